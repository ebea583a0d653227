"""The `hvdlm` command: every subcommand explains itself, and what it does not know it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from forked import hvdlm as run_hvdlm

import hvdlm

COMMANDS = ("train", "serve", "prepare", "inspect", "evaluate", "lm-eval", "generate", "install-horovod")


def test_help_names_every_command(tmp_path: Path) -> None:
    done = run_hvdlm("--help", cwd=tmp_path)
    assert done.returncode == 0
    for command in COMMANDS:
        assert f"\n    {command}" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(tmp_path: Path, command: str) -> None:
    done = run_hvdlm(command, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: hvdlm {command}")
    assert done.stderr == ""


def test_help_does_not_wait_for_torch() -> None:
    script = "import sys, hvdlm.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0


def test_version(tmp_path: Path) -> None:
    done = run_hvdlm("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"hvdlm {hvdlm.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["inspect", "x", "--verfy"], "unrecognized arguments: --verfy"),
        (["inspect", "x", "--train.steps", "5"], "unrecognized arguments: --train.steps 5"),
        (["generate"], "the following arguments are required: CHECKPOINT"),
        (["generate", "x", "--tokens", "many"], "argument --tokens: invalid int value: 'many'"),
        (["prepare", "--output", "x"], "one of the arguments --input --mix is required"),
        (["evaluate", "x", "--data", "y", "--engine", "nccl"], "invalid choice: 'nccl'"),
        (["train"], "the following arguments are required: CONFIG"),
        (["train", ""], "argument CONFIG: it is empty: give a path (was a shell variable not set?)"),
        (["train", "x.toml", "--resume", ""], "argument --resume: it is empty: give a path"),
        (["prepare", "--input", "", "--output", "x"], "argument --input: it is empty: give a path"),
        (["prepare", "--input", "x", "", "--output", "x"], "argument --input: it is empty: give a path"),
        (["prepare", "--input", "x", "--output", ""], "argument --output: it is empty: give a path"),
        (["prepare", "--input", "x", "--output", "x", "--validation-input", ""], "argument --validation-input: it is"),
        (["inspect", ""], "argument DIR: it is empty: give a path"),
        (["evaluate", "", "--data", "y"], "argument CHECKPOINT: it is empty: give a path"),
        (["evaluate", "x", "--data", ""], "argument --data: it is empty: give a path"),
        (["generate", ""], "argument CHECKPOINT: it is empty: give a path"),
        (["doctor", "--hostfile", ""], "argument --hostfile: it is empty: give a path"),
        (["slurm", "", "--nodes", "1", "--ranks-per-node", "1"], "argument CONFIG: it is empty: give a path"),
        (["fit", "x", "--output", ""], "argument --output: it is empty: give a path"),
        (
            ["prepare", "--input", "x", "--output", "y", "--seed", "-1"],
            "argument --seed: '-1': give a whole number from 0",
        ),
        (["doctor", "--timeout", "nan"], "argument --timeout: 'nan' is not a finite number"),
        (["doctor", "--timeout", "inf"], "argument --timeout: 'inf' is not a finite number"),
        (["doctor", "--timeout", "soon"], "argument --timeout: 'soon' is not a finite number"),
        (["doctor", "--timeout", "-1"], "argument --timeout: '-1': give seconds above 0, at most 1000000"),
        (["doctor", "--timeout", "1e10"], "argument --timeout: '1e10': give seconds above 0, at most 1000000"),
        (["predict", "x", "--ranks", "2", "--mfu", "nan"], "argument --mfu: 'nan' is not a finite"),
    ],
)
def test_a_wrong_command_line_exits_with_2_and_says_what_is_wrong(
    tmp_path: Path, arguments: list[str], part: str
) -> None:
    done = run_hvdlm(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert part in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "missing.toml"], "cannot read the configuration missing.toml: No such file or directory"),
        # Settings and options of `train` are not abbreviated, so that a misspelt setting cannot become an option.
        (["train", "x.toml", "--res", "latest"], "unknown argument '--res'"),
        (["train", "x.toml", "--steps", "5"], "unknown argument '--steps'"),
        (["train", "x.toml", "y.toml"], "unknown argument 'y.toml'"),
        (["inspect", "none"], "none: no such data set"),
        (["generate", "none"], "none holds no checkpoint"),
        (["evaluate", "none", "--data", "none"], "none: no such data set"),
        (["evaluate", "none", "--data", "none", "--micro-batch-size", "0"], "--micro-batch-size 0: give 1 or more"),
    ],
)
def test_a_wrong_argument_exits_with_1_and_one_sentence(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    (tmp_path / "x.toml").touch()
    done = run_hvdlm(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if not line.startswith("hvdlm: engine ")]
    assert len(errors) == 1
    assert errors[0].startswith("hvdlm: error: ")
    assert sentence in errors[0]
    assert done.stdout == ""
