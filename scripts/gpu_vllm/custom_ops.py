"""In the bundle ``vllm/_C_stable_libtorch.py``: what a small Llama calls of that library, in torch.

The library itself is 93 MB and built for another torch. vLLM's own Python stands in for what it
has twice (normalization, rotary embedding, activations: "custom ops off"); here is the rest.
"""

import torch

_LIBRARY = torch.library.Library("_C", "FRAGMENT")


def _op(schema: str):
    def define(function):
        _LIBRARY.define(schema)
        _LIBRARY.impl(schema.split("(")[0], function, "CompositeImplicitAutograd")
        return function

    return define


@_op("weak_ref_tensor(Tensor input) -> Tensor")
def weak_ref_tensor(input):
    """Not weak: a graph's outputs live as long as the graph, which for a small model is no harm."""
    return input.view(input.shape)


class _Mapped:
    """Pinned memory of the host as CUDA sees it: at the same address (unified addressing)."""

    def __init__(self, host: torch.Tensor) -> None:
        self.host = host  # the view keeps this object, and so the memory
        code = "b1" if host.dtype == torch.bool else f"i{host.element_size()}"
        self.__cuda_array_interface__ = {
            "shape": tuple(host.shape),
            "strides": tuple(s * host.element_size() for s in host.stride()),
            "typestr": f"{'<|'[host.element_size() == 1]}{code}",
            "data": (host.data_ptr(), False),
            "version": 3,
        }


@_op("get_cuda_view_from_cpu_tensor(Tensor cpu_tensor) -> Tensor")
def get_cuda_view_from_cpu_tensor(cpu_tensor):
    if not torch.cuda.is_available():  # a dry run
        return cpu_tensor.view(cpu_tensor.shape)
    if cpu_tensor.numel() == 0:
        return torch.empty(cpu_tensor.shape, dtype=cpu_tensor.dtype, device="cuda")
    if not cpu_tensor.is_pinned():
        raise ValueError("a CUDA view of host memory needs pinned memory, got pageable")
    view = torch.as_tensor(_Mapped(cpu_tensor), device="cuda")
    if view.data_ptr() != cpu_tensor.data_ptr():
        raise RuntimeError("a copy was made where a view was asked for")
    return view.view(cpu_tensor.dtype)


@_op("silu_and_mul(Tensor! result, Tensor input) -> ()")
def silu_and_mul(result, input):
    gate, up = input.chunk(2, -1)
    torch.mul(torch.nn.functional.silu(gate), up, out=result)


for _name in ("scaled_mm_supports_fp8", "scaled_mm_supports_block_fp8", "scaled_mm_supports_fp4",
              "group_gemm_supported"):  # fmt: skip
    _op(f"cutlass_{_name}(int cuda_device_capability) -> bool")(lambda capability: False)
