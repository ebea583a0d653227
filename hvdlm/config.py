"""Every setting hvdlm has: one typed section each.

A setting is declared once, here, with its type, its bounds, its default and its meaning. config_reader.py makes a
`Config` of TOML and a command line.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

from hvdlm.arguments import duration
from hvdlm.paths import expand_path

Precision = Literal["fp32", "bf16", "fp16"]
Algorithm = Literal["adamw", "adam", "sgd", "lion", "dion"]


def _check_duration(text: str) -> str:
    duration(text)
    return text


def _check_signals(text: str) -> str:
    known = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    if unknown := [name for name in text.split(",") if name not in known]:
        raise ValueError(f"{text!r}: {unknown[0]!r} is none of {', '.join(known)}")
    return text


UserPath = Annotated[str, AfterValidator(expand_path)]


class Section(BaseModel):
    """A group of settings; immutable, and strict about names and types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, serialize_by_alias=True)

    @classmethod
    def setting_fields(cls) -> dict[str, FieldInfo]:
        """Its settings by the names that users write."""
        return {field.alias or name: field for name, field in cls.model_fields.items()}


class ModelSection(Section):
    """`[model]`: the shape of the Transformer. The preset fills what is not given."""

    preset: str = Field("tiny", description="named starting point; any field below overrides it")
    from_: UserPath = Field(
        "",
        alias="from",
        description="checkpoint, run directory or output of `hvdlm import`: training begins with its weights, and "
        "`[model]` with its shape in place of the preset's; empty: weights are initialised by train.seed",
    )
    layers: int = Field(4, gt=0, description="Transformer blocks")
    heads: int = Field(4, gt=0, description="attention (query) heads")
    kv_heads: int = Field(0, ge=0, description="key and value heads; 0: as many as heads")
    width: int = Field(128, gt=0, description="size of the residual stream")
    mlp_width: int = Field(0, ge=0, description="hidden size of the MLP; 0: 4 x width, or 8/3 x width for swiglu")
    context_length: int = Field(128, gt=0, description="tokens a sequence")
    vocab_size: int = Field(0, ge=0, description="tokens in the vocabulary; 0: the data set's")
    norm: Literal["layernorm", "rmsnorm"] = Field("layernorm", description="normalisation before each sub-layer")
    norm_eps: float = Field(1e-5, gt=0, description="added to the variance in the normalisation")
    activation: Literal["gelu", "swiglu"] = Field("gelu", description="MLP non-linearity")
    position: Literal["learned", "rope"] = Field("learned", description="position embedding")
    rope_theta: float = Field(10000.0, gt=0, description="base of the rotary frequencies")
    rope_scaling: float = Field(0.0, ge=0, description="divides low rotary frequencies, as Llama 3.1 does; 0: does not")
    rope_low_frequency: float = Field(1.0, gt=0, description="turns in the original context below which it divides")
    rope_high_frequency: float = Field(4.0, gt=0, description="turns in the original context above which it does not")
    rope_original_context: int = Field(8192, gt=0, description="tokens of a sequence before it was scaled")
    bias: bool = Field(True, description="biases in linear layers and LayerNorm")
    qkv_bias: bool = Field(False, description="biases of queries, keys and values even without bias, as in Qwen2")
    tie_embeddings: bool = Field(True, description="output projection shares the token embedding")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability of dropping an activation")
    document_mask: bool = Field(False, description="attention does not cross the bounds of documents")

    @model_validator(mode="after")
    def _fits(self) -> ModelSection:
        if self.width % self.heads:
            raise ValueError(f"model.width = {self.width} is not a multiple of model.heads = {self.heads}")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"model.heads = {self.heads} is not a multiple of model.kv_heads = {self.kv_heads}")
        if self.position == "rope" and (self.width // self.heads) % 2:
            raise ValueError(
                "model.position = 'rope' rotates pairs of numbers, "
                f"but model.width / model.heads = {self.width // self.heads} is odd"
            )
        if self.rope_scaling and self.rope_low_frequency >= self.rope_high_frequency:
            raise ValueError(
                f"model.rope_low_frequency = {self.rope_low_frequency:g} is not below model.rope_high_frequency = "
                f"{self.rope_high_frequency:g}"
            )
        return self


class DataSection(Section):
    """`[data]`: where the tokens come from."""

    path: UserPath = Field("data/python-stdlib", min_length=1, description="directory written by `hvdlm prepare`")
    read_ahead: int = Field(2, gt=0, description="batches a rank reads ahead of the step that uses them")
    on_corrupt: Literal["fail", "skip"] = Field(
        "fail",
        description="where a shard is damaged or gone in mid-run: fail: the job ends, with its steps saved; skip: the "
        "sequences that cannot be read are left out, and counted",
    )


class TrainSection(Section):
    """`[train]`: steps, batches, precision, device."""

    steps: int = Field(1000, gt=0, description="optimizer steps")
    global_batch_size: int = Field(32, gt=0, description="sequences per optimizer step, over all ranks")
    micro_batch_size: int = Field(
        8, gt=0, description="sequences a rank computes at once; gradients of several are accumulated"
    )
    precision: Precision = Field("fp32", description="arithmetic of forward and backward; master weights are fp32")
    seed: int = Field(0, ge=0, lt=2**63, description="of initialisation, sample order and dropout")
    stop_signals: Annotated[str, AfterValidator(_check_signals)] = Field(
        "SIGTERM,SIGINT,SIGHUP,SIGUSR1",
        description="signals at which all ranks finish the step, save and exit with 75; a second SIGINT ends at once",
    )
    run_dir: UserPath = Field(
        "runs/default", min_length=1, description="where config, metrics, checkpoints and pictures go"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where there is one")
    threads: int = Field(0, ge=0, description="CPU threads a rank; 0: OMP_NUM_THREADS, or the cores shared among ranks")
    compile: bool = Field(False, description="torch.compile, block by block so that communication still overlaps")
    activation_checkpointing: bool = Field(
        False, description="blocks keep only their input and are computed again in the backward pass"
    )
    deterministic: bool = Field(
        False,
        description="only kernels that sum in one order: bit-for-bit resuming on GPUs needs it, and it costs time",
    )
    evaluate_every: int = Field(0, ge=0, description="steps between validations; 0: only at the end")
    evaluate_sequences: int = Field(0, ge=0, description="validation sequences each time; 0: all")
    max_skipped: int = Field(
        10, ge=0, description="steps in a row that may be left out because a gradient is NaN or infinite"
    )
    check_replicas_every: int = Field(100, ge=0, description="steps between parameter hash comparisons; 0: never")
    heal_replicas: bool = Field(
        False,
        description="a rank whose parameters are found to differ gets those of most ranks, of two those of rank 0; "
        "otherwise the job ends",
    )


class OptimizerSection(Section):
    """`[optimizer]`: how parameters step by gradients, and the schedule of the learning rate."""

    algorithm: Algorithm = Field(
        "adamw",
        description="adamw; adam and sgd, whose weight decay is L2 regularisation; lion; dion: matrices of blocks by "
        "Dion, whose ranks exchange low-rank factors of their momentum, and the rest by AdamW",
    )
    dion_rank: float = Field(
        0.125,
        gt=0,
        description="vectors by which Dion approximates the momentum of a matrix; below 1: as a share of model.width",
    )
    dion_momentum: float = Field(0.95, ge=0, lt=1, description="share of what it has used that Dion's momentum keeps")
    dion_lr_ratio: float = Field(
        2.0, gt=0, description="Dion's learning rate over `lr`; a matrix of m x n has sqrt(m / n) times that"
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd")
    nesterov: bool = Field(False, description="of sgd: the gradient where momentum leads to")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment; of lion, in the update")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of the second moment; of lion, of its momentum")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    freeze_variance_after: int = Field(
        0, ge=0, description="steps after which second moments are not updated, for topk, topk2 and powersgd; 0: never"
    )
    weight_decay: float = Field(0.1, ge=0, description="on matrices only; decoupled, but for adam and sgd")
    clip_norm: float = Field(1.0, ge=0, description="global gradient norm is clipped to this; 0: not clipped")
    schedule: Literal["cosine", "wsd", "linear", "inverse_sqrt"] = Field(
        "cosine", description="what follows the warm-up; wsd: a stable rate, then a linear decay"
    )
    warmup_steps: int = Field(100, ge=0, description="steps of linear warm-up from 0")
    decay_steps: int = Field(0, ge=0, description="length of wsd's final decay; 0: a fifth of train.steps")
    final_lr_ratio: float = Field(
        0.1, ge=0, le=1, description="last learning rate over the peak, of inverse_sqrt the least"
    )

    @model_validator(mode="after")
    def _fits(self) -> OptimizerSection:
        if self.dion_rank > 1 and self.dion_rank % 1:
            raise ValueError(f"optimizer.dion_rank = {self.dion_rank} is neither a share below 1 nor a whole number")
        if self.freeze_variance_after and self.algorithm not in ("adamw", "dion"):
            raise ValueError(f"optimizer.freeze_variance_after is of AdamW, not of algorithm = {self.algorithm!r}")
        if self.nesterov and not self.momentum:
            raise ValueError("optimizer.nesterov = true needs optimizer.momentum above 0")
        return self


class CommSection(Section):
    """`[comm]`: how ranks communicate."""

    engine: Literal["auto", "solo", "horovod", "mpi", "torch"] = Field(
        "auto", description="communication library; auto: by how the job was started"
    )
    bucket_mb: float = Field(
        0.0, ge=0, description="gradient bytes sent at once, in units of 2**20; 0: what suits codec and hosts"
    )
    algorithm: Literal["auto", "ring", "engine"] = Field(
        "auto", description="what sums gradients: our ring, the engine's all-reduce, or whichever costs less at start"
    )
    timeout: float = Field(
        300.0,
        gt=0,
        le=1e6,
        description="seconds that a rank waits for another before the job ends with an error; those in which it is "
        "suspended itself do not count",
    )
    elastic: bool = Field(
        False,
        description="when a rank dies, the others go on without it; needs engine mpi and mpirun --with-ft ulfm, or "
        "horovodrun with a host-discovery script, where ranks can join, too",
    )
    min_ranks: int = Field(1, gt=0, description="with elastic, fewer ranks save and end the job")
    mirror_residuals: bool = Field(
        False,
        description="with elastic, each rank sends its residuals to the next one in every step: they outlive it",
    )


class CompressionSection(Section):
    """`[compression]`: how gradients are encoded."""

    codec: str = Field(
        "none",
        description="none, fp16, bf16, int8, int4, int2, topk, topk2, powersgd, auto, or FILE.py:CLASS of your own",
    )
    candidates: str = Field(
        "none,fp16,int4",
        description="codecs among which auto chooses by measurement; those that cost loss only if listed",
    )
    hierarchical: bool = Field(False, description="the engine sums within a node, and the codec between nodes")
    error_feedback: bool = Field(True, description="what a codec did not deliver is added to the next step's gradients")
    density: float = Field(0.01, ge=1 / 256, le=1, description="share of a matrix's numbers that topk and topk2 send")
    warmup_steps: int = Field(
        0,
        ge=0,
        description="steps with dense gradients before topk, topk2, powersgd; the first two then thin out in as many",
    )
    matrix_rank: int = Field(4, gt=0, description="rank of the matrices by which powersgd approximates gradients")


class LocalStepsSection(Section):
    """`[local_steps]`: ranks train on their own for some steps, and average what they have learned."""

    every: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        0,
        description="steps of a rank from one average to the next; 0: gradients every step; auto: as few as hide an "
        "average on the link that is measured, with the overlap that this takes",
    )
    by: Literal["tokens", "seconds"] = Field(
        "tokens",
        description="tokens: every rank trains on its part of each batch; seconds: one that is slower than the fastest "
        "by more than a tenth leaves out steps, so that a round takes as long on each",
    )
    warmup_steps: int = Field(
        0,
        ge=0,
        description="first steps of a run, whose gradients are combined every step, by the codec if it is none, fp16, "
        "bf16, int8 or int4, and by int4 otherwise",
    )
    lr: float = Field(1.0, gt=0, description="learning rate of the outer optimizer; 1: the average as it is")
    momentum: float = Field(0.0, ge=0, lt=1, description="Nesterov momentum of the outer optimizer")
    fragments: int = Field(1, gt=0, description="parts of the model, averaged one after the other within `every` steps")
    hierarchical: bool = Field(
        False, description="ranks of a node combine their gradients every step; local steps are those of a node"
    )
    overlap: int = Field(0, ge=0, description="steps that go on while a fragment is being averaged; at most `every`")
    merge: Literal["add", "mix"] = Field(
        "add",
        description="add: a rank's parameters become the averaged ones, and steps that it has made while these were on "
        "their way are added; mix: parts of both, by alpha",
    )
    alpha: float = Field(0.5, ge=0, le=1, description="share of a rank's own parameters where merge = 'mix'")

    @model_validator(mode="after")
    def _fits(self) -> LocalStepsSection:
        if self.every == "auto":
            if self.overlap:
                raise ValueError("local_steps.every = 'auto' chooses local_steps.overlap too: leave it out")
        elif self.every and self.overlap > self.every:
            raise ValueError(f"local_steps.overlap = {self.overlap} is more than local_steps.every = {self.every}")
        return self


class CheckpointSection(Section):
    """`[checkpoint]`: when checkpoints are written, and how many are kept."""

    every: Annotated[int, Field(ge=0)] | Annotated[str, AfterValidator(_check_duration)] = Field(
        "30min", description="steps between checkpoints, or time: 90s, 30min, 2h; 0: only at the end"
    )
    keep: int = Field(3, gt=0, description="newest checkpoints kept")
    keep_every: int = Field(0, ge=0, description="checkpoints of multiples of so many steps are kept, too; 0: of none")
    keep_best: bool = Field(
        False,
        description="each validation is preceded by a checkpoint; the one of the least loss is kept, and is `best`",
    )
    max_failures: int = Field(
        3,
        gt=0,
        description="checkpoints in a row that cannot be written before the job ends; a run's last one ends it alone",
    )

    @property
    def steps_between(self) -> int:
        """From one checkpoint to the next; 0 if that is not told in steps."""
        return self.every if isinstance(self.every, int) else 0

    @property
    def seconds_between(self) -> float:
        """From one checkpoint to the next; 0 if that is not told in time."""
        return 0.0 if isinstance(self.every, int) else duration(self.every)


class LogSection(Section):
    """`[log]`: how often metrics are written, and for whom."""

    every: int = Field(10, gt=0, description="steps between lines of metrics.jsonl")
    tensorboard: bool = Field(False, description="the same for TensorBoard, in `tensorboard` of the run directory")


class Config(Section):
    """All sections. `config_reader.load` makes one."""

    model: ModelSection = Field(default_factory=ModelSection)
    data: DataSection = Field(default_factory=DataSection)
    train: TrainSection = Field(default_factory=TrainSection)
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    comm: CommSection = Field(default_factory=CommSection)
    compression: CompressionSection = Field(default_factory=CompressionSection)
    local_steps: LocalStepsSection = Field(default_factory=LocalStepsSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    log: LogSection = Field(default_factory=LogSection)

    @model_validator(mode="after")
    def _fits(self) -> Config:
        optimizer, local_steps, compression = self.optimizer, self.local_steps, self.compression
        is_dion = optimizer.algorithm == "dion"
        misfits = {
            f"optimizer.warmup_steps = {optimizer.warmup_steps} is more than train.steps = {self.train.steps}": (
                optimizer.warmup_steps > self.train.steps
            ),
            f"optimizer.decay_steps = {optimizer.decay_steps} does not fit between optimizer.warmup_steps = "
            f"{optimizer.warmup_steps} and train.steps = {self.train.steps}": (
                optimizer.decay_steps > self.train.steps - optimizer.warmup_steps
            ),
            "compression.codec = 'auto' chooses by the gradients of every step: name a codec for local_steps.every": (
                bool(local_steps.every) and compression.codec == "auto"
            ),
            "local_steps.hierarchical combines the ranks of a node every step, compression.hierarchical only where a "
            "codec is used: set one of them": local_steps.hierarchical and compression.hierarchical,
            "optimizer.algorithm = 'dion' exchanges momentum at every step: it does not go with local_steps.every": (
                is_dion and bool(local_steps.every)
            ),
            "compression.codec = 'auto' chooses for the gradients of all parameters: name a codec for those that "
            "optimizer.algorithm = 'dion' leaves to AdamW": is_dion and compression.codec == "auto",
            "comm.elastic = true goes neither with local_steps.hierarchical nor with local_steps.by = 'seconds': leave "
            "out one of them": (
                self.comm.elastic
                and bool(local_steps.every)
                and (local_steps.hierarchical or local_steps.by == "seconds")
            ),
            "comm.mirror_residuals = true needs comm.elastic = true": (
                self.comm.mirror_residuals and not self.comm.elastic
            ),
            "comm.mirror_residuals = true sends the residuals of gradients, not of local steps: leave it out": (
                self.comm.mirror_residuals and bool(local_steps.every)
            ),
            f"optimizer.dion_rank = {optimizer.dion_rank:g} is more than model.width = {self.model.width}": (
                is_dion and optimizer.dion_rank > self.model.width
            ),
        }
        if found := [sentence for sentence, is_wrong in misfits.items() if is_wrong]:
            raise ValueError(found[0])
        return self

    def to_toml(self) -> str:
        """This configuration as the text of a TOML file that `config_reader.load` reads back to an equal one."""
        return tomli_w.dumps(self.model_dump())

    def digest(self) -> str:
        """SHA-256 (hex) over every setting: equal on two ranks exactly if they were configured alike."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()
