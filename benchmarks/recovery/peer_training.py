"""What the peers train: hvdlm's model on hvdlm's batches, as a script in plain PyTorch would; and how it logs steps."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common.torch_adamw import torch_adamw
from hvdlm.config import Config
from hvdlm.config_reader import load
from hvdlm.data.loader import Loader
from hvdlm.data.rank_parts import RankParts
from hvdlm.data.shard import DataSet
from hvdlm.model.loss import token_loss
from hvdlm.model.presets import PRESETS
from hvdlm.model.transformer import Transformer
from hvdlm.strategies.optimizer import set_learning_rate
from hvdlm.training.schedule import learning_rate


@dataclass(frozen=True)
class Step:
    """A step that has ended, as one rank logs it."""

    step: int  # from 1
    loss: float  # of this rank's sequences, nats per token
    own_samples: int  # sequences of this rank that entered the step
    samples: int  # those of all ranks
    ranks: int  # that took part


class StepLog:
    """The file in which a rank writes a line of JSON for each step that has ended."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._file = (run_dir / f"rank{rank}.jsonl").open("a", encoding="utf-8")

    def write(self, step: Step) -> None:
        """Appends a line, which others can read at once."""
        self._file.write(json.dumps(asdict(step)) + "\n")
        self._file.flush()


class LanguageModel(nn.Module):
    """The model with its loss, as one module."""

    def __init__(self, config: Config, data: DataSet) -> None:
        super().__init__()
        self.transformer = Transformer(config.model, data.vocab_size)
        self.transformer.initialise(config.train.seed)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """inputs, targets: (b, T) int64. Returns the mean loss, nats per token."""
        hidden = self.transformer(inputs)
        return token_loss(hidden, self.transformer.output_weight, targets) / targets.numel()


class PeerTraining:
    """Model, optimizer, learning rates and batches of a peer's training script.

    The script's arguments are a file of settings, and the directory in which each rank logs its steps.
    """

    def __init__(self) -> None:
        settings, run_dir = (Path(word) for word in sys.argv[1:])
        self.config = load(settings, [], PRESETS)
        self.run_dir = run_dir
        self.data = DataSet(Path(self.config.data.path))
        self.steps = self.config.train.steps
        torch.set_num_threads(1)
        self.model = LanguageModel(self.config, self.data)
        self.optimizer = torch_adamw(self.model, self.config.optimizer)

    def open_batches(self, rank: int, size: int, start: int) -> Loader:
        """The part of one of `size` ranks in the global batches from number `start` on."""
        config, parts = self.config, RankParts(self.config.train.batch_sizes, size)
        length, seed, read_ahead = config.model.context_length, config.train.seed, config.data.read_ahead
        return Loader(self.data, length, parts, seed, rank, read_ahead, start)

    def set_learning_rate(self, optimizer: Optimizer, index: int) -> None:
        """Sets that of the step on global batch `index`."""
        set_learning_rate(optimizer, learning_rate(index, self.steps, self.config.optimizer))

    def clip_gradients(self) -> None:
        """Clips their norm, as the settings say."""
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip_norm)
