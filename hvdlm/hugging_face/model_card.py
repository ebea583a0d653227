"""README.md of an exported model: what it is, what it was trained on, how, and how well it does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from hvdlm.config import Config
from hvdlm.model.size import parameter_count
from hvdlm.training.metrics import read_metrics

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [hvdlm]
---

# {name}

A causal language model of {parameters:,} parameters, {architecture}, written by hvdlm {version}.

| | |
|---|---|
{rows}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
tokens = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=100)[0]))
```
{remarks}
## Settings

```toml
{settings}```
"""


def model_card(
    state: Mapping[str, Any], config: Config, name: str, architecture: str, dtype: str, averaged: bool = False
) -> str:
    """The text of README.md. `state`: of `checkpoint.open_state`, whose `path` may lie in a run directory. `averaged`:
    the weights are their moving average.
    """
    remarks = ""
    if config.model.document_mask:
        remarks = "\nIn training attention did not cross the bounds of documents; here it does: give one at a time.\n"
    weights = {"weights": f"{dtype}, a moving average (train.ema = {config.train.ema:g})" if averaged else dtype}
    return _CARD.format(
        name=name,
        parameters=parameter_count(config.model, state["vocab_size"]),
        architecture=architecture,
        version=state["versions"]["hvdlm"],
        rows="\n".join(
            f"| {name} | {value} |" for name, value in {**_origin(state, config, averaged), **weights}.items()
        ),
        remarks=remarks,
        settings=tomli_w.dumps(config.model_dump(exclude_defaults=True)),
    )


def _origin(state: Mapping[str, Any], config: Config, averaged: bool) -> dict[str, str]:
    if "imported_from" in state:
        return {"imported from": Path(state["imported_from"]).name}
    step = state["step"]
    return {
        "steps": f"{step:,} of {config.planned_steps:,}",
        "tokens seen": f"{config.tokens_before(step):,}",
        "validation loss": _validation_loss(Path(state["path"]), step, "ema_loss" if averaged else "loss"),
        "data set": f"{Path(config.data.path).name}, fingerprint {str(state['fingerprint'])[:16]}",
        "ranks": str(state["world_size"]),
    }


def _validation_loss(checkpoint: Path, step: int, field: str) -> str:
    """That `field` of this step, where the checkpoint lies in its run directory."""
    file = checkpoint.resolve().parent.parent / "metrics.jsonl"
    records = read_metrics(file) if file.exists() else []
    losses = [each.get(field) for each in records if each["kind"] == "eval" and each["step"] == step]
    return f"{losses[-1]:.4f} nats per token" if losses and losses[-1] is not None else "not known"
