"""`[privacy]`, and what it does not go with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from hvdlm.config.section import Section

if TYPE_CHECKING:
    from hvdlm.config import Config


class PrivacySection(Section):
    """`[privacy]`: differential privacy of the training data, by clipped and noised gradients (DP-SGD)."""

    clip_norm: float = Field(
        0.0,
        ge=0,
        description="the gradient of each sequence, of its mean loss over model.context_length targets, is clipped to "
        "this norm, and batches are drawn by Poisson sampling; 0: a run without [privacy]",
    )
    noise_multiplier: float = Field(
        0.0,
        ge=0,
        description="standard deviation of the noise in the sum of a step's clipped gradients, over clip_norm; 0: what "
        "target_epsilon takes, or none",
    )
    target_epsilon: float = Field(
        0.0, ge=0, description="the budget, at delta: training ends before it is exceeded; 0: there is none"
    )
    delta: float = Field(
        1e-6,
        gt=0,
        lt=1,
        description="the probability, about, with which epsilon does not hold; less than one over the sequences or "
        "documents",
    )
    unit: Literal["sequence", "document"] = Field(
        "sequence",
        description="whose presence is kept secret: a sequence of model.context_length targets, or a document, which "
        "is then a sequence of its own; of one that is longer, a part is drawn each time",
    )
    accountant: Literal["pld", "rdp"] = Field(
        "pld",
        description="what computes epsilon, in dp-accounting: pld composes distributions of the privacy loss, rdp "
        "Renyi divergences, whose epsilon is larger",
    )
    secure: bool = Field(
        True,
        description="noise and batches are drawn by random numbers of the operating system; false: by train.seed, so "
        "that a run can be repeated, also by whoever wants to know what the noise hides",
    )

    @property
    def is_used(self) -> bool:
        """Whether gradients are clipped by sequence."""
        return self.clip_norm > 0

    @property
    def has_noise(self) -> bool:
        return self.noise_multiplier > 0 or self.target_epsilon > 0


def masking_misfits(config: Config) -> dict[str, bool]:
    """The same of codec `masked`."""
    is_masked, local_steps = config.compression.codec == "masked", config.local_steps
    sentences = {
        "compression.codec = 'masked' is for differences of parameters, and too coarse for gradients: set "
        "local_steps.every": not local_steps.every,
        "the gradients of local_steps.warmup_steps, as of those that local_steps.every = 'auto' times, are not masked: "
        "with compression.codec = 'masked' leave them out": local_steps.warmup_steps > 0 or local_steps.every == "auto",
        "a rank that dies takes along its masks, without which the sum of the others cannot be read: "
        "compression.codec = 'masked' does not go with comm.elastic": config.comm.elastic,
        "servers are sent the differences of one worker at a time: compression.codec = 'masked' does not go with "
        "[server]": config.server.is_used,
    }
    return {sentence: is_masked and is_wrong for sentence, is_wrong in sentences.items()}


def privacy_misfits(config: Config) -> dict[str, bool]:
    """Sentences, and whether they are true of the settings."""
    privacy, train, local_steps = config.privacy, config.train, config.local_steps
    if not privacy.is_used:
        return {
            "privacy.noise_multiplier and privacy.target_epsilon need gradients of bounded norm: set "
            "privacy.clip_norm with them": privacy.has_noise,
        }
    return {
        "train.precision = 'fp16' leaves out steps in which the gradient of some sequence overflows, which tells of "
        "that sequence: with privacy.clip_norm set it to bf16 or fp32": train.precision == "fp16",
        "train.batch_ramp_start changes the chance of a sequence to be in a batch from step to step: with "
        "privacy.clip_norm leave it out": train.batch_ramp_start > 0,
        "with compression.codec a sequence is always in the part of the same rank, however slow that is, as "
        "privacy.clip_norm needs it: leave out train.balance, or set the codec to none": (
            train.balance and config.compression.codec != "none"
        ),
        "optimizer.algorithm = 'dion' has each rank send factors of its own momentum, in which there is only a part of "
        "the noise: with privacy.clip_norm set it to another one": config.optimizer.algorithm == "dion",
        "local_steps.by = 'seconds' and local_steps.every = 'auto' go by how long steps take, which tells how large "
        "batches were: with privacy.clip_norm name a number of steps": local_steps.by == "seconds"
        or (local_steps.every == "auto"),
        "with local_steps.every and comm.elastic = true those who are left train on what a dead rank has trained on: "
        "with privacy.clip_norm leave out one of them": bool(local_steps.every) and config.comm.elastic,
        "privacy.clip_norm needs the gradients that a sequence has of the whole model on one rank: it does not go with "
        "[parallel]": config.parallel.is_used,
        "privacy.clip_norm divides by the sequences that a batch is expected to have, and servers by those that "
        "workers have trained on: it does not go with [server]": (config.server.is_used),
    }
