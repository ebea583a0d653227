#!/bin/bash
# The tests that need a GPU, on a machine with at least one: after `make .venv/test.stamp`.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH
exec python -m pytest -m needs_gpu tests/gpu "$@"
