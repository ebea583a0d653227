"""`hvdlm train --dry-run`: what it says of a run, worked out by hand, and that it leaves nothing behind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from forked import hvdlm

from hvdlm.comm.launch import Launch
from hvdlm.config_reader import load
from hvdlm.errors import HvdlmError
from hvdlm.model.presets import PRESETS
from hvdlm.training.dry_run import print_dry_run


def rows(output: str) -> dict[str, str]:
    """The table below the settings."""
    table = output.split("\n\n")[-1]
    return {
        name.strip(): value.strip() for name, value in re.findall(r"^ (\S.*?)  +(\S.*)$", table, flags=re.MULTILINE)
    }


def test_sizes_are_those_worked_out_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["--model.layers=2", "--model.width=8", "--model.heads=2", "--model.context_length=16"]
    batch = ["--train.global_batch_size=32", "--train.micro_batch_size=4", "--train.steps=1000"]
    print_dry_run(load(None, [*overrides, *batch], PRESETS), 100, Launch("mpirun", 0, 3))
    found = rows(capsys.readouterr().out)
    # a block: 2 norms of 16, attention 8 x 24 + 24 and 8 x 8 + 8, MLP 8 x 32 + 32 and 32 x 8 + 8 -> 872
    # tokens 100 x 8, positions 16 x 8, last norm 16 -> 944
    assert found["parameters"] == f"{2 * 872 + 944:,}"
    assert found["vocabulary"] == "100"
    assert found["ranks"] == "3"
    assert found["sequences per step"] == "32, at most 11 a rank, 4 at once"
    assert found["micro-batches per step"] == "3"  # 4 + 4 + 3
    assert found["tokens per step"] == "512"
    assert found["tokens in all"] == "512,000"
    # 6 x (2 x 768 matrix weights + 800) + 12 x 2 x 8 x 16 / 2 = 15,552 a token
    assert found["arithmetic in all"] == f"{15_552 * 512_000 / 1e12:,.1f} TFLOP"
    assert re.fullmatch(r"[\d,]+ MiB", found["memory a rank, estimated"])


def test_a_batch_that_grows(capsys: pytest.CaptureFixture[str]) -> None:
    ramp = ["--train.batch_ramp_start=8", "--train.batch_ramp_steps=90", "--model.context_length=16"]
    print_dry_run(load(None, [*ramp, "--train.global_batch_size=32"], PRESETS), 100, Launch("mpirun", 0, 3))
    found = rows(capsys.readouterr().out)
    assert found["sequences per step"] == "32, at most 11 a rank, 8 at once"
    assert found["sequences at first"] == "8, growing in 90 steps"
    assert found["tokens per step"] == "512"
    # 30 steps each with 8, 16 and 24 sequences, and 910 with 32
    assert found["tokens in all"] == f"{16 * (30 * (8 + 16 + 24) + 910 * 32):,}"


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        (["--local_steps.every=4"], 2),
        (["--local_steps.every=4", "--local_steps.overlap=1"], 3),
        (["--local_steps.every=auto", "--local_steps.momentum=0.5"], 4),
        (["--local_steps.every=4", "--local_steps.overlap=1", "--local_steps.merge=mix"], 2),
    ],
)
def test_memory_of_local_steps(words: list[str], numbers: int, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--model.width=512", "--model.layers=8", "--train.device=cpu"]
    print_dry_run(load(None, [*shape, *words], PRESETS), 30_000, Launch("mpirun", 0, 2))
    output = capsys.readouterr().out
    count = int(rows(output)["parameters"].replace(",", ""))
    (nbytes,) = re.findall(r"averages of local steps +([\d,]+) MiB", output)
    assert int(nbytes.replace(",", "")) == round(4 * numbers * count / 2**20)


def test_memory_of_a_moving_average(capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for ema in ("0", "0.999"):
        print_dry_run(load(None, [f"--train.ema={ema}", "--model.width=512"], PRESETS), 30_000, Launch("mpirun", 0, 2))
        output = capsys.readouterr().out
        found.append(int(rows(output)["memory a rank, estimated"].removesuffix(" MiB").replace(",", "")))
    copy = round(4 * int(rows(output)["parameters"].replace(",", "")) / 2**20)
    assert re.findall(r"moving average of weights +([\d,]+) MiB", output) == [str(copy)]
    assert abs(found[1] - found[0] - copy) <= 1


@pytest.mark.parametrize(("batch", "is_more"), [(1, True), (64, False)])
def test_memory_of_the_copy_that_tasks_are_scored_with(
    batch: int, is_more: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """8 bytes a parameter, between two steps: in the place of what a step needs beside its weights."""
    found = []
    for tasks in ("", "arc_easy"):
        words = [f"--train.evaluate_tasks={tasks}", "--model.width=512", f"--train.micro_batch_size={batch}"]
        words += [f"--train.global_batch_size={batch}", "--train.device=cpu"]
        print_dry_run(load(None, words, PRESETS), 257, Launch("mpirun", 0, 2))
        output = capsys.readouterr().out
        found.append(int(rows(output)["memory a rank, estimated"].removesuffix(" MiB").replace(",", "")))
    copy = 8 * int(rows(output)["parameters"].replace(",", "")) / 2**20
    more = re.findall(r"float64 copy for tasks +([\d,]+) MiB", output)
    if not is_more:
        assert more == []
        assert abs(found[1] - found[0]) <= 1  # what libraries have is measured
        return
    # One sequence of 128 tokens needs little beside
    assert 0.7 * copy < int(more[0]) < copy
    assert abs(found[1] - found[0] - int(more[0])) <= 1


@pytest.mark.parametrize("copies", [1, 2], ids=["", "elastic"])
def test_memory_is_the_sum_of_its_parts(copies: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Of one of two ranks, whose codec keeps residuals; with comm.elastic also those of before the step."""
    shape = ["--model.width=512", "--model.layers=8", "--train.device=cpu", "--compression.codec=int4"]
    shape += ["--comm.elastic=true"] * (copies - 1)
    print_dry_run(load(None, shape, PRESETS), 30_000, Launch("mpirun", 0, 2))
    output = capsys.readouterr().out
    parts = {
        name: int(value.replace(",", "")) for name, value in re.findall(r"^   (\S.*?)  +([\d,]+) MiB", output, re.M)
    }
    names = {"weights and optimizer", "residuals of the codec", "activations", "loss", "libraries"}
    assert set(parts) == {*names, "temporary, and gaps between"}
    total = int(rows(output)["memory a rank, estimated"].removesuffix(" MiB").replace(",", ""))
    assert abs(sum(parts.values()) - total) <= len(parts)
    count = int(rows(output)["parameters"].replace(",", ""))
    assert parts["residuals of the codec"] == round(4 * copies * count / 2**20)
    assert parts["weights and optimizer"] == round(16 * count / 2**20)  # fp32: no copies
    assert parts["libraries"] > 100


