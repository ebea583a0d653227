"""`hvdlm fit` and `hvdlm predict`."""

from __future__ import annotations

import argparse

from hvdlm.arguments import finite, path


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the commands for performance models."""
    fit = commands.add_parser("fit", help="make a performance model of a scaling study, and say how good it is")
    fit.add_argument("results", type=path, metavar="RESULTS", help="a directory of benchmarks/scaling.py")
    fit.add_argument("--output", type=path, required=True, metavar="FILE", help="for hvdlm predict")
    fit.set_defaults(run=_fit)

    predict = commands.add_parser(
        "predict",
        help="forecast speed, efficiency and exposed communication of ranks, links, codecs and models",
        epilog="Any setting is overridden by --section.key value, as in --compression.matrix_rank 8.",
        allow_abbrev=False,
    )
    predict.add_argument(
        "fit", type=path, nargs="?", metavar="FIT", help="a file of hvdlm fit (default: nothing is measured)"
    )
    predict.add_argument("--ranks", required=True, metavar="N..M|N,M", help="N..M doubles from N to M")
    predict.add_argument("--per-node", type=int, metavar="R", help="ranks a host (default: as measured, or 8)")
    predict.add_argument("--link", metavar="RATE", help="of each host, as 100gbit (default: the fastest measured)")
    predict.add_argument(
        "--intra-node",
        metavar="RATE",
        help="of each rank, to the others of its host (default: as measured, or the device's)",
    )
    predict.add_argument(
        "--codec", action="append", default=[], metavar="CODEC", help="default: all that were measured"
    )
    predict.add_argument("--model", metavar="PRESET", help="default: tiny, or what overrides say")
    predict.add_argument(
        "--batch-size-per-rank", type=int, metavar="N", help="sequences of a rank in a step (default: 32)"
    )
    predict.add_argument("--device", metavar="NAME", help="that each rank computes on, such as h100 or a100")
    predict.add_argument("--mfu", type=finite, metavar="SHARE", help="of its peak that one rank attains, such as 0.4")
    predict.add_argument("--tokens-per-second", type=finite, metavar="N", help="that one rank alone attains")
    predict.add_argument(
        "--search", action="store_true", help="for the fastest layouts, of [parallel], that fit into memory"
    )
    predict.set_defaults(run=_predict)


def _fit(options: argparse.Namespace, _: list[str]) -> int:
    from hvdlm.scaling.commands import write_fit

    write_fit(options.results, options.output)
    return 0


def _predict(options: argparse.Namespace, overrides: list[str]) -> int:
    from hvdlm.scaling.commands import predict
    from hvdlm.scaling.forecast_options import ForecastOptions

    asked = ForecastOptions(
        ranks=options.ranks,
        ranks_per_host=options.per_node,
        link=options.link,
        inside_link=options.intra_node,
        codecs=options.codec,
        preset=options.model,
        batch_size_per_rank=options.batch_size_per_rank,
        device=options.device,
        mfu=options.mfu,
        tokens_per_second=options.tokens_per_second,
        search=options.search,
        overrides=overrides,
    )
    predict(options.fit, asked)
    return 0
