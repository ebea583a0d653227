"""Settings: what may be written, what is refused and with which sentence, and who wins over whom."""

from __future__ import annotations

from pathlib import Path

import pytest
from forked import hvdlm

from hvdlm.config import Config
from hvdlm.config_reader import load
from hvdlm.errors import HvdlmError

PRESETS = {
    "tiny": {},
    "small": {"layers": 3, "heads": 5, "width": 20, "bias": False},
    "smaller": {"layers": 2},
}


def configure(*overrides: str) -> Config:
    return load(None, overrides, PRESETS)


def refusal(*overrides: str) -> str:
    with pytest.raises(HvdlmError) as caught:
        configure(*overrides)
    return str(caught.value)


def refusal_of_file(path: Path, text: str, *overrides: str) -> str:
    path.write_text(text, encoding="utf-8")
    with pytest.raises(HvdlmError) as caught:
        load(path, overrides, PRESETS)
    return str(caught.value)


def test_nothing_given_gives_the_defaults() -> None:
    config = configure()
    assert (config.model.preset, config.model.layers, config.model.width) == ("tiny", 4, 128)
    assert (config.train.steps, config.optimizer.lr) == (1000, 1e-3)
    assert config == Config()


# ---- names


@pytest.mark.parametrize(
    ("text", "wrong", "right"),
    [
        ("[model]\nlayer = 3", "model.layer", "model.layers"),
        ("[train]\nstep = 3", "train.step", "train.steps"),
        ("[optimizer]\nlearning_rte = 1.0\n", "optimizer.learning_rte", None),
        ("[optimiser]\nlr = 1.0", "optimiser", "optimizer"),
        ("[chekpoint]\nkeep = 1", "chekpoint", "checkpoint"),
        ("steps = 3", "steps", None),
        ("[comm]\nengines = 'mpi'", "comm.engines", "comm.engine"),
    ],
)
def test_an_unknown_name_is_an_error_that_gives_the_nearest_valid_one(
    tmp_path: Path, text: str, wrong: str, right: str | None
) -> None:
    message = refusal_of_file(tmp_path / "a.toml", text)
    assert f"a.toml: unknown key {wrong} (" in message
    if right:
        assert f"(did you mean {right}?)" in message


def test_a_name_unlike_any_other_lists_the_valid_ones() -> None:
    assert refusal("--log.xyzzyx", "3").endswith(
        "unknown key log.xyzzyx (valid: log.every, log.tensorboard, log.wandb)"
    )
    assert (
        "valid: checkpoint, comm, compression, data, local_steps, log, model, optimizer, parallel, privacy, server, "
        "train" in refusal("--xyzzyx.q", "3")
    )


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("--optimizer.algorithm", "muon", "optimizer.algorithm = 'muon' needs whole matrices"),
        ("--compression.codec", "auto", "compression.codec = 'auto' chooses for whole gradients"),
        ("--train.heal_replicas", "true", "need the whole model on every rank"),
        ("--parallel.sequence", "true", "a divisor of model.context_length = 255"),
        ("--parallel.tensor", "3", "parallel.tensor = 3 does not divide the 4 key and value heads"),
    ],
)
def test_what_does_not_go_with_tensor_parallelism(setting: str, value: str, said: str) -> None:
    assert said in refusal("--parallel.tensor", "2", "--model.context_length", "255", setting, value)
    assert "needs 2 or more" in refusal("--parallel.sequence", "true")


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("local_steps.every", "4", "with local_steps.every leave it out, and set local_steps.by = 'seconds'"),
        ("parallel.shard", "2", "it goes with parallel.shard = 1 and parallel.pipeline, and neither"),
        ("parallel.tensor", "2", "train.balance = true gives ranks unequal numbers of passes"),
        ("parallel.split", "3,3", "by the speeds of their ranks: leave out parallel.split"),
        ("train.deterministic", "true", "train.deterministic = true wants the same bits each time"),
        ("train.balance_every", "4", "train.balance_every"),
    ],
)
def test_what_does_not_go_with_unequal_shares(setting: str, value: str, said: str) -> None:
    assert said in refusal("--train.balance", "true", f"--{setting}", value)
    train = configure("--train.balance", "true", "--parallel.shard", "1", "--train.balance_every", "5").train
    assert (train.balance, train.balance_every) == (True, 5)


