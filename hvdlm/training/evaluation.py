"""Validation, by all ranks together."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.rank_errors import raise_on_all_ranks
from hvdlm.data.loader import Batch, validation_batches
from hvdlm.data.shard import DataSet
from hvdlm.errors import HvdlmError, JobError
from hvdlm.model.transformer import Transformer, document_ids
from hvdlm.targets import IGNORE


@dataclass(frozen=True)
class Evaluation:
    """Loss and accuracy of a model on a validation split."""

    loss: float  # nats per token
    accuracy: float  # share of tokens to which the model gives the highest probability
    tokens: int  # predicted

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def bits_per_byte(self, data: DataSet) -> float:
        """Bits per byte of text, which can be compared between tokenizers; end-of-text tokens count no bytes."""
        shards = data.validation.shards
        tokens_per_byte = sum(shard.n_tokens for shard in shards) / sum(shard.n_bytes for shard in shards)
        return self.loss / math.log(2) * tokens_per_byte


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
    """Loss and accuracy over the first `limit` sequences of the validation split (0: all), shared among the ranks.

    Sums are added in the order of ranks, so all ranks return the same. None if `stop_requested` says so on some rank
    before the end. `is_collective`: a forward pass takes all ranks, so each makes as many as any other. `readers`:
    those among whom the sequences are divided; None: all, since each has the whole model.

    After each micro-batch the ranks exchange a message: none waits longer for a slower one. Collective. Raises JobError
    if the split is empty or cannot be read.
    """
    own, readers = _Sums(), readers or communicator
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
                own.add(model, batch, data.eos_id)
            elif is_collective:
                own.add(model, nothing, data.eos_id)
            flags = torch.tensor([batch is not None, stop_requested(), error is not None], dtype=torch.int32)
            communicator.activity.begin_wait("a validation")
            running, stops, errors = communicator.all_reduce_(flags).tolist()
            if errors:
                raise_on_all_ranks(communicator, communicator.all_gather_object(error))
            if stops:
                return None
    finally:
        model.train(was_training)
    parts = readers.all_gather_object((own.loss, own.correct, own.count))
    loss, correct, count = (sum(column) for column in zip(*parts, strict=True))
    if not count:
        raise JobError(f"{data.path} has no validation tokens: prepare it with a larger --validation")
    return Evaluation(loss / count, correct / count, int(count))


@dataclass
class _Sums:
    """Over the tokens that one rank has predicted."""

    loss: float = 0.0
    correct: int = 0
    count: int = 0

    @torch.no_grad()
    def add(self, model: Transformer, batch: Batch, eos_id: int) -> None:
        device = model.output_weight.device
        inputs, targets = batch.inputs.to(device), batch.targets.to(device)
        documents = document_ids(inputs, eos_id) if model.config.document_mask else None
        sums = model.token_statistics(model(inputs, documents), targets)
        self.loss += float(sums.loss_sum)
        self.correct += int(sums.correct_count)
        self.count += int(sums.target_count)
