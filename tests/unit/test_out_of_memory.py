"""Want of memory is a sentence with a remedy, and other errors stay what they are."""

from __future__ import annotations

import pytest
import torch

from hvdlm.errors import HvdlmError
from hvdlm.training.out_of_memory import out_of_memory_errors


def test_a_tensor_larger_than_the_address_space() -> None:
    """2^52 bytes, which is 2^32 MiB: PyTorch's own error."""
    with (
        pytest.raises(HvdlmError, match=r"^out of memory \(it asked for 4,294,967,296 MiB more\): lower the batch$"),
        out_of_memory_errors("lower the batch"),
    ):
        torch.empty(2**52, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory: less"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.20 GiB. GPU 0 has ..."),
            r"out of memory \(it asked for 1.20 GiB more\): less",
        ),
    ],
)
def test_errors_of_python_and_of_gpus(error: Exception, said: str) -> None:
    with pytest.raises(HvdlmError, match=f"^{said}$"), out_of_memory_errors("less"):
        raise error


def test_other_errors_stay() -> None:
    with pytest.raises(RuntimeError, match="shape"), out_of_memory_errors("less"):
        raise RuntimeError("shape")
