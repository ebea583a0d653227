"""Reads batches of token windows, ahead of the training step that uses them."""

from __future__ import annotations

import atexit
import itertools
import queue
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import numpy.typing as npt
import torch

from hvdlm.config.batch_sizes import BatchSizes
from hvdlm.data.cached_split import CachedSplit
from hvdlm.data.file_errors import UnreadableFileError
from hvdlm.data.mixture import Mixture
from hvdlm.data.poisson import Excerpts, PoissonBatches, PoissonSampler, sequences_of
from hvdlm.data.rank_parts import RankParts, Sequences
from hvdlm.data.sampler import MixtureSampler, Sampler, rank_part
from hvdlm.data.shard import DataSet
from hvdlm.data.token_replacement import replace_tokens
from hvdlm.errors import HvdlmError
from hvdlm.targets import IGNORE

# Whose shards are copied to this host before they are read
_BATCHES_AHEAD = 32


@dataclass(frozen=True)
class Batch:
    """One rank's part of a batch: b sequences (possibly none) of T tokens each.

    Attributes:
        index: number of the batch, from 0.
        inputs: (b, T) int64.
        targets: (b, T) int64; the token after each input, or IGNORE.
        errors: for each sequence that could not be read, and has no targets, why.
        shards: of a validation split, the number of the shard that each sequence is from.
    """

    index: int
    inputs: torch.Tensor
    targets: torch.Tensor
    errors: tuple[str, ...] = ()
    shards: tuple[int, ...] = ()

    @staticmethod
    def empty(index: int, length: int) -> Batch:
        """No sequences of `length` tokens."""
        nothing = torch.empty((0, length), dtype=torch.int64)
        return Batch(index, nothing, nothing)


class SequenceReader:
    """Reads any sequences of the global batches."""

    def __init__(
        self,
        data: DataSet,
        context_length: int,
        batch_sizes: BatchSizes | PoissonBatches,
        seed: int,
        pin_memory: bool = False,
        skip_unreadable: bool = False,
        token_dropout: float = 0.0,
    ) -> None:
        """For the arguments see `Loader`. Raises HvdlmError if the training split is too small."""
        self._split, self._end_of_text = data.train, data.eos_id
        self._token_dropout, self._vocab_size = token_dropout, data.vocab_size
        self._context_length, self._seed = context_length, seed
        self._sampler: Sampler | MixtureSampler | PoissonSampler
        if isinstance(batch_sizes, PoissonBatches):
            self._sampler = PoissonSampler(data.train, context_length, batch_sizes)
        else:
            self._sampler = training_sampler(data, context_length, batch_sizes, seed)
        self._pin_memory, self._skip_unreadable = pin_memory, skip_unreadable
        self.reads_copies = isinstance(self._split, CachedSplit)

    def read(self, index: int, own: Sequences) -> Batch:
        """The sequences `own`, as a batch of this number. Raises HvdlmError if their shards cannot be read."""
        batches = {each: self._excerpts(each) for each in sorted({batch for batch, _ in own})}
        rows = np.full((len(own), self._context_length + 1), self._end_of_text, dtype=np.int64)
        ends = np.zeros(len(own), dtype=np.int64)  # of what has been read of each row
        errors = []
        for number, (batch, place) in enumerate(own):
            shard, start, count, after_end = (int(column[place]) for column in batches[batch])
            try:
                rows[number, after_end : after_end + count] = self._split.read(shard, start, count)
                ends[number] = after_end + count
            except HvdlmError as error:
                if not self._skip_unreadable or (isinstance(error, UnreadableFileError) and not error.is_gone):
                    raise
                errors.append(str(error))
        inputs, targets = _tensor(rows[:, :-1]), _tensor(rows[:, 1:])
        for row, end in zip(targets, ends.tolist(), strict=True):
            row[max(end - 1, 0) :] = IGNORE
        if self._token_dropout:
            for row, (of_batch, place_in_batch) in zip(inputs.numpy(), own, strict=True):
                key = (self._seed, of_batch, place_in_batch)
                replace_tokens(row, self._token_dropout, key, self._vocab_size, self._end_of_text)
        if self._pin_memory:
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
        return Batch(index, inputs, targets, tuple(errors))

    def will_read(self, own: Sequences) -> None:
        """Has the shards of the sequences `own` copied to this host before they are read; where `reads_copies`."""
        assert isinstance(self._split, CachedSplit)
        batches = {each: self._excerpts(each).shards for each in sorted({batch for batch, _ in own})}
        self._split.will_read(dict.fromkeys(int(batches[batch][place]) for batch, place in own))

    def _excerpts(self, batch: int) -> Excerpts:
        if isinstance(self._sampler, PoissonSampler):
            return self._sampler.excerpts(batch)
        shards, windows = self._sampler.batch(batch)
        length = self._context_length
        return Excerpts(shards, windows * length, np.full_like(windows, length + 1), np.zeros_like(windows, dtype=bool))


