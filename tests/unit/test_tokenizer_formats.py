"""Rank files of tiktoken and models of SentencePiece: token ids are those of these libraries."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import tiktoken
import tiktoken_ext.openai_public
from forked import hvdlm
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from test_prepare import make_texts, stored_documents, write_lines
from tiktoken._educational import bpe_train
from transformers import AutoTokenizer

from hvdlm.data.tiktoken_ranks import ENCODINGS
from hvdlm.data.tokenizer import Tokenizer
from hvdlm.errors import HvdlmError
from hvdlm.hugging_face.tokenizer_files import read_tokenizer, write_tokenizer

ROOT = Path(__file__).parents[2]

TEXTS = [
    "",
    " ",
    "plain words, don't you'LL it's\n",
    "  spaces \t and\r\nline ends\n\n   \n",
    "1 22 333 4444 55555 3.14 １２３ ½",
    "Grüße, naïve café, 世界 你好 日本語 한국어",
    "🙂 👩‍👩‍👧 \u00a0\u3000\u2028 \x01\x1c\x7f\x85",
    "def f(x):\n\treturn {'a': [x ** 2]}  # HTTPServer/XMLHttp\n",
    "a literal <|endoftext|> or </s> or <unk> or <0x0A> is text",
    "Ǆungla ŒUVRE ß ſ'ſ",
]


def random_texts(count: int) -> list[str]:
    draw = random.Random(0)
    alphabet = list("abcdeABC   \n\n\t\r'sStT.,!?/<>|_0123456é世🙂\u00a0")
    return ["".join(draw.choices(alphabet, k=draw.randrange(40))) for _ in range(count)]


def corpus() -> str:
    return "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("data.md", "faults.md"))


# How tiktoken itself calls the encodings
OF_TIKTOKEN: dict[str, Callable[[], dict[str, object]]] = {
    "gpt2": tiktoken_ext.openai_public.r50k_base,
    "p50k_base": tiktoken_ext.openai_public.p50k_base,
    "cl100k_base": tiktoken_ext.openai_public.cl100k_base,
    "o200k_base": tiktoken_ext.openai_public.o200k_base,
}
# Llama 3's, as its authors' tokenizer.py has it
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def of_tiktoken(name: str, ranks: dict[bytes, int], monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What tiktoken knows of an encoding, with these ranks in the place of those that it would download."""
    monkeypatch.setattr(tiktoken_ext.openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks)
    return OF_TIKTOKEN[name]() if name != "llama3" else {"pat_str": LLAMA3}


def write_ranks(path: Path, ranks: dict[bytes, int]) -> Path:
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return path


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    """600 ranks, learnt by tiktoken's own code."""
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    learnt: dict[bytes, int] = bpe_train(data=corpus()[:30_000], vocab_size=600, pat_str=pattern, visualise=None)
    return learnt


