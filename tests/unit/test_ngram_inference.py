"""`hvdlm generate --ngram`, on texts whose likeliest continuation is plain."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvdlm.cli import main


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ngram")
    for number in range(4):
        (folder / f"{number}.txt").write_text("see the tree. " * 5, encoding="utf-8")
    words = ["--input", str(folder / "*.txt"), "--output", str(folder / "data"), "--validation", "0", "--shards", "1"]
    assert main(["prepare", *words]) == 0
    return folder / "data"


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("5", "see the tree. see the tr"),
        ("1", "see" + 10 * "e"),
    ],
)
def test_the_likeliest_tokens(order: str, expected: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(data), "--ngram", order, "--prompt", "see", "--temperature", "0", "--tokens", str(len(expected) - 3)]
    capsys.readouterr()
    assert main(["generate", *words]) == 0
    assert capsys.readouterr().out == f"{expected}\n"


def test_equal_seeds_give_equal_texts(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        capsys.readouterr()
        assert main(["generate", str(data), "--ngram", "3", "--seed", seed, "--tokens", "60"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("order", ["0", "6"])
def test_an_order_that_there_is_not(order: str, data: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(["generate", str(data), "--ngram", order]) == 1
    assert f"--ngram {order}: give an order from 1 to 5" in caplog.text
