"""The speed of `hvdlm prepare` on one core, and of `map` of Hugging Face's datasets with the same tokenizer and texts.

    python benchmarks/prepare.py --data data/python-stdlib

Each runs once per round in a process of its own. Writes prepare.json and prepare.md. hvdlm is timed whole: reading,
tokenizing, splitting into shards, checksums, HDF5. Of datasets only `map` is timed, batched, on documents that are
already in its cache. `pip install -e ".[benchmarks]"` installs what this needs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common.conditions import describe_run
from common.results import markdown_table, write_results, write_text
from common.script import RESULTS, absolute_path, run_script
from hvdlm.data.documents import read_blocks, read_documents
from hvdlm.data.input_files import find_files
from hvdlm.data.manifest import TOKENIZER
from hvdlm.errors import HvdlmError

_MAP = """
import sys, time
from datasets import load_from_disk
from transformers import PreTrainedTokenizerFast
tokenizer = PreTrainedTokenizerFast(tokenizer_file=sys.argv[2])
documents = load_from_disk(sys.argv[1])
begin = time.perf_counter()
tokens = documents.map(
    lambda batch: {"ids": tokenizer(batch["text"])["input_ids"]},
    batched=True, num_proc=1, remove_columns=["text"], load_from_cache_file=False,
)
seconds = time.perf_counter() - begin
print(seconds, sum(len(ids) for ids in tokens["ids"]))
"""


def measure(options: argparse.Namespace) -> None:
    """Alternates the two and writes the results."""
    try:
        from datasets import Dataset
    except ImportError:
        raise HvdlmError('Hugging Face\'s datasets is not installed: pip install -e ".[benchmarks]"') from None
    tokenizer = options.data / TOKENIZER
    files, _ = find_files([options.input])
    texts = [
        document
        for block in read_blocks(files)
        for document in read_documents(block, "text")
        if isinstance(document, str)
    ]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    hvdlm_rates, datasets_rates = [], []  # MB/s by round
    with tempfile.TemporaryDirectory(prefix="hvdlm-prepare-") as directory:
        documents = Path(directory, "documents")
        Dataset.from_dict({"text": texts}).save_to_disk(documents)
        for number in range(options.rounds):
            output = Path(directory, f"data-{number}")
            command = [sys.executable, "-m", "hvdlm", "prepare", "--input", options.input, "--output", str(output)]
            begin = time.perf_counter()
            run([*command, "--tokenizer", str(tokenizer), "--workers", "1"], environment)
            hvdlm_rates.append(megabytes / (time.perf_counter() - begin))
            seconds = float(run([sys.executable, "-c", _MAP, str(documents), str(tokenizer)], environment).split()[0])
            datasets_rates.append(megabytes / seconds)
    ratio = statistics.median(a / b for a, b in zip(hvdlm_rates, datasets_rates, strict=True))
    results = {
        **describe_run("datasets", "tokenizers"),
        "megabytes": megabytes,
        "hvdlm_megabytes_per_second": hvdlm_rates,
        "datasets_megabytes_per_second": datasets_rates,
        "ratio": ratio,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    write_results(options.output / "prepare.json", results)
    rows = [
        ("hvdlm prepare", f"{statistics.median(hvdlm_rates):.2f}"),
        ("datasets map", f"{statistics.median(datasets_rates):.2f}"),
        ("ratio within a round", f"{ratio:.2f}"),
    ]
    conditions = f"{megabytes:.1f} MB of {len(texts):,} documents, one core, medians of {options.rounds} rounds."
    text = f"{conditions}\n\n{markdown_table(('', 'MB/s'), rows)}"
    write_text(options.output / "prepare.md", text)
    print(text)


def run(command: list[str], environment: dict[str, str]) -> str:
    """A command's standard output. Raises HvdlmError with the last line of its standard error if it fails."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise HvdlmError(f"{' '.join(command[:4])} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return done.stdout


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=absolute_path, required=True, help="a data set, for its tokenizer")
    parser.add_argument("--input", default="python-stdlib", help="documents, as for hvdlm prepare")
    parser.add_argument("--output", type=absolute_path, default=RESULTS, help="a directory")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.rounds < 1:
        raise HvdlmError("give 1 or more --rounds")
    return options


if __name__ == "__main__":
    run_script("prepare.py", lambda: measure(_parse()))
