"""Which fragment of the model begins its round, or ends it, after which step."""

from __future__ import annotations

from torch import nn

from hvdlm.config import LocalStepsSection


def ending(settings: LocalStepsSection, step: int) -> list[int]:
    """The fragments whose round ends after `step` steps of the run.

    Each has one every `every` steps, and they are spread over these evenly, the last one at their end (Douillard et
    al., "Streaming DiLoCo", arXiv:2501.18512, section 2.3).
    """
    local = step - settings.warmup_steps
    if local <= settings.overlap:
        return []
    offsets = [settings.every * (index + 1) // settings.fragments for index in range(settings.fragments)]
    return [index for index, offset in enumerate(offsets) if (local - offset) % settings.every == 0]


def beginning(settings: LocalStepsSection, step: int) -> list[int]:
    """The fragments whose round begins after `step` steps of the run, to end `overlap` steps later."""
    return ending(settings, step + settings.overlap)


def split_into_fragments(parameters: dict[str, nn.Parameter], count: int) -> list[dict[str, nn.Parameter]]:
    """`count` groups of consecutive trainable parameters of about as many numbers; some are empty if `count` is large.

    A parameter is never cut, and belongs to the fragment in which its middle lies.
    """
    trainable = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    total = sum(parameter.numel() for parameter in trainable.values())
    fragments: list[dict[str, nn.Parameter]] = [{} for _ in range(count)]
    before = 0
    for name, parameter in trainable.items():
        middle = before + parameter.numel() / 2
        fragments[int(count * middle / total)][name] = parameter
        before += parameter.numel()
    return fragments
