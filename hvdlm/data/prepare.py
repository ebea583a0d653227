"""`hvdlm prepare`: turns text files into a data set of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdlm.cores import usable_cores
from hvdlm.data.assignment import VALIDATION, ShardAssignment
from hvdlm.data.corpus import Corpora, Corpus, find_corpora
from hvdlm.data.documents import BadDocument, Block, read_documents
from hvdlm.data.input_files import Holds, InputFile
from hvdlm.data.manifest import (
    MANIFEST,
    MIXTURE_VERSION,
    TOKENIZER,
    VALIDATION_DIRECTORY,
    VERSION,
    Manifest,
    SourceRecord,
)
from hvdlm.data.mixture import WeightedPath
from hvdlm.data.prepare_options import check_options, check_output_outside_inputs, tokenizer_choice
from hvdlm.data.progress import InputProgress
from hvdlm.data.shard import DataSet
from hvdlm.data.shard_writer import ShardWriter, token_dtype
from hvdlm.data.staging import staged
from hvdlm.data.text_sample import sample_training_text
from hvdlm.data.tokenizer import Tokenizer
from hvdlm.data.worker_pool import WorkerPool
from hvdlm.errors import HvdlmError

Recipe = dict[str, str | int | float]

# Of the input, read to see whether it fills all shards: all of an input that might be too small
CHECKED_BYTES = 64 * 2**20


def prepare(
    inputs: list[str],
    output: Path,
    tokenizer: str,
    shards: int,
    validation: float,
    workers: int,
    text_key: str,
    seed: int,
    skip_bad: bool,
    split: str | None = None,
    validation_inputs: Sequence[str] = (),
    mix: Sequence[WeightedPath] = (),
    tokenizer_pattern: str | None = None,
) -> None:
    """Writes the data set `output`, complete or not at all; does nothing if it exists with the same recipe.

    The tokens depend on the input, its order, the tokenizer, `shards`, `validation`, `split` and `seed`, not on
    `workers`. Memory holds a few MiB and a few documents for each worker, however large the input.

    Args:
        inputs: files (of text, or of records or rows by their suffix), directories, globs, or python-stdlib; none with
            `mix`.
        output: directory to write.
        tokenizer: `byte`, `bpe:VOCAB` (trained on a sample of the training documents), or a file of one: a
            tokenizer.json, a rank file of tiktoken, or a model of SentencePiece.
        shards: training shards, of each source.
        validation: fraction of the documents, at least 0 and below 1; of a single document, of its bytes.
        workers: number of processes; 0 for one for each core that may be used.
        text_key: key of the text in a JSON record, column of the texts in a table.
        seed: of the assignment of documents to shards and validation.
        skip_bad: leave out bad documents and count them, instead of stopping at the first.
        split: `blank-lines`, `lines` or a number of bytes by which text files are divided into documents; None: each
            is one document.
        validation_inputs: as `inputs`; files of which all documents belong to validation.
        mix: sources with weights, each a path as in `inputs`, whose shards are kept apart.
        tokenizer_pattern: how a rank file of tiktoken divides text; None for one that is known.

    Raises HvdlmError for bad input or options, naming the file and line.
    """
    check_options(inputs, mix, shards, validation, workers, validation_inputs)
    choice = tokenizer_choice(tokenizer, tokenizer_pattern)
    check_output_outside_inputs([*inputs, *(each.path for each in mix), *validation_inputs], output)
    corpora = find_corpora(inputs, mix, validation_inputs, split, shards, validation, text_key)
    bad = _BadDocuments(skip_bad, is_only_one=all(corpus.part_ends for corpus in corpora.sources))
    no_files = [
        BadDocument(str(each.path), f"is {each.kind}, not a file")
        for corpus in corpora.sources
        for each in corpus.no_files
    ]
    bad.refuse(no_files)
    bad.count(no_files)
    recipe: Recipe = {
        "tokenizer": tokenizer if isinstance(choice, int) or tokenizer == "byte" else f"file {choice.sha256}",
        "shards": shards,
        "validation": validation,
        "text key": text_key,
        "seed": seed,
        "bad documents": "left out" if skip_bad else "refused",
        "input files": _files_digest([file for corpus in corpora.sources for file in corpus.files]),
        **({"split": split} if split else {}),
        **({"validation files": _files_digest(corpora.sources[0].held_out)} if validation_inputs else {}),
        **({"mixture": " ".join(map(str, mix))} if mix else {}),
    }
    if _is_prepared(output, recipe):
        print(f"{output} is there already, made from the same input with the same arguments")
        return
    assignment = ShardAssignment(seed, validation, shards)
    with ExitStack() as stack:
        directory = stack.enter_context(staged(output))
        for corpus in corpora.sources:
            _check_enough(corpus, assignment, text_key, skip_bad)
        pool = stack.enter_context(WorkerPool(workers or usable_cores()))
        if isinstance(choice, int):
            texts = sample_training_text(corpora, pool, text_key, assignment, bad.refuse)
            choice = Tokenizer.train(texts, choice)
        choice.save(directory / TOKENIZER)
        tokenise = partial(_tokenise, directory / TOKENIZER, choice.sha256, text_key, assignment)
        with _shard_writers(directory, choice, corpora, assignment) as writers:
            with InputProgress("tokenising", corpora.size) as progress:
                for block in pool.map(tokenise, corpora.blocks()):
                    bad.refuse(block.bad)
                    bad.count(block.bad)
                    for document in block.documents:
                        writer = writers[block.source, document.shard]
                        writer.append(document.tokens, document.n_bytes, document.is_continued)
                    progress.advance(block.input_bytes)
            for source, corpus in enumerate(corpora.sources):
                own = {shard: writer.n_docs for (of, shard), writer in writers.items() if of == source}
                _check_filled(sum(own.values()), [shard for shard in own if not own[shard]], len(own), corpus)
            records = {key: writer.finish() for key, writer in writers.items()}
        manifest = Manifest(
            version=MIXTURE_VERSION if mix else VERSION,
            vocab_size=choice.vocab_size,
            eos_id=choice.eos_id,
            tokenizer_sha256=choice.sha256,
            train=[record for (_, shard), record in records.items() if shard != VALIDATION],
            validation=[record for (_, shard), record in records.items() if shard == VALIDATION],
            sources=[SourceRecord(path=each.path, weight=each.weight, shards=shards) for each in mix],
            recipe=recipe,
        )
        manifest.save(directory)
    if corpora.summary:
        print(corpora.summary)
    print(_summary(output, manifest))
    if bad.found:
        print(f"left out {bad.found:,} bad documents; the first: {bad.first}")


@dataclass(frozen=True)
class _Document:
    shard: int
    tokens: npt.NDArray[Any]  # (n,), ending with the end of text unless the document goes on in the next block
    n_bytes: int
    is_continued: bool


@dataclass(frozen=True)
class _TokenisedBlock:
    source: int
    documents: list[_Document]
    bad: list[BadDocument]
    input_bytes: int


def _tokenise(
    tokenizer: Path, sha256: str, text_key: str, assignment: ShardAssignment, block: Block
) -> _TokenisedBlock:
    """Runs in a worker: reads and tokenises the documents of a block and assigns them to shards."""
    encoder = _load_once(tokenizer, sha256)
    dtype = token_dtype(encoder.vocab_size)
    texts: list[str] = []
    bad: list[BadDocument] = []
    for document in read_documents(block, text_key):
        if isinstance(document, BadDocument):
            bad.append(document)
        else:
            texts.append(document)
    documents: list[_Document] = []
    for text, ids in zip(texts, encoder.encode_batch(texts), strict=True):
        content = text.encode()
        tokens = np.array([*ids, encoder.eos_id], dtype=dtype)
        shard = assignment.shard(content) if block.shard is None else block.shard
        documents.append(_Document(shard, tokens, len(content), is_continued=False))
    if block.is_continued and documents:
        last = documents[-1]
        documents[-1] = replace(last, tokens=last.tokens[:-1], is_continued=True)
    return _TokenisedBlock(block.source, documents, bad, block.input_bytes)


@lru_cache(maxsize=1)
def _load_once(path: Path, sha256: str) -> Tokenizer:
    """`sha256` keeps apart different tokenizers that one process reads from the same path, as tests do."""
    return Tokenizer.load(path)


class _BadDocuments:
    """Raises at the first bad document, or counts them if `skip` is set and there are others."""

    def __init__(self, skip: bool, is_only_one: bool) -> None:
        self._skip = skip and not is_only_one
        self._remedy = "" if is_only_one else ", or leave bad documents out with --skip-bad"
        self.found = 0
        self.first = ""

    def refuse(self, bad: Sequence[BadDocument]) -> None:
        if bad and not self._skip:
            raise HvdlmError(f"{bad[0].where} {bad[0].problem}; correct the input{self._remedy}")

    def count(self, bad: Sequence[BadDocument]) -> None:
        if bad and not self.found:
            self.first = f"{bad[0].where} {bad[0].problem}"
        self.found += len(bad)


def _shards(corpus: Corpus, assignment: ShardAssignment) -> list[int]:
    """The numbers of the training shards of a source, and VALIDATION if documents of it are to belong there."""
    return [*range(assignment.shards), *([VALIDATION] if assignment.validation or corpus.held_out else [])]


@contextmanager
def _shard_writers(
    directory: Path, tokenizer: Tokenizer, corpora: Corpora, assignment: ShardAssignment
) -> Iterator[dict[tuple[int, int], ShardWriter]]:
    """A writer for every shard, by the index of its source and its number there, or VALIDATION."""
    keys = [(source, shard) for source, each in enumerate(corpora.sources) for shard in _shards(each, assignment)]
    held_out = [key for key in keys if key[1] == VALIDATION]
    training = [key for key in keys if key[1] != VALIDATION]
    files = {key: (f"shard_{index:05}.h5", index, len(training)) for index, key in enumerate(training)}
    for index, key in enumerate(held_out):
        files[key] = (f"{VALIDATION_DIRECTORY}/shard_{index:05}.h5", index, len(held_out))
    with ExitStack() as stack:
        yield {
            key: stack.enter_context(
                ShardWriter(
                    directory,
                    file,
                    index,
                    count,
                    vocab_size=tokenizer.vocab_size,
                    eos_id=tokenizer.eos_id,
                    tokenizer_sha256=tokenizer.sha256,
                )
            )
            for key, (file, index, count) in files.items()
        }


def _check_enough(corpus: Corpus, assignment: ShardAssignment, text_key: str, skip_bad: bool) -> None:
    """Raises HvdlmError if a shard will get no document, as far as the first CHECKED_BYTES of the input tell."""
    if corpus.part_ends:
        return
    shards = _shards(corpus, assignment)
    empty = set(shards)
    n_documents = n_bytes = 0
    for block in corpus.blocks():
        for document in read_documents(block, text_key):
            if not isinstance(document, BadDocument):
                n_documents += 1
                empty.discard(assignment.shard(document.encode()) if block.shard is None else block.shard)
            elif not skip_bad:
                return  # it will be refused, with its name
        n_bytes += block.input_bytes
        if not empty or n_bytes > CHECKED_BYTES:
            return
    _check_filled(n_documents, sorted(empty), len(shards), corpus)


def _check_filled(n_documents: int, empty: Sequence[int], n_shards: int, corpus: Corpus) -> None:
    """Raises HvdlmError if shards are `empty`: numbers of training shards, or VALIDATION."""
    if not n_documents:
        name, option = ("the input", "--input") if corpus.option == "--input" else (corpus.option, "it")
        raise HvdlmError(f"{name} holds no documents; check {option}")
    if VALIDATION in empty and corpus.held_out:
        raise HvdlmError("--validation-input holds no documents; check it")
    source = "" if corpus.option == "--input" else f"{corpus.option}: "
    more = "give more documents"
    if corpus.split is None and any(file.holds == Holds.TEXT for file in corpus.files):
        more += ", divide text files with --split blank-lines (or lines, or a number of bytes)"
    if list(empty) == [VALIDATION]:
        raise HvdlmError(
            f"{source}none of the {n_documents:,} documents fell into validation; {more}, a larger --validation, "
            "--validation-input FILE, or --validation 0 to do without"
        )
    if empty:
        count = "1 document is" if n_documents == 1 else f"{n_documents:,} documents are"
        raise HvdlmError(
            f"{source}{count} too few: {len(empty)} of {n_shards} shards (validation included) got none; "
            f"{more}, or fewer --shards"
        )


def _files_digest(files: Sequence[InputFile]) -> str:
    """Identifies the input by path, size and modification time; reading it all would take as long as preparing it."""
    lines = (f"{file.path.resolve()}\0{file.size}\0{file.modified}\n" for file in files)
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def _is_prepared(output: Path, recipe: Recipe) -> bool:
    """Whether `output` is the data set of this recipe. Raises HvdlmError if it exists but is something else."""
    remedy = "remove it, or choose another --output"
    try:
        if output.is_dir() and not any(output.iterdir()):
            return False
        if not (output / MANIFEST).exists():
            if output.exists():
                raise HvdlmError(f"{output} exists and is not a data set; {remedy}")
            return False
    except OSError as error:
        raise HvdlmError(f"cannot write {output}: {error.strerror}") from None
    DataSet(output)
    found = Manifest.load(output).recipe
    differing = [
        f"{name} (there {found.get(name, 'none')}, here {recipe.get(name, 'none')})"
        for name in dict.fromkeys([*recipe, *found])
        if found.get(name) != recipe.get(name)
    ]
    if differing:
        raise HvdlmError(
            f"{output} is there already but was made with another {', another '.join(differing)}; {remedy}"
        )
    return True


def _summary(output: Path, manifest: Manifest) -> str:
    parts = []
    for name, shards in (("training", manifest.train), ("validation", manifest.validation)):
        documents, tokens = sum(shard.n_docs for shard in shards), sum(shard.n_tokens for shard in shards)
        parts.append(f"{tokens:,} tokens of {documents:,} documents for {name}")
    return f"{output}: {', '.join(parts)}, {len(manifest.train)} training shards, vocabulary {manifest.vocab_size:,}"
