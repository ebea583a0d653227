"""Tokenizers: encode text to token ids and decode ids to text.

Every tokenizer, the byte one included, is a `tokenizer.json` of the Hugging Face `tokenizers` library, so that any
tool that reads that format can use the tokenizer of an hvdlm data set.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from hvdlm.data.byte_characters import byte_vocabulary
from hvdlm.data.file_errors import LFS_POINTER, is_lfs_pointer
from hvdlm.data.sentencepiece_model import from_sentencepiece
from hvdlm.data.tiktoken_ranks import from_ranks, is_rank_file
from hvdlm.errors import HvdlmError

END_OF_TEXT = "<|endoftext|>"

# Names of the token that ends a document, in published tokenizers.
KNOWN_END_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|eos|>")

# What ends a process, and is no failure of the library.
_ENDS = (KeyboardInterrupt, SystemExit, GeneratorExit)

SMALLEST_VOCABULARY = 257  # 256 byte values and the end of text: enough to encode any text
LARGEST_VOCABULARY = 1_000_000  # the library reserves memory for as many before it learns

LONGEST_RUN = 1000  # characters of a word, a number, punctuation or blanks from which `Tokenizer.train` learns at once


class Tokenizer:
    """Encodes text to token ids and decodes ids to text.

    A special token's name in a text, such as "<|endoftext|>", is encoded as ordinary text: the token that ends a
    document is only ever added by hvdlm.

    Attributes:
        vocab_size: upper bound of the token ids, exclusive.
        eos_token, eos_id: the token that ends a document, and its id.
    """

    def __init__(self, backend: tokenizers.Tokenizer, origin: str) -> None:
        """Wraps `backend`; `origin` is its name in error messages.

        Raises HvdlmError if the vocabulary has no token that ends a document.
        """
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        if getattr(backend.model, "dropout", None):
            backend.model.dropout = None  # of merges while training a tokenizer: equal text must give equal tokens
        vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        end_of_text = next((token for token in KNOWN_END_OF_TEXT if token in vocabulary), None)
        if end_of_text is None:
            raise HvdlmError(
                f"{origin} has no token that ends a document; "
                f"add one of {', '.join(KNOWN_END_OF_TEXT)} to its vocabulary"
            )
        self._backend = backend
        self._ids_are_bytes = vocabulary == byte_vocabulary() | {END_OF_TEXT: 256}
        self.eos_token, self.eos_id = end_of_text, vocabulary[end_of_text]
        self.vocab_size = max(vocabulary.values()) + 1

    @classmethod
    def byte(cls) -> Tokenizer:
        """The byte tokenizer: ids 0 to 255 are the bytes of UTF-8, 256 is the end of text."""
        backend = tokenizers.Tokenizer(models.BPE(byte_vocabulary(), []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([END_OF_TEXT])
        return cls(backend, "the byte tokenizer")

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Byte-level byte-pair encoding (Sennrich et al. 2016; Radford et al. 2019) trained on `texts`.

        The vocabulary is smaller than `vocab_size` if the texts have too few repeated pairs to merge. Runs of more than
        LONGEST_RUN letters, digits, blanks or other characters are learnt from in pieces of that length: the library
        takes a time that grows with the square of their length.
        """
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(byte_vocabulary()),
            show_progress=False,
        )
        backend.train_from_iterator((piece for text in texts for piece in _without_long_runs(text)), trainer)
        return cls(backend, "the trained tokenizer")

    @classmethod
    def open(cls, path: Path, pattern: str | None = None) -> Tokenizer:
        """Reads a `tokenizer.json`, a rank file of tiktoken or a model of SentencePiece, told apart by their content.

        `pattern`: how text is divided before it is encoded by a rank file, one of `tiktoken_ranks.ENCODINGS`.

        Raises HvdlmError if it cannot be read or is none of them.
        """
        content = _read(path)
        if is_rank_file(content):
            return cls(from_ranks(path, content, pattern), str(path))
        if pattern is not None:
            raise HvdlmError(f"--tokenizer-pattern is for rank files of tiktoken, and {path} is none")
        if content.lstrip().startswith(b"{") or path.suffix == ".json":
            return cls._of_json(path, content)
        return cls(from_sentencepiece(path, content), str(path))

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Reads a `tokenizer.json`. Raises HvdlmError if it cannot be read or is not one."""
        return cls._of_json(path, _read(path))

    @classmethod
    def _of_json(cls, path: Path, content: bytes) -> Tokenizer:
        try:
            backend = tokenizers.Tokenizer.from_str(content.decode())
        except UnicodeDecodeError as error:
            raise HvdlmError(f"cannot read the tokenizer {path}: {error}") from None
        except _ENDS:
            raise
        except BaseException as error:  # the library raises no more specific type, and panics that are no Exception
            raise HvdlmError(f"{path} is not a tokenizer.json of the tokenizers library: {error}") from None
        return cls(backend, str(path))

    def save(self, path: Path) -> None:
        """Writes the tokenizer as a `tokenizer.json`, which `load` reads."""
        path.write_bytes(self.content)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 (hex) of the file that `save` writes."""
        return hashlib.sha256(self.content).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; no special token is added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each of `texts`, in order. Raises HvdlmError for a text that the tokenizer has no tokens for."""
        if self._ids_are_bytes:  # 50 times as fast as the library
            return [list(text.encode()) for text in texts]
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except _ENDS:
            raise
        except BaseException as error:
            if len(texts) > 1:  # one by one, to find the one
                return [self.encode(text) for text in texts]
            raise HvdlmError(
                f"the tokenizer cannot encode the text that begins with {texts[0][:40]!r} ({error}); take one that "
                "encodes any text, as byte or bpe:VOCAB"
            ) from None
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens included; bytes that are not UTF-8 become U+FFFD."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=False)
        return text

    @cached_property
    def content(self) -> bytes:
        """Of the file that `save` writes."""
        text: str = self._backend.to_str(pretty=True)
        return text.encode()


# Characters of a kind that a byte-level tokenizer keeps apart from others; a run begins where another kind ends.
_LONG_RUN = re.compile(
    "|".join(rf"(?<!{kind}){kind}{{{LONGEST_RUN + 1},}}" for kind in (r"[^\W\d_]", r"\d", r"(?:[^\w\s]|_)", r"\s"))
)


def _without_long_runs(text: str) -> Iterator[str]:
    """The text in one piece, or in several if it has runs of more than LONGEST_RUN characters of one kind."""
    start = 0
    for run in _LONG_RUN.finditer(text) if _may_have_long_runs(text) else ():
        for end in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN):
            yield text[start:end]
            start = end
    yield text[start:]


def _may_have_long_runs(text: str) -> bool:
    """Much faster than to look for them: a long run fills one of these slices with blanks, or with none."""
    half = LONGEST_RUN // 2
    return any(len(text[start : start + half].split()) < 2 for start in range(0, len(text) - half + 1, half))


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise HvdlmError(f"cannot read the tokenizer {path}: {error}") from None
    if is_lfs_pointer(content):
        raise HvdlmError(f"{path} {LFS_POINTER}")
    return content
