"""The documents of a data set: from which files, how divided, and what is held out for validation.

A data set has one source, or several with weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hvdlm.data.assignment import VALIDATION
from hvdlm.data.documents import Block, content_bytes, read_blocks, read_parts
from hvdlm.data.input_files import UNREADABLE, Holds, InputFile, NoFile, find_files
from hvdlm.data.json_records import MAX_DOCUMENT_BYTES
from hvdlm.data.mixture import WeightedPath
from hvdlm.data.splitting import Split, parse_split
from hvdlm.errors import HvdlmError


@dataclass(frozen=True)
class Corpus:
    """What a source of a data set is made of.

    Attributes:
        files: files whose documents are assigned to training shards and validation by their bytes.
        held_out: files of which all documents belong to validation.
        split: how text files are divided into documents.
        no_files: what lies in input directories but is no file, such as a pipe.
        part_ends: where the only file, a single document, is divided into parts, in bytes; empty if it is not.
        part_shards: the shard of each part.
        text_key: the key of the text in records, the column of texts in tables.
        option: the option that names it, and for a source with a weight its value.
    """

    files: tuple[InputFile, ...]
    held_out: tuple[InputFile, ...]
    split: Split
    no_files: tuple[NoFile, ...]
    part_ends: tuple[int, ...] = ()
    part_shards: tuple[int, ...] = ()
    text_key: str = "text"
    option: str = "--input"

    @property
    def size(self) -> int:
        """Bytes of all files, as stored on disk."""
        return sum(file.size for file in (*self.files, *self.held_out))

    def blocks(self) -> Iterator[Block]:
        """All documents in order, in work items."""
        if self.part_ends:
            yield from read_parts(self.files[0], self.part_ends, self.part_shards)
        else:
            yield from read_blocks(self.files, self.split, self.text_key)
        for block in read_blocks(self.held_out, self.split, self.text_key):
            yield block.belonging_to(VALIDATION)

    @property
    def summary(self) -> str:
        """One sentence about how a single document was divided, or "" if it was not."""
        if not self.part_ends:
            return ""
        shards = len(set(self.part_shards) - {VALIDATION})
        held_out = self.part_ends[-1] - self.part_ends[-2] if VALIDATION in self.part_shards else 0
        name, total = self.files[0].path, self.part_ends[-1]
        if not held_out:
            return f"{name} is one document: it fills the {shards} training shards in order"
        return (
            f"{name} is one document: its last {held_out / total:.1%} are validation, "
            f"what comes before fills the {shards} training shards in order"
        )


@dataclass(frozen=True)
class Corpora:
    """What a data set is made of: the corpus of each source."""

    sources: tuple[Corpus, ...]

    @property
    def size(self) -> int:
        """Bytes of all files, as stored on disk."""
        return sum(corpus.size for corpus in self.sources)

    def blocks(self) -> Iterator[Block]:
        """All documents, source by source, in work items."""
        for source, corpus in enumerate(self.sources):
            for block in corpus.blocks():
                yield block.of_source(source)

    @property
    def summary(self) -> str:
        """What there is to say of how single documents were divided, a sentence a line."""
        return "\n".join(corpus.summary for corpus in self.sources if corpus.summary)


def find_corpora(
    inputs: Sequence[str],
    mix: Sequence[WeightedPath],
    validation_inputs: Sequence[str],
    split: str | None,
    shards: int,
    validation: float,
    text_key: str = "text",
) -> Corpora:
    """The corpora of these options of `hvdlm prepare`: one of all `inputs`, or one for each source of `mix`.

    A corpus of one text file that is one document is divided into consecutive parts: one for each training shard and
    the last one for validation. The files of `validation_inputs` are with the first source.

    Raises HvdlmError for an input that cannot be read, options that do not fit it, a file that belongs to two sources,
    or a single document that is too short.
    """
    rule = parse_split(split)
    held_out, no_files = find_files(validation_inputs, "--validation-input")
    reserved = {file.path.resolve() for file in held_out}
    source_of: dict[Path, str] = {}
    corpora: list[Corpus] = []
    options = [(f"--mix {each}", [each.path]) for each in mix] or [("--input", list(inputs))]
    for option, names in options:
        found, more = find_files(names, option.partition(" ")[0])
        files = [file for file in found if file.path.resolve() not in reserved]
        if found and not files:
            raise HvdlmError(f"--validation-input names all files of {option}, so none are left for training")
        for file in files:
            if file.path.resolve() in source_of:
                both = f"{source_of[file.path.resolve()]} and {option}"
                raise HvdlmError(f"{file.path} belongs to {both}: a file can have one weight only; leave it out of one")
            source_of[file.path.resolve()] = option
        corpora.append(
            Corpus(tuple(files), tuple(held_out), rule, (*more, *no_files), text_key=text_key, option=option)
        )
        held_out, no_files = [], []
    every_file = [file for corpus in corpora for file in (*corpus.files, *corpus.held_out)]
    if rule is not None and not any(file.holds == Holds.TEXT for file in every_file):
        raise HvdlmError(f"--split {split} divides text files, but the input has none: each record is a document")
    return Corpora(tuple(_divided(corpus, shards, validation) for corpus in corpora))


def _divided(corpus: Corpus, shards: int, validation: float) -> Corpus:
    """A corpus of one document, divided into parts where there is more than one shard to fill or it is too long."""
    if corpus.split is not None or len(corpus.files) != 1 or corpus.files[0].holds != Holds.TEXT:
        return corpus
    file = corpus.files[0]
    try:
        size = content_bytes(file)
    except UNREADABLE as error:
        raise HvdlmError(f"cannot read the input {file.path}: {error}") from None
    if not size or (shards == 1 and not validation and size <= MAX_DOCUMENT_BYTES):
        return corpus
    training = round(size * (1 - validation))
    ends = [training * (shard + 1) // shards for shard in range(shards)] + ([size] if validation else [])
    if any(begin == end for begin, end in zip([0, *ends], ends, strict=False)):
        raise HvdlmError(
            f"{file.path} is one document of {size:,} bytes, too few for {shards} training shards"
            f"{' and validation' if validation else ''}; give more text or fewer --shards"
        )
    parts = [*range(shards), *([VALIDATION] if validation else [])]
    return replace(corpus, part_ends=tuple(ends), part_shards=tuple(parts))
