"""Validation, by all ranks together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.rank_errors import raise_on_all_ranks
from hvdlm.data.loader import Batch, validation_batches
from hvdlm.data.shard import DataSet, Shard
from hvdlm.errors import HvdlmError, JobError
from hvdlm.model.transformer import Transformer, document_ids
from hvdlm.targets import IGNORE
from hvdlm.training.pipeline import PipelinePasses


@dataclass(frozen=True)
class Evaluation:
    """Loss and accuracy of a model on a validation split, or on one source's part of it."""

    loss: float  # nats per token
    accuracy: float  # share of tokens to which the model gives the highest probability
    tokens: int  # predicted
    tokens_per_byte: float  # of the whole split; end-of-text tokens count no bytes
    # By path, where each has a shard of its own: those of which tokens were predicted
    of_sources: Mapping[str, Evaluation] = field(default_factory=dict, hash=False)

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text, which can be compared between tokenizers."""
        return self.loss / math.log(2) * self.tokens_per_byte


def evaluate(
    model: Transformer,
    data: DataSet,
    communicator: Communicator,
    micro_batch_size: int,
    limit: int = 0,
    stop_requested: Callable[[], bool] = lambda: False,
    is_collective: bool = False,
    readers: Communicator | None = None,
    counts: bool = True,
    pipeline: PipelinePasses | None = None,
) -> Evaluation | None:
    """Loss and accuracy over the first `limit` sequences of the validation split (0: all), shared among the ranks; and
    those of each source, where `DataSet.validates_sources`.

    Sums are added in the order of ranks, so all ranks return the same. None if `stop_requested` says so on some rank
    before the end. `is_collective`: a forward pass takes all ranks, so each makes as many as any other. `readers`:
    those among whom the sequences are divided; None: all, since each has the whole model. `counts`: False on all but
    one of several ranks that find the same. `pipeline`: makes the forward passes, of several micro-batches at once, if
    a rank has some stages of the model.

    Before each micro-batch the ranks exchange a message: none waits longer for a slower one. Collective. Raises
    JobError if the split is empty or cannot be read.
    """
    own, readers = [_Sums()] * (len(data.sources) if data.validates_sources else 1), readers or communicator
    length = model.config.context_length
    nothing = Batch(0, torch.zeros((1, length), dtype=torch.int64), torch.full((1, length), IGNORE))
    batches = validation_batches(data, length, micro_batch_size, readers.rank, readers.size, limit)
    was_training = model.training
    model.eval()
    try:
        while True:
            error, own_batches = None, []
            communicator.activity.begin("validates")
            try:
                own_batches = list(itertools.islice(batches, pipeline.stages if pipeline else 1))
            except HvdlmError as failure:
                error = str(failure)
            flags = torch.tensor([bool(own_batches), stop_requested(), error is not None], dtype=torch.int32)
            communicator.activity.begin_wait("a validation")
            running, stops, errors = communicator.all_reduce_(flags).tolist()
            if errors:
                raise_on_all_ranks(communicator, communicator.all_gather_object(error))
            if stops:
                return None
            if not running:
                break
            communicator.activity.begin("validates")
            if pipeline:
                pipeline.evaluate(own_batches, partial(_add, own, model))
            elif own_batches or is_collective:
                batch = own_batches[0] if own_batches else nothing
                _add(own, model, batch, _hidden(model, batch, data.eos_id))
    finally:
        model.train(was_training)
    told = communicator.all_gather_object(own if counts else [_Sums()] * len(own))
    sums = [sum(column, _Sums()) for column in zip(*told, strict=True)]
    shards = data.validation.shards
    whole = sum(sums, _Sums())
    if not whole.count:
        raise JobError(f"{data.path} has no validation tokens: prepare it with a larger --validation")
    sources = data.sources if data.validates_sources else ()
    parts = zip(sources, sums, shards, strict=False)
    of_sources = {source.path: each.mean([shard]) for source, each, shard in parts if each.count}
    return replace(whole.mean(shards), of_sources=of_sources)


@dataclass(frozen=True)
class _Sums:
    """Over tokens that have been predicted."""

    loss: float = 0.0
    correct: int = 0
    count: int = 0

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(self.loss + other.loss, self.correct + other.correct, self.count + other.count)

    def mean(self, shards: Sequence[Shard]) -> Evaluation:
        """`shards`: of which the tokens are, of which there are some."""
        n_tokens, n_bytes = sum(shard.n_tokens for shard in shards), sum(shard.n_bytes for shard in shards)
        tokens_per_byte = n_tokens / n_bytes if n_bytes else math.inf
        return Evaluation(self.loss / self.count, self.correct / self.count, self.count, tokens_per_byte)


@torch.no_grad()
def _hidden(model: Transformer, batch: Batch, eos_id: int) -> Tensor:
    """(b, T, D)."""
    inputs = batch.inputs.to(model.output_weight.device)
    hidden: Tensor = model(inputs, document_ids(inputs, eos_id) if model.config.document_mask else None)
    return hidden


@torch.no_grad()
def _add(sums: list[_Sums], model: Transformer, batch: Batch, hidden: Tensor) -> None:
    """Adds what the model predicts to the sums of each source; or to the only ones there are."""
    targets = batch.targets.to(hidden.device)
    of_rows = batch.shards if len(sums) > 1 else (0,) * len(targets)
    for source in sorted(set(of_rows)):
        rows = [row for row, other in enumerate(of_rows) if other == source]
        part = slice(None) if len(rows) == len(of_rows) else rows
        found = model.token_statistics(hidden[part], targets[part])
        sums[source] += _Sums(float(found.loss_sum), int(found.correct_count), int(found.target_count))
