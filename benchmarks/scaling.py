"""A scaling study: how fast training goes on more and more ranks, by codec, link, model and batch.

    python benchmarks/scaling.py weak benchmarks/studies/fabric.toml
    salloc --nodes 8 --ntasks-per-node 8 python benchmarks/scaling.py strong study.toml

weak: every rank has the same batch, however many there are; strong: all ranks together have. Starts the jobs itself, on
this machine, emulated hosts, a host list or inside a Slurm allocation, and writes a JSON file a point. What was killed
goes on where it stopped. README.md beside this file defines the figures; report.py draws them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common.script import absolute_path, run_script
from hvdlm.errors import HvdlmError
from hvdlm.scaling.point import SUFFIX, read_point, schema
from study.places import opened
from study.plan import Study, Visit, read_study, visits
from study.visit import VisitError, check_data, check_points, measure, missing

_MOST_TRIES = 2


def scale(options: argparse.Namespace) -> None:
    """Measures what is still missing of a study, repetition by repetition."""
    study = read_study(options.study, options.simulate_compute)
    check_data(study)
    directory = options.output / f"{study.name}-{options.mode}"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "point.schema.json").write_text(schema(), encoding="utf-8")
    planned = list(visits(study))
    for visit in planned:  # what does not fit is told before anything runs
        for codec in study.codecs:
            check_points(study, options.mode, visit, codec, directory)
    jobs = [
        (repetition, visit)
        for repetition in range(study.repetitions)
        for visit in planned
        if missing(study, visit, repetition, directory)
    ]
    if not jobs:
        print(f"{directory}: all {len(planned) * len(study.codecs)} points are there")
    failed = _visit_all(study, options, jobs, directory) if jobs else []
    invalid = [file.name for file in sorted(directory.glob(f"*{SUFFIX}")) if not read_point(file).is_valid]
    if invalid:
        failed.append(f"ranks ended with different models, so do not use {', '.join(invalid)}")
    if failed:
        raise HvdlmError("; ".join(failed))


def _visit_all(study: Study, options: argparse.Namespace, jobs: list[tuple[int, Visit]], directory: Path) -> list[str]:
    failed: list[str] = []
    with opened(study, directory) as places:
        for visit in dict.fromkeys(visit for _, visit in jobs):  # what cannot be started is told before anything runs
            places.launcher(visit)
        for number, (repetition, visit) in enumerate(jobs, start=1):
            for attempt in range(1, _MOST_TRIES + 1):
                codecs = missing(study, visit, repetition, directory)
                print(f"{number} of {len(jobs)}: {visit.name}, repetition {repetition + 1}: {', '.join(codecs)}")
                try:
                    measure(study, options.mode, visit, codecs, places, directory)
                    break
                except VisitError as error:
                    print(f"{visit.name}, attempt {attempt}: {error}", file=sys.stderr)
                    if attempt == _MOST_TRIES:
                        failed.append(f"{visit.name}: {error}")
    return failed


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["weak", "strong"])
    parser.add_argument("study", type=absolute_path, metavar="STUDY", help="a TOML file: see benchmarks/studies")
    default = Path(__file__).parent / "results" / "scaling"
    parser.add_argument("--output", type=absolute_path, default=default, help="a directory")
    parser.add_argument(
        "--simulate-compute",
        type=float,
        metavar="TOKENS_PER_SECOND",
        help="forward and backward of a rank are sleeps as long as at this speed",
    )
    return parser.parse_args()


if __name__ == "__main__":
    run_script("scaling.py", lambda: scale(_parse()))