@pytest.mark.parametrize("name", ENCODINGS)
def test_ids_are_those_of_tiktoken(
    name: str, ranks: dict[bytes, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern = of_tiktoken(name, ranks, monkeypatch)["pat_str"]
    expected = tiktoken.Encoding("x", pat_str=str(pattern), mergeable_ranks=ranks, special_tokens={})
    tokenizer = Tokenizer.open(write_ranks(tmp_path / "own.tiktoken", ranks), name)
    assert (tokenizer.eos_token, tokenizer.eos_id, tokenizer.vocab_size) == ("<|endoftext|>", 600, 601)
    for text in [*TEXTS, *random_texts(3000), corpus()]:
        assert tokenizer.encode(text) == expected.encode_ordinary(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("name", "count"), [("gpt2", 50_256), ("p50k_base", 50_280), ("cl100k_base", 100_256), ("o200k_base", 199_998)]
)
def test_published_files_are_known_by_their_number_of_ranks(
    name: str, count: int, ranks: dict[bytes, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file with as many tokens, most of them without meaning; in p50k_base no rank is 50256."""
    many = dict(ranks)
    numbers = (number for number in range(600, count + 1) if (name, number) != ("p50k_base", 50_256))
    for number in numbers:
        if len(many) < count:
            many[b"\x00" + number.to_bytes(3, "big")] = number
    said = of_tiktoken(name, many, monkeypatch)
    special = said["special_tokens"]
    assert isinstance(special, dict)
    tokenizer = Tokenizer.open(write_ranks(tmp_path / "published", many))
    library = tiktoken.Encoding("x", pat_str=str(said["pat_str"]), mergeable_ranks=many, special_tokens=special)
    assert tokenizer.eos_id == library.eot_token
    assert tokenizer.vocab_size == library.n_vocab
    for text, id_ in special.items():
        assert tokenizer.decode([id_]) == text
    for text in [*TEXTS, *random_texts(300)]:
        assert tokenizer.encode(text) == library.encode_ordinary(text)


def test_llama_3_is_known_by_its_number_of_ranks(ranks: dict[bytes, int], tmp_path: Path) -> None:
    """Its authors add 256 special tokens, of which the second ends a text."""
    many = ranks | {b"\x00" + number.to_bytes(3, "big"): number for number in range(600, 128_000)}
    tokenizer = Tokenizer.open(write_ranks(tmp_path / "tokenizer.model", many))
    assert (tokenizer.eos_token, tokenizer.eos_id, tokenizer.vocab_size) == ("<|end_of_text|>", 128_001, 128_256)
    assert tokenizer.decode([128_000, 128_009]) == "<|begin_of_text|><|eot_id|>"
    library = tiktoken.Encoding("x", pat_str=LLAMA3, mergeable_ranks=many, special_tokens={})
    for text in TEXTS:
        assert tokenizer.encode(text) == library.encode_ordinary(text)


def train_sentencepiece(path: Path, **options: object) -> SentencePieceProcessor:
    stream = io.BytesIO()
    shared = {"vocab_size": 700, "character_coverage": 0.999, "minloglevel": 2}
    SentencePieceTrainer.train(
        sentence_iterator=iter(corpus().splitlines()), model_writer=stream, **{**shared, **options}
    )
    path.write_bytes(stream.getvalue())
    return SentencePieceProcessor(model_proto=stream.getvalue())


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("byte_fallback", [True, False])
@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"add_dummy_prefix": False},
        {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},  # as Llama 2
        {  # as Gemma
            "user_defined_symbols": ["<sep>", "▁▁", "▁▁▁", "\n"],
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "add_dummy_prefix": False,
        },
    ],
    ids=["nmt_nfkc", "no prefix", "identity", "symbols"],
)
def test_ids_are_those_of_sentencepiece(
    kind: str, byte_fallback: bool, rules: dict[str, object], tmp_path: Path
) -> None:
    path = tmp_path / "own.model"
    if kind == "unigram" and "user_defined_symbols" in rules:
        rules = rules | {"user_defined_symbols": ["<sep>"]}  # of those that overlap it takes the most likely sequence
    library = train_sentencepiece(path, model_type=kind, byte_fallback=byte_fallback, **rules)
    tokenizer = Tokenizer.open(path)
    assert (tokenizer.eos_token, tokenizer.eos_id) == ("</s>", library.eos_id())
    assert tokenizer.vocab_size == library.vocab_size()
    for text in [*TEXTS, *random_texts(2000), "a<sep>b <sep><sep>"]:
        assert tokenizer.encode(text) == library.encode(text), text
        assert library.eos_id() not in tokenizer.encode(text)
    for text in corpus().splitlines()[:50] if byte_fallback else ():  # an unknown piece has no text
        assert tokenizer.decode(tokenizer.encode(text)) == library.decode(library.encode(text))


def test_a_rule_that_a_tokenizer_json_cannot_have_is_refused(tmp_path: Path) -> None:
    train_sentencepiece(tmp_path / "own.model", treat_whitespace_as_suffix=True)
    with pytest.raises(
        HvdlmError, match=r"own\.model has a rule that cannot be written as a tokenizer\.json: 'The qui"
    ):
        Tokenizer.open(tmp_path / "own.model")
    train_sentencepiece(tmp_path / "own.model", model_type="char")
    with pytest.raises(HvdlmError, match=r"own\.model is a SentencePiece model of words or characters; give one of"):
        Tokenizer.open(tmp_path / "own.model")


@pytest.mark.parametrize("kind", ["tiktoken", "sentencepiece"])
def test_a_data_set_and_an_export_have_it_as_tokenizer_json(kind: str, ranks: dict[bytes, int], tmp_path: Path) -> None:
    if kind == "tiktoken":
        library = tiktoken.Encoding("x", pat_str=LLAMA3, mergeable_ranks=ranks, special_tokens={})
        encode = library.encode_ordinary
        write_ranks(tmp_path / "tokenizer.model", ranks)
        words: tuple[str, ...] = ("--tokenizer-pattern", "llama3")
    else:
        rules = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
        encode = train_sentencepiece(tmp_path / "tokenizer.model", model_type="bpe", byte_fallback=True, **rules).encode
        words = ()
    texts = [text for text in make_texts(100) if not text.startswith(" ")]
    write_lines(tmp_path / "a.jsonl", texts)
    command = ("prepare", "--input", "a.jsonl", "--output", "out", "--tokenizer", "tokenizer.model", *words)
    done = hvdlm(*command, "--shards", "1", "--validation", "0.1", "--workers", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "is there already" in hvdlm(*command, "--shards", "1", "--validation", "0.1", cwd=tmp_path).stdout
    assert sorted(text for shard in stored_documents(tmp_path / "out").values() for text in shard) == sorted(texts)
    write_tokenizer(tmp_path, Tokenizer.load(tmp_path / "out" / "tokenizer.json"), 64)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    for text in texts:
        assert exported.encode(text, add_special_tokens=False) == encode(text)
    if kind == "sentencepiece":  # what `hvdlm import` reads where there is nothing else
        (tmp_path / "tokenizer.json").unlink()
        assert read_tokenizer(tmp_path).encode(texts[0]) == encode(texts[0])


@pytest.mark.parametrize(
    ("content", "words", "sentence"),
    [
        (b"AA== 0\n", [], "own has no rank for the byte 0x01, so it is cut short or none of tiktoken"),
        (b"AA== 0\nno base64\n", [], "own:2 is not a token in base64 and its rank, as tiktoken writes them"),
        (b"\x0a\x0etext", [], "own is not a tokenizer.json, a rank file of tiktoken or a model of SentencePiece"),
        (b"once upon a time", [], "own is not a tokenizer.json, a rank file of tiktoken or a model of SentencePiece"),
        (b"", [], "own is not a tokenizer.json, a rank file of tiktoken or a model of SentencePiece"),
        (b"{}", ["--tokenizer-pattern", "gpt2"], "--tokenizer-pattern is for rank files of tiktoken, and own is none"),
        (b"{", [], "own is not a tokenizer.json of the tokenizers library"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused_in_a_sentence(
    content: bytes, words: list[str], sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "own").write_bytes(content)
    write_lines(tmp_path / "a.jsonl", ["text"])
    done = hvdlm("prepare", "--input", "a.jsonl", "--output", "out", "--tokenizer", "own", *words, cwd=tmp_path)
    assert done.returncode == 1
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_ranks_of_an_unknown_number_need_a_pattern(ranks: dict[bytes, int], tmp_path: Path) -> None:
    path = write_ranks(tmp_path / "own.tiktoken", ranks)
    with pytest.raises(
        HvdlmError, match=r"has 600 ranks, as no encoding has that is known here; say with --tokenizer-p"
    ):
        Tokenizer.open(path)
    write_ranks(path, {**ranks, b"\x00\x00\x00": 5})
    no_line, too_large = r"601 is not a token in base64 and its rank", "has the rank 999999999: damaged"
    good = write_ranks(tmp_path / "good.tiktoken", ranks).read_text()
    for rank, said in (("-5", no_line), ("1_0", no_line), ("999999999", too_large)):
        (tmp_path / "bad.tiktoken").write_text(f"{good}cXVpeHh5eg== {rank}\n")
        with pytest.raises(HvdlmError, match=said):
            Tokenizer.open(tmp_path / "bad.tiktoken", "gpt2")
    with pytest.raises(HvdlmError, match=r"own\.tiktoken gives one rank to two tokens"):
        Tokenizer.open(path, "gpt2")


def test_patterns_of_the_command_line_are_those_that_are_known(tmp_path: Path) -> None:
    done = hvdlm("prepare", "--help", cwd=tmp_path)
    assert "{" + ",".join(ENCODINGS) + "}" in "".join(done.stdout.split())


def test_without_sentencepiece_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.model").write_bytes(b"\x0a")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(HvdlmError, match=r"is read by the library sentencepiece: pip install 'hvdlm\[sentencepiece\]'"):
        Tokenizer.open(tmp_path / "own.model")
