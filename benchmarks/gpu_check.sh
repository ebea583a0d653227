#!/bin/bash
# What the tests cannot reach without a GPU, on a machine with at least one: run from the repository, after `make setup`.
# Several ranks may share one GPU: over MPI and Gloo, whose messages are staged through the host.
set -euo pipefail
cd "$(dirname "$0")/.."
data=data/python-stdlib
out=$(mktemp -d)
small=(--data.path "$data" --train.steps 20 --optimizer.warmup_steps 5 --train.evaluate_sequences 64 --log.every 1 --train.device cuda)

python - <<'PYTHON'
import torch

assert torch.cuda.is_available(), "PyTorch finds no GPU here"
print(torch.cuda.get_device_name(), "torch", torch.__version__, "CUDA", torch.version.cuda)
PYTHON
[ -d "$data" ] || hvdlm prepare --input python-stdlib --output "$data"

echo "== the same curve on CPU and GPU, alone and on two ranks of each engine"
hvdlm train examples/quickstart.toml "${small[@]}" --train.device cpu --train.run_dir "$out/cpu"
hvdlm train examples/quickstart.toml "${small[@]}" --train.run_dir "$out/alone"
for engine in mpi torch; do
  mpirun -np 2 --bind-to none hvdlm train examples/quickstart.toml "${small[@]}" \
    --comm.engine "$engine" --train.run_dir "$out/$engine"
done
python - "$out" <<'PYTHON'
import json
import sys
from pathlib import Path


def losses(run: str) -> list[float]:
    lines = (Path(sys.argv[1]) / run / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if record["kind"] == "train"]


for run in ("alone", "mpi", "torch"):
    worst = max(abs(a / b - 1) for a, b in zip(losses(run), losses("cpu"), strict=True))
    print(f"{run}: within {worst:.1e} of the CPU's curve")
    assert worst < 1e-3, run
PYTHON

echo "== bf16 and fp16, compiled, GPT-2 124M"
for precision in bf16 fp16; do
  hvdlm train examples/quickstart.toml "${small[@]}" --model.preset gpt2 --model.layers 12 --train.batch_size 16 \
    --train.micro_batch_size 16 --train.precision "$precision" --train.compile true --train.run_dir "$out/$precision"
done
tail -n 2 "$out/bf16/metrics.jsonl"

echo "== every codec on two ranks; blocks computed again"
for codec in fp16 bf16 int8 int4 topk powersgd auto; do
  mpirun -np 2 --bind-to none hvdlm train examples/quickstart.toml "${small[@]}" --comm.engine mpi \
    --compression.codec "$codec" --train.check_replicas_every 5 --train.run_dir "$out/codec-$codec"
done
hvdlm train examples/quickstart.toml "${small[@]}" --train.precision bf16 --train.recompute true --train.run_dir "$out/recompute"

echo "== stop and resume on the GPU"
hvdlm train examples/quickstart.toml "${small[@]}" --checkpoint.every 10 --train.run_dir "$out/whole"
hvdlm train examples/quickstart.toml "${small[@]}" --checkpoint.every 1 --train.run_dir "$out/stopped" &
while [ ! -e "$out/stopped/checkpoints/latest" ]; do sleep 0.1; done
kill -TERM $!
wait $! || [ $? = 75 ]
hvdlm train examples/quickstart.toml "${small[@]}" --train.run_dir "$out/stopped" --resume latest
python - "$out" <<'PYTHON'
import sys
from pathlib import Path

from safetensors.torch import load_file

whole, stopped = (
    load_file(Path(sys.argv[1]) / run / "checkpoints" / "step_00000020" / "model.safetensors")
    for run in ("whole", "stopped")
)
worst = max(float((whole[name] - stopped[name]).abs().max()) for name in whole)
print(f"parameters of the run that was stopped differ by at most {worst:.1e}")
assert worst < 1e-4
PYTHON
hvdlm generate "$out/whole" --prompt "def " --tokens 20

echo "== sums of tensors on the GPU, and a trace of a step"
mpirun -np 2 --oversubscribe --bind-to none python benchmarks/allreduce.py --largest 64mb --output "$out" --name gpu
mpirun -np 2 --oversubscribe --bind-to none python benchmarks/timeline.py examples/quickstart.toml \
  --data.path "$data" --compression.codec fp16 --output "$out/trace.json"

echo "== one rank's speed; results go to benchmarks/results/one_rank.json"
python benchmarks/one_rank.py --data "$data" --models gpt2 gpt2-large --contestants "PyTorch bf16 autocast eager" \
  "hvdlm bf16" "hvdlm bf16 compiled"
python benchmarks/one_rank.py --data "$data" --models llama-1b --contestants "hvdlm bf16" "hvdlm bf16 compiled"
echo "all GPU checks passed; runs are in $out"
