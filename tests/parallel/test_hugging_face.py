"""Models go to transformers and come from there: it reads what was written, and computes and generates the same."""

from __future__ import annotations

import io
import json
import logging
import os
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import safetensors.torch
import torch
import transformers
from jobs import Ranks, losses, records
from launcher import Result

from hvdlm.cli import main
from hvdlm.comm.solo import SoloCommunicator
from hvdlm.config import Config, ModelSection, TrainSection
from hvdlm.config.batch_sizes import BatchSizes
from hvdlm.config_reader import from_dict, load
from hvdlm.data.loader import Loader
from hvdlm.data.rank_parts import RankParts
from hvdlm.data.shard import DataSet
from hvdlm.data.tokenizer import Tokenizer
from hvdlm.errors import HvdlmError
from hvdlm.model.generate import generate
from hvdlm.model.presets import PRESETS
from hvdlm.model.transformer import Transformer
from hvdlm.training import checkpoint
from hvdlm.training.initial_weights import begin_with_weights, shape_of
from hvdlm.training.trainer import Trainer

VOCABULARY = 301  # odd, and larger than the tokenizer's

GPT2 = {"position": "learned", "norm": "layernorm", "activation": "gelu", "bias": True, "tie_embeddings": True}
LLAMA = {"position": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "tie_embeddings": False}
SIZES = {"layers": 2, "heads": 4, "width": 32, "context_length": 48, "mlp_width": 56}
STRETCHED = {"rope_scaling": 8.0, "rope_original_context": 16, "rope_theta": 500.0}

# `[model]` by what it is, and the class of transformers that computes it
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "gpt2": (GPT2, "GPT2LMHeadModel"),
    "gpt2, untied": ({**GPT2, "tie_embeddings": False}, "GPT2LMHeadModel"),
    "gpt-neox": ({**GPT2, "position": "rope", "rope_theta": 500.0}, "GPTNeoXForCausalLM"),
    "gpt-neox, untied": ({**GPT2, "position": "rope", "tie_embeddings": False}, "GPTNeoXForCausalLM"),
    "llama": (LLAMA, "LlamaForCausalLM"),
    "llama, tied, grouped heads": ({**LLAMA, "tie_embeddings": True, "kv_heads": 2}, "LlamaForCausalLM"),
    "llama, biases": ({**LLAMA, "bias": True}, "LlamaForCausalLM"),
    "llama 3.1": ({**LLAMA, **STRETCHED, "kv_heads": 1}, "LlamaForCausalLM"),
    "llama, biases twice": ({**LLAMA, "bias": True, "qkv_bias": True}, "LlamaForCausalLM"),
    "qwen2": ({**LLAMA, "qkv_bias": True, "kv_heads": 2}, "Qwen2ForCausalLM"),
}


def hvdlm(*words: object) -> Result:
    """In this process, which has loaded PyTorch already."""
    output = io.StringIO()
    handler = logging.StreamHandler(output)
    logging.getLogger("hvdlm").addHandler(handler)
    try:
        with redirect_stdout(output):
            status = main(list(map(str, words)))
    finally:
        logging.getLogger("hvdlm").removeHandler(handler)
    return Result(status, output.getvalue())


def configuration(values: dict[str, Any]) -> Config:
    return from_dict({"model": {**SIZES, **values}}, "a test", PRESETS)


def random_model(config: Config) -> Transformer:
    """Of weights that are large enough for every part of the model to count."""
    model = Transformer(config.model, VOCABULARY)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm.weight" in name else 0.0, 0.2)
    return model.eval()


def save(model: Transformer, config: Config, parent: Path) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    state = {
        **{"step": 0, "config": config.model_dump(), "vocab_size": model.vocab_size, "world_size": 1},
        **{"fingerprint": "0" * 64, "versions": checkpoint.versions()},
    }
    Tokenizer.byte().save(parent / "byte.json")
    path = parent / "checkpoint"
    path.mkdir()
    checkpoint.write_files(path, 0, model.state_dict(), {}, state, (parent / "byte.json").read_bytes())
    return path


