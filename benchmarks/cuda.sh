#!/usr/bin/env bash
# All that needs a GPU, in one go: see benchmarks/cuda.py. Arguments go there: --device cpu --small tries it without one.
set -euo pipefail
cd "$(dirname "$0")/.."
python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python
if command -v nvidia-smi > /dev/null; then nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv; fi
exec "${PYTHON:-$python}" -m benchmarks.cuda "$@"
