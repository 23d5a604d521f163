"""Every .cu compiled by nvcc, without a GPU, and what its machine code looks like.

The attention kernels are compiled for one class of head sizes at a time (all of them, for all
formats and architectures, are minutes); the cases are those nearest to running out of registers
on each architecture, and each way of decoding.
"""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import emulator
import pytest
from cases import ALL_ROWS, WINDOW_ROWS

CUDA = emulator.ROOT / "csrc" / "cuda"
ARCHITECTURES = ("80", "90a", "100")
#: (format row, class of head sizes, architecture)
ATTEND = (
    *((row, 128, arch) for row in (3, 5) for arch in ARCHITECTURES),
    (0, 128, "80"),  # e4m3 without the instruction that decodes it
    (0, 256, "90a"),
    (5, 64, "80"),
    *((row, 128, "90a") for row in (7, 8, 9)),
    (8, 64, "80"),
    (9, 256, "100"),
    (8, 128, "120"),
)
#: Rows with recent rows: a loop over sealed tiles, and one over int8 rows, which may keep what
#: it needs once in a tile on the stack. So many bytes of it, at most.
SEALED = tuple(f.id for f in WINDOW_ROWS)
STACK = 96
OTHERS = tuple(("store.cu", arch) for arch in ARCHITECTURES)
#: Static shared memory of a block; more would have to be asked for at launch.
SHARED_MEMORY = 48 << 10


def nvcc() -> str:
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if found is None:
        pytest.skip("no nvcc: the CUDA C++ kernels are not compiled here (make cuda needs it too)")
    return found


def disassembler() -> str:
    found = shutil.which("nvdisasm")
    spec = None if found else find_spec("triton")
    if spec is not None:
        inside = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        found = str(inside) if inside.exists() else None
    if found is None:
        pytest.skip("no nvdisasm, on PATH or in Triton's package: machine code is not looked at")
    return found


def compile_cubin(source: str, arch: str, *flags: str) -> Path:
    command = [nvcc(), "-std=c++17", "-O3", "-Werror", "all-warnings", "-cubin", "-Xptxas", "-v",
               f"-gencode=arch=compute_{arch},code=sm_{arch}", *flags]  # fmt: skip
    if source == "store.cu":
        command.append("-fmad=false")
    name = f"{Path(source).stem}-sm_{arch}"
    return emulator.cached(name, [*command, str(CUDA / source)], CUDA, CUDA.parent)


@pytest.fixture(scope="module")
def cubins():
    """Everything compiled, two at a time."""
    nvcc()
    jobs = {
        **{case: ("attend.cu", case[2], f"-DKVQ_FORMAT={case[0]}", f"-DKVQ_HEAD={case[1]}")
           for case in ATTEND},
        **{case: case for case in OTHERS},
    }  # fmt: skip
    with ThreadPoolExecutor(2) as pool:
        return dict(
            zip(jobs, pool.map(lambda job: compile_cubin(*job), jobs.values()), strict=True)
        )


def test_the_build_compiles_every_format():
    """One object per row of the table; nvcc is not needed to see that."""
    text = (CUDA / "CMakeLists.txt").read_text()
    assert f"\nforeach(format RANGE {len(ALL_ROWS) - 1})" in text
    assert "\nproject(kvq_cuda LANGUAGES CXX)\n" in text


def test_every_family_of_gpus_has_machine_code():
    """Code runs on later GPUs of its family alone; PTX has to be compiled where the engine
    starts."""
    text = (CUDA / "CMakeLists.txt").read_text()
    [names] = re.findall(r"set\(CMAKE_CUDA_ARCHITECTURES (.*)\)", text)
    real = {name.removesuffix("-real") for name in names.split()}
    assert real >= {"80", "89", "90", "100", "120"} and {"100"} & set(names.split())


def test_entry_points_compile():
    compile_cubin("api.cu", "90a")


