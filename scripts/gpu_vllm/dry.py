"""A CPU that vLLM takes for an H100: its Python runs, and graphs count as captured.

Kernels either run in Triton's interpreter, ours by the reference in the pages of GPUs; or Triton
compiles all that are launched, for sm_90, and none runs. What is compiled so is there when a GPU
of that kind, with the same Triton, launches it (a bundle takes it along).

``become_cuda`` comes before anything of vLLM is imported.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import types
from pathlib import Path

import torch


class _Nothing:
    """A stream, an event or a graph."""

    device = torch.device("cpu")
    device_index = device_type = cuda_stream = 0

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: 0.0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False


def _give(value):
    """A function of its own, by which torch's compiler tells them apart."""
    return lambda *args, **kwargs: value


def become_cuda() -> None:
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "VLLM_PLUGINS": "kvq"}
    properties = types.SimpleNamespace(
        name="dry", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132,
        is_integrated=False, shared_memory_per_block_optin=232448, warp_size=32,
        max_threads_per_multi_processor=2048, L2_cache_size=50 << 20,
    )  # fmt: skip
    answers = {
        "synchronize": None, "empty_cache": None, "set_device": None, "set_stream": None,
        "reset_peak_memory_stats": None, "manual_seed_all": None, "set_device_index": None,
        "mem_get_info": (70 << 30, 80 << 30), "get_memory_info": (70 << 30, 80 << 30),
        "memory_stats": {}, "memory_reserved": 0, "memory_allocated": 0,
        "max_memory_allocated": 0, "device_count": 1, "current_device": 0,
        "get_device_properties": properties, "get_device_capability": (9, 0),
        "current_stream": _Nothing(), "default_stream": _Nothing(),
        "is_current_stream_capturing": False, "graph_pool_handle": (0, 0),
        "graph": contextlib.nullcontext(), "stream": contextlib.nullcontext(),
    }  # fmt: skip
    for name, value in answers.items():
        for module in (torch.cuda, torch.accelerator):
            if hasattr(module, name):
                setattr(module, name, _give(value))
    for name in ("Stream", "Event", "CUDAGraph"):
        setattr(torch.cuda, name, type(name, (_Nothing,), {}))
    torch.Event, torch.Stream = type("E", (_Nothing,), {}), type("S", (_Nothing,), {})

    import vllm.platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform

    class Platform(NonNvmlCudaPlatform):
        device_type, dispatch_key, dist_backend = "cpu", "CPU", "gloo"

        @classmethod
        def is_pin_memory_available(cls):
            return False

        @classmethod
        def check_and_update_config(cls, vllm_config):
            vllm_config.parallel_config.worker_cls = "dry.Worker"
            super().check_and_update_config(vllm_config)

        @classmethod
        def graph_pool_handle(cls):
            return (0, 0)

    vllm.platforms._current_platform = Platform()


def __getattr__(name: str):
    if name != "Worker":
        raise AttributeError(name)
    from vllm.v1.worker import gpu_worker

    class Worker(gpu_worker.Worker):
        def init_device(self) -> None:
            self.device = torch.device("cpu")
            gpu_worker.init_worker_distributed_environment(
                self.vllm_config, self.rank, self.distributed_init_method, self.local_rank, "gloo"
            )
            gpu_worker.set_random_seed(self.model_config.seed)
            self.init_snapshot = types.SimpleNamespace(free_memory=70 << 30, total_memory=80 << 30)
            self.requested_memory = 8 << 30
            self._init_workspace_and_model_runner()
            if os.environ.get("TRITON_INTERPRET") != "1":
                return
            # Triton's interpreter fails in this kernel of vLLM's.
            from vllm.v1.sample.ops import topk_topp_sampler

            topk_topp_sampler.apply_top_k_top_p_triton = lambda logits, *args, **kwargs: logits

        @contextlib.contextmanager
        def _scoped_allocator_max_split(self, *args, **kwargs):
            yield

    return Worker


def reference_kernels() -> None:
    """``ops.store`` and ``ops.attend`` by the reference, in the layout of GPUs."""
    from kvq_plugin import kernels, reference
    from kvq_plugin.layout import GPU_V1
    from kvq_plugin.serving import base, gpu

    def store(key, value, cache, slot_mapping, *rest, **recent):
        n = slot_mapping.shape[0]
        reference.store(key[:n], value[:n], cache, slot_mapping, *rest, **recent, layout=GPU_V1)

    def attend(out, query, *where, max_query_len, max_seq_len, workspace, **options):
        starts = where[3]
        result = reference.attend(query, *where, **options, layout=GPU_V1)
        rows = slice(int(starts[0]), int(starts[-1]))
        out[rows] = result[rows].to(out.dtype)

    kernels.workspace_size = lambda *args: 1024
    base.ops = gpu.ops = types.SimpleNamespace(store=store, attend=attend)


def compile_only(folder: Path) -> None:
    """Let Triton compile what is launched, for an H100, and launch nothing."""
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import build, driver

    # Launchers are linked to CUDA's library, which a machine without a GPU lacks.
    stub = folder / "libcuda.so.1"
    command = ["gcc", "-shared", f"-Wl,-soname,{stub.name}", "-o", str(stub), "-x", "c", os.devnull]
    subprocess.run(command, check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    loaded = types.SimpleNamespace(
        load_binary=lambda *a: (1, 1, 32, 0, 1024),
        launch=lambda *a: None,
        get_device_properties=lambda *a: {"max_shared_mem": 232448, "multiprocessor_count": 132,
                                          "warpSize": 32, "sm_clock_rate": 1, "mem_clock_rate": 1,
                                          "mem_bus_width": 1, "max_num_regs": 65536},
        cuOccupancyMaxActiveClusters=None, set_printf_fifo_size=None, fill_tma_descriptor=None,
        PyCUtensorMap=None, PyKernelArg=None, ARG_CONSTEXPR=None, ARG_KERNEL=None, ARG_TUPLE=None,
    )  # fmt: skip
    build._load_module_from_path = lambda name, path: loaded
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    driver.set_active(CudaDriver())
    # Kernels leave their outputs as they were allocated; vLLM takes some for indices.
    torch.empty, torch.empty_like = torch.zeros, torch.zeros_like
    torch.Tensor.new_empty = torch.Tensor.new_zeros


def compiled_kernels() -> None:
    """Our Triton kernels as on an H100; the CUDA C++ kernels take their share and do nothing."""
    from kvq_plugin import kernels
    from kvq_plugin.calls import Attend, Store
    from kvq_plugin.kernels import codec, cuda, launch
    from kvq_plugin.serving import base, gpu

    cuda.refusal = lambda *args: None
    cuda.store = cuda.attend = lambda *args, **kwargs: None
    cuda._multiprocessors = launch.multiprocessors = lambda device: 132
    launch.decoder = lambda device: codec.SM89.value
    launch.interpreted = lambda: True  # so that a cache on a CPU is taken
    base.ops = gpu.ops = types.SimpleNamespace(
        store=lambda *args, **recent: kernels.store(Store(*args, **recent)),
        attend=lambda *args, **options: kernels.attend(Attend(*args, **options)),
    )
