"""`hvdlm prepare`: turns text files into a data set of tokens."""

from __future__ import annotations

import hashlib
import resource
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
from hvdlm.data.corpus import Corpus, find_corpus
from hvdlm.data.documents import BadDocument, Block, read_documents
from hvdlm.data.manifest import MANIFEST, TOKENIZER, VALIDATION_DIRECTORY, Manifest
from hvdlm.data.progress import InputProgress
from hvdlm.data.shard import DataSet
from hvdlm.data.shard_writer import ShardWriter, token_dtype
from hvdlm.data.sources import Holds, Source
from hvdlm.data.staging import staged
from hvdlm.data.text_sample import sample_training_text
from hvdlm.data.tokenizer import LARGEST_VOCABULARY, SMALLEST_VOCABULARY, Tokenizer
from hvdlm.data.worker_pool import WorkerPool
from hvdlm.errors import HvdlmError

Recipe = dict[str, str | int | float]

# Of the input, read to see whether it fills all shards: all of an input that might be too small
CHECKED_BYTES = 64 * 2**20

MOST_WORKERS = 1024
OTHER_FILES = 256  # open at once, beside those of shards: modules, pipes to workers, input


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
) -> None:
    """Writes the data set `output`, complete or not at all; does nothing if it exists with the same recipe.

    The tokens depend on the input, its order, the tokenizer, `shards`, `validation`, `split` and `seed`, not on
    `workers`. Memory holds a few MiB and a few documents for each worker, however large the input.

    Args:
        inputs: files (of text, or of records or rows by their suffix), directories, globs, or python-stdlib.
        output: directory to write.
        tokenizer: `byte`, `bpe:VOCAB` (trained on a sample of the training documents), or a tokenizer.json.
        shards: training shards.
        validation: fraction of the documents, at least 0 and below 1; of a single document, of its bytes.
        workers: number of processes; 0 for one for each core that may be used.
        text_key: key of the text in a JSON record, column of the texts in a table.
        seed: of the assignment of documents to shards and validation.
        skip_bad: leave out bad documents and count them, instead of stopping at the first.
        split: `blank-lines`, `lines` or a number of bytes by which text files are divided into documents; None: each
            is one document.
        validation_inputs: as `inputs`; files of which all documents belong to validation.

    Raises HvdlmError for bad input or options, naming the file and line.
    """
    _check_options(shards, validation, workers, validation_inputs)
    choice = _tokenizer_choice(tokenizer)
    _check_output_outside_inputs([*inputs, *validation_inputs], output)
    corpus = find_corpus(inputs, validation_inputs, split, shards, validation, text_key)
    bad = _BadDocuments(skip_bad, is_only_one=bool(corpus.part_ends))
    no_files = [BadDocument(str(each.path), f"is {each.kind}, not a file") for each in corpus.no_files]
    bad.refuse(no_files)
    bad.count(no_files)
    recipe: Recipe = {
        "tokenizer": tokenizer if isinstance(choice, int) or tokenizer == "byte" else f"file {choice.sha256}",
        "shards": shards,
        "validation": validation,
        "text key": text_key,
        "seed": seed,
        "bad documents": "left out" if skip_bad else "refused",
        "input files": _sources_digest(corpus.sources),
        **({"split": split} if split else {}),
        **({"validation files": _sources_digest(corpus.held_out)} if validation_inputs else {}),
    }
    if _is_prepared(output, recipe):
        print(f"{output} is there already, made from the same input with the same arguments")
        return
    assignment = ShardAssignment(seed, validation, shards)
    with ExitStack() as stack:
        directory = stack.enter_context(staged(output))
        _check_enough(corpus, assignment, text_key, skip_bad)
        pool = stack.enter_context(WorkerPool(workers or usable_cores()))
        if isinstance(choice, int):
            texts = sample_training_text(corpus, pool, text_key, assignment, bad.refuse)
            choice = Tokenizer.train(texts, choice)
        choice.save(directory / TOKENIZER)
        tokenise = partial(_tokenise, directory / TOKENIZER, choice.sha256, text_key, assignment)
        has_validation = bool(validation or validation_inputs)
        with _shard_writers(directory, choice, shards, has_validation) as writers:
            with InputProgress("tokenising", corpus.size) as progress:
                for block in pool.map(tokenise, corpus.blocks()):
                    bad.refuse(block.bad)
                    bad.count(block.bad)
                    for document in block.documents:
                        writers[document.shard].append(document.tokens, document.n_bytes, document.is_continued)
                    progress.advance(block.input_bytes)
            empty = [shard for shard, writer in writers.items() if not writer.n_docs]
            _check_filled(sum(writer.n_docs for writer in writers.values()), empty, len(writers), corpus)
            records = {shard: writer.finish() for shard, writer in writers.items()}
        manifest = Manifest(
            vocab_size=choice.vocab_size,
            eos_id=choice.eos_id,
            tokenizer_sha256=choice.sha256,
            train=[records[shard] for shard in range(shards)],
            validation=[records[VALIDATION]] if VALIDATION in records else [],
            recipe=recipe,
        )
        manifest.save(directory)
    if corpus.summary:
        print(corpus.summary)
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
    return _TokenisedBlock(documents, bad, block.input_bytes)


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