@pytest.mark.parametrize("other", [("--local_steps.hierarchical", "true"), ("--local_steps.by", "seconds")])
def test_local_steps_that_do_not_outlive_a_rank_are_refused(other: tuple[str, str]) -> None:
    local = ("--local_steps.every", "4", *other)
    assert "comm.elastic = true goes neither with local_steps.hierarchical nor" in refusal(
        "--comm.elastic", "true", *local
    )
    assert configure(*local).local_steps.every == 4
    assert configure("--comm.elastic", "true", "--local_steps.every", "4").comm.elastic


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("optimizer.algorithm", "dion", "optimizer.algorithm = 'dion' exchanges factors of momentum"),
        *(
            ("compression.codec", codec, f"compression.codec = '{codec}' cannot send gradients to their owners")
            for codec in ("auto", "topk", "topk2", "powersgd")
        ),
        ("compression.hierarchical", "true", "leave it out with parallel.shard"),
        ("train.heal_replicas", "true", "train.heal_replicas needs another rank with the same parameters"),
        ("train.evaluate_tasks", "hellaswag", "train.evaluate_tasks needs the whole model on every rank"),
        ("local_steps.every", "4", "[parallel] divides a model among ranks"),
        ("comm.elastic", "true", "comm.elastic = true needs the whole model on every rank"),
    ],
)
def test_what_shards_do_not_go_with(name: str, value: str, sentence: str) -> None:
    assert sentence in refusal("--parallel.shard", "1", f"--{name}", value)
    configure(f"--{name}", value)
    for codec in ("none", "fp16", "bf16", "int8", "int4", "int2"):
        configure("--parallel.shard", "3", "--compression.codec", codec, "--optimizer.algorithm", "muon")


def test_several_mistakes_are_told_at_once() -> None:
    message = refusal("--train.steps", "0", "--model.layers", "x", "--log.evry", "3")
    for part in ("train.steps = 0", "model.layers = 'x'", "log.evry (did you mean log.every?)"):
        assert part in message


# ---- types and bounds


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[train]\nsteps = 'many'", "train.steps = 'many'"),
        ("[train]\nsteps = 1.5", "train.steps = 1.5"),
        ("[train]\nsteps = true", "train.steps = True"),
        ("[train]\ncompile = 1", "train.compile = 1"),
        ("[optimizer]\nlr = '1e-3'", "optimizer.lr = '1e-3'"),
        ("[data]\npath = 3", "data.path = 3"),
        ("[model]\nnorm = 'batchnorm'", "'layernorm' or 'rmsnorm'"),
        ("[model]\npreset = ['tiny']", "model.preset = ['tiny']"),
        ("model = 3", "model must be a section, [model]"),
        ("[[train]]\nsteps = 1", "train must be a section, [train]"),
    ],
)
def test_a_wrong_type_is_named_and_not_converted(tmp_path: Path, text: str, named: str) -> None:
    message = refusal_of_file(tmp_path / "a.toml", text)
    assert "a.toml: " in message
    assert named in message
    assert "\n" not in message


def test_a_section_that_is_no_section_is_told_before_it_is_overridden(tmp_path: Path) -> None:
    message = refusal_of_file(tmp_path / "a.toml", "train = 3", "--train.steps", "5")
    assert "train must be a section, [train]" in message