class Loader:
    """Context manager that yields what one rank trains on of global batches `start`, `start` + 1, ... without end.

    A thread reads up to `read_ahead` batches ahead.
    """

    def __init__(
        self,
        data: DataSet,
        context_length: int,
        parts: RankParts,
        seed: int,
        rank: int,
        read_ahead: int,
        start: int = 0,
        pin_memory: bool = False,
        skip_unreadable: bool = False,
        token_dropout: float = 0.0,
    ) -> None:
        """`rank`: its number in `parts`. `pin_memory` allows asynchronous copies to a GPU.

        `token_dropout`: share of input tokens that are replaced by random ones.
        `skip_unreadable`: sequences whose shard is damaged or gone are in `Batch.errors`, instead of an error.

        Raises HvdlmError if the training split is too small.
        """
        self._reader = SequenceReader(
            data, context_length, parts.batch_sizes, seed, pin_memory, skip_unreadable, token_dropout
        )
        self._parts, self._rank = parts, rank
        self._seed = seed
        self._next = start
        self._queue: queue.Queue[Batch | Exception] = queue.Queue(maxsize=read_ahead)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, args=(start,), name="hvdlm-loader", daemon=True)
        self._thread.start()
        # At exit the interpreter stops daemon threads; one that is stopped while holding h5py's lock makes exit hang.
        atexit.register(self.close)

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def next(self) -> Batch:
        """The next batch. Raises HvdlmError, now and at every later call, if its shards cannot be read."""
        if self._closed.is_set():
            raise RuntimeError("next() on a closed Loader")
        item = self._queue.get()
        if isinstance(item, Exception):
            self._queue.put(item)  # the thread has ended, so later calls must not wait for it
            raise item
        self._next = item.index + 1
        return item

    def state_dict(self) -> dict[str, int]:
        """The constructor's `seed`, and as `batch` the `start` that continues from here, on any number of ranks."""
        return {"seed": self._seed, "batch": self._next}

    def close(self) -> None:
        """Ends the thread. Further calls do nothing."""
        atexit.unregister(self.close)
        self._closed.set()
        while self._thread.is_alive():
            # The thread checks `_closed` after each put. Emptying the queue unblocks a put that waits.
            while not self._queue.empty():
                self._queue.get_nowait()
            self._thread.join(timeout=0.1)

    def _read_ahead(self, start: int) -> None:
        try:
            announced = start
            for index in itertools.count(start):
                while self._reader.reads_copies and announced <= index + _BATCHES_AHEAD:
                    self._reader.will_read(self._parts.own(announced, self._rank))
                    announced += 1
                self._queue.put(self._reader.read(index, self._parts.own(index, self._rank)))
                if self._closed.is_set():
                    return
        except Exception as error:
            self._queue.put(error)


def training_sampler(
    data: DataSet, context_length: int, batch_sizes: BatchSizes, seed: int
) -> Sampler | MixtureSampler:
    """The sample order of the training split. Raises HvdlmError if it, or one of its sources, is too small."""
    windows = [sequences_of(shard.n_tokens, context_length) for shard in data.train.shards]
    if not data.sources:
        return Sampler(windows, batch_sizes, seed, data.fingerprint)
    rest = iter(windows)
    by_source = [list(itertools.islice(rest, source.shards)) for source in data.sources]
    for source, own in zip(data.sources, by_source, strict=True):
        if not sum(own):
            raise HvdlmError(
                f"the training shards of {source.path} in {data.path} hold no whole sequence; "
                "shorten model.context_length, or prepare the data set with more of it or fewer --shards"
            )
    mixture = Mixture([source.weight for source in data.sources])
    return MixtureSampler(by_source, mixture, batch_sizes, seed, data.fingerprint)


def validation_batches(
    data: DataSet, context_length: int, sequences_at_once: int, rank: int, size: int, limit: int = 0
) -> Iterator[Batch]:
    """This rank's part of the validation split's windows, in order; of the first `limit` only if that is above 0.

    The last window of a shard may be short: its inputs are padded with the end of text, its targets with IGNORE. So
    every token but the first of each shard is predicted exactly once. `index` counts this rank's batches from 0.
    Ranks may have different numbers of batches, or none; a data set without validation has none on any rank.

    Where sources have weights and validation shards of their own, the first windows are as those of training: each
    source has its share, until it has no more.
    """
    windows = [
        (shard, start)
        for shard, info in enumerate(data.validation.shards)
        for start in range(0, info.n_tokens - 1, context_length)
    ]
    if data.validates_sources:
        mixture = Mixture([source.weight for source in data.sources])
        counts = Counter(shard for shard, _ in windows)
        draws = np.concatenate([mixture.draws(source, counts[source]) for source in range(len(data.sources))])
        windows = [windows[index] for index in np.argsort(draws).tolist()]
    if limit:
        windows = windows[:limit]
    own = rank_part(len(windows), rank, size)
    for index, first in enumerate(range(own.start, own.stop, sequences_at_once)):
        chosen = windows[first : min(first + sequences_at_once, own.stop)]
        inputs = np.full((len(chosen), context_length), data.eos_id, dtype=np.int64)
        targets = np.full((len(chosen), context_length), IGNORE, dtype=np.int64)
        for row, (shard, start) in enumerate(chosen):
            count = min(context_length, data.validation.shards[shard].n_tokens - 1 - start)
            tokens = data.validation.read(shard, start, count + 1)
            inputs[row, :count] = tokens[:-1]
            targets[row, :count] = tokens[1:]
        yield Batch(index, _tensor(inputs), _tensor(targets), shards=tuple(shard for shard, _ in chosen))


def _tensor(values: npt.NDArray[np.int64]) -> torch.Tensor:
    """A copy: inputs and targets of a sequence overlap in what was read, and are changed one without the other."""
    return torch.from_numpy(values.copy())
