"""The `hvdlm` command: parses and dispatches, nothing else.

Packages are imported only when their command runs, so that `hvdlm --help` need not wait for torch.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import hvdlm
from hvdlm.arguments import finite, path, path_text, seconds, split_overrides
from hvdlm.errors import HvdlmError
from hvdlm.exit_status import INTERRUPTED
from hvdlm.output import product_status, tolerant_output

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 1 after an error sentence, 130 after Ctrl-C."""
    with tolerant_output() as stdout:
        overrides, words = split_overrides(sys.argv[1:] if arguments is None else arguments)
        parser = _parser()
        options, rest = parser.parse_known_args(words)
        takes_overrides = options.command in ("train", "slurm", "predict")
        if not takes_overrides and (overrides or rest):
            parser.error(f"unrecognized arguments: {' '.join([*rest, *overrides])}")
        _set_up_logging(options.traceback)
        try:
            status: int = options.run(options, [*rest, *overrides])
        except HvdlmError as error:
            logger.error("%s", error, exc_info=options.traceback)
            return 1
        except KeyboardInterrupt:
            return INTERRUPTED
        if options.command in _PRINTS_ON_THE_WAY and not getattr(options, "dry_run", False):
            return status
        lost, sentence = product_status(stdout)
        if sentence:
            logger.error("%s", sentence)
        return status or lost


# Commands whose product is not what they print
_PRINTS_ON_THE_WAY = ("train", "prepare", "slurm", "install-horovod", "fabric")


def _set_up_logging(show_tracebacks: bool) -> None:
    """`hvdlm: message` for information, `hvdlm: error: message` for an error, on stderr."""
    names = {logging.DEBUG: "debug: ", logging.INFO: "", logging.WARNING: "warning: ", logging.ERROR: "error: "}
    for level, name in names.items():
        logging.addLevelName(level, name)
    logging.basicConfig(format="hvdlm: %(levelname)s%(message)s")
    logging.getLogger("hvdlm").setLevel(logging.DEBUG if show_tracebacks else logging.INFO)


def _train(options: argparse.Namespace, overrides: list[str]) -> int:
    from hvdlm.training.run import dry_run, read_config, train

    config = read_config(options.config, overrides)
    if options.dry_run:
        return dry_run(config)
    return train(config, options.resume, options.config)


def _prepare(options: argparse.Namespace, _: list[str]) -> int:
    from hvdlm.data.prepare import prepare

    prepare(
        inputs=options.input,
        output=options.output,
        tokenizer=options.tokenizer,
        shards=options.shards,
        validation=(0.0 if options.validation_input else 0.01) if options.validation is None else options.validation,
        workers=options.workers,
        text_key=options.text_key,
        seed=options.seed,
        skip_bad=options.skip_bad,
        split=options.split,
        validation_inputs=options.validation_input,
    )
    return 0


def _inspect(options: argparse.Namespace, _: list[str]) -> int:
    from hvdlm.data.inspect import inspect

    inspect(options.data, verify=options.verify)
    return 0


def _verify(options: argparse.Namespace, _: list[str]) -> int:
    from hvdlm.training.verify import verify

    return verify(options.path)


def _report(options: argparse.Namespace, _: list[str]) -> int:
    from hvdlm.report.run_report import write_report

    return write_report(options.runs, options.output)


def _evaluate(options: argparse.Namespace, _: list[str]) -> int:
    from hvdlm.training.inference import evaluate

    return evaluate(options.checkpoint, options.data, engine=options.engine, micro_batch_size=options.micro_batch_size)


def _generate(options: argparse.Namespace, _: list[str]) -> int:
    from hvdlm.training.inference import generate

    return generate(
        options.checkpoint,
        prompt=options.prompt,
        tokens=options.tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )


def _export(options: argparse.Namespace, _: list[str]) -> int:
    from hvdlm.hugging_face.export import export

    return export(options.checkpoint, options.output, options.dtype, int(options.shard_size * 1e9))


def _import(options: argparse.Namespace, _: list[str]) -> int:
    from hvdlm.hugging_face.import_model import import_model

    return import_model(options.model, options.output)


