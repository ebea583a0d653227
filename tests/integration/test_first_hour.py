"""examples/first_hour.sh: from a user's texts and a published model to a model of transformers, on two hosts."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cluster import Cluster
from jobs import records
from launcher import run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]

VOCABULARY = 1000


def write_inputs(folder: Path) -> None:
    """Texts, of which one is empty, and an untrained Llama with a tokenizer of its own."""
    library = Path(sysconfig.get_path("stdlib"))
    folders = [library / name for name in ("asyncio", "email", "http", "unittest")]
    texts = [path.read_text("utf-8") for folder in folders for path in sorted(folder.rglob("*.py"))]
    texts = [text for text in texts if text]
    pq.write_table(pa.table({"text": [*texts, ""], "id": list(range(len(texts) + 1))}), folder / "texts.parquet")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special, alphabet = ["<|begin_of_text|>", "<|end_of_text|>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1])
    wrapped.save_pretrained(folder / "llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rope_theta=500000.0,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "llama")


@pytest.mark.needs_root
def test_the_first_hour(cluster: Cluster, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    inputs = [str(tmp_path / "texts.parquet"), str(tmp_path / "llama"), str(cluster.hostfile)]
    output = tmp_path / "output"
    output.mkdir()
    done = cluster.run("h1", ["bash", "examples/first_hour.sh", *inputs, str(output)], deadline=280, cwd=ROOT)
    assert done.status == 0, done.output
    first, last = (float(str(each["loss"])) for each in records(output / "run", "eval"))
    assert last < first < 6.9  # log(1000), where it began
    assert {each["world_size"] for each in records(output / "run")} == {2}
    assert "left out 1 bad documents" in done.output
    assert (output / "run" / "report.html").exists()
    assert "python_lines" in done.output and "ROUGE-L" in done.output
    written = done.output.rstrip("\n").rpartition("\ndef test_")[2]
    words = ["generate", str(output / "run"), "--prompt", "def test_", "--temperature", "0", "--tokens", "40"]
    own = run(["hvdlm", *words], deadline=60)
    assert own.output.rstrip("\n") == f"def test_{written}".rstrip("\n")
