"""Checkpoints: whole or not there, whatever happens to the disk, the process or the files."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from hvdlm.errors import HvdlmError, write_failure
from hvdlm.training import checkpoint
from hvdlm.training.checkpoint_contents import RemovedCheckpointError
from hvdlm.training.retention import Retention

FILES = ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json"]
TOKENIZER = '{"kind": "byte"}'


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


def model_at(step: int, numbers: int = 6) -> dict[str, Tensor]:
    return {"weight": torch.arange(numbers).float().view(2, -1) + step, "bias": torch.full((3,), step / 7)}


def save(parent: Path, step: int, keep: int = 3, numbers: int = 6) -> Path:
    return checkpoint.save(
        parent,
        step,
        model_at(step, numbers),
        {"step.weight": torch.tensor(float(step)), "exp_avg.weight": torch.full((2, 3), -float(step))},
        {"step": step, "data": {"seed": 5, "batch": step}, "text": "ü"},
        TOKENIZER.encode(),
        Retention(keep),
    )


def names(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir())


def assert_whole(path: Path) -> None:
    """Everything that was saved is there, by means of our own."""
    assert names(path) == FILES
    manifest = json.loads((path / "manifest.json").read_bytes())
    assert sorted(manifest["files"]) == [name for name in FILES if name != "manifest.json"]
    for name, expected in manifest["files"].items():
        content = (path / name).read_bytes()
        assert expected == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    step = int(path.name.removeprefix("step_"))
    assert json.loads((path / "state.json").read_bytes())["step"] == step
    saved = safetensors.torch.load((path / "model.safetensors").read_bytes())
    assert torch.equal(saved["bias"], model_at(step)["bias"])
    assert float(saved["weight"][0, 0]) == step


def test_what_is_saved_is_read_back(parent: Path) -> None:
    path = save(parent, 1000)
    assert path == parent / "step_00001000"
    assert names(parent) == ["latest", "step_00001000"]
    assert (parent / "latest").read_text() == "step_00001000\n"
    assert_whole(path)
    opened = checkpoint.open_checkpoint(path)
    assert opened.path == path
    assert opened.state == {"step": 1000, "data": {"seed": 5, "batch": 1000}, "text": "ü"}
    model, optimizer = opened.model(), opened.optimizer()
    assert model.keys() == {"weight", "bias"}
    assert all(torch.equal(model[name], tensor) for name, tensor in model_at(1000).items())
    assert optimizer["step.weight"].shape == ()
    assert torch.equal(optimizer["exp_avg.weight"], torch.full((2, 3), -1000.0))
    assert (path / "tokenizer.json").read_text() == TOKENIZER


def test_the_safetensors_library_itself_reads_the_files(parent: Path) -> None:
    path = save(parent, 1)
    with safetensors.safe_open(path / "model.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == ["bias", "weight"]
        assert file.get_slice("weight").get_shape() == [2, 3]
        assert file.get_slice("weight").get_dtype() == "F32"
        assert torch.equal(file.get_tensor("weight"), model_at(1)["weight"])


def test_parameters_and_strided_tensors_are_saved_as_they_are(parent: Path) -> None:
    strided = torch.arange(12.0).view(3, 4).t()
    parameter = torch.nn.Parameter(torch.ones(2))
    path = checkpoint.save(parent, 1, {"a": parameter}, {"b": strided}, {}, TOKENIZER.encode(), keep=Retention(1))
    opened = checkpoint.open_checkpoint(path)
    assert torch.equal(opened.model()["a"], torch.ones(2))
    assert torch.equal(opened.optimizer()["b"], strided)


def test_the_newest_keep_stay_and_latest_names_the_last(parent: Path) -> None:
    for step in (5, 10, 15, 20):
        save(parent, step, keep=2)
        assert (parent / "latest").read_text() == f"step_{step:08}\n"
    assert names(parent) == ["latest", "step_00000015", "step_00000020"]
    save(parent, 25, keep=1)
    assert names(parent) == ["latest", "step_00000025"]


def test_a_run_that_goes_on_from_an_earlier_step_keeps_what_it_saves(parent: Path) -> None:
    for step in (10, 20, 30):
        save(parent, step)
    save(parent, 15, keep=1)
    assert_whole(parent / "step_00000015")
    assert (parent / "latest").read_text() == "step_00000015\n"
    assert not (parent / "step_00000010").exists()


def test_what_a_user_puts_beside_them_is_left_alone(parent: Path) -> None:
    first = save(parent, 1)
    shutil.copytree(first, parent / "step_00000001_best")
    (parent / "step_00000001.tar").write_bytes(b"archive")
    for step in (2, 3):
        save(parent, step, keep=1)
    assert names(parent) == ["latest", "step_00000001.tar", "step_00000001_best", "step_00000003"]
    assert checkpoint.open_checkpoint(parent).path.name == "step_00000003"
    assert checkpoint.open_checkpoint(parent / "step_00000001_best").state["step"] == 1


def test_the_same_step_is_saved_again(parent: Path) -> None:
    save(parent, 1)
    path = checkpoint.save(
        parent, 1, {"a": torch.ones(1)}, {"b": torch.ones(1)}, {"again": True}, TOKENIZER.encode(), keep=Retention(3)
    )
    assert names(parent) == ["latest", "step_00000001"]
    assert checkpoint.open_checkpoint(path).state == {"again": True}


@pytest.mark.parametrize("given", ["run", "run/checkpoints", "run/checkpoints/step_00000020"])
def test_a_checkpoint_is_found_by_its_own_name_or_its_run_s(parent: Path, given: str) -> None:
    save(parent, 10)
    save(parent, 20)
    found = checkpoint.open_checkpoint(parent.parent.parent / given)
    assert found.path == parent / "step_00000020"
    assert checkpoint.open_state(parent.parent.parent / given) == {**found.state, "path": str(found.path)}


def test_latest_leads_where_a_run_went_on_from_an_earlier_step(parent: Path) -> None:
    """Steps 20 and 30 are of the time line that was left; they are the last resort."""
    for step in (10, 20, 30, 15):
        save(parent, step)
    for expected in ("step_00000015", "step_00000010", "step_00000030"):
        assert checkpoint.open_checkpoint(parent).path.name == expected
        damage(parent / expected / "model.safetensors", "flipped")


@pytest.mark.parametrize("content", [None, "", "step_00000099"])
def test_without_a_latest_that_exists_the_highest_step_leads(parent: Path, content: str | None) -> None:
    save(parent, 10)
    save(parent, 20)
    (parent / "latest").unlink()
    if content is not None:
        (parent / "latest").write_text(content)
    assert checkpoint.open_checkpoint(parent).path.name == "step_00000020"


def test_a_run_directory_may_look_like_a_checkpoint(parent: Path) -> None:
    run_dir = parent.parent.with_name("step_size_study")
    save(run_dir / "checkpoints", 10)
    assert checkpoint.open_checkpoint(run_dir).state["step"] == 10


def test_where_there_is_none_the_sentence_says_so(parent: Path) -> None:
    for path in (parent, parent.parent, parent / "step_00000001"):
        with pytest.raises(HvdlmError, match=r"holds no checkpoint|cannot read the checkpoint .*No such file"):
            checkpoint.open_checkpoint(path)
    assert not checkpoint.exists_in(parent.parent)
    save(parent, 1)
    assert checkpoint.exists_in(parent.parent)


# ---- damage


def damage(file: Path, kind: str) -> None:
    content = file.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
    file.unlink()
    if kind != "missing":
        file.write_bytes(
            {"flipped": flipped, "truncated": content[:-1], "extended": content + b"\n{}", "empty": b""}[kind]
        )


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["flipped", "truncated", "extended", "empty", "missing"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_it_is_taken(
    parent: Path, caplog: pytest.LogCaptureFixture, name: str, kind: str
) -> None:
    save(parent, 10)
    newest = save(parent, 20)
    damage(newest / name, kind)
    with pytest.raises(HvdlmError) as caught:
        checkpoint.open_checkpoint(newest)
    sentence = str(caught.value)
    assert str(newest) in sentence
    # A manifest may be flipped where it speaks of another file.
    assert name in sentence or (kind == "flipped" and name == "manifest.json")
    assert checkpoint.open_checkpoint(parent.parent).path.name == "step_00000010"
    assert f"{sentence}; trying the one before it" in caplog.text


def test_every_flipped_byte_of_a_manifest_is_caught(parent: Path) -> None:
    path = save(parent, 1)
    manifest = path / "manifest.json"
    content = manifest.read_bytes()
    for place in range(0, len(content), 3):
        manifest.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(HvdlmError, match="is damaged"):
            checkpoint.open_checkpoint(path)


GARBAGE = ["{}", "[]", "null", "3", '{"files": {}}', '{"files": []}', '{"files": {"state.json": 3}}', "\0"]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_manifest_of_something_else_is_refused(parent: Path, garbage: str) -> None:
    path = save(parent, 1)
    (path / "manifest.json").write_text(garbage)
    with pytest.raises(HvdlmError, match=r"is damaged: manifest\.json is not what was written"):
        checkpoint.open_checkpoint(path)


def test_when_all_are_damaged_the_oldest_is_named(parent: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (10, 20):
        damage(save(parent, step) / "model.safetensors", "flipped")
    with pytest.raises(HvdlmError, match=r"step_00000010 is damaged: model\.safetensors does not match its SHA-256"):
        checkpoint.open_checkpoint(parent.parent)
    assert "step_00000020 is damaged" in caplog.text
    assert checkpoint.exists_in(parent.parent)


# ---- a disk that fails


def test_a_failing_fsync_leaves_the_checkpoint_before_it_whole(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(parent, 10)
    real = os.fsync
    calls = failing = 0

    def fail_once(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fail_once)
    save(parent.with_name("counted"), 10)
    syncs = calls
    assert syncs >= len(FILES) + 1  # each file, and the directory that names them
    for failing in range(1, syncs + 1):
        calls = 0
        with pytest.raises(HvdlmError, match=r"cannot write the checkpoint .*step_00000020: No space left on device"):
            save(parent, 20)
        assert_whole(parent / "step_00000010")
        newest = checkpoint.open_checkpoint(parent).path
        assert_whole(newest)
        assert not [name for name in names(parent) if name.startswith("step_") and name.endswith("partial")]
        if failing <= len(FILES) + 1:
            assert newest.name == "step_00000010"
            assert (parent / "latest").read_text() == "step_00000010\n"
    calls, failing = 0, syncs + 1
    assert_whole(save(parent, 20))
    assert names(parent) == ["latest", "step_00000010", "step_00000020"]


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process grows beyond 4 KiB: a write that fails in the middle, in any library."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_files")
def test_a_write_that_fails_in_the_middle_leaves_the_checkpoint_before_it_whole(parent: Path) -> None:
    save(parent, 10)
    with pytest.raises(HvdlmError, match=r"cannot write .*File too large; raise the limit"):
        save(parent, 20, numbers=10_000)
    assert names(parent) == ["latest", "step_00000010"]
    assert_whole(checkpoint.open_checkpoint(parent).path)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root")
def test_a_full_disk_leaves_the_checkpoint_before_it_whole(parent: Path) -> None:
    parent.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(parent)]).returncode:
        pytest.skip("this root may not mount")
    try:
        save(parent, 10)
        with pytest.raises(HvdlmError, match=r"cannot write the checkpoint .*No space left on device"):
            save(parent, 20, numbers=100_000)
        assert names(parent) == ["latest", "step_00000010"]
        assert_whole(checkpoint.open_checkpoint(parent).path)
        assert_whole(save(parent, 30))
    finally:
        subprocess.run(["umount", str(parent)], check=True)


def test_a_place_that_cannot_be_written_is_named(parent: Path) -> None:
    parent.parent.write_text("a file")
    with pytest.raises(HvdlmError, match=r"cannot write the checkpoint .*step_00000001: Not a directory"):
        save(parent, 1)


# ---- a process that is killed

KILLER = """
import os, shutil, signal, sys
from pathlib import Path
import torch
from hvdlm.training import checkpoint
from hvdlm.training.retention import Retention

