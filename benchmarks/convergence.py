"""What codecs and local steps do to the loss: validation loss over tokens and over seconds, over several seeds.

    hvdlm prepare --input python-stdlib --tokenizer bpe:1024 --output data/convergence
    python benchmarks/convergence.py --data data/convergence --no-error-feedback int4

Every run is `hvdlm train` under mpirun. Finished runs are skipped, so an interrupted study continues when it is started
again. Writes convergence.json, convergence.md and convergence.png; benchmarks/README.md defines the figures. The model
is a GPT of about 1M parameters; any setting can be overridden as for `hvdlm train`, by --section.key value.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from common.conditions import describe_run, describe_settings
from common.methods import parse_method
from common.results import write_results, write_text
from common.script import RESULTS, absolute_path, run_script
from common.setups import ONE_HOST, available_setups, open_cluster, parse_setup
from convergence.curves import draw, table
from convergence.runs import Run, Variant, configure, is_finished, read_run, run_config, train
from hvdlm.data.shard import DataSet
from hvdlm.errors import HvdlmError
from hvdlm.gradients.codecs.registry import CODECS


def run(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Trains what is not finished, seed by seed, and writes the results of all finished runs after each run."""
    (setup,) = available_setups([parse_setup(options.setup, options.ranks)])
    variants = [Variant(parse_method(text), True) for text in options.codecs]
    variants += [Variant(parse_method(text), False) for text in options.no_error_feedback]
    config = configure(options.data, overrides)
    planned = [
        (variant, run_config(config, variant, seed, options.runs))
        for seed in range(options.seeds)
        for variant in variants
    ]
    finished = [is_finished(each) for _, each in planned]
    options.output.mkdir(parents=True, exist_ok=True)
    text_bytes = sum(shard.n_bytes for shard in DataSet(options.data).train.shards)
    conditions = {
        **describe_run(),
        "setup": asdict(setup),
        "corpus": {"text_bytes": text_bytes, "fingerprint": DataSet(options.data).fingerprint},
        "settings": describe_settings(config),
    }
    print(f"{len(planned)} runs on {text_bytes / 1e6:.1f} MB of text, {sum(finished)} of them finished")
    done: list[Run] = []
    failed: list[str] = []
    with (
        tempfile.TemporaryDirectory(prefix="hvdlm-convergence-") as directory,
        open_cluster(setup, Path(directory, "fabric")) as cluster,
    ):
        for (variant, each), is_done in zip(planned, finished, strict=True):
            if not is_done:
                print(f"== {variant.name}, seed {each.train.seed}", flush=True)
                status = train(cluster, each)
                if status != 0:
                    failed.append(f"{each.train.run_dir} ended with status {status}")
                    continue
            done.append(read_run(each, variant))
            results = {**conditions, "failed": failed, "runs": [asdict(one) for one in done]}
            write_results(options.output / "convergence.json", results)
            write_text(options.output / "convergence.md", table(done))
            draw(done, options.output / "convergence.png")
    print(table(done))
    if failed:
        raise HvdlmError("; ".join(failed) + ": see the messages above, and start this again")


def _parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=absolute_path, required=True, help="of hvdlm prepare, at least 10 MB of text")
    parser.add_argument("--output", type=absolute_path, default=RESULTS, help="a directory")
    parser.add_argument("--runs", type=absolute_path, default="runs/convergence", help="a directory of run directories")
    parser.add_argument(
        "--codecs",
        nargs="+",
        default=list(CODECS),
        help="or FILE.py:CLASS (default: all of hvdlm's); CODEC/EVERY/FRAGMENTS/OVERLAP: of local steps; dion",
    )
    parser.add_argument(
        "--no-error-feedback", nargs="+", default=[], metavar="CODEC", help="codecs to run without error feedback too"
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on (default: %(default)s)")
    parser.add_argument("--setup", default=ONE_HOST, help=f"HOSTSxRATE as in 2x1gbit, or {ONE_HOST} (default)")
    parser.add_argument("--ranks", type=int, default=2, help=f"of {ONE_HOST}; other set-ups have one per host")
    options, overrides = parser.parse_known_args()
    if options.seeds < 1 or options.ranks < 2:
        raise HvdlmError("give 1 or more --seeds, and 2 or more --ranks")
    return options, overrides


if __name__ == "__main__":
    run_script("convergence.py", lambda: run(*_parse()))
