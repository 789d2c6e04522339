#!/usr/bin/env bash
# What needs a GPU, in one go: each main part of benchmarks/cuda.py in a process of its own, with a limit in seconds, so
# that one fault does not spoil the rest. All together take at most TOTAL_SECONDS (default 600). Arguments go there:
# --packed FOLDER is what benchmarks.pack wrote; --device cpu --small tries it without a GPU; with --parts, it runs them
# in one process, without a limit.
set -uo pipefail
cd "$(dirname "$0")/.."
python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python
python=${PYTHON:-$python}
if command -v nvidia-smi > /dev/null; then nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv; fi
case " $* " in *" --parts "*) exec "$python" -m benchmarks.cuda "$@" ;; esac
failed=
for entry in device:60 equality:150 network:60 distances:60 steps:180 cell:150; do
  part=${entry%:*} limit=${entry#*:}
  left=$((${TOTAL_SECONDS:-600} - SECONDS - 5))  # 5: a process that ignores its end is killed
  [ "$left" -lt "$limit" ] && limit=$left
  if [ "$limit" -le 0 ]; then failed="$failed $part (no time left)"; continue; fi
  timeout --kill-after 5 "$limit" "$python" -m benchmarks.cuda --parts "$part" "$@" || failed="$failed $part"
done
echo "$SECONDS s in all"
if [ -n "$failed" ]; then echo "failed:$failed"; exit 1; fi