def logits_of(reference: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = reference(tokens).logits
    return logits


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_exported_computes_and_generates_the_same_and_comes_back(kind: str, tmp_path: Path) -> None:
    values, architecture = MODELS[kind]
    config = configuration(values)
    model = random_model(config)
    source, exported = save(model, config, tmp_path), tmp_path / "exported"
    result = hvdlm("export", source, "--to", "hf", exported, "--shard-size", "2e-5")
    assert result.status == 0, result.output
    assert len(list(exported.glob("model-*-of-*.safetensors"))) > 2
    reference, told = transformers.AutoModelForCausalLM.from_pretrained(
        exported, attn_implementation="eager", output_loading_info=True
    )
    assert type(reference).__name__ == architecture
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    tokens = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours = model.logits(model(tokens))
    theirs = logits_of(reference.eval(), tokens)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()

    own = generate(model, tokens[0, :5], 20, temperature=0.0, top_k=0, top_p=1.0, seed=0, eos_id=256)
    other = reference.generate(tokens[:1, :5], max_new_tokens=20, do_sample=False)[0]
    assert own.tolist() == other.tolist()

    back = hvdlm("import", exported, "--output", tmp_path / "back")
    assert back.status == 0, back.output
    before, after = (checkpoint.open_checkpoint(path) for path in (source, tmp_path / "back"))
    assert after.state["vocab_size"] == VOCABULARY
    assert_equal(after.model(), before.model())
    now = from_dict(after.state["config"], "back", PRESETS).model
    unsaid = {"kv_heads": config.model.kv_heads, "qkv_bias": now.qkv_bias or (now.bias and config.model.qkv_bias)}
    assert now.model_copy(update=unsaid) == config.model


def assert_equal(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())


LLAMA_SIZES = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 64, "vocab_size": VOCABULARY},
}
LLAMA3_SCALING = {
    **{"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 32,
}


def published(kind: str) -> Any:
    """A random model as its publisher would have made it."""
    torch.manual_seed(3)
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    if kind == "gpt-neox":
        sizes = {each: LLAMA_SIZES[each] for each in LLAMA_SIZES if each != "num_key_value_heads"}
        settings = {"use_parallel_residual": False, "rotary_pct": 1.0, "hidden_act": "gelu_new"}
        return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes, **settings))
    if kind == "mistral":
        return transformers.MistralForCausalLM(transformers.MistralConfig(**LLAMA_SIZES, sliding_window=48))
    if kind == "qwen2":
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**LLAMA_SIZES, tie_word_embeddings=True))
    more = {"rope_scaling": LLAMA3_SCALING, "rope_theta": 500000.0} if kind == "llama 3.1" else {}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA_SIZES, **more))