def _install_horovod(options: argparse.Namespace, _: list[str]) -> int:
    from hvdlm.cluster.horovod_build.build import install

    install(dry_run=options.dry_run)
    return 0


def _doctor(options: argparse.Namespace, _: list[str]) -> int:
    if options.hostfile:
        from hvdlm.cluster.doctor.examine_hosts import examine_hosts

        return examine_hosts(options.hostfile, options.timeout)
    from hvdlm.cluster.doctor.examine_ranks import examine_ranks

    return examine_ranks(options.engine, options.timeout)


def _fit(options: argparse.Namespace, _: list[str]) -> int:
    from hvdlm.scaling.commands import write_fit

    write_fit(options.results, options.output)
    return 0


def _predict(options: argparse.Namespace, overrides: list[str]) -> int:
    from hvdlm.scaling.commands import predict

    predict(
        options.fit,
        ranks=options.ranks,
        ranks_per_host=options.per_node,
        link=options.link,
        codecs=options.codec,
        preset=options.model,
        batch_size_per_rank=options.batch_size_per_rank,
        rank_flops=options.rank_flops,
        overrides=overrides,
    )
    return 0


def _slurm(options: argparse.Namespace, overrides: list[str]) -> int:
    from hvdlm.cluster.slurm.job import write_job

    write_job(
        options.config,
        overrides,
        nodes=options.nodes,
        ranks_per_node=options.ranks_per_node,
        gpus_per_rank=options.gpus_per_rank,
        time=options.time,
        launcher=options.launcher,
        sbatch=options.sbatch,
        output=options.output,
        submit=options.submit,
        shape_of=_shape_of,
    )
    return 0


def _shape_of(checkpoint: str) -> Mapping[str, Any]:
    from hvdlm.training.initial_weights import shape_of

    return shape_of(checkpoint)


