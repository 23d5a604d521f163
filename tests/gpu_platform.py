"""vLLM in a process of its own, on a stand-in for a GPU platform; shared by tests.

vLLM's own ``platforms/cuda.py`` and ``platforms/rocm.py`` run, but for what asks a device: compiled
extensions that a CPU build lacks, the GPU's name and its compute capability. ``FLASH_ATTN``, which
needs such an extension, is stood in for by a class that declares what vLLM's does on Hopper.

    python gpu_platform.py cuda|rocm CODE

runs CODE with ``platform``, ``select``, ``stock``, ``engine`` and ``refusal`` at hand. With
``OLD_REGISTRY=1`` in the environment, vLLM's registry takes no new names, as before 0.32.
"""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

ARCHITECTURES = {"cuda": ((9, 0), "stand-in for an H200"), "rocm": ((9, 4), "stand-in for gfx942")}
FLASH = "gpu_platform.FlashAttention"


def run(kind: str, code: str, **env: str) -> list[str]:
    """Lines that *code* printed after the plugin was registered on platform *kind*."""
    here = Path(__file__)
    done = subprocess.run(
        [sys.executable, str(here), kind, code],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"VLLM_PLUGINS": "", "VLLM_LOGGING_LEVEL": "WARNING"} | env,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


# --- inside the process ----------------------------------------------------------------


def _platform_class(kind: str) -> type:
    if kind == "cuda":
        sys.modules["vllm._C_stable_libtorch"] = types.ModuleType("vllm._C_stable_libtorch")
        from vllm.platforms.cuda import NonNvmlCudaPlatform

        return NonNvmlCudaPlatform
    device = types.SimpleNamespace(gcnArchName="gfx942", name="gfx942")
    with mock.patch("torch.cuda.get_device_properties", return_value=device):
        from vllm.platforms.rocm import RocmPlatform

    return RocmPlatform


def become(kind: str) -> type:
    """Make vLLM run on the stand-in; its class, whose ``capability`` tests may change."""
    import vllm.platforms
    import vllm.triton_utils
    from vllm.platforms.interface import DeviceCapability

    capability, name = ARCHITECTURES[kind]

    class StandIn(_platform_class(kind)):
        @classmethod
        def get_device_capability(cls, device_id=0):
            return DeviceCapability(*cls.capability)

        @classmethod
        def get_device_name(cls, device_id=0):
            return name

        @classmethod
        def device_count(cls):
            return 8

    # vLLM finds no driver for Triton and replaces its language by a table that lacks this.
    vllm.triton_utils.tl.bfloat16 = getattr(vllm.triton_utils.tl, "bfloat16", None)
    StandIn.capability = capability
    vllm.platforms._current_platform = StandIn()
    return StandIn


def stand_in_for_flash_attention() -> type:
    from vllm.v1.attention.backend import AttentionBackend
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    class FlashAttention(AttentionBackend):
        supported_kv_cache_dtypes = ["auto", "float16", "bfloat16", "fp8", "fp8_e4m3"]

        @staticmethod
        def get_name():
            return "FLASH_ATTN"

        get_impl_cls = get_builder_cls = get_name

    FlashAttention.__module__, FlashAttention.__qualname__ = FLASH.split(".")
    register_backend(AttentionBackendEnum.FLASH_ATTN, FLASH)
    return FlashAttention


def select(kv_cache_dtype: str = "fp8", backend: str | None = None, **changes) -> str:
    """Import path of the backend that vLLM's platform selects for a layer."""
    import torch
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

    layer = {"head_size": 128, "dtype": torch.bfloat16, "block_size": None} | changes
    return current_platform.get_attn_backend_cls(
        backend and AttentionBackendEnum[backend],
        AttentionSelectorConfig(kv_cache_dtype=kv_cache_dtype, **layer),
    )


def stock(kv_cache_dtype: str, **changes) -> str:
    """As :func:`select`, of vLLM alone."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    patched = platform.get_attn_backend_cls
    with mock.patch.object(platform, "get_attn_backend_cls", patched.__wrapped__):
        return select(kv_cache_dtype, **changes)


def engine(model: str, **arguments):
    """The config of an engine, as far as the user's own process makes it."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=model, skip_tokenizer_init=True, max_model_len=512, **arguments
    ).create_engine_config()


def refusal(call, *args, **kwargs) -> str:
    """Message of the ValueError that ``call(...)`` must raise, on one line."""
    try:
        call(*args, **kwargs)
    except ValueError as error:
        return " ".join(str(error).split())
    raise AssertionError(f"{args} {kwargs} was not refused")


def _main(kind: str, code: str) -> None:
    platform = become(kind)
    sys.modules["gpu_platform"].FlashAttention = stand_in_for_flash_attention()
    if os.environ.get("OLD_REGISTRY"):
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        del AttentionBackendEnum.register
    from kvq_plugin import serving

    serving.register()
    given = {f.__name__: f for f in (select, stock, engine, refusal)}
    exec(code, given | {"platform": platform})


if __name__ == "__main__":
    sys.modules["gpu_platform"] = sys.modules["__main__"]
    _main(*sys.argv[1:])
