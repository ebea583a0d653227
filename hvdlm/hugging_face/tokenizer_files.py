"""The files of a tokenizer as transformers reads and writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import ByteLevelBPETokenizer

from hvdlm.data.tokenizer import END_OF_TEXT, KNOWN_END_OF_TEXT, Tokenizer
from hvdlm.errors import HvdlmError


def write_tokenizer(directory: Path, tokenizer: Tokenizer, context_length: int) -> None:
    """tokenizer.json and tokenizer_config.json, of a class that transformers has for any tokenizer.json."""
    tokenizer.save(directory / "tokenizer.json")
    end = tokenizer.eos_token
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_tokenizer(directory: Path) -> Tokenizer:
    """Of tokenizer.json, of GPT-2's vocab.json and merges.txt, or of tokenizer.model, which is one of SentencePiece or
    ranks of tiktoken. Raises HvdlmError if there is none of them."""
    if (directory / "tokenizer.json").exists():
        return Tokenizer.load(directory / "tokenizer.json")
    vocabulary, merges = directory / "vocab.json", directory / "merges.txt"
    if vocabulary.exists() and merges.exists():
        try:
            backend = ByteLevelBPETokenizer.from_file(str(vocabulary), str(merges))._tokenizer
        except Exception as error:  # the library raises nothing more specific
            raise HvdlmError(f"cannot read {vocabulary} and {merges}: {error}") from None
        backend.add_special_tokens([END_OF_TEXT])
        return Tokenizer(backend, str(vocabulary))
    if (directory / "tokenizer.model").exists():
        return Tokenizer.open(directory / "tokenizer.model")
    raise HvdlmError(
        f"{directory} holds no tokenizer.json: transformers writes one with "
        f"AutoTokenizer.from_pretrained(...).save_pretrained(...); it must know one of {', '.join(KNOWN_END_OF_TEXT)}"
    )
