"""`[optimizer]`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hvdlm.config.section import Section

Algorithm = Literal["adamw", "adam", "sgd", "lion", "dion", "muon"]


class OptimizerSection(Section):
    """`[optimizer]`: how parameters step by gradients, and the schedule of the learning rate."""

    algorithm: Algorithm = Field(
        "adamw",
        description="adamw; adam and sgd, whose weight decay is L2 regularisation; lion; dion: matrices of blocks by "
        "Dion, whose ranks exchange low-rank factors of their momentum, and the rest by AdamW; muon: matrices of "
        "blocks by Muon, of which each rank orthogonalises some, and the rest by AdamW",
    )
    muon_momentum: float = Field(0.95, ge=0, lt=1, description="decay of Muon's momentum, which is Nesterov's")
    muon_lr_ratio: float = Field(1.0, gt=0, description="Muon's learning rate over `lr`, before the adjustment")
    muon_adjustment: Literal["match_rms_adamw", "original"] = Field(
        "match_rms_adamw",
        description="of Muon's learning rate for a matrix of m x n: match_rms_adamw: 0.2 sqrt(max(m, n)), with which "
        "the rate and decay of AdamW fit; original: sqrt(max(1, m / n))",
    )
    dion_rank: float = Field(
        0.125,
        gt=0,
        description="vectors by which Dion approximates the momentum of a matrix; below 1: as a share of model.width",
    )
    dion_momentum: float = Field(0.95, ge=0, lt=1, description="share of what it has used that Dion's momentum keeps")
    dion_lr_ratio: float = Field(
        2.0, gt=0, description="Dion's learning rate over `lr`; a matrix of m x n has sqrt(m / n) times that"
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd")
    nesterov: bool = Field(False, description="of sgd: the gradient where momentum leads to")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment; of lion, in the update")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of the second moment; of lion, of its momentum")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    freeze_variance_after: int = Field(
        0, ge=0, description="steps after which second moments are not updated, for topk, topk2 and powersgd; 0: never"
    )
    weight_decay: float = Field(0.1, ge=0, description="on matrices only; decoupled, but for adam and sgd")
    l1: float = Field(0.0, ge=0, description="L1 regularisation of matrices, as a part of their clipped gradients")
    l2: float = Field(0.0, ge=0, description="L2 regularisation, likewise")
    clip_norm: float = Field(1.0, ge=0, description="global gradient norm is clipped to this; 0: not clipped")
    schedule: Literal["cosine", "wsd", "linear", "inverse_sqrt", "range_test"] = Field(
        "cosine",
        description="what follows the warm-up; wsd: a stable rate, then a linear decay; range_test: to find a rate, "
        "rises from a 100,000th of `lr` by the same factor in each step",
    )
    warmup_steps: int = Field(100, ge=0, description="steps of linear warm-up from 0")
    decay_steps: int = Field(0, ge=0, description="length of wsd's final decay; 0: a fifth of train.steps")
    final_lr_ratio: float = Field(
        0.1, ge=0, le=1, description="last learning rate over the peak, of inverse_sqrt the least"
    )

    @model_validator(mode="after")
    def _fits(self) -> OptimizerSection:
        if self.dion_rank > 1 and self.dion_rank % 1:
            raise ValueError(f"optimizer.dion_rank = {self.dion_rank} is neither a share below 1 nor a whole number")
        if self.freeze_variance_after and self.algorithm not in ("adamw", "dion", "muon"):
            raise ValueError(f"optimizer.freeze_variance_after is of AdamW, not of algorithm = {self.algorithm!r}")
        for name in ("l1", "l2"):
            if getattr(self, name) and self.algorithm == "dion":
                raise ValueError(f"optimizer.{name} is added to gradients, which no rank has with algorithm = 'dion'")
        if self.nesterov and not self.momentum:
            raise ValueError("optimizer.nesterov = true needs optimizer.momentum above 0")
        return self
