"""Real vLLM on a GPU machine without network: ``python scripts/gpu_vllm COMMAND``.

    bundle FILE              make the archive, here (needs pip and a network)
    run FILE --out FOLDER    there: start the engines, one process each, and write the findings
    summarize FOLDER         from whatever a run has left in its folder

``run --dry interpret`` makes a CPU pass for an H100: all of vLLM's and the plugin's Python runs, on
a tiny model. ``run --dry compile --keep-cache FOLDER`` compiles Triton's kernels on the way, which
``bundle --triton-cache FOLDER`` takes along.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> int:
    p = argparse.ArgumentParser(
        prog="gpu_vllm", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = p.add_subparsers(dest="command", required=True)
    c = commands.add_parser("bundle")
    c.add_argument("file", type=Path)
    c.add_argument("--triton-cache", type=Path, help="folder of compiled kernels to take along")
    c = commands.add_parser("run")
    c.add_argument("file", type=Path)
    c.add_argument("--out", type=Path, required=True)
    c.add_argument("--library", type=Path, help="a _kvq_cuda.so to use, of make gpu-bundle")
    c.add_argument("--engines", default="", help="names, comma-separated; default: all, in order")
    c.add_argument("--seconds", type=float, default=150.0, help="for all")
    c.add_argument("--limit", type=float, default=100.0, help="seconds for one engine")
    c.add_argument("--slots", type=int, default=4, help="engines side by side (timed alone)")
    c.add_argument("--dry", choices=("", "interpret", "compile"), default="")
    c.add_argument("--keep-cache", type=Path, help="copy Triton's cache here at the end")
    c = commands.add_parser("summarize")
    c.add_argument("folder", type=Path)
    a = p.parse_args()
    if a.command == "bundle":
        import bundle

        bundle.make(a.file, a.triton_cache)
        return 0
    import run

    if a.command == "summarize":
        print(run.summarize(a.folder))
        return 0
    return run.main(a)


if __name__ == "__main__":
    sys.exit(main())
