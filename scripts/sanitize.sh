#!/usr/bin/env bash
# sanitize.sh PYTHON BATCHES [ISA...]: build the compiled kernels with the address and
# undefined-behaviour sanitizers into build/sanitize, for the named instruction sets (default: all),
# and run tests/fuzz.py on them. The build is kept: a second one compiles what changed.
set -euo pipefail
python=$1 batches=$2
shift 2
cd "$(dirname "$0")/.."
build=build/sanitize${*:+-$(IFS=-; echo "$*")}
bin=$(cd "$(dirname "$python")" && pwd)
PATH=$bin:$PATH
torch=$("$python" -c 'import os, torch; print(os.path.dirname(torch.__file__))')
cmake -S . -B "$build" -G Ninja -DKVQ_SANITIZE=ON "-DKVQ_ISAS=$(IFS=\;; echo "$*")" \
  "-DKVQ_TORCH_DIR=$torch" "-DKVQ_OUTPUT_DIR=$PWD/$build" > /dev/null
cmake --build "$build"
# Python is not built with the sanitizer, so its library has to be there first. Python and torch
# never free what they keep: leaks say nothing here.
# Threads that wait by spinning would take the cores from those that work.
OMP_WAIT_POLICY=passive LD_PRELOAD=$("${CXX:-g++}" -print-file-name=libasan.so) \
  ASAN_OPTIONS=detect_leaks=0:abort_on_error=0 UBSAN_OPTIONS=print_stacktrace=1 \
  PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" \
  "$python" tests/fuzz.py --batches "$batches" --library "$PWD/$build/_kvq.so"
