"""`hvdlm prepare`: the data set it writes, complete or not at all, and its errors for bad input."""

from __future__ import annotations

import errno
import gzip
import hashlib
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import psutil
import pytest
from forked import hvdlm

from hvdlm.data.prepare import prepare
from hvdlm.data.shard import DataSet
from hvdlm.data.tokenizer import Tokenizer
from hvdlm.errors import HvdlmError

WORDS = ("ring", "rank", "shard", "bucket", "residual", "Grüße", "🙂", "\n")


def make_texts(count: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return [f"document {i} " + " ".join(generator.choices(WORDS, k=generator.randint(1, 60))) for i in range(count)]


def write_lines(path: Path, texts: list[str]) -> None:
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    path.write_bytes(gzip.compress(content.encode(), mtime=0) if path.suffix == ".gz" else content.encode())


def stored_documents(directory: Path) -> dict[str, list[str]]:
    """The decoded documents of each shard, by its file, cut at the shard's document offsets."""
    tokenizer = Tokenizer.load(directory / "tokenizer.json")
    documents: dict[str, list[str]] = {}
    for path in sorted(directory.rglob("*.h5")):
        with h5py.File(path) as file:
            tokens, offsets = file["tokens"][:].tolist(), file["doc_offsets"][:].tolist()
        assert offsets[0] == 0
        assert offsets[-1] == len(tokens)
        bounds = list(itertools.pairwise(offsets))
        assert all(tokens[end - 1] == tokenizer.eos_id for _, end in bounds)
        assert tokens.count(tokenizer.eos_id) == len(bounds)
        documents[str(path.relative_to(directory))] = [tokenizer.decode(tokens[a : b - 1]) for a, b in bounds]
    return documents


def contents(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_every_document_is_stored_once_in_input_order(tmp_path: Path) -> None:
    texts = make_texts(300)
    (tmp_path / "folder" / "deeper").mkdir(parents=True)
    for i in range(100):
        (tmp_path / "folder" / f"{i:03}.txt").write_text(texts[i], newline="")
    (tmp_path / "folder" / "099.txt").unlink()
    (tmp_path / "folder" / "099.txt.gz").write_bytes(gzip.compress(texts[99].encode(), mtime=0))
    (tmp_path / "folder" / ".hidden").write_bytes(b"\0")
    write_lines(tmp_path / "folder" / "deeper" / "a.jsonl", texts[100:150])
    write_lines(tmp_path / "b.jsonl.gz", texts[150:250])
    write_lines(tmp_path / "c1.ndjson", texts[250:280])
    write_lines(tmp_path / "c2.ndjson", texts[280:])
    done = hvdlm(
        "prepare", "--input", "folder", "b.jsonl.gz", "c?.ndjson", "b.jsonl.gz",
        "--output", "out", "--shards", "3", "--validation", "0.2", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    documents = stored_documents(tmp_path / "out")
    assert list(documents) == ["shard_00000.h5", "shard_00001.h5", "shard_00002.h5", "val/shard_00000.h5"]
    order = {text: number for number, text in enumerate(texts)}
    assert sorted(order[text] for shard in documents.values() for text in shard) == list(range(300))
    for shard in documents.values():
        assert [order[text] for text in shard] == sorted(order[text] for text in shard)
    # 300 documents at 0.2: 60 expected, standard deviation 7.
    assert 30 < len(documents["val/shard_00000.h5"]) < 90
    data = DataSet(tmp_path / "out")
    stored = [*data.train.shards, *data.validation.shards]
    assert sum(shard.n_bytes for shard in stored) == sum(len(text.encode()) for text in texts)
    assert sum(shard.n_tokens for shard in stored) == sum(len(text.encode()) + 1 for text in texts)


def test_equal_documents_share_a_shard(tmp_path: Path) -> None:
    texts = make_texts(100)
    write_lines(tmp_path / "a.jsonl", texts + texts[::-1])
    done = hvdlm("prepare", "--input", "a.jsonl", "--output", "out", "--validation", "0.3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shards = stored_documents(tmp_path / "out").values()
    assert sum(map(len, shards)) == 200
    assert sum(len(set(shard)) for shard in shards) == 100


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:400"])
def test_workers_do_not_change_a_byte(tokenizer: str, tmp_path: Path) -> None:
    texts = make_texts(9000)  # 2 MiB, so several blocks
    write_lines(tmp_path / "a.jsonl", texts[:8000])
    write_lines(tmp_path / "b.jsonl.gz", texts[8000:])
    for workers in ("1", "3"):
        done = hvdlm(
            "prepare", "--input", "a.jsonl", "b.jsonl.gz", "--output", f"out{workers}", "--workers", workers,
            "--tokenizer", tokenizer, "--shards", "2", cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out1") == contents(tmp_path / "out3")


def test_an_option_for_input_may_be_given_twice(tmp_path: Path) -> None:
    texts = make_texts(40)
    for number in range(4):
        write_lines(tmp_path / f"{number}.jsonl", texts[number::4])
    held_out = ("--validation-input", "2.jsonl", "--validation-input", "3.jsonl")
    options = ("--output", "out", "--shards", "1", "--workers", "1")
    done = hvdlm("prepare", "--input", "0.jsonl", "--input", "1.jsonl", *held_out, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert stored_documents(tmp_path / "out") == {
        "shard_00000.h5": texts[0::4] + texts[1::4],
        "val/shard_00000.h5": texts[2::4] + texts[3::4],
    }


def test_seed_changes_the_split(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", make_texts(200))
    for seed in ("0", "1"):
        arguments = ("--output", f"out{seed}", "--seed", seed, "--validation", "0.1")
        assert hvdlm("prepare", "--input", "a.jsonl", *arguments, cwd=tmp_path).returncode == 0
    assert stored_documents(tmp_path / "out0") != stored_documents(tmp_path / "out1")


def test_without_validation(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", make_texts(100))
    assert hvdlm("prepare", "--input", "a.jsonl", "--output", "out", "--validation", "0", cwd=tmp_path).returncode == 0
    assert len(DataSet(tmp_path / "out").validation.shards) == 0


def test_preparing_again_changes_nothing_and_other_arguments_are_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", make_texts(100))
    command = ("prepare", "--input", "a.jsonl", "--output", "out", "--validation", "0.1")
    assert hvdlm(*command, cwd=tmp_path).returncode == 0
    before = contents(tmp_path / "out")
    again = hvdlm(*command, "--workers", "2", cwd=tmp_path)
    assert again.returncode == 0
    assert "out is there already, made from the same input with the same arguments" in again.stdout
    other = hvdlm(*command, "--shards", "4", cwd=tmp_path)
    assert other.returncode == 1
    assert "made with another shards (there 8, here 4); remove it, or choose another --output" in other.stderr
    write_lines(tmp_path / "a.jsonl", make_texts(101))
    assert "another input files" in hvdlm(*command, cwd=tmp_path).stderr
    assert contents(tmp_path / "out") == before


def test_own_tokenizer_file(tmp_path: Path) -> None:
    Tokenizer.train(make_texts(50), 300).save(tmp_path / "own.json")
    write_lines(tmp_path / "a.jsonl", make_texts(100))
    arguments = ("--output", "out", "--validation", "0.1", "--tokenizer", "own.json")
    assert hvdlm("prepare", "--input", "a.jsonl", *arguments, cwd=tmp_path).returncode == 0
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "own.json").read_bytes()
    assert sorted(text for shard in stored_documents(tmp_path / "out").values() for text in shard) == sorted(
        make_texts(100)
    )


@pytest.mark.parametrize("target", ["disk/data", "disk/empty"], ids=["dangling", "empty directory"])
def test_output_that_is_a_link(target: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", make_texts(100))
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    (tmp_path / "out").symlink_to(target)
    command = ("prepare", "--input", "a.jsonl", "--output", "out", "--validation", "0.1", "--workers", "1")
    done = hvdlm(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / target / "manifest.json").is_file()
    assert "is there already" in hvdlm(*command, cwd=tmp_path).stdout
    assert {path.name for path in (tmp_path / "disk").iterdir()} == {"empty", Path(target).name}


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("loop", "cannot write loop: "),
        ("unmounted", "unmounted is a symbolic link, but there is no directory "),
        ("disk/data", "disk is a symbolic link, but there is no directory "),
        (".", ". is the current directory or the root: name a directory to be made within it"),
        ("deeper/..", "deeper/.. is the current directory or the root"),
        ("x" * 300, "cannot write xxx"),
        ("x" * 250, "cannot write xxx"),
    ],
)
def test_output_that_cannot_be_is_refused_before_any_work(output: str, message: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [*make_texts(100), ""])  # the last one is bad, as would be found by working
    folder = tmp_path / "here"
    folder.mkdir()
    if output == "loop":
        (folder / "loop").symlink_to("loop")
    if output == "disk/data":
        (folder / "disk").symlink_to(tmp_path / "lost")
    if output == "unmounted":
        (folder / "unmounted").symlink_to(tmp_path / "lost" / "data")
    before = {path.name for path in folder.iterdir()}
    done = hvdlm("prepare", "--input", "../a.jsonl", "--output", output, "--validation", "0.1", cwd=folder)
    assert done.returncode == 1
    assert done.stderr.startswith(f"hvdlm: error: {message}")
    assert done.stderr.count("\n") == 1
    assert {path.name for path in folder.iterdir()} == before
    assert not (tmp_path / "lost").exists()


def test_output_where_a_volume_is_mounted_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path / "a.jsonl", [*make_texts(100), ""])
    (tmp_path / "volume").mkdir()
    rename = Path.rename

    def busy(self: Path, target: Path) -> Path:
        if target == tmp_path / "volume":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(HvdlmError, match=r"volume cannot be replaced \(Device or resource busy\), as where a disk"):
        prepare([str(tmp_path / "a.jsonl")], tmp_path / "volume", "byte", 2, 0.1, 1, "text", 0, skip_bad=False)
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "volume"}


def test_more_shards_than_files_may_be_open_at_first(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", make_texts(1000))
    command = f"exec {sys.executable} -m hvdlm prepare --input a.jsonl --output out --shards 70 --workers 1"
    done = subprocess.run(["sh", "-c", f"ulimit -Sn 64; {command}"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(DataSet(tmp_path / "out").train.shards) == 70


GOOD = b'{"text": "good"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty.txt is empty"),
        ("binary.txt", b"one\ntwo\n\x00\x01", "binary.txt:3 holds a NUL byte"),
        ("latin1.txt", b"one\ncaf\xe9\n", "latin1.txt:2 is not UTF-8"),
        ("cut.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], "cut.txt.gz cannot be read (Compressed file ended"),
        ("plain.txt.gz", b"text", "plain.txt.gz cannot be read (Not a gzipped file"),
        (
            "cut.jsonl.gz",
            gzip.compress(GOOD * 99, mtime=0)[:-9],
            "cut.jsonl.gz:100 cannot be read (Compressed file ended",
        ),
        ("broken.jsonl", GOOD + b'{"text": "goo', "broken.jsonl:2 is not JSON"),
        ("latin1.jsonl", GOOD + b'\n{"text": "caf\xe9"}\n', "latin1.jsonl:3 is not UTF-8"),
        ("deep.jsonl", b"[" * 100_000 + b"\n", "deep.jsonl:1 is not JSON"),
        ("list.jsonl", GOOD + b"[1]\n", "list.jsonl:2 is not a JSON object"),
        ("other.jsonl", b'{"body": "b"}\n', "other.jsonl:1 has no key 'text' (its keys: 'body'); name the right one"),
        ("number.jsonl", b'{"text": 5}\n', "number.jsonl:1 has a 'text' that is no string"),
        ("empty.jsonl", GOOD + b'{"text": ""}\n', "empty.jsonl:2 is empty"),
        ("nul.jsonl", b'{"text": "a\\u0000"}\n', "nul.jsonl:1 holds a NUL character"),
        ("surrogate.jsonl", b'{"text": "\\ud800"}\n', "surrogate.jsonl:1 holds half of a surrogate pair"),
    ],
)
def test_a_bad_document_is_named_or_skipped(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    texts = make_texts(100)
    write_lines(tmp_path / "fine.jsonl", texts)
    (tmp_path / name).write_bytes(content)
    command = ("prepare", "--input", "fine.jsonl", name, "--output", "out", "--shards", "2", "--validation", "0.1")
    refused = hvdlm(*command, "--workers", "1", cwd=tmp_path)
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"hvdlm: error: {message}")
    assert refused.stderr.endswith("; correct the input, or leave bad documents out with --skip-bad\n")
    assert {path.name for path in tmp_path.iterdir()} == {"fine.jsonl", name}
    skipped = hvdlm(*command, "--workers", "1", "--skip-bad", cwd=tmp_path)
    assert skipped.returncode == 0
    assert f"left out 1 bad documents; the first: {message}" in skipped.stdout
    stored = [text for shard in stored_documents(tmp_path / "out").values() for text in shard]
    assert sorted(text for text in stored if text != "good") == sorted(texts)


def test_a_document_that_is_too_long_is_left_out(tmp_path: Path) -> None:
    with (tmp_path / "long.jsonl").open("wb") as file:
        file.write(GOOD)
        file.write(b'{"text": "')
        for _ in range(65):
            file.write(b"x" * 2**20)
        file.write(b'"}\n' + GOOD)
    command = ("prepare", "--input", "long.jsonl", "--output", "out", "--shards", "1", "--validation", "0")
    refused = hvdlm(*command, cwd=tmp_path)
    assert "long.jsonl:2 is longer than 64 MiB; split it into several documents" in refused.stderr
    assert hvdlm(*command, "--skip-bad", cwd=tmp_path).returncode == 0
    assert stored_documents(tmp_path / "out") == {"shard_00000.h5": ["good", "good"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--input", "missing"), "--input missing: no such file, directory or glob match; check the path"),
        (("--input", "*.md"), "--input *.md: no such file, directory or glob match; check the path"),
        (("--input", "nothing"), "the input holds no documents; check --input"),
        (("--input", "a.jsonl", "--validation", "0"), "5 documents are too few:"),
        (("--input", "one.txt", "two.txt"), "2 documents are too few: 8 of 9 shards (validation included) got none; "
         "give more documents, divide text files with --split blank-lines (or lines, or a number of bytes), or fewer"),
        (("--input", "one.txt", "--split", "lines"), "1 document is too few: 8 of 9 shards (validation included) got"),
        (("--input", "one.txt"), "one.txt is one document of 4 bytes, too few for 8 training shards and validation;"),
        (("--input", "one.txt", "--split", "0"), "--split 0: give blank-lines, lines, or a number of bytes from 1 to"),
        (("--input", "one.txt", "--split", "words"), "--split words: give blank-lines, lines, or a number of bytes"),
        (("--input", "a.jsonl", "--split", "lines"), "--split lines divides text files, but the input has none"),
        (("--input", "one.txt", "--validation-input", "*.txt"), "--validation-input names all files of --input"),
        (("--input", "one.txt", "--validation-input", "lost"), "--validation-input lost: no such file, directory"),
        (("--input", "one.txt", "--validation-input", "two.txt", "--validation", "0.1"), "--validation 0.1 and "),
        (("--input", "a.jsonl", "--shards", "1"), "none of the 5 documents fell into validation; give more documents"),
        (("--input", "a.jsonl", "--shards", "0"), "--shards 0: there must be at least 1"),
        (("--input", "a.jsonl", "--validation", "1"), "--validation 1.0: the fraction must be at least 0 and below 1"),
        (("--input", "a.jsonl", "--validation", "nan"), "--validation nan: the fraction must be at least 0"),
        (("--input", "a.jsonl", "--workers", "-1"), "--workers -1: give a number of processes, at most 1,024, or 0"),
        (("--input", "a.jsonl", "--workers", "9999"), "--workers 9999: give a number of processes, at most 1,024"),
        (("--input", "a.jsonl", "--shards", str(10**9)), "--shards 1000000000: a process may open "),
        (("--input", ".",), "--output out lies in the input directory ., so it would be read as input"),
        (("--input", "a.jsonl", "--output", "taken"), "taken exists and is not a data set; remove it, or choose"),
        (("--input", "a.jsonl", "--output", "a.jsonl/out"), "cannot write a.jsonl/out"),
    ],
)  # fmt: skip
def test_bad_arguments_are_one_sentence(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", make_texts(5))
    (tmp_path / "one.txt").write_text("text")
    (tmp_path / "two.txt").write_text("text")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("do not lose me")
    done = hvdlm("prepare", "--output", "out", "--workers", "1", *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"hvdlm: error: {message}")
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "one.txt", "two.txt", "nothing", "taken"}
    assert (tmp_path / "taken" / "thesis.tex").read_text() == "do not lose me"


@pytest.fixture(scope="module")
def long_input(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 MB of distinct documents, compressed."""
    path = tmp_path_factory.mktemp("long") / "long.jsonl.gz"
    filler = " ".join(random.Random(0).choices([word for word in WORDS if word.isascii()], k=500))
    with gzip.open(path, "wt", compresslevel=1) as file:
        for i in range(20_000):
            file.write(json.dumps({"text": f"{i} {filler}"}) + "\n")
    return path


def start_prepare(
    source: Path, cwd: Path, stdout: int | None = None, stderr: int = subprocess.PIPE
) -> subprocess.Popen[str]:
    """Starts `hvdlm prepare` with two workers and waits until it writes shards."""
    process = subprocess.Popen(
        [sys.executable, "-m", "hvdlm", "prepare", "--input", source, "--output", "out", "--workers", "2"],
        cwd=cwd,
        stdout=stdout,
        stderr=stderr,
        text=True,
        start_new_session=True,
    )
    shard = cwd / ".out.preparing" / "shard_00000.h5"
    while not (shard.exists() and shard.stat().st_size > 2**18):
        assert process.poll() is None, "it ended before it could be interrupted"
        time.sleep(0.005)
    return process


def test_killed_in_the_middle_then_run_again(long_input: Path, tmp_path: Path) -> None:
    process = start_prepare(long_input, tmp_path)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
    assert not (tmp_path / "out").exists()
    with pytest.raises(HvdlmError, match="is an unfinished data set"):
        DataSet(tmp_path / ".out.preparing")
    (tmp_path / ".out.preparing" / "shard_99999.h5").write_text("left by the killed run")
    done = hvdlm("prepare", "--input", long_input, "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert sum(shard.n_docs for shard in DataSet(tmp_path / "out").train.shards) > 19_000
    assert not (tmp_path / "out" / "shard_99999.h5").exists()


def test_interrupted_leaves_nothing(long_input: Path, tmp_path: Path) -> None:
    process = start_prepare(long_input, tmp_path)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_two_at_once_do_not_mix(long_input: Path, tmp_path: Path) -> None:
    process = start_prepare(long_input, tmp_path)
    second = hvdlm("prepare", "--input", long_input, "--output", "out", cwd=tmp_path)
    assert second.returncode == 1
    assert "another process is writing out; wait for it to end" in second.stderr
    process.communicate()
    assert process.returncode == 0
    assert sum(shard.n_docs for shard in DataSet(tmp_path / "out").train.shards) > 19_000


def test_a_killed_worker_is_one_sentence(long_input: Path, tmp_path: Path) -> None:
    process = start_prepare(long_input, tmp_path)
    children = psutil.Process(process.pid).children()
    next(child for child in children if "spawn_main" in " ".join(child.cmdline())).kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.startswith("hvdlm: error: a worker process was killed, most likely because memory ran out; use fewer")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_is_one_sentence(long_input: Path, tmp_path: Path) -> None:
    # A file may grow to 1 MiB here: writing fails in the middle of a shard, as it does when the disk is full.
    done = subprocess.run(
        [sys.executable, "-m", "hvdlm", "prepare", "--input", long_input, "--output", "out", "--workers", "1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)),
    )
    assert (done.returncode, done.stderr) == (1, "hvdlm: error: cannot write out: [Errno 27] File too large\n")
    assert list(tmp_path.iterdir()) == []


def test_memory_does_not_grow_with_the_input(long_input: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "short.jsonl", make_texts(5000))  # a block
    program = (
        "import resource, sys; from hvdlm.cli import main; status = main(sys.argv[1:]); "
        "print(status, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for name, source in (("short", tmp_path / "short.jsonl"), ("long", long_input)):
        arguments = ["prepare", "--input", source, "--output", tmp_path / name, "--workers", "1"]
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
        status, kibibytes = done.stdout.splitlines()[-1].split()
        assert status == "0"
        peaks.append(int(kibibytes) / 1024)
    # The input is 60 MB of text, and would be 120 as tokens; what a block needs is in both.
    assert peaks[1] - peaks[0] < 40
