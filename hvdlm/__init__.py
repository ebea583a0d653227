"""hvdlm: data-parallel training of Transformer language models on Horovod and MPI."""

__version__ = "0.1.0"
