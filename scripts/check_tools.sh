#!/usr/bin/env bash
# Prints the first python >= 3.11 that can make a virtual environment. Where that, or g++ >= 12,
# is missing, says which and how to get it on Debian and Ubuntu, and fails.
set -u
missing=()

usable_python() {
  # Run it: a version manager's shim exists on the PATH for versions that are not installed.
  "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

python=""
for candidate in ${PYTHON:-} python3.11 python3.12 python3.13 python3; do
  if usable_python "$candidate"; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  missing+=("python 3.11 or newer with its venv module: apt install python3 python3-venv, \
or set PYTHON=/path/to/python3")
fi

compiler=${CXX:-g++}
if ! command -v "$compiler" >/dev/null; then
  missing+=("$compiler, the C++ compiler (g++ 12 or newer): apt install g++, or set CXX")
elif "$compiler" --version | head -n 1 | grep -qv clang; then
  version=$("$compiler" -dumpversion)
  if [ "${version%%.*}" -lt 12 ]; then
    missing+=("g++ 12 or newer (found $version): apt install g++-12, then set CXX=g++-12")
  fi
fi

if [ ${#missing[@]} -gt 0 ]; then
  printf 'missing: %s\n' "${missing[@]}" >&2
  exit 1
fi
echo "$python"
