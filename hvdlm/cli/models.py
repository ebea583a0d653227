"""`hvdlm evaluate`, `hvdlm lm-eval`, `hvdlm generate`, `hvdlm export` and `hvdlm import`."""

from __future__ import annotations

import argparse

from hvdlm.arguments import finite, path, seed
from hvdlm.cli.shared import add_checkpoint, add_engine
from hvdlm.errors import HvdlmError


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the commands for trained models."""
    evaluate = commands.add_parser(
        "evaluate", help="loss, perplexity, bits per byte and accuracy, beside n-gram baselines"
    )
    add_checkpoint(evaluate)
    evaluate.add_argument(
        "--data", type=path, required=True, metavar="DIR", help="data set whose validation split is read"
    )
    add_engine(evaluate)
    evaluate.add_argument(
        "--micro-batch-size", type=int, default=8, metavar="N", help="sequences a rank computes at once (default: 8)"
    )
    evaluate.add_argument(
        "--samples",
        type=int,
        default=0,
        metavar="N",
        help="continue N texts of the validation split, and compare with how they go on there (default: 0)",
    )
    evaluate.add_argument("--seed", type=seed, default=0, help="of which texts, and of the tokens that are drawn")
    _add_ema(evaluate)
    evaluate.set_defaults(run=_evaluate)

    lm_eval = commands.add_parser("lm-eval", help="scores in tasks of lm-evaluation-harness")
    add_checkpoint(lm_eval)
    lm_eval.add_argument(
        "--tasks", required=True, metavar="NAMES", help="tasks, or paths of task files, with commas between them"
    )
    lm_eval.add_argument("--include-path", type=path, metavar="DIR", help="a folder of task files of your own")
    lm_eval.add_argument(
        "--num-fewshot", type=int, metavar="N", help="examples before a question (default: the task's)"
    )
    lm_eval.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each task")
    lm_eval.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="requests a rank computes at once (default: 8)"
    )
    add_engine(lm_eval)
    lm_eval.add_argument("--output", type=path, metavar="FILE", help="the scores as JSON")
    lm_eval.add_argument(
        "--log-samples", action="store_true", help="also write every question with the model's answers there"
    )
    _add_ema(lm_eval)
    lm_eval.set_defaults(run=_lm_eval)

    generate = commands.add_parser("generate", help="continue a prompt")
    add_checkpoint(generate)
    generate.add_argument("--prompt", default="", help="text to continue (default: a new document)")
    generate.add_argument("--tokens", type=int, default=200, metavar="N", help="tokens to add (default: 200)")
    generate.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (default: 0.8)")
    generate.add_argument("--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens (0: all)")
    generate.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="only the likeliest tokens that hold P of the mass"
    )
    generate.add_argument("--seed", type=seed, default=0)
    generate.add_argument(
        "--ngram", type=int, metavar="N", help="CHECKPOINT is a data set: by its N-gram model, N up to 5"
    )
    _add_ema(generate)
    generate.set_defaults(run=_generate)

    export = commands.add_parser("export", help="write a checkpoint's model as transformers loads it")
    export.add_argument("checkpoint", type=path, metavar="CHECKPOINT", help="a checkpoint, or a run directory")
    export.add_argument("--to", choices=["hf"], required=True, help="hf: Hugging Face's transformers")
    export.add_argument("output", type=path, metavar="DIR", help="the directory to be made")
    export.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the weights")
    export.add_argument("--shard-size", type=finite, default=5.0, metavar="GB", help="of a file at most (default: 5)")
    _add_ema(export)
    export.set_defaults(run=_export)

    importing = commands.add_parser("import", help="make a checkpoint of a model of transformers, for model.from")
    importing.add_argument("model", type=path, metavar="DIR", help="with config.json, safetensors and a tokenizer")
    importing.add_argument("--output", type=path, required=True, metavar="DIR", help="the checkpoint")
    importing.set_defaults(run=_import)


def _add_ema(command: argparse.ArgumentParser) -> None:
    command.add_argument("--ema", action="store_true", help="the moving average of weights, which train.ema keeps")


def _evaluate(options: argparse.Namespace, _: list[str]) -> int:
    from hvdlm.training.inference import evaluate

    return evaluate(
        options.checkpoint,
        options.data,
        engine=options.engine,
        micro_batch_size=options.micro_batch_size,
        samples=options.samples,
        seed=options.seed,
        averaged=options.ema,
    )


def _lm_eval(options: argparse.Namespace, _: list[str]) -> int:
    from hvdlm.training.task_evaluation import lm_eval

    return lm_eval(
        options.checkpoint,
        options.tasks,
        include_path=options.include_path,
        few_shot=options.num_fewshot,
        limit=options.limit,
        batch_size=options.batch_size,
        engine=options.engine,
        output=options.output,
        log_samples=options.log_samples,
        averaged=options.ema,
    )


def _generate(options: argparse.Namespace, _: list[str]) -> int:
    names = ("prompt", "tokens", "temperature", "top_k", "top_p", "seed")
    settings = {name: getattr(options, name) for name in names}
    if options.ngram is not None:
        if options.ema:
            raise HvdlmError("--ngram takes a data set, which has no moving average of weights: leave out --ema")
        from hvdlm.training.ngram_inference import generate_by_ngrams

        return generate_by_ngrams(options.checkpoint, options.ngram, **settings)
    from hvdlm.training.inference import generate

    return generate(options.checkpoint, **settings, averaged=options.ema)


def _export(options: argparse.Namespace, _: list[str]) -> int:
    from hvdlm.hugging_face.export import export

    return export(options.checkpoint, options.output, options.dtype, int(options.shard_size * 1e9), options.ema)


def _import(options: argparse.Namespace, _: list[str]) -> int:
    from hvdlm.hugging_face.import_model import import_model

    return import_model(options.model, options.output)
