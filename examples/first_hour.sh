#!/bin/bash
# From texts in a Parquet file and a small Llama, as others publish them, to a model that transformers runs.
# In the checkout:
#
#   examples/first_hour.sh TEXTS.parquet LLAMA HOSTLIST OUTPUT
#
# LLAMA is a folder with config.json, safetensors and tokenizer.json; HOSTLIST names the hosts of two ranks.
# docs/first-hour.md shows what it prints.
set -euo pipefail
texts=$1 llama=$2 hosts=$3 output=$4

hvdlm prepare --input "$texts" --tokenizer "$llama/tokenizer.json" --validation 0.05 --skip-bad --output "$output/data"
hvdlm import "$llama" --output "$output/start"

mpirun -np 2 --hostfile "$hosts" --map-by node -x PATH --bind-to none \
  hvdlm train examples/continued.toml --model.from "$output/start" --data.path "$output/data" \
  --train.run_dir "$output/run" --train.steps 120 --train.global_batch_size 8 --train.micro_batch_size 4 \
  --train.evaluate_every 60 --optimizer.lr 2e-3 --compression.codec int4 --log.every 20

hvdlm report "$output/run"
hvdlm evaluate "$output/run" --data "$output/data" --samples 4
hvdlm lm-eval "$output/run" --tasks examples/tasks/python_lines.yaml
hvdlm export "$output/run" --to hf "$output/exported"
python - "$output/exported" <<'PYTHON'
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained(sys.argv[1]), AutoModelForCausalLM.from_pretrained(sys.argv[1])
prompt = tokenizer("def test_", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40, do_sample=False)[0]))
PYTHON