@pytest.mark.parametrize(
    ("key", "refused", "taken"),
    [
        ("model.layers", "0", "1"),
        ("model.dropout", "1.0", "0.99"),
        ("model.dropout", "-0.1", "0"),
        ("model.kv_heads", "-1", "0"),
        ("train.steps", "0", "100"),
        ("train.micro_batch_size", "0", "1"),
        ("train.seed", "-1", "0"),
        ("train.seed", str(2**63), str(2**63 - 1)),  # what a generator of random numbers takes
        ("optimizer.lr", "0", "1e-9"),
        ("optimizer.lr", "nan", "1"),
        ("optimizer.beta2", "1", "0.999"),
        ("optimizer.final_lr_ratio", "1.1", "1"),
        ("comm.timeout", "0", "0.5"),
        ("comm.timeout", "1e308", "1e6"),
        ("comm.timeout", "inf", "300"),
        ("comm.timeout", "nan", "300"),
        ("optimizer.lr", "nan", "1e30"),
        ("optimizer.clip_norm", "inf", "0"),
        ("checkpoint.keep", "0", "1"),
        ("log.every", "0", "1"),
    ],
)
def test_bounds(key: str, refused: str, taken: str) -> None:
    assert f"{key} = " in refusal(f"--{key}", refused)
    section, name = key.split(".")
    value = getattr(getattr(configure(f"--{key}", taken), section), name)
    assert value == float(taken) or value == int(taken)


@pytest.mark.parametrize("key", ["data.path", "train.run_dir"])
def test_an_empty_path_is_refused(key: str, tmp_path: Path) -> None:
    assert f"the command line: {key} is empty: give a path, or leave it out" in refusal(f"--{key}", "")
    section, name = key.split(".")
    assert f"{key} is empty: " in refusal_of_file(tmp_path / "a.toml", f'[{section}]\n{name} = ""')


# ---- settings that do not go together


def test_impossible_combinations_are_refused_with_their_numbers() -> None:
    assert "model.width = 128 is not a multiple of model.heads = 3" in refusal("--model.heads", "3")
    assert "model.heads = 4 is not a multiple of model.kv_heads = 3" in refusal("--model.kv_heads", "3")
    assert "model.width / model.heads = 3 is odd" in refusal(
        "--model.position=rope", "--model.width=6", "--model.heads=2"
    )
    assert "optimizer.warmup_steps = 100 is more than train.steps = 99" in refusal("--train.steps", "99")
    message = refusal("--train.steps=100", "--optimizer.warmup_steps=60", "--optimizer.decay_steps=41")
    assert "optimizer.decay_steps = 41 does not fit between" in message
    assert "optimizer.warmup_steps = 60 and train.steps = 100" in message


def test_the_last_possible_combinations_are_taken() -> None:
    assert configure("--train.steps=100", "--optimizer.warmup_steps=60", "--optimizer.decay_steps=40")
    assert configure("--train.steps=100", "--optimizer.warmup_steps=100")
    assert configure("--model.kv_heads=2").model.kv_heads == 2
    assert configure("--model.width=6", "--model.heads=2", "--optimizer.warmup_steps=0").model.width == 6


# ---- overrides


def test_overrides_take_the_type_of_their_setting() -> None:
    config = configure(
        "--train.steps", "500",
        "--train.global_batch_size=7",
        "--optimizer.lr", "2",
        "--optimizer.eps=1e-6",
        "--train.compile", "true",
        "--model.bias=false",
        "--data.path", "a b/c = d",
        "--train.run_dir=runs/x=y",
        "--train.precision", "bf16",
        "--train.seed", "1_000",
    )  # fmt: skip
    assert config.train.steps == 500
    assert config.train.global_batch_size == 7
    assert (config.optimizer.lr, type(config.optimizer.lr)) == (2.0, float)
    assert config.optimizer.eps == 1e-6
    assert config.train.compile is True
    assert config.model.bias is False
    assert config.data.path == "a b/c = d"
    assert config.train.run_dir == "runs/x=y"
    assert config.train.precision == "bf16"
    assert config.train.seed == 1000


def test_an_override_that_is_one_of_some_numbers() -> None:
    assert configure("--parallel.shard", "3").parallel.shard == 3
    assert "parallel.shard = 4: input should be 0, 1, 2 or 3" in refusal("--parallel.shard", "4")


@pytest.mark.parametrize("path", ["123", "true", "1e-3", "2024-01-01", " ", '"quoted"', "-x", "café ☕", "a\\b"])
def test_a_text_setting_takes_any_text_as_it_is(path: str) -> None:
    assert configure("--data.path", path).data.path == path
    assert configure(f"--data.path={path}").data.path == path


