"""Triton's kernels compiled ahead of time for NVIDIA GPUs that need not be there.

What a profile would tell and a compiler knows already: no registers spilled, shared memory within
what the device has, tiles loaded 16 bytes at a time by asynchronous copies with the next tile
under way, products on tensor cores, and no conversion of integers per element.
"""

import re
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvq_plugin.formats import get_format
from kvq_plugin.kernels import launch, prefill
from kvq_plugin.kernels.pages import page_of
from kvq_plugin.kernels.triton_attend import attend_kernel, merge_kernel
from kvq_plugin.kernels.triton_prefill import combine_kernel, gather_kernel, plan_kernel
from kvq_plugin.kernels.triton_seal import seal_kernel
from kvq_plugin.kernels.triton_sealed import sealed_kernel
from kvq_plugin.kernels.triton_store import store_kernel

#: Bytes of shared memory that one program may have (CUDA C++ Programming Guide, technical
#: specifications): 163 KiB on sm_80, 227 KiB on sm_90.
SHARED = {80: 163 * 1024, 90: 227 * 1024}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    "cache": "*u8",
    "recent": "*u8",
    "block_table": "*i32",
    "recent_table": "*i32",
    "seq_lens": "*i32",
    "query_start": "*i32",
    "slots": "*i64",
    "recent_slots": "*i64",
    **dict.fromkeys(("out", "query", "key", "value", "keys", "values"), "*bf16"),
    **dict.fromkeys(("starts", "firsts"), "*i32"),
    **dict.fromkeys(("partial", "partial_lse", "alibi", "sinks", "source", "target",
                     "target_lse", "first", "first_lse", "second", "second_lse"), "*fp32"),
    **dict.fromkeys((f"{s}_{x}" for s in ("key", "value") for x in ("scale", "zero", "inverse")),
                    "*fp32"),
}  # fmt: skip


def compiled(kernel, capability: int, constants: dict, warps: int, stages: int, **options):
    """*kernel* as it is launched for aligned tensors; *constants* are its constexpr arguments."""
    names, signature, aligned = kernel.arg_names, {}, {}
    for i, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("scale", "softcap"):
            signature[name] = "fp32"
        else:
            signature[name] = POINTERS.get(name, "i32")
        if name in POINTERS or "_stride" in name and not name.endswith("table_stride"):
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        kernel, signature, {(names.index(n),): v for n, v in constants.items()}, aligned
    )
    return triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages, **options},
    )


def sealed_pages(format, head_size: int) -> dict:
    recent = page_of(format.recent, head_size, 64)
    return {"PAGE": page_of(format, head_size, 128), "RECENT_PAGE": recent}


def attention(name: str, capability: int, long: bool, head_size: int, **changes):
    format = get_format(name)
    choice = launch.attend_choice(format, head_size, long)
    rows = launch.rows(4, 1000 if long else 1, choice.rows)[-1]
    absent = ["key_zero", "value_zero", "alibi", "sinks"]
    absent += ["key_scale", "value_scale"] if format.is_dynamic else []
    kernel, constants = (
        attend_kernel,
        {
            **{"ROWS": rows, "WINDOW": False, "SOFTCAP": False, "SPLIT": not long},
            **{"MIN_TILES": 4, "EXACT_DOT": False},
            "ISA": 89 if capability >= 89 else 80,
            **changes,
        },
    )
    if format.recent is None:
        constants["PAGE"] = page_of(format, head_size, 64)
        constants |= {**dict.fromkeys(absent), "CAUSAL": True, "BLOCK_N": choice.block_n}
    else:
        kernel = sealed_kernel
        constants |= sealed_pages(format, head_size)
        constants |= dict.fromkeys(("alibi", "sinks"))
    return compiled(kernel, capability, constants, choice.warps, choice.stages)


def usage(kernel, tmp_path) -> dict[str, int]:
    """Registers, bytes of stack and bytes of shared memory by cuobjdump."""
    path = tmp_path / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    text = subprocess.run([TOOLS / "cuobjdump", "-res-usage", path], capture_output=True, text=True,
                          check=True).stdout  # fmt: skip
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    return dict(zip(("registers", "stack", "shared", "local"), map(int, found.groups()),
                    strict=True))  # fmt: skip


