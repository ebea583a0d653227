"""What `[parallel]` does not go with."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hvdlm.config import Config


def parallel_misfits(config: Config) -> dict[str, bool]:
    """Sentences, and whether they are true of the settings."""
    parallel, weights = config.parallel, config.compression.weights
    return {
        "[parallel] divides a model among ranks, local_steps.every has them train copies of their own: set one of "
        "them": parallel.is_used and bool(config.local_steps.every),
        "comm.elastic = true needs the whole model on every rank: it does not go with parallel.shard, parallel.tensor "
        "or parallel.pipeline": parallel.is_used and config.comm.elastic,
        **(_of_shards(config) if parallel.shard else {}),
        **(_of_divided_models(config) if parallel.tensor > 1 or parallel.pipeline > 1 else {}),
        f"compression.weights = {weights!r} is how owners send weights: set parallel.shard with it": (
            weights != "none" and not parallel.shard
        ),
        **_of_tensor_ranks(config),
        **(_of_pipelines(config) if parallel.pipeline > 1 else {}),
    }


def no_half_for_owners(codec: str) -> str:
    """What is to be said of a codec by whose messages gradients cannot be summed at their owners alone."""
    return (
        f"compression.codec = {codec!r} cannot send gradients to their owners, as parallel.shard wants it: set it to "
        "none, fp16, bf16, int8, int4 or int2"
    )


def _of_shards(config: Config) -> dict[str, bool]:
    codec, weights = config.compression.codec, config.compression.weights
    return {
        "optimizer.algorithm = 'dion' exchanges factors of momentum in place of the sums of gradients that "
        "parallel.shard sends to their owners: set it to another one": config.optimizer.algorithm == "dion",
        no_half_for_owners(codec): codec in ("auto", "topk", "topk2", "powersgd"),
        f"compression.weights = {weights!r} is for what has changed of weights, which ranks do not keep with "
        "parallel.shard = 3: set it to int8 or none": config.parallel.shard == 3 and weights in ("int4", "int2"),
        "compression.hierarchical = true sums gradients that ranks have whole: leave it out with parallel.shard": (
            config.compression.hierarchical
        ),
        "train.heal_replicas needs another rank with the same parameters: it does not go with parallel.shard": (
            config.train.heal_replicas
        ),
        "train.evaluate_tasks needs the whole model on every rank: with parallel.shard leave it out, and score "
        "checkpoints by hvdlm lm-eval": bool(config.train.evaluate_tasks),
    }


def _of_divided_models(config: Config) -> dict[str, bool]:
    train = config.train
    return {
        "train.heal_replicas and train.evaluate_tasks need the whole model on every rank: they go with neither "
        "parallel.tensor nor parallel.pipeline": train.heal_replicas or bool(train.evaluate_tasks),
        "optimizer.algorithm = 'dion' needs the whole model on every rank: it goes with neither parallel.tensor nor "
        "parallel.pipeline": config.optimizer.algorithm == "dion",
        "train.precision = 'fp16' with a codec would lose what a part of the model has delivered of a step that "
        "overflows in another: with parallel.tensor or parallel.pipeline set compression.codec to 'none', or "
        "train.precision to 'bf16'": train.precision == "fp16" and config.compression.codec != "none",
    }


def _of_tensor_ranks(config: Config) -> dict[str, bool]:
    parallel, model = config.parallel, config.model
    heads = model.kv_heads or model.heads
    return {
        f"parallel.tensor = {parallel.tensor} does not divide the {heads} key and value heads of the model: take a "
        f"divisor of {heads}": heads % parallel.tensor > 0,
        "optimizer.algorithm = 'muon' needs whole matrices, which parallel.tensor divides: take another": (
            parallel.tensor > 1 and config.optimizer.algorithm == "muon"
        ),
        "compression.codec = 'auto' chooses for whole gradients, which parallel.tensor divides: name a codec": (
            parallel.tensor > 1 and config.compression.codec == "auto"
        ),
        f"parallel.sequence = true divides sequences among parallel.tensor = {parallel.tensor} ranks: it needs 2 or "
        f"more, and a divisor of model.context_length = {model.context_length}": (
            parallel.sequence and (parallel.tensor == 1 or model.context_length % parallel.tensor > 0)
        ),
    }


def _of_pipelines(config: Config) -> dict[str, bool]:
    parallel, layers = config.parallel, config.model.layers
    split = parallel.blocks_of_stages
    stages = f"parallel.pipeline = {parallel.pipeline}"
    if parallel.schedule == "interleaved":
        stages += f" x parallel.chunks = {parallel.chunks}"
    return {
        f"{stages} makes {parallel.stages} stages, more than model.layers = {layers}: take fewer": (
            parallel.stages > layers
        ),
        f"parallel.split = '{parallel.split}' names {len(split)} stages, but {stages} makes {parallel.stages}": (
            bool(split) and len(split) != parallel.stages
        ),
        f"parallel.split = '{parallel.split}' has {sum(split)} blocks, but model.layers = {layers}": (
            bool(split) and sum(split) != layers
        ),
        f"parallel.schedule = {parallel.schedule!r} makes the gradients of weights apart, which compiled blocks "
        "cannot: set train.compile = false or another schedule": (
            parallel.divides_backward_passes and config.train.compile
        ),
        "parallel.shard = 3 gathers parameters for each pass of each micro-batch, of which a pipeline needs many: with "
        "parallel.pipeline, which divides parameters, set it to 1 or 2": parallel.shard == 3,
        f"parallel.shard = 2 sums the gradients of a rank after each backward pass, of which parallel.schedule = "
        f"{parallel.schedule!r} makes a part at a time: set it to '1f1b', or parallel.shard to 1": (
            parallel.shard == 2 and (parallel.divides_backward_passes or parallel.schedule == "interleaved")
        ),
        "parallel.sequence = true divides hidden states, which the stages of parallel.pipeline send as a whole: leave "
        "out one of them": parallel.sequence,
        "data.on_corrupt = 'skip' may leave out a sequence on one stage and not on the others: set it to 'fail' or "
        "leave out parallel.pipeline": config.data.on_corrupt == "skip",
    }
