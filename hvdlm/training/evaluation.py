"""Validation, by all ranks together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hvdlm.comm.communicator import Communicator
from hvdlm.comm.rank_errors import raise_on_all_ranks
from hvdlm.data.loader import Batch, validation_batches
from hvdlm.data.shard import DataSet
from hvdlm.errors import HvdlmError, JobError
from hvdlm.model.loss import TokenStatistics, token_statistics
from hvdlm.model.transformer import Transformer, document_ids
from hvdlm.training.pipeline import PipelinePasses


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
    pipeline: PipelinePasses | None = None,
) -> Evaluation | None:
    """Loss and accuracy over the first `limit` sequences of the validation split (0: all), shared among the ranks.

    Sums are added in the order of ranks, so all ranks return the same. None if `stop_requested` says so on some rank
    before the end. Before each micro-batch the ranks exchange a message: none waits longer for a slower one.
    `pipeline`: makes the forward passes, of several micro-batches at once, if a rank has some stages of the model.
    Collective. Raises JobError if the split is empty or cannot be read.
    """
    own = _Sums()
    length = model.config.context_length
    readers, at_once = (pipeline.readers, pipeline.stages) if pipeline else (communicator, 1)
    batches = validation_batches(data, length, micro_batch_size, readers.rank, readers.size, limit)
    was_training = model.training
    model.eval()
    try:
        while True:
            error, own_batches = None, []
            communicator.activity.begin("validates")
            try:
                own_batches = list(itertools.islice(batches, at_once))
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
                pipeline.evaluate(own_batches, own.add)
            elif own_batches:
                own.add_batch(model, own_batches[0], data.eos_id)
    finally:
        model.train(was_training)
    parts = communicator.all_gather_object((own.loss, own.correct, own.count))
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
    def add_batch(self, model: Transformer, batch: Batch, eos_id: int) -> None:
        device = model.output_weight.device
        inputs, targets = batch.inputs.to(device), batch.targets.to(device)
        documents = document_ids(inputs, eos_id) if model.config.document_mask else None
        self.add(token_statistics(model(inputs, documents), model.output_weight, targets, model.dtype))

    def add(self, sums: TokenStatistics) -> None:
        self.loss += float(sums.loss_sum)
        self.correct += int(sums.correct_count)
        self.count += int(sums.target_count)
