"""The documents of a data set: from which files, how divided, and what is held out for validation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from hvdlm.data.assignment import VALIDATION
from hvdlm.data.documents import Block, content_bytes, read_blocks, read_parts
from hvdlm.data.json_records import MAX_DOCUMENT_BYTES
from hvdlm.data.sources import UNREADABLE, Holds, NoFile, Source, find_sources
from hvdlm.data.splitting import Split, parse_split
from hvdlm.errors import HvdlmError


@dataclass(frozen=True)
class Corpus:
    """What a data set is made of.

    Attributes:
        sources: files whose documents are assigned to training shards and validation by their bytes.
        held_out: files of which all documents belong to validation.
        split: how text files are divided into documents.
        no_files: what lies in input directories but is no file, such as a pipe.
        part_ends: where the only file, a single document, is divided into parts, in bytes; empty if it is not.
        part_shards: the shard of each part.
        text_key: the key of the text in records, the column of texts in tables.
    """

    sources: tuple[Source, ...]
    held_out: tuple[Source, ...]
    split: Split
    no_files: tuple[NoFile, ...]
    part_ends: tuple[int, ...] = ()
    part_shards: tuple[int, ...] = ()
    text_key: str = "text"

    @property
    def size(self) -> int:
        """Bytes of all files, as stored on disk."""
        return sum(source.size for source in (*self.sources, *self.held_out))

    def blocks(self) -> Iterator[Block]:
        """All documents in order, in work items."""
        if self.part_ends:
            yield from read_parts(self.sources[0], self.part_ends, self.part_shards)
        else:
            yield from read_blocks(self.sources, self.split, self.text_key)
        for block in read_blocks(self.held_out, self.split, self.text_key):
            yield block.belonging_to(VALIDATION)

    @property
    def summary(self) -> str:
        """One sentence about how a single document was divided, or "" if it was not."""
        if not self.part_ends:
            return ""
        shards = len(set(self.part_shards) - {VALIDATION})
        held_out = self.part_ends[-1] - self.part_ends[-2] if VALIDATION in self.part_shards else 0
        name, total = self.sources[0].path, self.part_ends[-1]
        if not held_out:
            return f"{name} is one document: it fills the {shards} training shards in order"
        return (
            f"{name} is one document: its last {held_out / total:.1%} are validation, "
            f"what comes before fills the {shards} training shards in order"
        )


def find_corpus(
    inputs: Sequence[str],
    validation_inputs: Sequence[str],
    split: str | None,
    shards: int,
    validation: float,
    text_key: str = "text",
) -> Corpus:
    """The corpus of these options of `hvdlm prepare`.

    A corpus of one text file that is one document is divided into consecutive parts: one for each training shard and
    the last one for validation.

    Raises HvdlmError for an input that cannot be read, options that do not fit it, or a single document that is too
    short.
    """
    rule = parse_split(split)
    found, no_files = find_sources(inputs)
    held_out, more = find_sources(validation_inputs, "--validation-input")
    reserved = {source.path.resolve() for source in held_out}
    sources = [source for source in found if source.path.resolve() not in reserved]
    if found and not sources:
        raise HvdlmError("--validation-input names all files of --input, so none are left for training")
    if rule is not None and not any(source.holds == Holds.TEXT for source in (*sources, *held_out)):
        raise HvdlmError(f"--split {split} divides text files, but the input has none: each record is a document")
    corpus = Corpus(tuple(sources), tuple(held_out), rule, (*no_files, *more), text_key=text_key)
    if rule is None and len(sources) == 1 and sources[0].holds == Holds.TEXT:
        return _in_parts(corpus, shards, validation)
    return corpus


def _in_parts(corpus: Corpus, shards: int, validation: float) -> Corpus:
    """A corpus of one document, divided into parts where there is more than one shard to fill or it is too long."""
    source = corpus.sources[0]
    try:
        size = content_bytes(source)
    except UNREADABLE as error:
        raise HvdlmError(f"cannot read the input {source.path}: {error}") from None
    if not size or (shards == 1 and not validation and size <= MAX_DOCUMENT_BYTES):
        return corpus
    training = round(size * (1 - validation))
    ends = [training * (shard + 1) // shards for shard in range(shards)] + ([size] if validation else [])
    if any(begin == end for begin, end in zip([0, *ends], ends, strict=False)):
        raise HvdlmError(
            f"{source.path} is one document of {size:,} bytes, too few for {shards} training shards"
            f"{' and validation' if validation else ''}; give more text or fewer --shards"
        )
    parts = [*range(shards), *([VALIDATION] if validation else [])]
    return replace(corpus, part_ends=tuple(ends), part_shards=tuple(parts))
