"""The Transformer, divided among tensor ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from hvdlm.comm.communicator import Communicator, part_lengths
from hvdlm.config import ModelSection
from hvdlm.errors import JobError
from hvdlm.model.linear import Linear
from hvdlm.model.loss import TokenStatistics, loss_chunk_tokens, token_loss, token_statistics
from hvdlm.model.size import mlp_width
from hvdlm.model.transformer import Block, Transformer, without_memory
from hvdlm.parallel.tensor.collectives import TensorRanks
from hvdlm.parallel.tensor.layers import TensorParallelAttention, TensorParallelMLP, VocabularyParallelEmbedding
from hvdlm.parallel.tensor.layout import cut, is_divided, parameter_regions
from hvdlm.parallel.tensor.sequence import SequenceParallelPositions, sequence_parallel_norm
from hvdlm.parallel.tensor.softmax import VocabularyParallelSoftmax


class TensorParallelTransformer(Transformer):
    """What one tensor rank has of a Transformer; all of them call the same methods with the same arguments.

    Its parameters have the names of the whole model's, and are regions of them: `parameter_regions`. Each block has two
    all-reduces in the forward pass and two in the backward pass. Hidden states are equal on all ranks, or
    divided along the sequence. Random numbers are to be seeded alike on all ranks; where they divide the sequence, each
    with its own seed. Without a cache of keys and values.
    """

    def __init__(
        self, config: ModelSection, vocab_size: int, communicator: Communicator, divides_sequence: bool = False
    ) -> None:
        """`communicator`: of the tensor ranks. `divides_sequence`: see `TensorRanks`; what `forward` returns is then
        (B, T / n, D), and T has to be a multiple of n.

        Raises HvdlmError if they do not divide the heads, JobError if they are more than tokens or hidden numbers of
        the MLP, or with `divides_sequence` do not divide these.
        """
        size, hidden = communicator.size, mlp_width(config)
        if size > min(vocab_size, hidden):
            raise JobError(
                f"parallel.tensor = {size} is more than the {vocab_size} tokens of the vocabulary or the {hidden} "
                "hidden numbers of the MLP: lower it"
            )
        if divides_sequence and hidden % size:  # a compiled backward pass may send in an order that depends on sizes
            raise JobError(
                f"parallel.sequence needs an MLP whose {hidden} hidden numbers parallel.tensor = {size} divides: set "
                "model.mlp_width to a multiple"
            )
        regions = parameter_regions(config, vocab_size, communicator.rank, size)
        with torch.device("meta"):  # no rank has the memory for the whole
            super().__init__(config, vocab_size)
            ranks = TensorRanks(communicator, divides_sequence)
            self.token_embedding = embedding = VocabularyParallelEmbedding(vocab_size, config.width, ranks)
            if self.output is not None:
                self.output = nn.Linear(config.width, embedding.num_embeddings, bias=False)
            for block in self.blocks:
                assert isinstance(block, Block)
                divide(block, config, ranks)
            if divides_sequence:
                self.final_norm = sequence_parallel_norm(self.final_norm, ranks)
                if self.position_embedding is not None:
                    self.position_embedding = SequenceParallelPositions(self.position_embedding, ranks)
        self._linear = [layer for layer in self.blocks.modules() if isinstance(layer, Linear)]
        self.to_empty(device=torch.get_default_device())
        self.regions = regions
        self._ranks = ranks
        self._softmax = VocabularyParallelSoftmax(ranks, embedding.part)

    def initial_values(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """This rank's part of what the whole model begins with, of which one parameter at a time is made."""
        yield from self.own_values(without_memory(self.config, self.vocab_size).initial_values(seed))

    def own_values(self, whole: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, values in whole:
            yield name, cut(values, self.regions[name])

    def replicated_parameters(self) -> dict[str, Tensor]:
        """Those that every tensor rank has as a whole, by name."""
        return {name: each for name, each in self.named_parameters() if not is_divided(name)}

    def token_loss(self, hidden: Tensor, targets: Tensor, grad_scale: float = 1.0) -> Tensor:
        entered = self._ranks.enter(hidden)
        arguments = self._loss_arguments()
        return token_loss(entered, self.output_weight, targets, *arguments, grad_scale, self._softmax)

    def token_statistics(self, hidden: Tensor, targets: Tensor) -> TokenStatistics:
        return token_statistics(
            self._ranks.enter(hidden), self.output_weight, targets, *self._loss_arguments(), self._softmax
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Of the whole vocabulary, without gradients: (B, T or T / n, D) to (B, T, V)."""
        hidden = self._ranks.enter(hidden)
        own = functional.linear(hidden.to(self.dtype), self.output_weight.to(self.dtype)).detach()
        padded = functional.pad(own, (0, self._longest_part - own.shape[-1]))
        lengths = part_lengths(self.vocab_size, self._ranks.size)
        parts = self._ranks.gather(padded)
        return torch.cat([part[..., :length] for part, length in zip(parts, lengths, strict=True)], dim=-1)

    @property
    def _longest_part(self) -> int:
        """Rows of the vocabulary of the first rank."""
        return -(-self.vocab_size // self._ranks.size)

    def _loss_arguments(self) -> tuple[torch.dtype, int]:
        """The dtype of products, and how many tokens are taken at once: equal on all ranks, whose parts may not be."""
        device = self.output_weight.device.type
        return self.dtype, loss_chunk_tokens(self._longest_part, self.dtype.itemsize, device)


def divide(block: Block, config: ModelSection, ranks: TensorRanks) -> None:
    """Replaces attention and MLP of a block by this rank's parts, with new parameters; norms, if ranks divide the
    sequence.
    """
    block.attention = TensorParallelAttention(config, ranks)
    block.mlp = TensorParallelMLP(config, ranks)
    if ranks.divides_sequence:
        block.attention_norm = sequence_parallel_norm(block.attention_norm, ranks)
        block.mlp_norm = sequence_parallel_norm(block.mlp_norm, ranks)