@pytest.mark.parametrize("kind", ["gpt2", "gpt-neox", "llama", "llama 3.1", "mistral", "qwen2"])
def test_what_is_imported_computes_the_same(kind: str, tmp_path: Path) -> None:
    reference = published(kind).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    reference.save_pretrained(tmp_path / "published", max_shard_size="50KB")
    Tokenizer.byte().save(tmp_path / "published" / "tokenizer.json")
    result = hvdlm("import", tmp_path / "published", "--output", tmp_path / "start")
    assert result.status == 0, result.output
    opened = checkpoint.open_checkpoint(tmp_path / "start")
    config = Config.model_validate(opened.state["config"])
    assert config.model.context_length == (48 if kind == "mistral" else 64)
    model = Transformer(config.model, VOCABULARY)
    model.load_state_dict(opened.model())
    tokens = torch.randint(VOCABULARY, (2, 48), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours = model.eval().logits(model(tokens))
    theirs = logits_of(reference, tokens)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_weights_of_16_bits_come_as_they_are(tmp_path: Path) -> None:
    reference = published("llama").to(torch.bfloat16)
    reference.save_pretrained(tmp_path / "published")
    Tokenizer.byte().save(tmp_path / "published" / "tokenizer.json")
    assert hvdlm("import", tmp_path / "published", "--output", tmp_path / "start").status == 0
    assert hvdlm("export", tmp_path / "start", "--to", "hf", tmp_path / "out", "--dtype", "bfloat16").status == 0
    written = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert_equal(written, safetensors.torch.load_file(tmp_path / "published" / "model.safetensors"))


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("llama", {"model_type": "mamba"}, "model_type = 'mamba', which hvdlm has no architecture for"),
        ("llama", {"head_dim": 16}, "hvdlm's Transformer has no head_dim = 16"),
        ("llama", {"hidden_act": "relu"}, "hvdlm's Transformer has no hidden_act = 'relu'"),
        ("llama", {"attention_bias": True}, "hvdlm's Transformer has no attention_bias = True beside mlp_bias = False"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "no rope_scaling of type 'yarn'"),
        (
            "llama",
            {"intermediate_size": 40},
            "hold (48, 32) and (48, 32) numbers, where config.json says (40, 32) and (40, 32)",
        ),
        ("llama", {"num_hidden_layers": 3}, "holds no weight model.layers.2."),
        ("llama", {"num_hidden_layers": 1}, "holds weights that hvdlm's Transformer does not have: model.layers.1."),
        ("gpt2", {"activation_function": "relu"}, "hvdlm's Transformer has no activation_function = 'relu'"),
        ("gpt2", {"vocab_size": 200}, "the tokenizer of"),
        ("gpt-neox", {"use_parallel_residual": True}, "hvdlm's Transformer has no use_parallel_residual = True"),
        ("gpt2", {"n_embd": None}, "is not the configuration of a model of type gpt2"),
        ("llama", {"num_attention_heads": 0}, "is not the configuration of a model of type llama"),
        ("llama", {"model_type": ["llama"]}, "which hvdlm has no architecture for"),
        (
            "llama",
            {"num_key_value_heads": 4},
            "hold (32, 32) and (16, 32) and (16, 32) numbers, where config.json says",
        ),
        ("gpt-neox", {"hidden_act": None}, "hvdlm's Transformer has no hidden_act"),
        ("gpt2", {"n_embd": 30}, "model.width = 30 is not a multiple of model.heads = 4"),
    ],
)
def test_what_our_model_cannot_express_is_refused_by_name(
    kind: str, change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    published(kind).save_pretrained(tmp_path / "published")
    Tokenizer.byte().save(tmp_path / "published" / "tokenizer.json")
    file = tmp_path / "published" / "config.json"
    content = {key: value for key, value in json.loads(file.read_text()).items() if key != "rope_parameters"}
    file.write_text(json.dumps({**content, **change}))
    result = hvdlm("import", tmp_path / "published", "--output", tmp_path / "start")
    assert result.status == 1
    assert said in result.output, result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "start").exists()


def test_one_file_is_read_before_an_index_that_was_left(tmp_path: Path) -> None:
    published("gpt2").save_pretrained(tmp_path / "published")
    Tokenizer.byte().save(tmp_path / "published" / "tokenizer.json")
    (tmp_path / "published" / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00001-of-00002"}}'
    )
    assert hvdlm("import", tmp_path / "published", "--output", tmp_path / "start").status == 0


def test_weights_that_do_not_fit_into_16_bits(tmp_path: Path) -> None:
    config = configuration(LLAMA)
    model = random_model(config)
    with torch.no_grad():
        model.final_norm.weight[3] = 1e5
    source = save(model, config, tmp_path)
    result = hvdlm("export", source, "--to", "hf", tmp_path / "out", "--dtype", "float16")
    assert result.status == 1
    assert "model.norm.weight of" in result.output and "does not fit into float16" in result.output
    assert not (tmp_path / "out").exists()


