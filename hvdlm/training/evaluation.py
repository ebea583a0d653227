"""Validation, by all ranks together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.rank_errors import raise_on_all_ranks
from hvdlm.data.loader import Batch, validation_batches
from hvdlm.data.shard import DataSet, Shard
from hvdlm.errors import HvdlmError, JobError
from hvdlm.model.transformer import Transformer, document_ids
from hvdlm.targets import IGNORE


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
) -> Evaluation | None:
    """Loss and accuracy over the first `limit` sequences of the validation split (0: all), shared among the ranks; and
    those of each source, where `DataSet.validates_sources`.

    Sums are added in the order of ranks, so all ranks return the same. None if `stop_requested` says so on some rank
    before the end. `is_collective`: a forward pass takes all ranks, so each makes as many as any other. `readers`:
    those among whom the sequences are divided; None: all, since each has the whole model.

    After each micro-batch the ranks exchange a message: none waits longer for a slower one. Collective. Raises JobError
    if the split is empty or cannot be read.
    """
    own, readers = [_Sums()] * (len(data.sources) if data.validates_sources else 1), readers or communicator
    length = model.config.context_length
    nothing = Batch(0, torch.zeros((1, length), dtype=torch.int64), torch.full((1, length), IGNORE))
    batches = validation_batches(data, length, micro_batch_size, readers.rank, readers.size, limit)
    was_training = model.training
    model.eval()
    try:
        running = 1
        while running:
            error, batch = None, None
            communicator.activity.begin("validates")
            try:
                batch = next(batches, None)
            except HvdlmError as failure:
                error = str(failure)
            if batch is not None:
                _add(own, model, batch, data.eos_id)
            elif is_collective:
                _add(own, model, nothing, data.eos_id)
            flags = torch.tensor([batch is not None, stop_requested(), error is not None], dtype=torch.int32)
            communicator.activity.begin_wait("a validation")
            running, stops, errors = communicator.all_reduce_(flags).tolist()
            if errors:
                raise_on_all_ranks(communicator, communicator.all_gather_object(error))
            if stops:
                return None
    finally:
        model.train(was_training)
    told = readers.all_gather_object(own)
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
def _add(sums: list[_Sums], model: Transformer, batch: Batch, eos_id: int) -> None:
    """Adds what the model predicts to the sums of each source; or to the only ones there are."""
    device = model.output_weight.device
    inputs, targets = batch.inputs.to(device), batch.targets.to(device)
    documents = document_ids(inputs, eos_id) if model.config.document_mask else None
    hidden = model(inputs, documents)  # (b, T, D)
    of_rows = batch.shards if len(sums) > 1 else (0,) * len(inputs)
    for source in sorted(set(of_rows)):
        rows = [row for row, other in enumerate(of_rows) if other == source]
        part = slice(None) if len(rows) == len(of_rows) else rows
        found = model.token_statistics(hidden[part], targets[part])
        sums[source] += _Sums(float(found.loss_sum), int(found.correct_count), int(found.target_count))