@contextmanager
def _shard_writers(
    directory: Path, tokenizer: Tokenizer, shards: int, has_validation: bool
) -> Iterator[dict[int, ShardWriter]]:
    """A writer for every shard, by the shard's number or VALIDATION."""
    files = {index: (f"shard_{index:05}.h5", index, shards) for index in range(shards)}
    if has_validation:
        files[VALIDATION] = (f"{VALIDATION_DIRECTORY}/shard_00000.h5", 0, 1)
    with ExitStack() as stack:
        yield {
            shard: stack.enter_context(
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
            for shard, (file, index, count) in files.items()
        }


def _check_enough(corpus: Corpus, assignment: ShardAssignment, text_key: str, skip_bad: bool) -> None:
    """Raises HvdlmError if a shard will get no document, as far as the first CHECKED_BYTES of the input tell."""
    if corpus.part_ends:
        return
    shards = [*range(assignment.shards), *([VALIDATION] if assignment.validation or corpus.held_out else [])]
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
        raise HvdlmError("the input holds no documents; check --input")
    if VALIDATION in empty and corpus.held_out:
        raise HvdlmError("--validation-input holds no documents; check it")
    more = "give more documents"
    if corpus.split is None and any(source.holds == Holds.TEXT for source in corpus.sources):
        more += ", divide text files with --split blank-lines (or lines, or a number of bytes)"
    if list(empty) == [VALIDATION]:
        raise HvdlmError(
            f"none of the {n_documents:,} documents fell into validation; {more}, a larger --validation, "
            "--validation-input FILE, or --validation 0 to do without"
        )
    if empty:
        count = "1 document is" if n_documents == 1 else f"{n_documents:,} documents are"
        raise HvdlmError(
            f"{count} too few: {len(empty)} of {n_shards} shards (validation included) got none; "
            f"{more}, or fewer --shards"
        )


def _check_options(shards: int, validation: float, workers: int, validation_inputs: Sequence[str]) -> None:
    if shards < 1:
        raise HvdlmError(f"--shards {shards}: there must be at least 1")
    if not 0 <= validation < 1:
        raise HvdlmError(f"--validation {validation}: the fraction must be at least 0 and below 1")
    if validation and validation_inputs:
        raise HvdlmError(
            f"--validation {validation} and --validation-input: give one of them; "
            "the files of --validation-input are all of validation"
        )
    if not 0 <= workers <= MOST_WORKERS:
        raise HvdlmError(
            f"--workers {workers}: give a number of processes, at most {MOST_WORKERS:,}, or 0 for one for each core"
        )
    _allow_open_files(shards)


def _allow_open_files(shards: int) -> None:
    """Raises the limit of open files to what a file for each shard needs. Raises HvdlmError if that is too high."""
    needed = shards + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise HvdlmError(
            f"--shards {shards}: a process may open {hard:,} files here, and each shard is one; "
            "give fewer, or raise the limit, ulimit -Hn"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _tokenizer_choice(name: str) -> Tokenizer | int:
    """The tokenizer that `name` selects, or the vocabulary size of one that is still to be trained."""
    if name == "byte":
        return Tokenizer.byte()
    if name.startswith("bpe:"):
        size = name.removeprefix("bpe:")
        if not size.isascii() or not size.isdigit() or not SMALLEST_VOCABULARY <= int(size) <= LARGEST_VOCABULARY:
            raise HvdlmError(
                f"--tokenizer {name}: the vocabulary must be a number of at least {SMALLEST_VOCABULARY} "
                f"and at most {LARGEST_VOCABULARY:,}"
            )
        return int(size)
    if not Path(name).exists():
        raise HvdlmError(f"--tokenizer {name}: no such file; give byte, bpe:VOCAB or the path of a tokenizer.json")
    return Tokenizer.load(Path(name))


def _check_output_outside_inputs(inputs: Sequence[str], output: Path) -> None:
    for name in inputs:
        directory = Path(name).resolve()
        if directory.is_dir() and directory in (output.resolve(), *output.resolve().parents):
            raise HvdlmError(
                f"--output {output} lies in the input directory {name}, so it would be read as input next time"
            )


def _sources_digest(sources: Sequence[Source]) -> str:
    """Identifies the input by path, size and modification time; reading it all would take as long as preparing it."""
    lines = (f"{source.path.resolve()}\0{source.size}\0{source.modified}\n" for source in sources)
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