def check_resources(kernel, capability, tmp_path) -> None:
    used = usage(kernel, tmp_path)
    assert used["stack"] == used["local"] == 0, f"registers are spilled: {used}"
    assert kernel.metadata.shared + used["shared"] <= SHARED[capability]


def main_loop(sass: str) -> list[str]:
    """Instructions of the longest loop."""
    labels, code = {}, []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label.group(1)] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,5}\*/\s+(.*?);", line):
            code.append(instruction.group(1))
    loops = [
        code[labels[m.group(1)] : i + 1]
        for i, text in enumerate(code)
        if (m := re.search(r"BRA.*?(\.L_\w+)", text)) and labels.get(m.group(1), i + 1) <= i
    ]
    return max(loops, key=len)


#: Decoding by each kind of decoder, and the long programs that come closest to spilling.
ATTENTION = [
    *((name, False, 128, cc) for cc in SHARED
      for name in ("fp8", "int8_per_token_head", "int4_per_token_head", "k8v4")),
    ("int8_per_token_head", True, 64, 80),
    ("int8_per_token_head", True, 128, 90),
    ("int8_per_token_head", True, 256, 80),
    ("int4_per_token_head", True, 128, 80),
]  # fmt: skip


@pytest.mark.parametrize(("name", "long", "head_size", "capability"), ATTENTION)
def test_attention(name, long, head_size, capability, tmp_path):
    kernel = attention(name, capability, long, head_size)
    check_resources(kernel, capability, tmp_path)
    ptx = kernel.asm["ptx"]
    waits = [int(n) for n in re.findall(r"cp\.async\.wait_group\s+(\d+)", ptx)]
    assert max(waits) >= 2, "no tile is under way while one is used"
    assert re.search(r"mma\.sync|wgmma\.mma_async", ptx), "no tensor cores"
    if long:  # bound by arithmetic; its tiles are small, to keep all in registers
        return
    assert re.search(r"cp\.async\.cg\.shared\.global[^;]*, 0x10\b", ptx), "no 128-bit loads"
    assert not re.search(r"cp\.async\.\w+\.shared\.global[^;]*, 0x8\b", ptx), "64-bit loads"
    sass = subprocess.run([TOOLS / "nvdisasm", "-c", tmp_path / "kernel.cubin"], check=True,
                          capture_output=True, text=True).stdout  # fmt: skip
    loop = main_loop(sass)
    assert any("HMMA" in i for i in loop)
    assert not [i for i in loop if "I2F" in i], "integers converted in the loop"
    assert not [i for i in loop if "LDS.U8" in i], "codes read from shared memory byte by byte"
    choice = launch.attend_choice(get_format(name), head_size, long)
    codes = 2 * choice.block_n * head_size / (32 * choice.warps)
    assert len(loop) / codes <= INSTRUCTIONS[capability], "instructions per code of the cache"


#: The usual one, and those of the table that come closest to spilling.
SEALED = [("int4", False, 128, 90), ("k3v2", False, 256, 80), ("k3v2", True, 64, 80)]


@pytest.mark.parametrize(("name", "long", "head_size", "capability"), SEALED)
def test_attention_over_sealed_groups(name, long, head_size, capability, tmp_path):
    kernel = attention(name, capability, long, head_size)
    check_resources(kernel, capability, tmp_path)
    ptx = kernel.asm["ptx"]
    waits = [int(n) for n in re.findall(r"cp\.async\.wait_group\s+(\d+)", ptx)]
    assert max(waits) >= 2, "no tile is under way while one is used"
    assert re.search(r"mma\.sync|wgmma\.mma_async", ptx), "no tensor cores"
    assert "fma.rn.f16" in ptx, "K is not decoded in one rounding"