def test_a_negative_number_is_a_value_and_not_a_flag() -> None:
    assert "train.steps = -5: input should be greater than 0" in refusal("--train.steps", "-5")
    assert "optimizer.lr = -0.1" in refusal("--optimizer.lr=-1e-1")


def test_the_last_of_two_overrides_wins() -> None:
    assert configure("--train.steps", "500", "--train.steps=600").train.steps == 600


def test_what_is_no_override_is_refused() -> None:
    assert refusal("--train.steps") == "--train.steps needs a value: --train.steps VALUE"
    assert "unknown argument '--steps'" in refusal("--steps", "5")
    assert "unknown argument 'train.steps'" in refusal("train.steps", "5")
    assert "unknown argument '5'" in refusal("--train.steps", "6", "5")
    assert "train.steps = ''" in refusal("--train.steps=")
    assert "train.compile = 'yes'" in refusal("--train.compile", "yes")
    assert "unknown key train.steps.more" in refusal("--train.steps.more", "5")


# ---- presets, file, command line


def test_a_preset_fills_what_neither_file_nor_command_line_gives(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("[model]\npreset = 'small'\nwidth = 40\nheads = 4\n")
    model = load(path, ["--model.heads", "2"], PRESETS).model
    assert (model.preset, model.layers, model.width, model.heads, model.bias) == ("small", 3, 40, 2, False)
    assert model.activation == "gelu"


def test_the_preset_itself_may_be_overridden(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("[model]\npreset = 'small'\n")
    model = load(path, ["--model.preset", "smaller"], PRESETS).model
    assert (model.preset, model.layers, model.heads, model.bias) == ("smaller", 2, 4, True)


def test_an_unknown_preset_is_refused_with_the_nearest() -> None:
    assert refusal("--model.preset", "smal").endswith("model.preset = 'smal' is unknown (did you mean small?)")
    assert "(valid: small, smaller, tiny)" in refusal("--model.preset", "xyzzy")


# ---- there and back


def test_to_toml_is_read_back_as_an_equal_configuration(tmp_path: Path) -> None:
    config = configure(
        "--model.preset=small", "--data.path", 'C:\\new "data"\ttab ü', "--optimizer.lr=3e-4", "--train.precision=fp16",
        "--comm.bucket_mb", "0.5", "--train.compile=true", "--train.seed", str(2**63 - 1),
    )  # fmt: skip
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    again = load(path, [], PRESETS)
    assert again == config
    assert again.digest() == config.digest()
    # What a run was trained with does not change when the preset does.
    assert load(path, [], {"small": {"layers": 99}}) == config


def test_digests_are_equal_exactly_if_the_settings_are() -> None:
    base = configure("--optimizer.lr", "1", "--model.layers=4")
    assert base.digest() == configure("--model.layers", "4", "--optimizer.lr=1.0").digest()
    assert len(base.digest()) == 64
    others = [
        ("--train.seed", "1"),
        ("--data.path", "elsewhere"),
        ("--optimizer.lr", "1.0000000000000002"),
        ("--model.bias", "false"),
        ("--log.every", "11"),
        ("--comm.engine", "mpi"),
    ]
    digests = {configure("--optimizer.lr", "1", *other).digest() for other in others} | {base.digest()}
    assert len(digests) == len(others) + 1


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        configure().train.steps = 5


# ---- files, and the command as a user runs it


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"[train\nsteps = 3", "line 1"),
        (b"[train]\nsteps = 3\nsteps = 4", "overwrite"),
    ],
)
def test_a_broken_file_is_named_with_the_place(tmp_path: Path, content: bytes, part: str) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    with pytest.raises(HvdlmError) as caught:
        load(path, [], PRESETS)
    assert str(caught.value).startswith(f"{path} is not valid TOML: ")
    assert part in str(caught.value)


