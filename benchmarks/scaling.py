"""A scaling study: training speed over the number of ranks, by codec, link, model and batch size.

    python benchmarks/scaling.py weak benchmarks/studies/fabric.toml
    salloc --nodes 8 --ntasks-per-node 8 python benchmarks/scaling.py strong study.toml

In weak mode every rank has the same batch size, in strong mode all ranks together have it. The script starts the jobs,
on this machine, emulated hosts, a host list or in a Slurm allocation, and writes one JSON file per point. A study that
was interrupted continues when it is started again. benchmarks/README.md defines the figures; report.py draws them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common.results import write_text
from common.script import RESULTS, absolute_path, run_script
from hvdlm.errors import HvdlmError
from hvdlm.scaling.point import SUFFIX, read_point, schema
from scaling.repetitions import JobFailedError, check_point, measure, missing_codecs
from scaling.study import JobSpec, Study, check_data, job_specs, read_study
from scaling.study_hosts import open_hosts

_MAX_ATTEMPTS = 2


def run(options: argparse.Namespace) -> None:
    """Measures the points that are missing, repetition by repetition."""
    study = read_study(options.study, options.simulate_compute)
    check_data(study)
    directory = options.output / f"{study.name}-{options.mode}"
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / "point.schema.json", schema())
    specs = list(job_specs(study))
    for spec in specs:  # errors in settings are found before anything runs
        for codec in study.codecs:
            check_point(study, options.mode, spec, codec, directory)
    jobs = [
        (repetition, spec)
        for repetition in range(study.repetitions)
        for spec in specs
        if missing_codecs(study, spec, repetition, directory)
    ]
    if not jobs:
        print(f"{directory}: all {len(specs) * len(study.codecs)} points are there")
    failed = _run_jobs(study, options, jobs, directory) if jobs else []
    invalid = [file.name for file in sorted(directory.glob(f"*{SUFFIX}")) if not read_point(file).is_valid]
    if invalid:
        failed.append(f"ranks ended with different models, so do not use {', '.join(invalid)}")
    if failed:
        raise HvdlmError("; ".join(failed))


def _run_jobs(study: Study, options: argparse.Namespace, jobs: list[tuple[int, JobSpec]], directory: Path) -> list[str]:
    """Runs jobs one after the other; returns a sentence for each that has failed."""
    failed: list[str] = []
    with open_hosts(study, directory) as hosts:
        for spec in dict.fromkeys(spec for _, spec in jobs):  # missing hosts are found before anything runs
            hosts.launcher(spec)
        for number, (repetition, spec) in enumerate(jobs, start=1):
            for attempt in range(1, _MAX_ATTEMPTS + 1):
                codecs = missing_codecs(study, spec, repetition, directory)
                print(f"{number} of {len(jobs)}: {spec.name}, repetition {repetition + 1}: {', '.join(codecs)}")
                try:
                    measure(study, options.mode, spec, codecs, hosts, directory)
                    break
                except JobFailedError as error:
                    print(f"{spec.name}, attempt {attempt}: {error}", file=sys.stderr)
                    if attempt == _MAX_ATTEMPTS:
                        failed.append(f"{spec.name}: {error}")
    return failed


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["weak", "strong"])
    parser.add_argument("study", type=absolute_path, metavar="STUDY", help="a TOML file: see benchmarks/studies")
    parser.add_argument("--output", type=absolute_path, default=RESULTS / "scaling", help="a directory")
    parser.add_argument(
        "--simulate-compute",
        type=float,
        metavar="TOKENS_PER_SECOND",
        help="simulate forward and backward pass of ranks of this speed, by sleeping",
    )
    return parser.parse_args()


if __name__ == "__main__":
    run_script("scaling.py", lambda: run(_parse()))
