"""A bounded random sample of the training documents, for a tokenizer to learn from."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from hvdlm.data.documents import BadDocument, Block, Source, read_blocks, read_documents
from hvdlm.data.placement import VALIDATION, Placement
from hvdlm.data.progress import InputProgress
from hvdlm.data.worker_pool import WorkerPool

SAMPLE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class _Candidates:
    documents: list[tuple[int, str]]  # rank, text
    bad: list[BadDocument]
    input_bytes: int


def sample_training_text(
    sources: Sequence[Source],
    pool: WorkerPool,
    text_key: str,
    placement: Placement,
    refuse: Callable[[Sequence[BadDocument]], None],
) -> list[str]:
    """The documents lowest in `placement.rank` that fit in SAMPLE_BYTES, or the lowest one where none fits.

    Whether a document is among them does not depend on the order of the input. `refuse` is shown bad documents.
    """
    sample: list[tuple[int, str]] = []  # a heap by negative rank: the highest is the first to go
    held = 0
    bound = 2**64  # ranks from here on are out

    def jobs() -> Iterator[tuple[Block, int]]:
        return ((block, bound) for block in read_blocks(sources))

    find = partial(_candidates, text_key=text_key, placement=placement)
    with InputProgress("reading a sample", sum(source.size for source in sources)) as progress:
        for found in pool.map(find, jobs()):
            refuse(found.bad)
            for rank, text in found.documents:
                if rank < bound:
                    heapq.heappush(sample, (-rank, text))
                    held += len(text.encode())
                while held > SAMPLE_BYTES and len(sample) > 1:
                    highest, dropped = heapq.heappop(sample)
                    bound = min(bound, -highest)
                    held -= len(dropped.encode())
            progress.advance(found.input_bytes)
    return [text for _, text in sorted(sample)]


def _candidates(job: tuple[Block, int], text_key: str, placement: Placement) -> _Candidates:
    block, bound = job
    documents: list[tuple[int, str]] = []
    bad: list[BadDocument] = []
    for document in read_documents(block, text_key):
        if isinstance(document, BadDocument):
            bad.append(document)
            continue
        content = document.encode()
        rank = placement.rank(content)
        if rank < bound and placement.shard(content) != VALIDATION:
            documents.append((rank, document))
    return _Candidates(documents, bad, block.input_bytes)
