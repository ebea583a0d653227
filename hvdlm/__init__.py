"""hvdlm: data-parallel training of Transformer language models on Horovod and MPI."""

import os

# The CPUs that this process may use, before a library that is imported later binds it to some of them.
AFFINITY_AT_START = frozenset(os.sched_getaffinity(0))

__version__ = "0.1.0"
