#!/bin/sh
# Runs the device tests, tunes the kernels, measures whole models and judges the targets; see benchmarks/README.md.
#
#   [BUDGET=330] [WHEELS=folder] [REHEARSE=1] [PYTHON=python3] benchmarks/gpu/measure.sh FOLDER
set -eu
if [ $# -ne 1 ]; then
  echo "usage: [BUDGET=seconds] [WHEELS=folder] [REHEARSE=1] [PYTHON=python3] $0 FOLDER" >&2
  exit 2
fi
began=$(date +%s)
out=$(realpath -m "$1")
wheels=${WHEELS:+$(realpath -m "$WHEELS")}
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
if [ -n "$wheels" ]; then
  python=$("$python" -m benchmarks.gpu.prepare "$wheels") || exit 2
fi
export OMP_WAIT_POLICY=passive
set -- "$out" --budget "${BUDGET:-330}" --spent "$(($(date +%s) - began))"
if [ "${REHEARSE:-0}" != 0 ]; then
  set -- "$@" --rehearse
fi
exec "$python" -m benchmarks.gpu.measure "$@"
