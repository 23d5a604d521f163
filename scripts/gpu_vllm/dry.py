"""A CPU that vLLM takes for an H100, for a dry run: its Python runs, kernels run in Triton's
interpreter, ours by the reference in the pages of GPUs. Graphs are only recorded as taken.

``become_cuda`` comes before anything of vLLM is imported.
"""

from __future__ import annotations

import contextlib
import os
import types

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
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "VLLM_PLUGINS": "kvq"}
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

    def store(key, value, cache, slot_mapping, *rest):
        n = slot_mapping.shape[0]
        reference.store(key[:n], value[:n], cache, slot_mapping, *rest, layout=GPU_V1)

    def attend(out, query, *where, max_query_len, max_seq_len, workspace, **options):
        starts = where[3]
        result = reference.attend(query, *where, **options, layout=GPU_V1)
        rows = slice(int(starts[0]), int(starts[-1]))
        out[rows] = result[rows].to(out.dtype)

    kernels.workspace_size = lambda *args: 1024
    base.ops = gpu.ops = types.SimpleNamespace(store=store, attend=attend)
