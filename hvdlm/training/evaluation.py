"""Validation, by all ranks together."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hvdlm.comm.communicator import Communicator
from hvdlm.data.loader import validation_batches
from hvdlm.data.shard import DataSet
from hvdlm.errors import JobError
from hvdlm.model.loss import token_statistics
from hvdlm.model.transformer import Transformer, document_ids
from hvdlm.training.rank_errors import on_all_ranks


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
) -> Evaluation:
    """Loss and accuracy over the first `limit` sequences of the validation split (0: all), shared among the ranks.

    Sums are added in the order of ranks, so all ranks return the same. Collective. Raises JobError if the split
    is empty or cannot be read.
    """

    def own_part() -> tuple[float, int, int]:
        device = model.output_weight.device
        loss, correct, count = 0.0, 0, 0
        length = model.config.context_length
        for batch in validation_batches(data, length, micro_batch_size, communicator.rank, communicator.size, limit):
            inputs, targets = batch.inputs.to(device), batch.targets.to(device)
            documents = document_ids(inputs, data.eos_id) if model.config.document_mask else None
            sums = token_statistics(model(inputs, documents), model.output_weight, targets, model.dtype)
            loss += float(sums.loss_sum)
            correct += int(sums.correct_count)
            count += int(sums.target_count)
        return loss, correct, count

    was_training = model.training
    model.eval()
    with torch.no_grad():
        parts = communicator.all_gather_object(on_all_ranks(communicator, own_part))
    model.train(was_training)
    loss, correct, count = (sum(column) for column in zip(*parts, strict=True))
    if not count:
        raise JobError(f"{data.path} has no validation tokens: prepare it with a larger --validation")
    return Evaluation(loss / count, correct / count, int(count))
