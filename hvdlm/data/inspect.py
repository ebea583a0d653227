"""`hvdlm inspect`: prints what a data set contains, and checks whether it is complete and undamaged."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hvdlm.data.file_errors import UnreadableFileError, unreadable
from hvdlm.data.manifest import TOKENIZER, Manifest, ShardRecord
from hvdlm.data.mixture import Mixture
from hvdlm.data.shard import DataSet, check_contents, check_shard
from hvdlm.errors import HvdlmError


def inspect(path: Path, verify: bool) -> None:
    """Prints a table of the data set `path`; with `verify`, reads every token and checks every hash.

    Raises HvdlmError if `path` is not a data set or is damaged; with `verify`, after listing every damaged file.
    """
    manifest = Manifest.load(path)
    console = Console()
    if verify:
        damage = _find_damage(path, manifest)
        for sentence in damage:
            console.print(f"damaged: {sentence}", style="red", markup=False, highlight=False, soft_wrap=True)
        if damage:
            raise HvdlmError(f"{path} is damaged: {len(damage)} of its files are bad (listed above); prepare it again")
    else:
        DataSet(path)
    console.print(_table(path, manifest))
    if manifest.sources:
        console.print(_mixture_table(manifest))
    made_from = ", ".join(f"{name} {value}" for name, value in manifest.recipe.items())
    for line in (
        f"vocabulary {manifest.vocab_size:,}, end of text {manifest.eos_id}",
        f"fingerprint {manifest.fingerprint}",
        f"made with {made_from}",
        *(["every token and every hash is as it was written"] if verify else []),
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(path: Path, manifest: Manifest) -> Table:
    shards = [*manifest.train, *manifest.validation]
    table = Table(title=str(path), box=box.SIMPLE, show_footer=True)
    table.add_column("shard", "all")
    for name in ("tokens", "documents", "text MiB", "file MiB", "bytes/token"):
        table.add_column(name, justify="right", no_wrap=True)
    for shard in shards:
        table.add_row(shard.file, *_figures([shard]))
    for column, total in zip(table.columns[1:], _figures(shards), strict=True):
        column.footer = total
    return table


def _mixture_table(manifest: Manifest) -> Table:
    """Of each source its share, and how many tokens a run trains on, of all sources, in an epoch of it."""
    table = Table(box=box.SIMPLE)
    table.add_column("source", overflow="fold")
    for name in ("weight", "share", "shards", "tokens", "run tokens/epoch"):
        table.add_column(name, justify="right", no_wrap=True)
    rest = iter(manifest.train)
    shares = Mixture([source.weight for source in manifest.sources]).shares
    for source, share in zip(manifest.sources, shares, strict=True):
        shards = list(itertools.islice(rest, source.shards))
        tokens = sum(shard.n_tokens for shard in shards)
        figures = f"{source.weight:g}", f"{share:.2%}", f"{source.shards}", f"{tokens:,}"
        table.add_row(escape(source.path), *figures, f"{tokens / share:,.0f}")
    return table


def _figures(shards: list[ShardRecord]) -> list[str]:
    """The cells of a table row with the totals of these shards."""
    tokens, documents = sum(shard.n_tokens for shard in shards), sum(shard.n_docs for shard in shards)
    text, size = sum(shard.n_bytes for shard in shards), sum(shard.size for shard in shards)
    ratio = text / max(tokens - documents, 1)  # each document ends with a token that stands for no text
    return [f"{tokens:,}", f"{documents:,}", f"{text / 2**20:,.1f}", f"{size / 2**20:,.1f}", f"{ratio:.2f}"]


def _find_damage(path: Path, manifest: Manifest) -> list[str]:
    """One sentence for each file that is missing or changed since it was written.

    Raises UnreadableFileError at the first that the system does not let this process read.
    """
    damage: list[str] = []
    try:
        if hashlib.sha256((path / TOKENIZER).read_bytes()).hexdigest() != manifest.tokenizer_sha256:
            damage.append(f"{path / TOKENIZER} is not the tokenizer that the tokens were made with")
    except FileNotFoundError as error:
        damage.append(f"{path / TOKENIZER} cannot be read ({error.strerror})")
    except OSError as error:
        raise unreadable(path / TOKENIZER, error) or HvdlmError(f"{path / TOKENIZER}: {error.strerror}") from None
    for shards in (manifest.train, manifest.validation):
        for index, record in enumerate(shards):
            try:
                check_shard(path, manifest, shards, index)
                check_contents(path, record)
            except UnreadableFileError:
                raise  # that says nothing of what the file holds
            except HvdlmError as error:
                damage.append(str(error))
    return damage
