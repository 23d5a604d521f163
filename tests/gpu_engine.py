"""engine_jobs on the GPU backend: the script of a process without a GPU.

vLLM's CPU runner schedules, allocates and describes batches as its GPU runners do; our CPU
backend's classes are exchanged for the GPU's, and the reference in layout gpu-v1 stands in for the
kernels. The first job runs before the exchange, the others after it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import engine_jobs


def reference_kernels() -> SimpleNamespace:
    """``store`` and ``attend`` as :mod:`kvq_plugin.ops` has them on a GPU, by the reference.

    ``launches`` lists what attend was called for: (first row, one past the last, bound on query
    lengths, workspace).
    """
    from kvq_plugin import reference
    from kvq_plugin.layout import GPU_V1

    launches = []

    def store(key, value, cache, slot_mapping, *rest, **recent):
        n = slot_mapping.shape[0]
        reference.store(key[:n], value[:n], cache, slot_mapping, *rest, **recent, layout=GPU_V1)

    def attend(out, query, *where, max_query_len, max_seq_len, workspace, **options):
        _, _, seq_lens, starts, *_ = where
        assert int(seq_lens.max()) <= max_seq_len
        assert int(starts.diff().max()) <= max_query_len
        first, last = int(starts[0]), int(starts[-1])
        launches.append((first, last, max_query_len, workspace))
        result = reference.attend(query, *where, **options, layout=GPU_V1)
        out[first:last] = result[first:last].to(out.dtype)

    return SimpleNamespace(store=store, attend=attend, launches=launches)


class NotedKernel:
    """A Triton kernel that only notes what it is launched with: (name, grid, keywords)."""

    def __init__(self, name: str, launches: list):
        self.name, self.launches = name, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.name, grid, kwargs))


def noted_kernels(monkeypatch, family: str) -> list:
    """What the kernels of *family* ("cuda" or "triton") are launched with from now on, on CPU
    tensors and as on an H100, instead of being launched."""
    import emulator

    from kvq_plugin import kernels
    from kvq_plugin.kernels import cuda, launch, triton_store

    made = []
    monkeypatch.setenv("KVQ_GPU_KERNELS", family)
    monkeypatch.setattr(kernels, "_choice", lambda: family)
    monkeypatch.setattr(cuda, "_load", emulator.host_library)
    monkeypatch.setattr(cuda, "_device_refusal", lambda device: None)
    for module, name in ((cuda, "_multiprocessors"), (launch, "multiprocessors")):
        monkeypatch.setattr(module, name, lambda device: 132)
    monkeypatch.setattr(cuda, "_launch", lambda name, *rest: made.append((name, None, {})))
    monkeypatch.setattr(launch, "interpreted", lambda: True)
    paged, seal = map(kernels._triton, ("triton_paged", "triton_seal"))
    for module, name in ((paged, "attend_kernel"), (paged, "sealed_kernel"),
                         (paged, "merge_kernel"), (triton_store, "store_kernel"),
                         (seal, "seal_kernel")):  # fmt: skip
        monkeypatch.setattr(module, name, NotedKernel(name, made))
    return made


def exchange_backends() -> SimpleNamespace:
    """Make the CPU platform select the GPU's classes; the stand-in for their kernels."""
    from vllm.platforms import current_platform
    from vllm.platforms.interface import Platform
    from vllm.v1.attention import selector

    from kvq_plugin import kernels
    from kvq_plugin.serving import backend, base, gpu, platforms

    stand_in = reference_kernels()
    kernels.workspace_size = lambda head_size, device: 1024
    base.ops = gpu.ops = stand_in
    backend.BACKENDS = gpu.BACKENDS
    platforms.backend_class = lambda: gpu.GPUBackend
    platforms.backends = lambda: gpu.BACKENDS
    gpu.GPUBackend.lacking = classmethod(lambda cls, format, head_size: None)  # no library here
    # Sizes of blocks and padding of mixed pages as on GPUs; the CPU platform has its own way.
    choose_block_size = Platform.update_block_size_for_backend.__func__
    type(current_platform).update_block_size_for_backend = classmethod(choose_block_size)
    selector._cached_get_attn_backend.cache_clear()
    return stand_in


def _main(source: str, target: str) -> None:
    first, *others = json.loads(Path(source).read_text())
    results = [engine_jobs._run_job(first)]
    stand_in = exchange_backends()
    results += [engine_jobs._run_job(job) for job in others]
    if not any(result["error"] for result in results):
        # A decode launched apart from the prefill behind it; without one this shows little.
        assert any(first > 0 and bound > 1 for first, _, bound, _ in stand_in.launches)
    Path(target).write_text(json.dumps(results))


if __name__ == "__main__":
    _main(*sys.argv[1:])
