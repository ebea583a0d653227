"""What ranks must share to stay replicas of each other, compared once each knows its data set and its device.

Every rank computes the update of all parameters for itself, from gradients that are equal on all. So ranks must round
alike: the loops of strategies/update_loops.py do on every CPU, but kernels of a GPU may not, and the C library has
several cosines. What decides is what a rank has computed: each updates the same few numbers, and all compare the
results bit for bit. Where more than updates must be equal on several ranks, PyTorch's loops must be those of one
instruction set.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from hvdlm.comm.agreement import Shared, check_alike
from hvdlm.comm.communicator import Communicator
from hvdlm.config import CompressionSection, Config, OptimizerSection
from hvdlm.data.shard import DataSet
from hvdlm.gradients.codecs.registry import AUTO
from hvdlm.strategies.optimizer import make_optimizer, optimizer_tensors, set_learning_rate
from hvdlm.training.schedule import learning_rate

logger = logging.getLogger(__name__)

_SAMPLE_ROWS, _SAMPLE_COLUMNS = 97, 101
_SAMPLE_STEPS = 4
_MAX_RATES = 1000


def check_data_matches(communicator: Communicator, data: DataSet) -> None:
    """Raises JobError on every rank unless all have opened the same tokens and tokenizer. Collective."""
    check_alike(communicator, {"the data set": shared_data(data)})


def shared_data(data: DataSet) -> Shared:
    """What tells a data set from others."""
    value = f"fingerprint {data.fingerprint[:12]} with a vocabulary of {data.vocab_size}"
    return Shared(value, f"{data.path} must be one data set on all hosts: prepare it once, and copy or share it")


def check_devices_match(communicator: Communicator, device: torch.device, config: Config | None = None) -> None:
    """Raises JobError on every rank unless all compute on one type of device and, with the `config` of a training run,
    update parameters alike. Collective."""
    remedy = "set train.device = 'cpu', or ask nvidia-smi on the hosts without a GPU why they have none"
    own = {"the type of device": Shared(device.type, remedy)}
    if config is not None:
        own |= _what_rounds(device, config)
    check_alike(communicator, own)
    if device.type == "cuda":
        _report_unlike_gpus(communicator, torch.cuda.get_device_name(device))


def _what_rounds(device: torch.device, config: Config) -> dict[str, Shared]:
    """What decides how this rank updates parameters, by subject."""
    own = {}
    if device.type == "cpu" and (cause := needs_one_instruction_set(config)):
        remedy = (
            f"{cause} has ranks compute the same by PyTorch: set ATEN_CPU_CAPABILITY to the least of these on all "
            "ranks, as in mpirun -x ATEN_CPU_CAPABILITY=avx2"
        )
        own["CPU capability"] = Shared(torch.backends.cpu.get_cpu_capability(), remedy)
    remedy = "parameters would drift apart: use hosts of one kind, with one C library and one PyTorch"
    own["how they round the optimizer's update"] = Shared(update_digest(device, config.optimizer), remedy)
    rates = rates_digest(config.planned_steps, config.optimizer)
    own["how they round the learning rate"] = Shared(rates, remedy)
    for file, digest in codec_digests(config.compression).items():
        own[f"the codec {file}"] = Shared(digest, "copy one file to all hosts")
    return own


def needs_one_instruction_set(config: Config) -> str:
    """The setting by which ranks compute more alike than updates, such as a norm's gradient, or initial values of which
    each has a copy; empty if there is none."""
    parallel = config.parallel
    shared = {
        "parallel.tensor": parallel.tensor > 1,
        "parallel.pipeline": parallel.pipeline > 1,
        "parallel.data with parallel.shard": parallel.shard > 0 and parallel.data > 1,
        "a codec of your own": bool(codec_digests(config.compression)),
    }
    return next((name for name, is_set in shared.items() if is_set), "")


def update_digest(device: torch.device, settings: OptimizerSection) -> str:
    """12 digits of a hash over parameters and moments after some steps of AdamW on numbers of all magnitudes."""
    shapes = ((_SAMPLE_ROWS, _SAMPLE_COLUMNS), (_SAMPLE_COLUMNS,))
    sample = nn.ParameterList([nn.Parameter(_numbers(shape, 1).to(device)) for shape in shapes])
    if settings.freeze_variance_after:
        settings = settings.model_copy(update={"freeze_variance_after": _SAMPLE_STEPS // 2})
    optimizer = make_optimizer(sample, settings)
    for step in range(_SAMPLE_STEPS):
        for parameter in sample:
            parameter.grad = _numbers(parameter.shape, 2 + step).to(device)
        set_learning_rate(optimizer, settings.lr * (step + 1) / 3)
        optimizer.step()
    digest = hashlib.sha256()
    for tensor in (*sample, *optimizer_tensors(optimizer, sample).values()):
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def rates_digest(steps: int, settings: OptimizerSection) -> str:
    """12 digits of a hash over the learning rates of some steps of a run."""
    stride = -(-steps // _MAX_RATES)
    rates = [learning_rate(step, steps, settings).hex() for step in range(0, steps, stride)]
    return hashlib.sha256(" ".join(rates).encode()).hexdigest()[:12]


def codec_digests(settings: CompressionSection) -> dict[str, str]:
    """12 digits of a hash of each file whose codec the settings name."""
    names = [settings.codec, *(settings.candidates.split(",") if settings.codec == AUTO else [])]
    files = sorted({Path(name.strip().rpartition(":")[0]) for name in names if ":" in name})
    return {
        str(file): hashlib.sha256(file.read_bytes()).hexdigest()[:12] if file.is_file() else "no such file"
        for file in files
    }


def _numbers(shape: tuple[int, ...] | torch.Size, seed: int) -> Tensor:
    """Numbers of both signs from 2**-80 to 2, made by operations that round alike everywhere."""
    index = torch.arange(torch.Size(shape).numel()) + seed * 7919
    mantissa = (index * 104_729 % 65_521 - 32_760).double() / 16_384
    powers = torch.tensor([2.0**-exponent for exponent in range(81)], dtype=torch.float64)
    return (mantissa * powers[index % 81]).float().view(shape)


def _report_unlike_gpus(communicator: Communicator, name: str) -> None:
    models = Counter(communicator.all_gather_object(name))
    if len(models) > 1 and communicator.rank == 0:
        kinds = ", ".join(f"{count} x {model}" for model, count in models.items())
        logger.warning("ranks compute on unlike GPUs, %s: all wait for the slowest", kinds)
