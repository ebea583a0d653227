"""Every recipe of examples/ trains as it stands, in small; and what `hvdlm new` writes does, by its own commands."""

from __future__ import annotations

import math
import re
import subprocess
from pathlib import Path

import pytest
from forked import hvdlm
from jobs import Ranks, losses, records
from launcher import run

from hvdlm.config import Config
from hvdlm.config_reader import load
from hvdlm.model.presets import PRESETS
from hvdlm.model.size import flops_per_token, parameter_count

EXAMPLES = Path(__file__).parents[2] / "examples"

RECIPES = {"shakespeare_cpu": 2, "shakespeare_gpu": 1, "llama_small": 2, "gpt2_fineweb": 2, "two_offices": 2}  # ranks
ELSEWHERE = {"quickstart", "continued"}  # tests/integration has tests of these

SMALL = {
    "model.layers": 1,
    "model.heads": 2,
    "model.kv_heads": 0,
    "model.width": 32,
    "model.context_length": 32,
    "model.vocab_size": 0,
    "train.steps": 24,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 4,
    "train.compile": "false",
    "train.evaluate_every": 12,
    "train.evaluate_sequences": 16,
    "optimizer.warmup_steps": 4,
    "optimizer.lr": 0.01,
    "log.every": 1,
}


def test_every_example_is_tested() -> None:
    assert {file.stem for file in EXAMPLES.glob("*.toml")} == {*RECIPES, *ELSEWHERE}


@pytest.mark.thorough
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_in_small(name: str, ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    settings = SMALL | {"data.path": small_data, "train.run_dir": tmp_path / "run"}
    if name == "two_offices":
        settings["local_steps.warmup_steps"] = 4
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    result = ranks.hvdlm(RECIPES[name], "train", str(EXAMPLES / f"{name}.toml"), *words)
    assert result.status == 0, result.output
    curve = losses(tmp_path / "run")
    assert curve[max(curve)] < curve[min(curve)] < 6.0
    assert len(records(tmp_path / "run", "eval")) == 2


def config_of(name: str) -> Config:
    return load(EXAMPLES / f"{name}.toml", [], PRESETS)


def tokens_per_step(config: Config) -> int:
    return config.train.global_batch_size * config.model.context_length


def test_the_arithmetic_in_their_comments() -> None:
    """Counted by hand: 12 D^2 a block, embeddings of tokens and positions, one weight of each LayerNorm."""
    cpu, gpu = config_of("shakespeare_cpu"), config_of("shakespeare_gpu")
    assert parameter_count(cpu.model, 257) == 4 * 12 * 128**2 + (257 + 64) * 128 + 9 * 128
    assert parameter_count(gpu.model, 257) == 6 * 12 * 384**2 + (257 + 256) * 384 + 13 * 384
    assert cpu.train.steps * tokens_per_step(cpu) == 1_536_000  # 1.5 epochs of 1,003,837 tokens
    sequences = gpu.train.steps * gpu.train.global_batch_size
    assert round(sequences / (1_003_836 // 256)) == 82
    assert flops_per_token(gpu.model, 257) == 6 * (6 * 12 * 384**2 + 257 * 384) + 6 * 6 * 384 * 256
    assert flops_per_token(gpu.model, 257) == pytest.approx(68e6, rel=0.01)
    llama, quickstart = config_of("llama_small"), config_of("quickstart")
    # queries and outputs of 192^2, keys and values of 64 x 192, three matrices of the MLP of 512 x 192
    block = 2 * 192**2 + 2 * 64 * 192 + 3 * 512 * 192
    assert flops_per_token(llama.model, 1024) == 6 * (4 * block + 1024 * 192) + 6 * 4 * 192 * 256
    assert flops_per_token(llama.model, 1024) == pytest.approx(11.8e6, rel=0.005)
    assert llama.train.steps * tokens_per_step(llama) * 11.8e6 == pytest.approx(48e12, rel=0.01)
    assert flops_per_token(quickstart.model, 1024) == pytest.approx(5.9e6, rel=0.005)
    for name, tokens in (("gpt2_fineweb", 10.0e9), ("two_offices", 2.49e9)):
        gpt2 = config_of(name)
        assert tokens_per_step(gpt2) == 524_288
        assert gpt2.train.steps * tokens_per_step(gpt2) == pytest.approx(tokens, rel=0.001)
        products = 12 * 12 * 768**2 + 50_304 * 768
        assert flops_per_token(gpt2.model, 50_304) == 6 * products + 6 * 12 * 768 * 1024
        assert flops_per_token(gpt2.model, 50_304) == pytest.approx(798e6, rel=0.001)
        assert parameter_count(gpt2.model, 50_304) == pytest.approx(124.5e6, rel=0.001)


def test_what_new_writes_runs_by_its_own_commands(tmp_path: Path) -> None:
    made = hvdlm("new", "mine", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    folder = tmp_path / "mine"
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.toml", "slurm.sh", "text"]
    (folder / "text" / "book.txt").write_text("".join(f"The line {i} of {i * i % 97} books.\n" for i in range(6000)))
    (block,) = re.findall(r"```bash\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    small = "--train.steps 12 --optimizer.warmup_steps 4 --train.evaluate_every 12 --model.layers 1 --log.every 1"
    for line in block.splitlines():
        words = f"{line} {small}" if " train " in line else line
        result = run(["bash", "-c", words], cwd=folder, deadline=200)
        assert result.status == 0, f"{line}\n{result.output}"
    assert result.output.startswith("The ")
    assert {record["world_size"] for record in records(folder / "run")} == {2}
    curve = losses(folder / "run")
    assert curve[12] < curve[1] < math.log(1024) + 1


def test_the_job_that_new_writes_is_one_for_slurm(tmp_path: Path) -> None:
    """Up to what it would give sbatch."""
    assert hvdlm("new", "mine", cwd=tmp_path).returncode == 0
    folder = tmp_path / "mine"
    (folder / "text" / "book.txt").write_text("".join(f"The line {i}.\n" for i in range(6000)))
    done = hvdlm("prepare", "--input", "text", "--output", "data", "--workers", "1", cwd=folder)
    assert done.returncode == 0, done.stderr
    (tmp_path / "sbatch").write_text('#!/bin/sh\necho "$@" > submitted\necho 7\n')
    (tmp_path / "sbatch").chmod(0o755)
    job = f"PATH={tmp_path}:$PATH {folder / 'slurm.sh'} --sbatch=--partition=fast"
    result = run(["bash", "-c", job], cwd=tmp_path)
    assert result.status == 0, result.output
    (script,) = [word for word in (folder / "submitted").read_text().split() if not word.startswith("--")]
    assert "--partition=fast" in Path(folder, script).read_text()
    assert subprocess.run(["bash", "-n", Path(folder, script)], check=False).returncode == 0


def test_new_changes_nothing_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    done = hvdlm("new", "mine", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "hvdlm: error: mine is there already: remove it, or name another directory\n"
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_new_fills_an_empty_directory_and_names_one_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert hvdlm("new", "empty", cwd=tmp_path).returncode == 0
    (tmp_path / "file").touch()
    done = hvdlm("new", "file/mine", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("hvdlm: error: cannot write file/mine: ")
    assert done.stderr.count("\n") == 1