def kernels(cubin: Path) -> list[dict[str, int]]:
    """What ptxas said of each kernel."""
    said = cubin.with_suffix(".log").read_text()
    out = []
    for part in said.split("Compiling entry function")[1:]:
        found = {
            "stores": r"(\d+) bytes spill stores",
            "loads": r"(\d+) bytes spill loads",
            "registers": r"Used (\d+) registers",
            "shared": r"(\d+) bytes smem",
        }
        numbers = {k: re.search(p, part) for k, p in found.items()}
        out.append({k: int(m.group(1)) if m else 0 for k, m in numbers.items()})
    return out


@pytest.mark.parametrize("case", (*ATTEND, *OTHERS), ids=lambda c: "-".join(map(str, c)))
def test_no_spills_and_shared_memory_fits(cubins, case):
    made = kernels(cubins[case])
    assert made
    for kernel in made:
        room = STACK if case[0] in SEALED else 0
        assert kernel["stores"] <= room and kernel["loads"] <= 2 * room, kernel
        assert kernel["shared"] <= SHARED_MEMORY
        assert 0 < kernel["registers"] <= 255


def loops(cubin: Path) -> list[list[str]]:
    """The machine instructions of each kernel's loop over tiles: the one with products in it."""
    text = subprocess.run(
        [disassembler(), "-c", str(cubin)], capture_output=True, text=True, check=True, timeout=240
    ).stdout
    found = []
    for section in re.split(r"\n//-+ \.text\.", text)[1:]:
        labels, code = {}, []
        for line in section.splitlines():
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                labels[label.group(1)] = len(code)
            elif op := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z].*)", line):
                code.append(op.group(1))
        ranges = []
        for at, op in enumerate(code):
            target = re.search(r"\.L_x_\d+", op) if op.startswith("BRA") else None
            start = labels.get(target.group(0), at) if target else at
            if start < at and any("HMMA" in o for o in code[start:at]):
                ranges.append(range(start, at))
        # Shuffles of the rotation, before the loop and after, lie behind the kernel's end and jump
        # back: ranges around the loop that are none.
        inner = (
            r for r in ranges if not any(r != o and r[0] <= o[0] and o[-1] <= r[-1] for o in ranges)
        )
        found += [code[r.start : r.stop] for r in inner]
    return found


@pytest.mark.parametrize("case", ATTEND, ids=lambda c: "-".join(map(str, c)))
def test_the_loop_over_tiles(cubins, case):
    """Codes come 16 bytes at a time and products follow; nothing goes through the stack or
    through shared memory but a few facts of each row."""
    row, head, _ = case
    found = loops(cubins[case])
    if row in SEALED:
        assert len(found) == 2 * len(kernels(cubins[case]))
        found = found[::2]
    assert len(found) == len(kernels(cubins[case]))
    for code in found:
        widths = (".128", ".64") if row == 9 else (".128",)  # 3-bit codes are 8 bytes a lane
        wide = [op for op in code if op.startswith("LDG") and any(w in op for w in widths)]
        # A lane's share of rows narrower than 128 bytes is less than 16 bytes, but for K's of 64.
        codes = {(5, 128): 4, (5, 64): 0, (7, 128): 8, (8, 128): 4, (8, 64): 0}.get((row, head), 16)
        codes = 4 if row == 9 else codes
        metadata = {3: 2, 5: 2, 7: 2, 8: 2, 9: 3}.get(row, 0)
        assert len(wide) >= codes + metadata > 0
        # The next tile's K is asked for before this one's softmax, its V after its products.
        first = next(i for i, op in enumerate(code) if op in wide)
        products = [i for i, op in enumerate(code) if op.startswith("HMMA")]
        assert products[0] < first < products[-1]
        # A sealed tile's scales of K go through shared memory, to the warp's own lanes.
        apart = ("LDL", "STL", "BAR", *(() if row in SEALED else ("STS",)))
        assert len([op for op in code if op.startswith(apart)]) <= (2 if row in SEALED else 0)
        assert len(products) >= (16 if head == 64 else 32)