@pytest.mark.parametrize(
    ("name", "head_size", "capability"), (("int4", 256, 80), ("k3v2", 128, 90))
)
def test_sealing_keeps_to_ieee_arithmetic(capability, name, head_size, tmp_path):
    constants = sealed_pages(get_format(name), head_size)
    choice = launch.store_choice(4096, launch.SEAL)
    kernel = compiled(seal_kernel, capability, {**constants, "BLOCK_T": choice.block_t},
                      choice.warps, 1, enable_fp_fusion=False)  # fmt: skip
    check_resources(kernel, capability, tmp_path)
    check_ieee(kernel.asm["ptx"])


#: Instructions per code. An H200 at full bandwidth has 6.9 slots per 8-bit code, an A100 12.5;
#: compiled there are at most 6.5 on sm_90 (k8v4 by Triton 3.6; 5.9 by 3.9) and 7 on sm_80.
INSTRUCTIONS = {80: 7.5, 90: 6.6}


def check_ieee(ptx: str) -> None:
    assert ".ftz" not in ptx and "div.full" not in ptx and "div.approx" not in ptx
    assert not re.search(r"\bfma\.", ptx)


@pytest.mark.parametrize("capability", SHARED)
def test_store_keeps_to_ieee_arithmetic(capability, tmp_path):
    """Bytes depend on it: no fused multiply-add, no flushed subnormals, IEEE division."""
    for name in ("fp8", "int4_per_token_head", "k8v4"):
        format = get_format(name)
        absent = ["key_zero", "value_zero"]
        absent += ["key_inverse", "value_inverse"] if format.is_dynamic else []
        constants = {**dict.fromkeys(absent), "PAGE": page_of(format, 128, 64)}
        choice = launch.store_choice(4096)
        kernel = compiled(store_kernel, capability, {**constants, "BLOCK_T": choice.block_t},
                          choice.warps, 1, enable_fp_fusion=False)  # fmt: skip
        check_resources(kernel, capability, tmp_path)
        ptx = kernel.asm["ptx"]
        check_ieee(ptx)
        assert ("div.rn.f32" in ptx) == format.is_dynamic
        assert re.search(r"ld\.global[\w.:]*\.v4\.b32", ptx), "rows loaded in small pieces"


@pytest.mark.parametrize("capability", SHARED)
def test_merge(capability, tmp_path):
    constants = {
        "ROWS": launch.rows(4, 1)[0],
        **{"D": 256, "WIDTH": 256, "SPLITS": 256, "BLOCK_S": launch.MERGE_BLOCK},
        "INTERPRETED": False,
    }
    kernel = compiled(merge_kernel, capability, constants, launch.MERGE_WARPS, 2)
    check_resources(kernel, capability, tmp_path)


@pytest.mark.parametrize("name", ("fp8", "int4_per_token_head", "k8v4"))
@pytest.mark.parametrize("capability", SHARED)
def test_decoding_of_prefill(capability, name, tmp_path):
    """16 bytes of codes at a time, and as many of what they decode to."""
    format = get_format(name)
    absent = ["key_zero", "value_zero"]
    absent += ["key_scale", "value_scale"] if format.is_dynamic else []
    constants = {
        **dict.fromkeys(absent),
        "PAGE": page_of(format, 128, 64),
        **{"HEADS": 8, "STEPS": 4, "BLOCK_T": prefill.BLOCK_T, "INTERPRETED": False},
        "ISA": 89 if capability >= 89 else 80,
    }
    kernel = compiled(gather_kernel, capability, constants, 4, 1)
    check_resources(kernel, capability, tmp_path)


@pytest.mark.parametrize("capability", SHARED)
def test_plan_and_combination_of_prefill(capability, tmp_path):
    kernel = compiled(plan_kernel, capability, {"BLOCK": prefill.BLOCK_S}, 4, 1)
    check_resources(kernel, capability, tmp_path)
    constants = {"D": 128, "WIDTH": 128, "ROWS": prefill.ROWS, "INTERPRETED": False}
    kernel = compiled(combine_kernel, capability, constants, 4, 1)
    check_resources(kernel, capability, tmp_path)