def _fabric(options: argparse.Namespace, _: list[str]) -> int:
    from hvdlm.cluster.fabric.fabric import Fabric

    fabric = Fabric(options.state)
    if options.action == "up":
        fabric.up(options.hosts, options.slots, options.rate, slurm=options.slurm)
    elif options.action == "run":
        return fabric.run(options.host, options.program)
    elif options.action == "link":
        fabric.link(options.host, options.change)
    elif options.action == "status":
        fabric.print_status()
    else:
        fabric.down()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hvdlm", description=hvdlm.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"hvdlm {hvdlm.__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    train = commands.add_parser(
        "train",
        help="train a model; start it with horovodrun, mpirun or srun for more than one rank",
        epilog="Any setting is overridden by --section.key value, as in --train.steps 500.",
        allow_abbrev=False,
    )
    train.add_argument("config", type=path, metavar="CONFIG", help="TOML file of settings")
    train.add_argument("--resume", type=path_text, metavar="latest|PATH", help="go on from a checkpoint of the run")
    train.add_argument("--dry-run", action="store_true", help="print settings, sizes and memory; do not train")
    train.set_defaults(run=_train)

    prepare = commands.add_parser("prepare", help="turn text into a data set of HDF5 shards")
    paths: dict[str, Any] = {"type": path_text, "nargs": "+", "action": "extend", "metavar": "PATH"}
    prepare.add_argument("--input", **paths, required=True, help="files, directories, globs, or python-stdlib")
    prepare.add_argument("--output", type=path, required=True, metavar="DIR", help="the data set's directory")
    prepare.add_argument("--tokenizer", default="byte", metavar="byte|bpe:VOCAB|FILE", help="default: byte")
    prepare.add_argument("--shards", type=int, default=8, metavar="N", help="training shards (default: 8)")
    prepare.add_argument("--validation", type=float, metavar="FRACTION", help="of documents, or of one (default: 0.01)")
    prepare.add_argument("--validation-input", **paths, default=[], help="files for validation, in place of a fraction")
    prepare.add_argument("--split", metavar="blank-lines|lines|BYTES", help="divide text files into documents")
    prepare.add_argument("--workers", type=int, default=0, metavar="W", help="processes (default: one a core)")
    prepare.add_argument(
        "--text-key", default="text", metavar="KEY", help="of records, or column of tables (default: text)"
    )
    prepare.add_argument("--seed", type=int, default=0, help="of the split into shards and validation")
    prepare.add_argument("--skip-bad", action="store_true", help="count bad documents and go on")
    prepare.set_defaults(run=_prepare)

    inspect = commands.add_parser("inspect", help="print what a data set holds")
    inspect.add_argument("data", type=path, metavar="DIR")
    inspect.add_argument("--verify", action="store_true", help="read everything and check every hash")
    inspect.set_defaults(run=_inspect)

    verify = commands.add_parser("verify", help="check every hash of a run's checkpoints, and name what is damaged")
    verify.add_argument("path", type=path, nargs="+", metavar="PATH", help="a checkpoint, or a run directory")
    verify.set_defaults(run=_verify)

    report = commands.add_parser("report", help="write one HTML page of what runs have measured, side by side")
    report.add_argument("runs", type=path, nargs="+", metavar="RUN", help="run directories")
    report.add_argument("--output", type=path, metavar="FILE", help="the page (default: report.html in the first run)")
    report.set_defaults(run=_report)

    evaluate = commands.add_parser(
        "evaluate", help="loss, perplexity, bits per byte and accuracy, beside n-gram baselines"
    )
    evaluate.add_argument(
        "checkpoint", type=path, metavar="CHECKPOINT", help="a checkpoint, or a run directory for its latest"
    )
    evaluate.add_argument(
        "--data", type=path, required=True, metavar="DIR", help="data set whose validation split is read"
    )
    evaluate.add_argument("--engine", default="auto", choices=["auto", "solo", "horovod", "mpi", "torch"])
    evaluate.add_argument(
        "--micro-batch-size", type=int, default=8, metavar="N", help="sequences a rank computes at once (default: 8)"
    )
    evaluate.set_defaults(run=_evaluate)

    generate = commands.add_parser("generate", help="continue a prompt")
    generate.add_argument(
        "checkpoint", type=path, metavar="CHECKPOINT", help="a checkpoint, or a run directory for its latest"
    )
    generate.add_argument("--prompt", default="", help="text to continue (default: a new document)")
    generate.add_argument("--tokens", type=int, default=200, metavar="N", help="tokens to add (default: 200)")
    generate.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (default: 0.8)")
    generate.add_argument("--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens (0: all)")
    generate.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="only the likeliest tokens that hold P of the mass"
    )
    generate.add_argument("--seed", type=int, default=0)
    generate.set_defaults(run=_generate)

    export = commands.add_parser("export", help="write a checkpoint's model as transformers loads it")
    export.add_argument("checkpoint", type=path, metavar="CHECKPOINT", help="a checkpoint, or a run directory")
    export.add_argument("--to", choices=["hf"], required=True, help="hf: Hugging Face's transformers")
    export.add_argument("output", type=path, metavar="DIR", help="the directory to be made")
    export.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the weights")
    export.add_argument("--shard-size", type=finite, default=5.0, metavar="GB", help="of a file at most (default: 5)")
    export.set_defaults(run=_export)

    importing = commands.add_parser("import", help="make a checkpoint of a model of transformers, for model.from")
    importing.add_argument("model", type=path, metavar="DIR", help="with config.json, safetensors and a tokenizer")
    importing.add_argument("--output", type=path, required=True, metavar="DIR", help="the checkpoint")
    importing.set_defaults(run=_import)

    install = commands.add_parser("install-horovod", help="build Horovod for this PyTorch and MPI, install and test it")
    install.add_argument("--dry-run", action="store_true", help="print the plan; build nothing")
    install.set_defaults(run=_install_horovod)

    doctor = commands.add_parser("doctor", help="say whether this machine, these ranks or these hosts can train")
    doctor.add_argument(
        "--hostfile", type=path, metavar="FILE", help="check this host list and every host on it, by ssh, from here"
    )
    doctor.add_argument("--engine", default="auto", choices=["auto", "solo", "horovod", "mpi", "torch"])
    doctor.add_argument("--timeout", type=seconds, default=20.0, metavar="SECONDS", help="for each wait (default: 20)")
    doctor.set_defaults(run=_doctor)

    slurm = commands.add_parser(
        "slurm",
        help="write a Slurm job that trains, and goes on by itself after its time limit",
        epilog="Any setting is overridden by --section.key value, as in --train.steps 500.",
        allow_abbrev=False,
    )
    slurm.add_argument("config", type=path, metavar="CONFIG", help="TOML file of settings; the job keeps a copy")
    slurm.add_argument("--nodes", type=int, required=True, metavar="N")
    slurm.add_argument("--ranks-per-node", type=int, required=True, metavar="R")
    slurm.add_argument("--gpus-per-rank", type=int, default=0, metavar="G", help="default: 0, for training on CPUs")
    slurm.add_argument("--time", default="4:00:00", metavar="LIMIT", help="as sbatch takes it (default: 4:00:00)")
    slurm.add_argument("--launcher", default="mpirun", choices=["mpirun", "srun", "horovodrun"])
    slurm.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help='more for sbatch, as in "--partition=gpu"'
    )
    slurm.add_argument("--output", type=path, metavar="DIR", help="the job's directory (default: RUN_DIR.slurm)")
    slurm.add_argument("--submit", action="store_true", help="submit it too")
    slurm.set_defaults(run=_slurm)

    _add_fabric(commands)
    _add_scaling(commands)
    return parser