def test_an_unreadable_file_is_named_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(HvdlmError, match=r"cannot read the configuration .*none\.toml: No such file"):
        load(tmp_path / "none.toml", [], PRESETS)
    with pytest.raises(HvdlmError, match="Is a directory"):
        load(tmp_path, [], PRESETS)


@pytest.mark.parametrize(
    ("text", "overrides", "part"),
    [
        ("[train]\nstep = 3\n", [], "x.toml: unknown key train.step (did you mean train.steps?)"),
        ("[train]\n", ["--model.width=5"], "model.width = 5 is not a multiple of model.heads = 4"),
        ("[train\n", [], "x.toml is not valid TOML"),
    ],
)
def test_the_command_says_one_sentence_and_exits_with_1(
    tmp_path: Path, text: str, overrides: list[str], part: str
) -> None:
    (tmp_path / "x.toml").write_text(text)
    done = hvdlm("train", "x.toml", "--dry-run", *overrides, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("hvdlm: error: ")
    assert part in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_a_traceback_is_shown_on_request(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("[train]\nstep = 3\n")
    done = hvdlm("--traceback", "train", "x.toml", "--dry-run", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("hvdlm: error: x.toml: unknown key train.step")
    assert "Traceback (most recent call last)" in done.stderr
    assert "HvdlmError" in done.stderr


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(b"\xef\xbb\xbf[train]\nseed = 3\n")
    assert load(tmp_path / "x.toml", [], PRESETS).train.seed == 3


def test_what_is_not_utf_8_is_said(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes("[train]\nsteps = 3\n".encode("utf-16"))
    with pytest.raises(HvdlmError, match=r"x.toml is not UTF-8 \(invalid start byte\): save it as UTF-8 text"):
        load(tmp_path / "x.toml", [], PRESETS)
    assert refusal("--train.run_dir", "caf\udce9") == "--train.run_dir is not UTF-8: 'caf\\udce9'"


def test_the_home_of_a_user_stands_in_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = configure("--train.run_dir", "~/runs/x", "--data.path", "data~")
    assert (config.train.run_dir, config.data.path) == ("/home/me/runs/x", "data~")
    assert "a user who is not there" in refusal("--train.run_dir", "~nobody-of-this-name/x")


@pytest.mark.parametrize("path", ["$SCRATCH/run", "a/${USER}/b"])
def test_a_variable_that_no_shell_has_replaced_is_refused(path: str) -> None:
    variable = path[path.index("$") :].partition("/")[0]
    sentence = f"train.run_dir = {path!r} holds {variable}, which hvdlm does not replace: write the path itself"
    assert refusal("--train.run_dir", path).endswith(sentence)


def test_tokens_that_end_training_shorten_the_schedule() -> None:
    shape = ("--train.steps", "1000", "--train.global_batch_size", "4", "--model.context_length", "8")
    config = configure(*shape, "--train.max_tokens", "3201", "--optimizer.warmup_steps", "50")
    assert config.planned_steps == 101  # of 32 tokens each
    few = (*shape, "--train.max_tokens", "3200", "--optimizer.warmup_steps")
    assert configure(*few, "100").planned_steps == 100
    said = refusal(*few, "101")
    assert said.endswith("optimizer.warmup_steps = 101 is more than the 100 steps of train.max_tokens = 3200")
    assert "optimizer.decay_steps = 60 does not fit between" in refusal(*few, "50", "--optimizer.decay_steps", "60")


def test_a_range_test_has_no_warm_up() -> None:
    assert "is more than train.steps = 50" in refusal("--train.steps", "50")
    assert configure("--train.steps", "50", "--optimizer.schedule", "range_test").train.steps == 50


# ---- pipelines


def test_stages_of_a_pipeline() -> None:
    config = configure("--parallel.pipeline", "2", "--parallel.schedule", "interleaved", "--parallel.split", "1,2,0,1")
    assert (config.parallel.stages, config.parallel.blocks_of_stages) == (4, [1, 2, 0, 1])
    config = configure("--parallel.pipeline", "2", "--parallel.boundary", "int8", "--parallel.chunks", "3")
    assert (config.parallel.stages, config.parallel.blocks_of_stages, config.parallel.schedule) == (2, [], "1f1b")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["--parallel.split", "2,x"], "'2,x' is not a list of numbers of blocks, such as 4,4,3"),
        (["--parallel.split", "2,1,1"], "names 3 stages, but parallel.pipeline = 2 makes 2"),
        (["--parallel.split", "2,3"], "has 5 blocks, but model.layers = 4"),
        (
            ["--parallel.schedule", "interleaved", "--parallel.chunks", "3"],
            "parallel.pipeline = 2 x parallel.chunks = 3 makes 6 stages, more than model.layers = 4",
        ),
        (["--parallel.schedule", "zero_bubble", "--train.compile", "true"], "compiled blocks cannot"),
        (["--parallel.schedule", "zero_bubble_h2", "--train.compile", "true"], "compiled blocks cannot"),
        (
            ["--optimizer.algorithm", "dion"],
            "needs the whole model on every rank: it goes with neither",
        ),
        (["--train.evaluate_tasks", "hellaswag"], "train.evaluate_tasks need the whole model"),
        (["--train.heal_replicas", "true"], "need the whole model on every rank"),
        (["--train.precision", "fp16", "--compression.codec", "topk"], "set compression.codec to 'none'"),
        (["--data.on_corrupt", "skip"], "may leave out a sequence on one stage"),
        (["--parallel.shard", "3"], "parallel.shard = 3 gathers parameters for each pass of each micro-batch"),
        *(
            (["--parallel.shard", "2", "--parallel.schedule", name], f"parallel.schedule = '{name}' makes a part")
            for name in ("interleaved", "zero_bubble", "zero_bubble_h2")
        ),
        (["--parallel.tensor", "2", "--parallel.sequence", "true"], "send as a whole: leave out one of them"),
    ],
)
def test_what_does_not_fit_a_pipeline(settings: list[str], sentence: str) -> None:
    assert sentence in refusal("--parallel.pipeline", "2", *settings)


# ---- privacy

PRIVATE = ("--privacy.clip_norm", "1.0", "--privacy.noise_multiplier", "1.0")


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (("--train.precision", "fp16"), "train.precision = 'fp16' leaves out steps"),
        (
            ("--train.batch_ramp_start", "8", "--train.batch_ramp_steps", "50"),
            "train.batch_ramp_start changes the chance",
        ),
        (("--train.balance", "true", "--compression.codec", "int4"), "always in the part of the same rank"),
        (("--optimizer.algorithm", "dion"), "factors of its own momentum"),
        (("--local_steps.every", "auto"), "go by how long steps take"),
        (("--local_steps.every", "4", "--local_steps.by", "seconds"), "go by how long steps take"),
        (("--local_steps.every", "4", "--comm.elastic", "true"), "train on what a dead rank has trained on"),
        (("--parallel.shard", "1"), "it does not go with [parallel]"),
        (("--parallel.tensor", "2"), "it does not go with [parallel]"),
        (("--server.ranks", "1"), "it does not go with [server]"),
        (("--privacy.clip_norm", "0"), "need gradients of bounded norm"),
    ],
)
def test_what_breaks_privacy_is_refused(overrides: tuple[str, ...], part: str) -> None:
    assert configure(*PRIVATE).privacy.is_used
    assert part in refusal(*PRIVATE, *overrides)


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (("--local_steps.every", "0"), "too coarse for gradients: set local_steps.every"),
        (("--local_steps.warmup_steps", "5"), "are not masked"),
        (("--local_steps.every", "auto"), "are not masked"),
        (("--comm.elastic", "true"), "takes along its masks"),
        (
            ("--server.ranks", "1", "--server.max_staleness", "2"),
            "servers are sent the differences of one worker at a time",
        ),
    ],
)
def test_what_masks_do_not_go_with(overrides: tuple[str, ...], part: str) -> None:
    masked = ("--compression.codec", "masked", "--local_steps.every", "4")
    assert configure(*masked).local_steps.every == 4
    assert part in refusal(*masked, *overrides)
