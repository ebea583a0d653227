"""Scores in tasks of lm-evaluation-harness: those of its own model of transformers on the exported checkpoint, to the
last digit the same at any batch size and number of ranks, and in training."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import lm_eval
import pytest
import torch
from jobs import Ranks, records
from lm_eval.tasks import TaskManager
from pool import Pools
from small_tasks import CHOICES, KINDS, PROMPTS, TEXTS, write_tasks
from test_hugging_face import LLAMA, configuration, hvdlm
from test_tensorboard import shown

from hvdlm.data.prepare import prepare
from hvdlm.data.tokenizer import Tokenizer
from hvdlm.errors import HvdlmError
from hvdlm.model.transformer import Transformer
from hvdlm.scoring.harness import check_harness
from hvdlm.training import checkpoint


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file for each task, and its questions beside it."""
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    return folder


@pytest.fixture(scope="module")
def data(small_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens of several bytes, so that a context and its continuation may share one."""
    output = tmp_path_factory.mktemp("data") / "words"
    prepare(small_texts[1:3], output, "bpe:400", 2, 0.1, workers=1, text_key="text", seed=0, skip_bad=True)
    return output


@pytest.fixture(scope="module")
def run_dir(data: Path, tasks: Path, pools: Pools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of local steps, whose tasks are scored with averaged parameters; it is saved at the same steps."""
    run_dir = tmp_path_factory.mktemp("scored") / "run"
    settings = {
        "train__evaluate_tasks": f"{tasks / 'text.yaml'},{tasks / 'choice.yaml'}",
        **{"train__steps": 20, "train__evaluate_every": 10, "checkpoint__every": 10, "checkpoint__keep": 9},
        **{"local_steps__every": 4, "local_steps__warmup_steps": 5, "log__tensorboard": "true"},
    }
    result = Ranks(pools.get("mpi", "mpirun", 4)).train(2, data, run_dir, **settings)
    assert result.status == 0, result.output
    assert "step 20/20  text/byte_perplexity " in result.output
    return run_dir


@pytest.fixture(scope="module")
def checkpoint_path(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights, large enough that what it generates is not always the same."""
    tokenizer = Tokenizer.load(data / "tokenizer.json")
    config = configuration({**LLAMA, "kv_heads": 2, "context_length": 32})
    model = Transformer(config.model, tokenizer.vocab_size)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm.weight" in name else 0.0, 0.2)
    state = {
        **{"step": 3, "config": config.model_dump(), "vocab_size": model.vocab_size, "world_size": 1},
        **{"fingerprint": "0" * 64, "versions": checkpoint.versions()},
    }
    path = tmp_path_factory.mktemp("random") / "checkpoint"
    path.mkdir()
    checkpoint.write_files(path, 3, model.state_dict(), {}, state, tokenizer.content)
    return path


def scored(ranks: Ranks, size: int, path: Path, output: Path, *options: str) -> dict[str, Any]:
    result = ranks.hvdlm(size, "lm-eval", str(path), "--output", str(output), *options)
    assert result.status == 0, result.output
    found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def files(checkpoint_path: Path, tasks: Path, pools: Pools, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """All scores with all answers, by ranks and batch sizes."""
    folder, ranks = tmp_path_factory.mktemp("scores"), Ranks(pools.get("mpi", "mpirun", 4))
    found = []
    for size, batch_size in ((1, 1), (1, 4), (1, 32), (2, 4)):
        found.append(folder / f"{size}-{batch_size}.json")
        options = ("--tasks", ",".join(KINDS), "--include-path", str(tasks), "--batch-size", str(batch_size))
        scored(ranks, size, checkpoint_path, found[-1], *options, "--log-samples")
    return found


def test_scores_do_not_depend_on_batches_and_ranks(files: Sequence[Path]) -> None:
    assert len({file.read_bytes() for file in files}) == 1
    drawn = [each["resps"][0] for each in json.loads(files[0].read_text())["samples"]["drawn"]]
    assert any(first != second for first, second in drawn)  # of the same request


def test_scores_of_the_harness_itself(
    files: Sequence[Path], checkpoint_path: Path, tasks: Path, tmp_path: Path
) -> None:
    """With its own model of transformers, in float32."""
    exported = tmp_path / "exported"
    assert hvdlm("export", checkpoint_path, "--to", "hf", exported).status == 0
    names = [name for name in KINDS if name != "drawn"]
    reference = lm_eval.simple_evaluate(
        "hf",
        {"pretrained": str(exported), "dtype": "float32"},
        tasks=[str(tasks / f"{name}.yaml") for name in names],
        task_manager=TaskManager(include_defaults=False),
        batch_size=1,
        device="cpu",
    )
    assert reference is not None
    found = json.loads(files[0].read_text())
    compared = 0
    for name in names:
        for ours, theirs in zip(found["samples"][name], reference["samples"][name], strict=True):
            assert ours["doc"] == theirs["doc"]
            for (own,), (other,) in zip(ours["resps"], theirs["resps"], strict=True):
                if name == "choice":
                    assert own[0] == pytest.approx(float(other[0]), rel=0, abs=1e-5)
                    assert own[1] == bool(other[1])
                elif name == "text":
                    assert own == pytest.approx(float(other), rel=1e-6, abs=1e-5)
                else:
                    assert own == other
                compared += 1
        for metric, value in reference["results"][name].items():
            if isinstance(value, float):
                assert found["results"][name][metric] == pytest.approx(value, rel=1e-6)
    assert compared == sum(len(each["choices"]) for each in CHOICES) + len(TEXTS) + len(PROMPTS)
    assert len({each["resps"][0][0] for each in found["samples"]["greedy"]}) > 1


def test_the_registered_model(files: Sequence[Path], checkpoint_path: Path, tasks: Path) -> None:
    import hvdlm.training.registered_model  # noqa: F401

    task = str(tasks / "choice.yaml")
    manager = TaskManager(include_defaults=False)
    results = lm_eval.simple_evaluate(
        "hvdlm", {"checkpoint": str(checkpoint_path)}, tasks=[task], task_manager=manager, batch_size=3
    )
    assert results is not None
    answers = [[list(answer) for (answer,) in each["resps"]] for each in results["samples"]["choice"]]
    own = json.loads(files[0].read_text())["samples"]["choice"]
    assert answers == [[answer for (answer,) in each["resps"]] for each in own]


def test_examples_and_a_limit(ranks: Ranks, run_dir: Path, tasks: Path, tmp_path: Path) -> None:
    options = ("--tasks", str(tasks / "choice.yaml"), "--num-fewshot", "1", "--limit", "2")
    found = scored(ranks, 2, run_dir, tmp_path / "scores.json", *options)
    assert (found["n-shot"]["choice"], found["n-samples"]["choice"]["effective"]) == (1, 2)
    assert "samples" not in found


def test_scores_in_training_are_those_of_the_checkpoints(
    ranks: Ranks, run_dir: Path, tasks: Path, tmp_path: Path
) -> None:
    written = records(run_dir, "tasks")
    assert [each["step"] for each in written] == [10, 20]
    assert written[0]["text/byte_perplexity"] != written[1]["text/byte_perplexity"]
    for record in written:
        path = run_dir / "checkpoints" / f"step_{record['step']:08d}"
        names = ("--tasks", "text,choice", "--include-path", str(tasks))
        results = scored(ranks, 1, path, tmp_path / "scores.json", *names)["results"]
        keys = {"text": ("byte_perplexity",), "choice": ("acc", "acc_norm")}
        expected = {f"{task}/{key}": results[task][f"{key},none"] for task, of_task in keys.items() for key in of_task}
        assert {name: value for name, value in record.items() if name not in ("kind", "step")} == expected
    points = shown(run_dir)["tasks/text/byte_perplexity"]
    assert points == pytest.approx({int(str(each["step"])): each["text/byte_perplexity"] for each in written})


def test_a_run_that_was_killed_before_its_scores(
    ranks: Ranks, run_dir: Path, data: Path, tasks: Path, tmp_path: Path
) -> None:
    """It scores them when it goes on, and writes nothing twice."""
    broken = tmp_path / "run"
    shutil.copytree(run_dir, broken)
    metrics = broken / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if '"tasks", "step": 20' not in line))
    settings = {"train__evaluate_tasks": f"{tasks / 'text.yaml'},{tasks / 'choice.yaml'}", "train__steps": 20}
    settings |= {"train__evaluate_every": 10, "local_steps__every": 4, "local_steps__warmup_steps": 5}
    for _ in range(2):
        result = ranks.train(2, data, broken, "--resume", "latest", **settings)
        assert result.status == 0, result.output
        assert records(broken, "tasks") == records(run_dir, "tasks")
        assert records(broken, "eval") == records(run_dir, "eval")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--tasks", "tiny_choise"], "'tiny_choise' is neither a task of lm-evaluation-harness 0.4.13 nor a task file"),
        (["--tasks", " ,"], "no task is named"),
        (["--tasks", "TASKS/choice.jsonl"], "cannot load the tasks"),
        (["--tasks", "choice", "--include-path", "TASKS/none"], "TASKS/none is no folder of task files"),
        (["--tasks", "TASKS/choice.yaml", "--batch-size", "0"], "--batch-size 0: give 1 or more"),
        (["--tasks", "TASKS/choice.yaml", "--limit", "0"], "--limit 0: give 1 or more"),
        (["--tasks", "TASKS/choice.yaml", "--num-fewshot", "-1"], "--num-fewshot -1: give 0 or more"),
        (["--tasks", "TASKS/choice.yaml", "--log-samples"], "--log-samples goes into the file of --output"),
        (["--tasks", "TASKS/choice.yaml", "--output", "TASKS"], "--output TASKS: give the name of a file"),
    ],
)
def test_what_cannot_be_scored(options: list[str], sentence: str, ranks: Ranks, run_dir: Path, tasks: Path) -> None:
    words = [each.replace("TASKS", str(tasks)) for each in options]
    result = ranks.hvdlm(2, "lm-eval", str(run_dir), *words)
    assert result.status == 1
    assert result.output.count(sentence.replace("TASKS", str(tasks))) == 1, result.output


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("max_gen_toks: 9", "max_gen_toks: 32"), "a task generates 32 tokens (max_gen_toks in generation_kwargs)"),
        (("max_gen_toks: 9", "num_beams: 4"), "a task sets num_beams in generation_kwargs: hvdlm knows do_sample, max"),
        (('"self"', '"{{1 // (text | length < 20)}}"'), "lm-evaluation-harness cannot score the tasks: ZeroDivision"),
        (("greedy.jsonl", "missing.jsonl"), "cannot load the tasks"),
    ],
)
def test_tasks_that_fail(
    change: tuple[str, str], sentence: str, ranks: Ranks, run_dir: Path, tasks: Path, tmp_path: Path
) -> None:
    """While other ranks wait; nothing is written."""
    task, output = tmp_path / "bad.yaml", tmp_path / "scores.json"
    task.write_text((tasks / "greedy.yaml").read_text().replace(*change))
    result = ranks.hvdlm(2, "lm-eval", str(run_dir), "--tasks", str(task), "--output", str(output))
    assert result.status == 1
    assert result.output.count(sentence) == 1, result.output
    assert not output.exists()


def test_an_unknown_task_ends_training_before_it_begins(ranks: Ranks, data: Path, tmp_path: Path) -> None:
    result = ranks.train(2, data, tmp_path / "run", train__evaluate_tasks="none.yaml")
    assert result.status == 1
    assert result.output.count("train.evaluate_tasks: there is no task file none.yaml") == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_task_file_needs_no_network(tasks: Path) -> None:
    """Nothing is asked for a name or connected to, whatever the environment says of the Hub."""
    script = f"""
import socket
asked = []
socket.getaddrinfo = lambda *words, **_: asked.append(words)
socket.socket.connect = lambda _, address: asked.append(address)
from hvdlm.scoring.harness import Tasks
Tasks({[str(tasks / f"{name}.yaml") for name in KINDS]})
assert asked == [], asked
"""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_without_the_harness_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(HvdlmError, match=r"hvdlm lm-eval needs lm_eval, .*: pip install 'hvdlm\[lm-eval\]'"):
        check_harness("hvdlm lm-eval")
