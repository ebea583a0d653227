"""`hvdlm prepare`: turns text files into a data set of tokens."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdlm.data.assignment import VALIDATION, ShardAssignment
from hvdlm.data.documents import BadDocument, Block, Source, find_sources, read_blocks, read_documents
from hvdlm.data.manifest import MANIFEST, TOKENIZER, VALIDATION_DIRECTORY, Manifest
from hvdlm.data.progress import InputProgress
from hvdlm.data.shard import DataSet
from hvdlm.data.shard_writer import ShardWriter, token_dtype
from hvdlm.data.staging import staged
from hvdlm.data.text_sample import sample_training_text
from hvdlm.data.tokenizer import SMALLEST_VOCABULARY, Tokenizer
from hvdlm.data.worker_pool import WorkerPool
from hvdlm.errors import HvdlmError

Recipe = dict[str, str | int | float]


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
) -> None:
    """Writes the data set `output`, complete or not at all; does nothing if it exists with the same recipe.

    The tokens depend on the input, its order, the tokenizer, `shards`, `validation` and `seed`, not on `workers`.
    Memory holds a few MiB and a few documents for each worker, however large the input.

    Args:
        inputs: files (one document each, or JSON Lines by their suffix), directories, globs, or python-stdlib.
        output: directory to write.
        tokenizer: `byte`, `bpe:VOCAB` (trained on a sample of the training documents), or a tokenizer.json.
        shards: training shards.
        validation: fraction of the documents, at least 0 and below 1.
        workers: number of processes; 0 for one for each core.
        text_key: key of the text in a JSON Lines record.
        seed: of the assignment of documents to shards and validation.
        skip_bad: leave out bad documents and count them, instead of stopping at the first.

    Raises HvdlmError for bad input or options, naming the file and line.
    """
    _check_options(shards, validation, workers)
    choice = _tokenizer_choice(tokenizer)
    _check_output_outside_inputs(inputs, output)
    sources = find_sources(inputs)
    recipe: Recipe = {
        "tokenizer": tokenizer if isinstance(choice, int) or tokenizer == "byte" else f"file {choice.sha256}",
        "shards": shards,
        "validation": validation,
        "text key": text_key,
        "seed": seed,
        "bad documents": "left out" if skip_bad else "refused",
        "input files": _sources_digest(sources),
    }
    if _is_prepared(output, recipe):
        print(f"{output} is there already, made from the same input with the same arguments")
        return
    bad = _BadDocuments(skip_bad)
    assignment = ShardAssignment(seed, validation, shards)
    with staged(output) as directory, WorkerPool(workers or os.cpu_count() or 1) as pool:
        if isinstance(choice, int):
            texts = sample_training_text(sources, pool, text_key, assignment, bad.refuse)
            choice = Tokenizer.train(texts, choice)
        choice.save(directory / TOKENIZER)
        tokenise = partial(_tokenise, directory / TOKENIZER, choice.sha256, text_key, assignment)
        with _shard_writers(directory, choice, assignment) as writers:
            with InputProgress("tokenising", sum(source.size for source in sources)) as progress:
                for block in pool.map(tokenise, read_blocks(sources)):
                    bad.refuse(block.bad)
                    bad.count(block.bad)
                    for document in block.documents:
                        writers[document.shard].append(document.tokens, document.n_bytes)
                    progress.advance(block.input_bytes)
            _check_filled(writers)
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
    print(_summary(output, manifest))
    if bad.found:
        print(f"left out {bad.found:,} bad documents; the first: {bad.first}")


@dataclass(frozen=True)
class _Document:
    shard: int
    tokens: npt.NDArray[Any]  # (n,), ending with the end of text
    n_bytes: int


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
        documents.append(_Document(assignment.shard(content), tokens, len(content)))
    return _TokenisedBlock(documents, bad, block.input_bytes)


@lru_cache(maxsize=1)
def _load_once(path: Path, sha256: str) -> Tokenizer:
    """`sha256` keeps apart different tokenizers that one process reads from the same path, as tests do."""
    return Tokenizer.load(path)


class _BadDocuments:
    """Raises at the first bad document, or counts them if `skip` is set."""

    def __init__(self, skip: bool) -> None:
        self._skip = skip
        self.found = 0
        self.first = ""

    def refuse(self, bad: Sequence[BadDocument]) -> None:
        if bad and not self._skip:
            raise HvdlmError(
                f"{bad[0].where} {bad[0].problem}; correct the input, or leave bad documents out with --skip-bad"
            )

    def count(self, bad: Sequence[BadDocument]) -> None:
        if bad and not self.found:
            self.first = f"{bad[0].where} {bad[0].problem}"
        self.found += len(bad)


@contextmanager
def _shard_writers(
    directory: Path, tokenizer: Tokenizer, assignment: ShardAssignment
) -> Iterator[dict[int, ShardWriter]]:
    """A writer for every shard, by the shard's number or VALIDATION."""
    files = {index: (f"shard_{index:05}.h5", index, assignment.shards) for index in range(assignment.shards)}
    if assignment.validation:
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


def _check_filled(writers: dict[int, ShardWriter]) -> None:
    documents = sum(writer.n_docs for writer in writers.values())
    if not documents:
        raise HvdlmError("the input holds no documents; check --input")
    empty = [shard for shard, writer in writers.items() if not writer.n_docs]
    if empty == [VALIDATION]:
        raise HvdlmError(
            f"none of the {documents:,} documents fell into validation; "
            "give more documents, a larger --validation, or --validation 0 to do without"
        )
    if empty:
        raise HvdlmError(
            f"{documents:,} documents are too few: {len(empty)} of {len(writers)} shards (validation included) got "
            "none; give more documents (a text file is one, a JSON Lines record is one), or fewer --shards"
        )


def _check_options(shards: int, validation: float, workers: int) -> None:
    if shards < 1:
        raise HvdlmError(f"--shards {shards}: there must be at least 1")
    if not 0 <= validation < 1:
        raise HvdlmError(f"--validation {validation}: the fraction must be at least 0 and below 1")
    if workers < 0:
        raise HvdlmError(f"--workers {workers}: give a number of processes, or 0 for one for each core")


def _tokenizer_choice(name: str) -> Tokenizer | int:
    """The tokenizer that `name` selects, or the vocabulary size of one that is still to be trained."""
    if name == "byte":
        return Tokenizer.byte()
    if name.startswith("bpe:"):
        size = name.removeprefix("bpe:")
        if not size.isascii() or not size.isdigit() or int(size) < SMALLEST_VOCABULARY:
            raise HvdlmError(f"--tokenizer {name}: the vocabulary must be a number of at least {SMALLEST_VOCABULARY}")
        return int(size)
    if not Path(name).is_file():
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
    if output.is_dir() and not any(output.iterdir()):
        return False
    if not (output / MANIFEST).exists():
        if output.exists():
            raise HvdlmError(f"{output} exists and is not a data set; {remedy}")
        return False
    DataSet(output)
    found = Manifest.load(output).recipe
    differing = [
        f"{name} (there {found.get(name)}, here {recipe[name]})" for name in recipe if found.get(name) != recipe[name]
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