base, work, step, keep = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
left, counting = 0, False


def count(*_):
    global left
    if counting:
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)


# Python tells of every file that it opens, makes, renames or removes, before it does so; not of fsync.
TOLD = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
sys.addaudithook(lambda event, _: count() if event in TOLD else None)
sync = os.fsync
os.fsync = lambda descriptor: (count(), sync(descriptor))

status = 1
while status:
    victim = work / f"{left:03}"
    shutil.copytree(base, victim)
    moment = left
    child = os.fork()
    if child == 0:
        counting = True
        model = {"weight": torch.arange(6).float().view(2, -1) + step, "bias": torch.full((3,), step / 7)}
        checkpoint.save(victim, step, model, {"b": torch.ones(2)}, {"step": step}, b"{}", Retention(keep))
        counting = False
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status
    left = moment + 1
"""


@pytest.mark.parametrize(("step", "keep", "left"), [(30, 2, {10, 20}), (30, 1, {10, 20}), (20, 2, {10})])
def test_a_process_killed_at_any_moment_leaves_nothing_half_done(
    tmp_path: Path, step: int, keep: int, left: set[int]
) -> None:
    base, work = tmp_path / "base", tmp_path / "work"
    for earlier in (10, 20):
        checkpoint.save(
            base, earlier, model_at(earlier), {"b": torch.ones(2)}, {"step": earlier}, b"{}", keep=Retention(3)
        )
    arguments = [str(base), str(work), str(step), str(keep)]
    subprocess.run([sys.executable, "-c", KILLER, *arguments], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})

    victims = sorted(work.iterdir())
    assert len(victims) > 20  # moments
    outcomes = []
    for victim in victims:
        steps = {int(path.name.removeprefix("step_")) for path in victim.iterdir() if path.name[-8:].isdigit()}
        for each in steps:
            assert_whole(victim / f"step_{each:08}")
        assert left <= steps or step in steps
        newest = checkpoint.open_checkpoint(victim)
        # renamed but not yet named by `latest`, it is whole and the one before it leads
        assert newest.state["step"] in (max(steps), 20 if 20 in steps else max(steps))
        outcomes.append(step in steps and newest.state["step"] == step)
        # the next one clears away what is left
        checkpoint.save(victim, 40, model_at(40), {"b": torch.ones(2)}, {"step": 40}, b"{}", keep=Retention(1))
        assert names(victim) == ["latest", "step_00000040"]
    assert outcomes[-1]
    if step == 30:
        assert outcomes == sorted(outcomes)  # from one moment on it is there
        assert not outcomes[0]


def test_what_a_crash_has_left_is_cleared_by_the_next_save(parent: Path) -> None:
    stale = parent / "step_00000005.partial"
    stale.mkdir(parents=True)
    (stale / "model.safetensors").write_bytes(b"half")
    assert not checkpoint.exists_in(parent.parent)
    save(parent, 10)
    assert names(parent) == ["latest", "step_00000010"]


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_weights_of_no_use_are_named(parent: Path, number: float) -> None:
    tensors = {"good": torch.zeros(3), "bad": torch.tensor([0.0, number])}
    path = checkpoint.save(parent, 5, tensors, tensors, {}, TOKENIZER.encode(), keep=Retention(1))
    with pytest.raises(HvdlmError, match="step_00000005 is of no use: bad holds NaN or infinite numbers"):
        checkpoint.open_checkpoint(path).model()


def test_whoever_may_read_the_state_may_read_the_weights(parent: Path) -> None:
    before = os.umask(0o027)
    try:
        path = save(parent, 5)
    finally:
        os.umask(before)
    assert {stat.S_IMODE((path / name).stat().st_mode) for name in FILES} == {0o640}


@pytest.mark.needs_root
def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(parent: Path, caplog: pytest.LogCaptureFixture) -> None:
    busy = save(parent, 5) / "busy"
    busy.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(busy)], check=True)
    try:
        for step in (6, 7):
            assert_whole(save(parent, step, keep=1))
        assert "cannot remove the old checkpoint" in caplog.text and "Device or resource busy" in caplog.text
    finally:
        subprocess.run(["umount", *[str(path) for path in parent.glob("*/busy")]], check=True)
    assert_whole(save(parent, 8, keep=1))
    assert names(parent) == ["latest", "step_00000008"]


@pytest.mark.parametrize(("number", "is_lost"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_file_system_that_cannot_sync_directories(
    parent: Path, monkeypatch: pytest.MonkeyPatch, number: int, is_lost: bool
) -> None:
    sync = os.fsync

    def refuse_directories(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_directories)
    with pytest.raises(HvdlmError, match="Input/output error") if is_lost else nullcontext():
        assert_whole(save(parent, 5))


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.ENOSPC, "No space left on device; make room"),
        (errno.EDQUOT, "Disk quota exceeded; make room within your quota"),
        (errno.EROFS, "Read-only file system; choose a file system that can be written"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_the_cause_named_is_the_cause(number: int, sentence: str) -> None:
    assert write_failure(OSError(number, os.strerror(number))) == sentence


def test_a_checkpoint_that_its_job_removes_meanwhile(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the newest is verified, it makes way for a newer one; read later, it is said to be gone."""
    save(parent, 5)
    verify = checkpoint._verify
    newer = iter([6])

    def verify_late(path: Path) -> None:
        if step := next(newer, None):
            save(parent, step, keep=1)
        verify(path)

    monkeypatch.setattr(checkpoint, "_verify", verify_late)
    opened = checkpoint.open_checkpoint(parent)
    assert opened.path.name == "step_00000006"
    save(parent, 7, keep=1)
    for read in (opened.model, opened.optimizer, lambda: opened.state):
        with pytest.raises(RemovedCheckpointError, match="step_00000006 was removed while it was read"):
            read()
