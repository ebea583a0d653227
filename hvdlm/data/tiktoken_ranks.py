"""Rank files of tiktoken, such as cl100k_base.tiktoken or Llama 3's tokenizer.model, as a tokenizer of `tokenizers`.

Each line is a token in base64 and its rank, which is its id. To merge the adjacent pair that makes the token of the
least rank, as tiktoken does, is byte-pair encoding with the merges in the order of the tokens that they make. The file
says neither how text is divided before that nor which special tokens there are: published files are known by their
number of ranks.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from hvdlm.data.byte_characters import byte_vocabulary
from hvdlm.errors import HvdlmError

_LARGEST_RANK = 1_000_000

_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?")

_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CL100K = _LLAMA3.replace(r"|\s*[\r\n]+", r"|\s+\z|\s*[\r\n]+")  # blanks at the end of a text are not divided
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Encoding:
    """What a rank file does not say.

    Attributes:
        ranks: how many the published file has.
        pattern: what text is divided into before it is encoded, as a regular expression.
        special: ids of special tokens.
        size: ids in all, where there are more than that.
    """

    ranks: int
    pattern: str
    special: dict[str, int] = field(default_factory=dict)
    size: int = 0


ENCODINGS = {
    "gpt2": Encoding(50_256, _GPT2, {"<|endoftext|>": 50_256}),
    "p50k_base": Encoding(50_280, _GPT2, {"<|endoftext|>": 50_256}),
    "cl100k_base": Encoding(
        100_256,
        _CL100K,
        {
            "<|endoftext|>": 100_257,
            "<|fim_prefix|>": 100_258,
            "<|fim_middle|>": 100_259,
            "<|fim_suffix|>": 100_260,
            "<|endofprompt|>": 100_276,
        },
    ),
    "o200k_base": Encoding(199_998, _O200K, {"<|endoftext|>": 199_999, "<|endofprompt|>": 200_018}),
    "llama3": Encoding(
        128_000,
        _LLAMA3,
        {
            "<|begin_of_text|>": 128_000,
            "<|end_of_text|>": 128_001,
            "<|start_header_id|>": 128_006,
            "<|end_header_id|>": 128_007,
            "<|eot_id|>": 128_009,
        },
        size=128_256,
    ),
}


def is_rank_file(content: bytes) -> bool:
    """Whether a file begins as one of tiktoken does."""
    return _LINE.fullmatch(content.partition(b"\n")[0]) is not None


def from_ranks(path: Path, content: bytes, pattern: str | None) -> tokenizers.Tokenizer:
    """The tokenizer of the rank file `path`, which holds `content`.

    `pattern`: one of ENCODINGS, whose pattern divides text; None for a published file. A file that is not the published
    one of its pattern has one special token, the end of text, behind its ranks.

    Raises HvdlmError if the file is damaged, or is none of the published ones and `pattern` is None.
    """
    ranks = _read(path, content)
    published = next((name for name, each in ENCODINGS.items() if each.ranks == len(ranks)), None)
    if pattern is None and published is None:
        raise HvdlmError(
            f"{path} has {len(ranks):,} ranks, as no encoding has that is known here; "
            f"say with --tokenizer-pattern how it divides text: {', '.join(ENCODINGS)}"
        )
    encoding = ENCODINGS[pattern or str(published)]
    special, size = encoding.special, encoding.size
    if encoding.ranks != len(ranks):
        special, size = {"<|endoftext|>": max(ranks.values()) + 1}, 0
    characters = {value: character for character, value in byte_vocabulary().items()}
    names = {token: "".join(map(characters.__getitem__, token)) for token in ranks}
    vocabulary = {names[token]: rank for token, rank in ranks.items()} | special
    taken = set(vocabulary.values())
    unused = {f"<|unused_{id_}|>": id_ for id_ in range(max(max(taken) + 1, size)) if id_ not in taken}
    merges = [
        (names[token[:cut]], names[token[cut:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary | unused, merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(encoding.pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([*special, *unused])
    return backend


def _read(path: Path, content: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        token, _, rank = line.partition(b" ")
        try:
            ranks[base64.b64decode(token, validate=True)] = _rank(rank)
        except (binascii.Error, ValueError):
            raise HvdlmError(
                f"{path}:{number} is not a token in base64 and its rank, as tiktoken writes them"
            ) from None
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise HvdlmError(f"{path} has no rank for the byte {missing[0]:#04x}, so it is cut short or none of tiktoken")
    if max(ranks.values()) > _LARGEST_RANK:
        raise HvdlmError(f"{path} has the rank {max(ranks.values())}: damaged, for published files end at 200,000")
    if len(set(ranks.values())) < len(ranks):
        raise HvdlmError(f"{path} gives one rank to two tokens")
    return ranks


def _rank(text: bytes) -> int:
    """Raises ValueError if it is no number in digits."""
    if not text.isdigit():
        raise ValueError(f"{text!r} is no rank")
    return int(text)
