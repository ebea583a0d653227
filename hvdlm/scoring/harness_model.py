"""A model as lm-evaluation-harness knows one."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from hvdlm.errors import HvdlmError
from hvdlm.model.generate_batch import Prompt, Sampling
from hvdlm.scoring.distributed_model import DIGITS, Completion, Continuation, DistributedModel

_DEFAULT_LIMIT = 256  # tokens that are generated where a task does not say it, as of the harness's model `hf`

_KNOWN_SETTINGS = {"do_sample", "temperature", "top_k", "top_p", "until", "max_gen_toks"}


class HarnessModel(TemplateLM):  # type: ignore[misc]  # the harness is not typed
    """Rank 0 has one, within `DistributedModel.leading`: all ranks together answer what the harness asks.

    Texts become tokens as for the harness's `hf` on the exported model: context and continuation are encoded together,
    the end of text goes before a text without context, and what does not fit into the context is cut at the left.
    To the harness it is one process, whose results do not depend on the number of ranks.
    """

    def __init__(self, model: DistributedModel) -> None:
        super().__init__()
        self._model, self._tokenizer = model, model.tokenizer
        self.max_length = model.model.config.context_length

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text; none is added. The name of a special token in it is ordinary text."""
        return self._tokenizer.encode(string)

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of continuations, each after its context; and whether they are what greedy decoding would give."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """requests: (texts, tokens of the context, tokens of the continuation)."""
        asked = []
        for texts, context, continuation in requests:
            if not continuation:
                raise HvdlmError(f"a task asks how likely an empty text is, after {texts[0][-40:]!r}")
            if len(continuation) > self.max_length:
                raise HvdlmError(
                    f"a task asks how likely a text of {len(continuation)} tokens is, which begins with "
                    f"{texts[1][:40]!r}: model.context_length is {self.max_length}"
                )
            tokens = (context or [self.eot_token_id]) + continuation
            asked.append(Continuation(tokens[-(self.max_length + 1) :], len(continuation)))
        return [(each.log_probability, each.is_greedy) for each in self._model.ask(asked)]  # type: ignore[union-attr]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows of the context; each token is predicted once."""
        windows = []
        for (text,) in (request.args for request in requests):
            tokens = self._tokenizer.encode(text)
            pairs = get_rolling_token_windows(tokens, self.eot_token_id, self.max_length, context_len=1)
            windows.append([(None, *make_disjoint_window(pair)) for pair in pairs])
        scores = iter(self._loglikelihood_tokens([window for each in windows for window in each]))
        return [round(sum(next(scores)[0] for _ in each), DIGITS) for each in windows]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedily, or as `generation_kwargs` of a task say. Samples depend on the context and on how often the same
        request has been made before, not on other requests."""
        asked, texts, made = [], [], Counter[str]()
        for context, settings in (request.args for request in requests):
            seed = hashlib.sha256(context.encode()).digest()
            name = repr((context, settings))
            completion = self._completion(context, settings, int.from_bytes(seed[:6], "big") + made[name])
            made[name] += 1
            asked.append(completion)
        answers = self._model.ask(asked)
        for completion, added in zip(asked, answers, strict=True):
            assert isinstance(added, list)
            text = self._tokenizer.decode([token for token in added if token != self.eot_token_id])
            texts.append(postprocess_generated_text(text, list(completion.stops), think_end_token=None))
        return texts

    def _completion(self, context: str, settings: dict[str, Any], seed: int) -> Completion:
        kwargs = normalize_gen_kwargs(settings, _DEFAULT_LIMIT)
        if unknown := kwargs.keys() - _KNOWN_SETTINGS:
            known = ", ".join(sorted(_KNOWN_SETTINGS))
            raise HvdlmError(f"a task sets {sorted(unknown)[0]} in generation_kwargs: hvdlm knows {known}")
        stops = handle_stop_sequences(kwargs["until"], self._tokenizer.eos_token)
        limit = kwargs["max_gen_toks"]
        if limit >= self.max_length:
            raise HvdlmError(
                f"a task generates {limit} tokens (max_gen_toks in generation_kwargs): model.context_length is "
                f"{self.max_length}; set it to less in a task file of yours"
            )
        tokens = self._tokenizer.encode(context)[-(self.max_length - limit) :] or [self.eot_token_id]
        sampling = Sampling()
        if kwargs["do_sample"]:
            sampling = Sampling(
                float(kwargs.get("temperature", 1.0)), int(kwargs.get("top_k", 0)), float(kwargs.get("top_p", 1))
            )
        return Completion(Prompt(tokens, limit, sampling, seed), [stop for stop in stops if stop])
