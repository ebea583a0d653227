"""Models of SentencePiece (byte-pair encoding and unigram) as a tokenizer of `tokenizers`.

The library sentencepiece, which comes with `pip install hvdlm[sentencepiece]`, reads the model, and has the last word:
what was made of it must give the same ids for texts of all kinds.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from hvdlm.errors import HvdlmError

_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # ModelProto.SentencePiece.Type
_FIRST_TAG = b"\x0a"  # of a ModelProto: its pieces come first
_SPACE = "▁"

# Both libraries must give the same ids of these
_PROBES = (
    "The quick brown fox, and then some: jumped over 3.14159 lazy dogs.",
    " two  spaces   three, one at the end ",
    "lines\nand\n\nmore\tof\r\nthem\n",
    "Grüße, naïve café, ﬁ ﬂ ½ Ⅷ １２３",
    "世界 你好，日本語のテキスト 한국어",
    "🙂 👩‍👩‍👧 e\u0301 \u200b \u00a0 \u3000 \x01 \x7f",
    "def f(x):\n    return {'a': [x ** 2, \"b\"]}  # 0x1F <s> </s> <unk> <0x0A>",
    "1234567890" * 3,
    "",
    "   ",
)


def from_sentencepiece(path: Path, content: bytes) -> tokenizers.Tokenizer:
    """The tokenizer of the model file `path`, which holds `content`.

    Raises HvdlmError if sentencepiece is not installed, if this is not a model of it or one of words or characters, or
    if its ids could not be reproduced.
    """
    no_model = f"{path} is not a tokenizer.json, a rank file of tiktoken or a model of SentencePiece"
    if not content.startswith(_FIRST_TAG):
        raise HvdlmError(no_model)
    if not all(map(_is_installed, ("sentencepiece", "google.protobuf"))):
        raise HvdlmError(f"{path} is read by the library sentencepiece: pip install 'hvdlm[sentencepiece]'")
    from sentencepiece import SentencePieceProcessor

    # protobuf makes the names of this module when it is imported
    proto: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2").ModelProto()
    try:
        proto.ParseFromString(content)
        if not proto.pieces:
            raise ValueError("it holds no pieces")
        processor = SentencePieceProcessor(model_proto=content)
    except Exception as error:  # of several types, by what is wrong
        raise HvdlmError(f"{no_model} ({error})") from None
    kind = proto.trainer_spec.model_type
    if kind not in (_UNIGRAM, _BPE):
        raise HvdlmError(f"{path} is a SentencePiece model of words or characters; give one of kind bpe or unigram")
    backend = _unigram(proto) if kind == _UNIGRAM else _byte_pairs(proto)
    backend.normalizer = _normalizer(proto)
    backend.pre_tokenizer = _pre_tokenizer(proto)
    backend.decoder = _decoder(proto)
    backend.add_special_tokens([piece.piece for piece in proto.pieces if piece.type == _CONTROL])
    backend.encode_special_tokens = True
    symbols = [f"a {symbol} b{symbol}{symbol}" for symbol in _symbols(proto)]
    for text in (*_PROBES, *symbols):
        if backend.encode(text, add_special_tokens=False).ids != processor.encode(text):
            raise HvdlmError(
                f"{path} has a rule that cannot be written as a tokenizer.json: {text[:40]!r} would get other tokens; "
                "give the tokenizer.json of its model, if there is one"
            )
    return backend


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that it would be in
        return False


def _symbols(proto: Any) -> list[str]:
    """Pieces that are never divided, and that text may hold; longer ones first."""
    symbols = (piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED)
    return sorted(symbols, key=len, reverse=True)


def _pre_tokenizer(proto: Any) -> pre_tokenizers.PreTokenizer:
    symbols = "|".join(map(re.escape, _symbols(proto)))
    # Text that reads like "</s>" or "<0x0A>" is text: SentencePiece does not look for these, `tokenizers` would
    reserved = [p.piece for p in proto.pieces if p.type not in (_NORMAL, _USER_DEFINED) and len(p.piece) > 1]
    cuts = "|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in reserved)
    steps = []
    if symbols:
        steps.append(pre_tokenizers.Split(Regex(symbols), behavior="isolated"))
    if cuts:
        steps.append(pre_tokenizers.Split(Regex(cuts), behavior="merged_with_previous"))
    return pre_tokenizers.Sequence(steps)


def _unigram(proto: Any) -> tokenizers.Tokenizer:
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    return tokenizers.Tokenizer(models.Unigram(pieces, proto.trainer_spec.unk_id, proto.trainer_spec.byte_fallback))


def _byte_pairs(proto: Any) -> tokenizers.Tokenizer:
    """Two pieces merge into one of a kind that text may hold; the one with the highest score first."""
    vocabulary = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    parts = {piece.piece for piece in proto.pieces if piece.type == _NORMAL}
    merges = [
        (-piece.score, (piece.piece[:cut], piece.piece[cut:]))
        for piece in proto.pieces
        if piece.type == _NORMAL
        for cut in range(1, len(piece.piece))
        if piece.piece[:cut] in parts and piece.piece[cut:] in parts
    ]
    merges.sort(key=lambda merge: merge[0])
    return tokenizers.Tokenizer(
        models.BPE(
            vocabulary,
            [pair for _, pair in merges],
            unk_token=proto.pieces[proto.trainer_spec.unk_id].piece,
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
            ignore_merges=bool(_symbols(proto)),  # a symbol, which the pre-tokenizer has isolated, is made by no merge
        )
    )


def _normalizer(proto: Any) -> normalizers.Normalizer:
    rules = proto.normalizer_spec
    steps: list[normalizers.Normalizer] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(pattern), "") for pattern in (r"\A +", r" +\z")]
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if rules.escape_whitespaces:
        steps.append(normalizers.Replace(" ", _SPACE))
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE if rules.escape_whitespaces else " "))
    return normalizers.Sequence(steps)


def _decoder(proto: Any) -> decoders.Decoder:
    steps: list[decoders.Decoder] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    return decoders.Sequence(steps)