def test_whoever_may_read_the_settings_may_read_the_weights(tmp_path: Path) -> None:
    config = configuration(LLAMA)
    assert hvdlm("export", save(random_model(config), config, tmp_path), "--to", "hf", tmp_path / "out").status == 0
    modes = {(tmp_path / "out" / name).stat().st_mode for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1


def test_the_card_of_a_run_whose_validation_was_not_finite(tmp_path: Path) -> None:
    config = configuration(LLAMA)
    source = save(random_model(config), config, tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"kind": "eval", "step": 0, "loss": null, "tokens": 0}\n')
    assert hvdlm("export", source, "--to", "hf", tmp_path / "out").status == 0
    assert "| validation loss | not known |" in (tmp_path / "out" / "README.md").read_text()


def test_pickles_are_not_read(tmp_path: Path) -> None:
    published("gpt2").config.save_pretrained(tmp_path)
    Tokenizer.byte().save(tmp_path / "tokenizer.json")
    torch.save({}, tmp_path / "pytorch_model.bin")
    result = hvdlm("import", tmp_path, "--output", tmp_path / "start")
    assert result.status == 1
    assert "only pytorch_model.bin, a pickle, which can run code and is not read" in result.output


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_biases_that_a_model_does_not_have_are_zeros(position: str, tmp_path: Path) -> None:
    config = configuration({**GPT2, "position": position, "bias": False})
    model = random_model(config)
    assert hvdlm("export", save(model, config, tmp_path), "--to", "hf", tmp_path / "out").status == 0
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        ours = model.logits(model(tokens))
    theirs = logits_of(reference, tokens)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_a_model_between_architectures_is_not_exported(tmp_path: Path) -> None:
    config = configuration({**GPT2, "norm": "rmsnorm"})
    result = hvdlm("export", save(random_model(config), config, tmp_path), "--to", "hf", tmp_path / "out")
    assert result.status == 1
    assert (
        "no architecture of transformers that hvdlm writes has model.position = 'learned', model.norm = 'rmsnorm'"
        in result.output
    )
    assert not (tmp_path / "out").exists()


def start_of(reference: Any, tokenizer: Tokenizer, parent: Path) -> Path:
    reference.save_pretrained(parent / "published")
    tokenizer.save(parent / "published" / "tokenizer.json")
    assert hvdlm("import", parent / "published", "--output", parent / "start").status == 0
    return parent / "start"


def test_training_goes_on_from_an_imported_model(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """Its first loss is that of transformers with the same weights on the same tokens."""
    tokenizer = Tokenizer.load(small_data / "tokenizer.json")
    torch.manual_seed(4)
    sizes = {**LLAMA_SIZES, "vocab_size": tokenizer.vocab_size, "max_position_embeddings": 32}
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    start = start_of(reference, tokenizer, tmp_path)
    file = tmp_path / "config.toml"
    run_dir = tmp_path / "run"
    file.write_text(f"[model]\nfrom = '{start}'\n[data]\npath = '{small_data}'\n[train]\nrun_dir = '{run_dir}'\n")
    words = [
        "--train.steps",
        "4",
        "--train.global_batch_size",
        "4",
        "--optimizer.warmup_steps",
        "1",
        "--log.every",
        "1",
    ]
    result = ranks.hvdlm(2, "train", str(file), *words)
    assert result.status == 0, result.output
    events = [str(each["message"]) for each in records(run_dir, "event")]
    assert any(each.startswith(f"training begins with the weights of {start}, step 0") for each in events), events
    with Loader(DataSet(small_data), 32, RankParts(BatchSizes(4), 1), seed=0, rank=0, read_ahead=1) as loader:
        batch = loader.next()
    loss = torch.nn.functional.cross_entropy(logits_of(reference, batch.inputs).flatten(0, 1), batch.targets.flatten())
    assert losses(run_dir)[1] == pytest.approx(loss.item(), abs=1e-5)

    resumed = ranks.hvdlm(2, "train", str(file), *words, "--resume", "latest")
    assert resumed.status == 0, resumed.output
    assert "all 4 steps are done" in resumed.output


def begun(section: ModelSection, vocabulary: int, data: Path) -> tuple[Transformer, list[str]]:
    """A model that begins with the weights of `section`, and what the user is told of that."""
    config = Config(model=section, train=TrainSection(seed=5))
    trainer = Trainer(config, SoloCommunicator(), DataSet(data), vocabulary, torch.device("cpu"))
    return trainer.model, begin_with_weights(trainer.communicator, trainer)


def test_a_larger_vocabulary_keeps_the_rows_that_there_were(small_data: Path, tmp_path: Path) -> None:
    config = configuration(LLAMA)
    source = random_model(config)
    section = config.model.model_copy(update={"from_": str(save(source, config, tmp_path)), "context_length": 16})
    fresh = Transformer(section, VOCABULARY + 6)
    fresh.initialise(5)
    model, told = begun(section, VOCABULARY + 6, small_data)
    assert told == [f"training begins with the weights of {section.from_}, step 0"]
    for name, parameter in model.named_parameters():
        rows = len(source.state_dict()[name])
        assert torch.equal(parameter[:rows], source.state_dict()[name])
        assert torch.equal(parameter[rows:], fresh.state_dict()[name][rows:])
    with pytest.raises(HvdlmError, match=rf"has a vocabulary of {VOCABULARY} tokens: set model.vocab_size to that"):
        begun(section, VOCABULARY - 1, small_data)


def test_learned_positions_are_not_made_up(small_data: Path, tmp_path: Path) -> None:
    config = configuration(GPT2)
    section = config.model.model_copy(update={"from_": str(save(random_model(config), config, tmp_path))})
    shorter, longer = (section.model_copy(update={"context_length": each}) for each in (40, 49))
    begun(shorter, VOCABULARY, small_data)
    with pytest.raises(HvdlmError, match=r"has learned 48 positions: set model.context_length to that or less, not 49"):
        begun(longer, VOCABULARY, small_data)


def test_a_job_of_slurm_keeps_the_shape_of_its_start(small_data: Path, tmp_path: Path) -> None:
    config = configuration({**LLAMA, "layers": 3})
    start = save(random_model(config), config, tmp_path)
    file = tmp_path / "config.toml"
    file.write_text(f"[model]\nfrom = '{start}'\n[data]\npath = '{small_data}'\n")
    words = ["--nodes", 1, "--ranks-per-node", 2, "--output", tmp_path / "job", "--train.run_dir", tmp_path / "run"]
    result = hvdlm("slurm", file, *words)
    assert result.status == 0, result.output
    kept = load(tmp_path / "job" / "config.toml", [], PRESETS).model
    assert (kept.layers, kept.norm, kept.vocab_size, kept.from_) == (3, "rmsnorm", VOCABULARY, str(start))


def test_the_home_of_a_user_stands_in_the_path_of_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration({**LLAMA, "layers": 3})
    save(random_model(config), config, tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load(None, ["--model.from", "~/checkpoint"], PRESETS, shape_of).model.layers == 3
    with pytest.raises(
        HvdlmError, match=r"the command line: model\.from = .* holds \$HOME, which hvdlm does not replace"
    ):
        load(None, ["--model.from", "$HOME/checkpoint"], PRESETS, shape_of)


def test_the_shape_is_that_of_the_newest_checkpoint_that_can_be_read(tmp_path: Path) -> None:
    config = configuration({**LLAMA, "layers": 3})
    good = save(random_model(config), config, tmp_path / "run" / "checkpoints")
    good.rename(good.with_name("step_00000001"))
    bad = good.with_name("step_00000002")
    bad.mkdir()
    (bad / "state.json").write_text("{}")
    assert shape_of(str(tmp_path / "run"))["layers"] == 3
    with pytest.raises(HvdlmError, match=r"cannot read .*step_00000002/state\.json: it is not what was written"):
        shape_of(str(bad))


def test_a_forecast_has_no_start(tmp_path: Path) -> None:
    with pytest.raises(HvdlmError, match=r"model\.from begins a training; here, set the shape itself"):
        load(None, ["--model.from", str(tmp_path)], PRESETS)


def test_a_start_of_another_shape_is_refused(ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(small_data / "tokenizer.json")
    sizes = {**LLAMA_SIZES, "vocab_size": tokenizer.vocab_size}
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    start = start_of(reference, tokenizer, tmp_path)
    result = ranks.train(2, small_data, tmp_path / "run", model__from=start, model__layers=3)
    assert result.status == 1
    assert f"model.from = {start} has model.layers = 2, not 3" in result.output