def _add_scaling(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
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
    predict.add_argument("fit", type=path, metavar="FIT", help="a file of hvdlm fit")
    predict.add_argument("--ranks", required=True, metavar="N..M|N,M", help="N..M doubles from N to M")
    predict.add_argument("--per-node", type=int, metavar="R", help="ranks a host (default: as measured)")
    predict.add_argument("--link", metavar="RATE", help="of each host, as 100gbit (default: the fastest measured)")
    predict.add_argument(
        "--codec", action="append", default=[], metavar="CODEC", help="default: all that were measured"
    )
    predict.add_argument("--model", metavar="PRESET", help="default: tiny, or what overrides say")
    predict.add_argument(
        "--batch-size-per-rank", type=int, metavar="N", help="sequences of a rank in a step (default: 32)"
    )
    predict.add_argument(
        "--rank-flops", type=finite, metavar="FLOPS", help="FLOP/s that a rank achieves (default: as measured)"
    )
    predict.set_defaults(run=_predict)


def _add_fabric(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    fabric = commands.add_parser("fabric", help="an emulated cluster on this machine, for tests")
    fabric.add_argument(
        "--state",
        type=path,
        metavar="DIR",
        help="its directory (default: HVDLM_FABRIC, or /var/lib/hvdlm/fabric)",
    )
    actions = fabric.add_subparsers(dest="action", metavar="ACTION", required=True)
    up = actions.add_parser("up", help="start hosts h1, h2, ...")
    up.add_argument("--hosts", type=int, required=True, metavar="N")
    up.add_argument("--slots", type=int, default=2, metavar="S", help="ranks a host (default: 2)")
    up.add_argument("--rate", metavar="RATE", help="of each host's link, as 100mbit or 1gbit (default: unlimited)")
    up.add_argument("--slurm", action="store_true", help="with Slurm: munge, slurmctld on h1, slurmd on every host")
    run = actions.add_parser("run", help="run a program inside a host")
    run.add_argument("host", metavar="HOST")
    run.add_argument("program", nargs="+", metavar="-- PROGRAM", help="and its arguments")
    link = actions.add_parser("link", help="cut, heal or reshape a host's link, while jobs run")
    link.add_argument("host", metavar="HOST")
    link.add_argument("change", metavar="down|up|RATE")
    actions.add_parser("status", help="print hosts, addresses, links and processes")
    actions.add_parser("down", help="end every process of the hosts and remove them")
    fabric.set_defaults(run=_fabric)
