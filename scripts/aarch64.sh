#!/usr/bin/env bash
# aarch64.sh PYTHON [PYTEST ARGUMENT...]: cross-compile the CPU kernels for 64-bit ARM and run their
# tests on an emulated processor, in build/aarch64, which a second run uses again. For Debian, as
# root: apt-get install g++-aarch64-linux-gnu qemu-user debootstrap.
set -euo pipefail
bin=$(cd "$(dirname "$1")" && pwd)
shift
cd "$(dirname "$0")/.."
for tool in aarch64-linux-gnu-g++ qemu-aarch64 debootstrap dpkg-deb; do
  if ! command -v "$tool" > /dev/null; then
    echo "$tool is missing: on Debian, as root," \
      "apt-get install g++-aarch64-linux-gnu qemu-user debootstrap" >&2
    exit 1
  fi
done
root=$PWD/build/aarch64/root site=$PWD/build/aarch64/site tree=$PWD/build/aarch64/tree
mkdir -p build/aarch64

# A Python for it. Packages are unpacked, not configured, which would need their processor.
if [[ ! -e $root/usr/bin/python3.11 ]]; then
  rm -rf "$root"
  debootstrap --arch=arm64 --foreign --variant=minbase --include=python3,libgomp1,libstdc++6 \
    bookworm "$root" > /dev/null
  for package in "$root"/var/cache/apt/archives/*.deb; do dpkg-deb -x "$package" "$root"; done
fi
# torch 2.10: the oldest that the library serves, and the newest on PyPI without CUDA for ARM.
# Without dependencies: pip takes conditions on the processor to be about its own.
if [[ ! -e $site/torch ]]; then
  rm -rf "$site"
  "$bin/python" -m pip --disable-pip-version-check install --quiet --no-deps --target "$site.new" \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
    --platform manylinux2014_aarch64 --python-version 3.11 --only-binary :all: torch==2.10.0 \
    numpy pytest pytest-timeout pluggy iniconfig packaging typing_extensions sympy mpmath networkx \
    jinja2 markupsafe fsspec filelock pygments hypothesis sortedcontainers
  mv "$site.new" "$site"
fi

PATH=$bin:$PATH
cmake -S . -B build/aarch64/cmake -G Ninja -DCMAKE_SYSTEM_NAME=Linux \
  -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
  "-DKVQ_TORCH_DIR=$site/torch" "-DKVQ_OUTPUT_DIR=$PWD/build/aarch64" > /dev/null
cmake --build build/aarch64/cmake
rm -rf "$tree"
mkdir -p "$tree"
cp -r kvq_plugin tests csrc pyproject.toml "$tree"
cp build/aarch64/_kvq.so "$tree/kvq_plugin/"

cd "$tree"
[[ $# -gt 0 ]] || set -- tests/test_golden.py tests/test_store.py tests/test_seal_kernel.py \
  tests/test_attend.py tests/test_attend_edges.py tests/test_sealed_attend.py \
  tests/test_invariance.py
PYTHONPATH=$tree:$site OMP_WAIT_POLICY=passive qemu-aarch64 -L "$root" \
  "$root/usr/bin/python3.11" -m pytest -q -p no:cacheprovider "$@"
