"""A Transformer whose backward passes keep, by sequence, what the gradients of its parameters are made of."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from hvdlm.config import ModelSection
from hvdlm.model.linear import Linear
from hvdlm.model.transformer import Block, Transformer
from hvdlm.privacy import sequence_norms
from hvdlm.privacy.layers import Gradient, RecordedLayer, RecordedLayerNorm, RecordedLinear, RecordedRMSNorm
from hvdlm.privacy.output_layer import OutputLayer


class RecordedTransformer(Transformer):
    """Parameters have the names, the order and the first values of `Transformer`'s, and no gradient by `backward()`.

        loss = model.token_loss(model(inputs), targets)
        recorded = model.record(loss, factor)
        recorded.squared_norms()
        recorded.gradients(factors)

    Without gradients, as in a validation, it is a Transformer.
    """

    def __init__(self, config: ModelSection, vocab_size: int) -> None:
        with torch.device("meta"):
            super().__init__(config, vocab_size)
            for block in self.blocks:
                assert isinstance(block, Block)
                for part in (block.attention, block.mlp):
                    for name, layer in list(part.named_children()):
                        if isinstance(layer, Linear):
                            setattr(part, name, _recorded_linear(layer))
                block.attention_norm, block.mlp_norm = _recorded_norm(config), _recorded_norm(config)
            self.final_norm = _recorded_norm(config)
        self._linear = [layer for layer in self.blocks.modules() if isinstance(layer, Linear)]
        self._recorded: list[RecordedLayer] = [layer for layer in self.modules() if isinstance(layer, RecordedLayer)]
        self.to_empty(device=torch.get_default_device())
        self._tokens: Tensor | None = None  # of the pass under way, (b, T)
        self._embedded = torch.empty(0)
        self._output_layer: OutputLayer | None = None

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            for layer in self._recorded:
                layer.end()
            return super().embed(tokens, positions)
        for layer in self._recorded:
            layer.begin(*tokens.shape)
        self._tokens = tokens
        embedded = functional.embedding(tokens, self.token_embedding.weight.detach())  # (b, T, D)
        if self.position_embedding is not None:
            embedded = embedded + functional.embedding(positions, self.position_embedding.weight.detach())
        self._embedded = embedded.requires_grad_()
        dropped: Tensor = self.dropout(self._embedded)
        return dropped

    def token_loss(self, hidden: Tensor, targets: Tensor, grad_scale: float = 1.0) -> Tensor:
        """hidden: of the last forward pass, (b, T, D). `grad_scale` has to be 1."""
        if not torch.is_grad_enabled():
            return super().token_loss(hidden, targets)
        tokens = self._tokens if self.output is None else None
        self._output_layer = OutputLayer(self.output_weight, self.dtype, tokens)
        return self._output_layer.loss(hidden, targets)

    def record(self, loss: Tensor, factor: float) -> RecordedGradients:
        """The backward pass of `factor` times the loss of the last forward pass."""
        assert self._tokens is not None and self._output_layer is not None
        marks = [mark for layer in self._recorded for mark in layer.marks or ()]
        embedded, *grads = torch.autograd.grad(loss * factor, [self._embedded, *marks])
        waiting = (each.detach() for each in grads)  # inputs of layers belong to the graph, which is let go
        of_layers = [(layer, [next(waiting) for _ in layer.marks or ()]) for layer in self._recorded]
        recorded = RecordedGradients(self, self._tokens, embedded, of_layers, self._output_layer, factor)
        self._tokens, self._embedded, self._output_layer = None, torch.empty(0), None
        return recorded


class RecordedGradients:
    """What the gradients of one pass are made of."""

    def __init__(
        self,
        model: RecordedTransformer,
        tokens: Tensor,
        embedded: Tensor,
        of_layers: list[tuple[RecordedLayer, list[Tensor]]],
        output_layer: OutputLayer,
        factor: float,
    ) -> None:
        """`embedded`: the gradient of embeddings, (b, T, D). `of_layers`: those of the marks of layers, in the order of
        parameters. `factor`: by what the loss was multiplied, which `output_layer` does not know.
        """
        self._model, self._tokens, self._embedded = model, tokens, embedded
        self._of_layers, self._output_layer, self._factor = of_layers, output_layer, factor

    def squared_norms(self) -> Tensor:
        """(b,) float32: of each sequence's gradient of all parameters together."""
        output, factor = self._output_layer, self._factor
        squares = factor**2 * output.squared_norms
        squares += sequence_norms.of_embedding(self._tokens, self._embedded)
        if self._model.output is None:  # ||a + b||^2 = ||a||^2 + ||b||^2 + 2 <a, b>
            squares += 2 * factor * output.product_with_embedding(self._embedded)
        if self._model.position_embedding is not None:
            squares += self._embedded.square().sum(dim=(1, 2))
        for layer, grads in self._of_layers:
            squares += layer.squared_norms(grads)
        return squares

    def gradients(self, factors: Tensor) -> Iterator[Gradient]:
        """Of all parameters, each once, the last ones first: the sum over sequences of their gradients, multiplied by
        their factors, (b,) float32. What they are made of is let go on the way.
        """
        model = self._model
        of_output = self._output_layer.gradient(factors * self._factor)
        if model.output is not None:
            yield model.output.weight, of_output
        while self._of_layers:
            layer, grads = self._of_layers.pop()
            yield from layer.gradients(grads, factors)
        scaled = self._embedded * factors[:, None, None]  # (b, T, D)
        if model.position_embedding is not None:
            of_positions = torch.zeros_like(model.position_embedding.weight)
            of_positions[: scaled.shape[1]] = scaled.sum(dim=0)
            yield model.position_embedding.weight, of_positions
        embedding = model.token_embedding.weight
        of_embedding = of_output if model.output is None else torch.zeros_like(embedding)
        of_embedding.index_add_(0, self._tokens.flatten(), scaled.flatten(0, 1))
        yield embedding, of_embedding

    def leave_out(self, sequences: Tensor) -> None:
        """Sequences, (b,) bool, count as if they had no gradient, even if its numbers are not finite."""
        self._embedded[sequences] = 0
        for _, grads in self._of_layers:
            for grad in grads:
                grad[sequences] = 0
        self._output_layer.leave_out(sequences)


def _recorded_linear(layer: Linear) -> RecordedLinear:
    return RecordedLinear(layer.in_features, layer.out_features, bias=layer.bias is not None)


def _recorded_norm(config: ModelSection) -> nn.Module:
    if config.norm == "rmsnorm":
        return RecordedRMSNorm(config.width, eps=config.norm_eps)
    return RecordedLayerNorm(config.width, eps=config.norm_eps, bias=config.bias)
