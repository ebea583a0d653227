"""What GPUs compute, hold and carry, by their makers' data sheets."""

from __future__ import annotations

from typing import NamedTuple

from hvdlm.errors import HvdlmError


class Device(NamedTuple):
    """A chip. Rates are those of dense products that are summed in fp32; fp32 is without TF32."""

    name: str  # words of what CUDA calls the chip
    bf16: float | None  # 10^12 operations/s; None: it has no such products
    fp16: float | None
    fp32: float
    memory: int  # GiB
    memory_bandwidth: float  # 10^9 bytes/s
    link: float  # 10^9 bytes/s each way to the other chips of its host: NVLink, or PCI Express

    def peak_flops(self, precision: str) -> float | None:
        """Operations/s in "fp32", "bf16" or "fp16"."""
        rate: float | None = getattr(self, precision)
        return None if rate is None else rate * 1e12

    @property
    def option(self) -> str:
        """Its name on a command line: h100, a100-40gb."""
        return self.name.lower().replace(" ", "-")


# The first that fits counts. NVIDIA's data sheets, where they give the rate of sparse products halved: HGX B200 (2025),
# GH200 (2024), H200 (2024), H100 (2024), A100 (2021), L40S (2024), L4 (2023), A10 (2022), V100 (2020), T4 (2019); for
# GeForce the white papers of Ada (2022, table 2) and Ampere GA102 (2021, table 3). What they call GB of memory is GiB.
# Links are half of what they give for both ways; the two NVL cards and the RTX 3090 have NVLink to one other card only,
# so theirs is PCI Express.
DEVICES = (
    Device("B200", 2250, 2250, 75, 180, 7700, 900),
    Device("GH200", 989, 989, 67, 96, 4000, 450),
    Device("H200 NVL", 835, 835, 60, 141, 4800, 64),
    Device("H200", 989, 989, 67, 141, 4800, 450),
    Device("H100 PCIe", 756, 756, 51, 80, 2000, 64),
    Device("H100 NVL", 835, 835, 60, 94, 3900, 64),
    Device("H100", 989, 989, 67, 80, 3350, 450),
    Device("A100 40GB", 312, 312, 19.5, 40, 1555, 300),
    Device("A100 PCIe", 312, 312, 19.5, 80, 1935, 32),
    Device("A100", 312, 312, 19.5, 80, 2039, 300),
    Device("L40S", 362, 362, 91.6, 48, 864, 32),
    Device("L4", 121, 121, 30.3, 24, 300, 32),
    Device("A10", 125, 125, 31.2, 24, 600, 32),
    Device("V100 SXM2 32GB", None, 125, 15.7, 32, 900, 150),
    Device("V100 SXM2", None, 125, 15.7, 16, 900, 150),
    Device("V100 PCIE", None, 112, 14, 16, 900, 16),
    Device("T4", None, 65, 8.1, 16, 320, 16),
    Device("RTX 4090", 165.2, 165.2, 82.6, 24, 1008, 32),
    Device("RTX 3090", 71, 71, 35.6, 24, 936, 32),
)

# Words in the names of chips that are slower or faster than those without, and of parts of a chip
_OTHER_CHIPS = {"Ti", "SUPER", "D", "Laptop", "MIG"}


def device_of_chip(chip: str) -> Device | None:
    """The device that CUDA calls so; None for one that is not in the list."""
    words = set(chip.replace("-", " ").split())
    if not _OTHER_CHIPS.isdisjoint(words):
        return None
    return next((device for device in DEVICES if words.issuperset(device.name.split())), None)


def device_named(option: str) -> Device:
    """The device of that name on a command line. Raises HvdlmError with all names for another."""
    for device in DEVICES:
        if device.option == option.lower():
            return device
    known = ", ".join(sorted(device.option for device in DEVICES))
    raise HvdlmError(
        f"--device {option} is not known (known: {known}); of another give one rank's measured --tokens-per-second"
    )