def test_memory_of_a_layout(capsys: pytest.CaptureFixture[str]) -> None:
    """16 ranks: 2 stages of 4 blocks, 2 tensor ranks, 2 groups of 2 that divide what the optimizer has."""
    shape = ["--model.width=512", "--model.layers=8", "--train.device=cpu", "--train.global_batch_size=32"]
    layout = [
        "--parallel.shard=1",
        "--parallel.data=2",
        "--parallel.tensor=2",
        "--parallel.pipeline=2",
        "--parallel.split=4,4",
    ]
    codec = ["--compression.codec=int4"]
    config = load(None, [*shape, *layout, *codec, "--train.micro_batch_size=4"], PRESETS)
    print_dry_run(config, 30_000, Launch("mpirun", 0, 16))
    output = capsys.readouterr().out
    found = rows(output)
    assert found["layout"] == "ZeRO 1 x 2, data 2, tensor 2, pipeline 2"
    assert found["sequences per step"] == "32, at most 8 a rank, 4 at once"
    assert found["micro-batches per step"] == "2"
    # The last stage needs most: blocks, each with half of 12 x 512^2 in matrices and of 7 x 512 in biases, and with 6 x
    # 512 in norms and biases; half of the output projection; the last norm. The first one has positions in its place.
    blocks = 4 * (6 * 512**2 + 7 * 256 + 6 * 512)
    count, most = blocks + 15_000 * 512 + 2 * 512, blocks + 15_000 * 512 + 128 * 512
    parts = dict(re.findall(r"^   (\S.*?)  +([\d,]+) MiB", output, re.M))
    mebibytes = {name: int(value.replace(",", "")) for name, value in parts.items()}
    assert mebibytes["weights"] == round(4 * count / 2 / 2**20)
    assert mebibytes["weights to compute with"] == mebibytes["gradients"] == round(4 * count / 2**20)
    assert mebibytes["optimizer"] == round(8 * count / 2 / 2**20)
    assert mebibytes["residuals of the codec"] == round(4 * most / 2**20)
    with pytest.raises(HvdlmError, match="6 ranks cannot be arranged"):
        print_dry_run(config, 30_000, Launch("mpirun", 0, 6))
    assert capsys.readouterr().out == ""


