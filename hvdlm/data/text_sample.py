"""A random sample of the training documents, of bounded size, from which a tokenizer is trained."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from hvdlm.data.assignment import VALIDATION, ShardAssignment
from hvdlm.data.corpus import Corpora
from hvdlm.data.documents import BadDocument, Block, read_documents
from hvdlm.data.progress import InputProgress
from hvdlm.data.worker_pool import WorkerPool

SAMPLE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class _Candidates:
    documents: list[tuple[int, str]]  # sort key, text
    bad: list[BadDocument]
    input_bytes: int


def sample_training_text(
    corpora: Corpora,
    pool: WorkerPool,
    text_key: str,
    assignment: ShardAssignment,
    refuse: Callable[[Sequence[BadDocument]], None],
) -> list[str]:
    """The documents with the lowest `assignment.sort_key` that together fit in SAMPLE_BYTES, but at least one.

    The sample does not depend on the order of the input. `refuse` is called with the bad documents of each block.
    """
    sample: list[tuple[int, str]] = []  # a heap of negated sort keys, so that the highest key is removed first
    size = 0  # bytes of the sample
    bound = 2**64  # documents with this sort key or a higher one are not in the sample

    def jobs() -> Iterator[tuple[Block, int]]:
        return ((block, bound) for block in corpora.blocks())

    find = partial(_candidates, text_key=text_key, assignment=assignment)
    with InputProgress("reading a sample", corpora.size) as progress:
        for found in pool.map(find, jobs()):
            refuse(found.bad)
            for key, text in found.documents:
                if key < bound:
                    heapq.heappush(sample, (-key, text))
                    size += len(text.encode())
                while size > SAMPLE_BYTES and len(sample) > 1:
                    highest, dropped = heapq.heappop(sample)
                    bound = min(bound, -highest)
                    size -= len(dropped.encode())
            progress.advance(found.input_bytes)
    return [text for _, text in sorted(sample)]


def _candidates(job: tuple[Block, int], text_key: str, assignment: ShardAssignment) -> _Candidates:
    block, bound = job
    documents: list[tuple[int, str]] = []
    bad: list[BadDocument] = []
    for document in read_documents(block, text_key):
        if isinstance(document, BadDocument):
            bad.append(document)
            continue
        content = document.encode()
        key = assignment.sort_key(content)
        shard = assignment.shard(content) if block.shard is None else block.shard
        if key < bound and shard != VALIDATION:
            documents.append((key, document))
    return _Candidates(documents, bad, block.input_bytes)
