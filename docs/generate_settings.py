"""Writes settings.md beside this file from hvdlm/config: `python docs/generate_settings.py`.

tests/unit/test_docs.py fails when the page is not what this script would write.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from hvdlm.config import Config
from hvdlm.model.presets import PRESETS

PAGE = Path(__file__).with_name("settings.md")

_HEAD = """\
# Settings

<!-- Written by `python docs/generate_settings.py` from hvdlm/config; edit those files, then run the script. -->

A setting belongs to a section. In a TOML file it is a key of that section, on the command line it is
`--section.key value`, and the command line wins over the file:

```bash
hvdlm train examples/quickstart.toml --dry-run --model.layers 8 --train.precision bf16
```

`--dry-run` prints every setting as the run would use it, with the number of parameters, the memory of a rank, and the
batch of each rank; it does not train. A run keeps its settings in `config.toml` of its run directory.

- `[model]` begins with the values of `model.preset`; a value in the file or on the command line replaces the preset's.
  With `model.from` it begins with the shape of that checkpoint instead, which every host must be able to read.
- Text needs no quotes on the command line. In TOML a number such as `3e-3` is a number and `"bf16"` is text.
- An unknown key is an error that names the nearest valid one. A value of the wrong type or out of its bounds is an
  error that names the key; nothing is converted.
- `model.width` must be a multiple of `model.heads`, and `model.heads` of `model.kv_heads`; with `model.position =
  "rope"`, width over heads must be even. `optimizer.warmup_steps` must not exceed `train.steps`, and
  `optimizer.decay_steps` must fit between them.
- All ranks of a job must have equal settings; if they do not, the job ends before it trains.
- `--resume` needs the same `[model]` (but for the name of the preset), `train.seed`, `train.global_batch_size`,
  `train.batch_ramp_start`, `train.batch_ramp_increment` and `train.batch_ramp_steps` as the checkpoint, and the same
  data set. Every other setting may change.
"""

_PRESETS = """
## Presets

`model.preset` names one of these shapes. All train without dropout, and weights are initialised anew.
"""


def page() -> str:
    """The whole page."""
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    parts = [_HEAD]
    for name, section in sections.items():
        assert section is not None
        parts.append(f"\n## [{name}]\n\n{_purpose(section.__doc__ or '')}\n\n")
        rows = [(f"`{name}.{key}`", *_columns(field)) for key, field in section.setting_fields().items()]
        parts.append(_table(("setting", "type", "bounds", "default", "meaning"), rows))
    parts.append(_PRESETS + "\n")
    keys = list(dict.fromkeys(key for preset in PRESETS.values() for key in preset))
    rows = [(f"`{key}`", *(_value(preset.get(key, "")) for preset in PRESETS.values())) for key in keys]
    parts.append(_table(("", *(f"`{name}`" for name in PRESETS)), rows))
    return "".join(parts)


def _purpose(docstring: str) -> str:
    """What the docstring of a section says after its name."""
    text = " ".join(docstring.split()).partition(": ")[2]
    return text[0].upper() + text[1:]


def _columns(field: FieldInfo) -> tuple[str, str, str, str]:
    return _type(field.annotation), ", ".join(_bounds(field)), f"`{_value(field.default)}`", _cell(field.description)


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Union:
        return " or ".join(_type(each) for each in get_args(annotation))
    if get_origin(annotation) is Annotated:
        return _type(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    return {str: "text", int: "integer", float: "number", bool: "true or false"}[annotation]


def _bounds(field: FieldInfo) -> Iterator[str]:
    of_parts = [bound for part in get_args(field.annotation) for bound in getattr(part, "__metadata__", ())]
    for bound in [*field.metadata, *(each for part in of_parts for each in getattr(part, "metadata", [part]))]:
        for kind, sign, value in ((Ge, "≥", "ge"), (Gt, ">", "gt"), (Le, "≤", "le"), (Lt, "<", "lt")):
            if isinstance(bound, kind):
                yield f"{sign} {_number(getattr(bound, value))}"


def _number(value: float) -> str:
    return "2^63" if value == 2**63 else "1/256" if value == 1 / 256 else f"{value:g}"


def _value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else '""' if value is None else str(value)


def _cell(text: str | None) -> str:
    assert text, "a setting has no description"
    return text.replace("|", "\\|")


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