def test_ranks_that_were_not_started(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("[model]\npreset = 'gpt2'\n[parallel]\nshard = 3\n")
    done = hvdlm("train", "x.toml", "--dry-run", "--ranks", "64", cwd=tmp_path)
    assert (rows(done.stdout)["ranks"], rows(done.stdout)["layout"]) == ("64", "ZeRO 3 x 64")
    for words, sentence in ((["--ranks", "64"], "--ranks is of --dry-run"), (["--ranks", "0"], "above 0")):
        wrong = hvdlm("train", "x.toml", *words, cwd=tmp_path)
        assert wrong.returncode != 0 and sentence in wrong.stderr


@pytest.mark.parametrize(
    ("ranks", "batch", "micro", "share", "at_once", "passes"),
    [(1, 8, 8, 8, 8, 1), (1, 9, 8, 9, 8, 2), (4, 8, 8, 2, 2, 1), (16, 8, 8, 1, 1, 1), (3, 16, 3, 6, 3, 2)],
)
def test_the_batch_is_shared_among_the_ranks(
    capsys: pytest.CaptureFixture[str], ranks: int, batch: int, micro: int, share: int, at_once: int, passes: int
) -> None:
    config = load(None, [f"--train.global_batch_size={batch}", f"--train.micro_batch_size={micro}"], PRESETS)
    print_dry_run(config, 65, Launch("mpirun", 0, ranks))
    found = rows(capsys.readouterr().out)
    assert found["sequences per step"] == f"{batch}, at most {share} a rank, {at_once} at once"
    assert found["micro-batches per step"] == str(passes)


def test_the_settings_it_prints_can_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = "runs/" + "a long name with [brackets] and :smile: " * 5
    config = load(None, ["--train.run_dir", run_dir, "--model.preset=llama-1b"], PRESETS)
    print_dry_run(config, 128256, Launch("none", 0, 1))
    settings, _, _ = capsys.readouterr().out.rpartition("\n\n")
    (tmp_path / "printed.toml").write_text(settings)
    assert load(tmp_path / "printed.toml", [], PRESETS) == config


def test_the_command_plans_for_the_ranks_that_were_started(tmp_path: Path, small_data: Path) -> None:
    (tmp_path / "x.toml").write_text(f"[data]\npath = '{small_data}'\n")
    first = hvdlm("train", "x.toml", "--dry-run", cwd=tmp_path, OMPI_COMM_WORLD_RANK="0", OMPI_COMM_WORLD_SIZE="4")
    assert (first.returncode, first.stderr) == (0, "")
    found = rows(first.stdout)
    assert found["ranks"] == "4"
    assert found["vocabulary"] == "257"  # bytes and the end of text
    other = hvdlm("train", "x.toml", "--dry-run", cwd=tmp_path, OMPI_COMM_WORLD_RANK="1", OMPI_COMM_WORLD_SIZE="4")
    assert (other.returncode, other.stdout, other.stderr) == (0, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["x.toml"]


def test_a_given_vocabulary_needs_no_data(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("[model]\npreset = 'gpt2'\n[data]\npath = 'nowhere'\n")
    done = hvdlm("train", "x.toml", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0
    assert rows(done.stdout)["parameters"] == "124,439,808"  # the released GPT-2's


def test_without_data_the_sentence_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("[data]\npath = 'nowhere'\n")
    done = hvdlm("train", "x.toml", "--dry-run", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("hvdlm: error: nowhere: no such data set; write it with `hvdlm prepare")
    assert done.stderr.count("\n") == 1


def test_memory_with_parameter_servers(capsys: pytest.CaptureFixture[str]) -> None:
    """Two of six ranks are servers, which have the optimizer's state, and divide weights, sums and moments."""
    shape = ["--model.width=512", "--model.layers=8", "--train.device=cpu", "--train.global_batch_size=32"]
    config = load(None, [*shape, "--server.ranks=2"], PRESETS)
    print_dry_run(config, 30_000, Launch("mpirun", 0, 6))
    output = capsys.readouterr().out
    found = rows(output)
    assert found["ranks"] == "6, of them 2 servers"
    assert found["sequences per step"].startswith("32, at most 8 a rank")  # of four workers
    parts = {
        name: int(value.replace(",", "")) for name, value in re.findall(r"^   (\S.*?)  +([\d,]+) MiB", output, re.M)
    }
    count = int(found["parameters"].replace(",", ""))
    assert parts["weights and optimizer"] == round(8 * count / 2**20)  # fp32: weights and gradients
    server = int(found["memory a server, estimated"].removesuffix(" MiB").replace(",", ""))
    assert abs(server - parts["libraries"] - round(16 * count / 2 / 2**20)) <= 1
    with pytest.raises(HvdlmError, match=r"server.ranks = 2 of 2 ranks leaves none to train"):
        print_dry_run(config, 30_000, Launch("mpirun", 0, 2))
