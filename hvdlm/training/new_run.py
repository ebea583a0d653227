"""`hvdlm new`: a directory to begin with, whose settings and commands are explained."""

from __future__ import annotations

from pathlib import Path

from hvdlm.data.staging import refuse_what_is_there, staged

_CONFIG = """\
# Settings of one training run. `hvdlm train config.toml --dry-run` prints all others, too, with the memory and the
# arithmetic that the run takes. Any of them is overridden on the command line, as in `--train.steps 500`.

[model]
preset = "tiny"           # a shape to start from: GPT-2's at the size of a laptop
position = "rope"         # rotary positions: in short runs better than learned ones
layers = 4                # Transformer blocks
heads = 4                 # attention heads
width = 128               # numbers a token has between blocks
context_length = 128      # tokens of a sequence

[data]
path = "data"             # where `hvdlm prepare` has written the data set

[train]
steps = 800               # updates of the model
global_batch_size = 16    # sequences of one update, over all ranks: the loss does not depend on their number
micro_batch_size = 8      # sequences that a rank computes at once: as many as fit into memory
precision = "fp32"        # "bf16" is faster on GPUs, and on CPUs that can compute it
run_dir = "run"           # checkpoints, metrics and a picture of the loss
evaluate_every = 200      # steps from one validation to the next
evaluate_sequences = 256  # validation sequences each time

[optimizer]
lr = 3e-3                 # the highest learning rate: larger models want a lower one
warmup_steps = 50         # steps until it is reached

[checkpoint]
every = "10min"           # a run that is stopped goes on from the newest one, with `--resume latest`

[log]
every = 20                # steps from one line to the next
"""

_README = """\
# A run of hvdlm

Put your text into `text/`: files of plain text, JSON Lines or Parquet, in folders if you like. Then, in this directory:

```bash
hvdlm prepare --input text --tokenizer bpe:1024 --output data
mpirun -np 2 --bind-to none hvdlm train config.toml --resume latest
hvdlm generate run --prompt "The " --tokens 100
```

The first divides the text into tokens; one long file is fine. The second trains on two ranks, and goes on where it was
stopped; without `mpirun -np 2 --bind-to none` it trains on one. The third continues a prompt.

On a cluster with Slurm, `./slurm.sh` submits the same run as a job that saves before its time limit and goes on after
it.
"""

_SLURM = """\
#!/bin/sh
# Submits this run to Slurm. Set how many nodes, and ranks on each: one a GPU, or one every few cores.
cd "$(dirname "$0")" || exit
exec hvdlm slurm config.toml --nodes 1 --ranks-per-node 2 --time 4:00:00 --submit "$@"
# With GPUs add: --gpus-per-rank 1
# What your cluster wants besides, for sbatch: --sbatch=--partition=NAME --sbatch=--account=NAME
"""


def new(directory: Path) -> None:
    """Writes config.toml, README.md, slurm.sh and an empty directory for text, all of them or nothing.

    Raises HvdlmError if `directory` holds something already, or cannot be written.
    """
    refuse_what_is_there(directory)
    with staged(directory) as whole:
        (whole / "config.toml").write_text(_CONFIG, encoding="utf-8")
        (whole / "README.md").write_text(_README, encoding="utf-8")
        (whole / "slurm.sh").write_text(_SLURM, encoding="utf-8")
        (whole / "slurm.sh").chmod(0o755)
        (whole / "text").mkdir()
    print(f"{directory}: put your text into {directory / 'text'}, and see {directory / 'README.md'} for the commands")
