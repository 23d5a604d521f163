"""The backends of the platform that vLLM runs on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvq_plugin.serving import compat

if TYPE_CHECKING:
    from kvq_plugin.formats import KVFormat
    from kvq_plugin.serving.base import KVQBackend


def backend_class() -> type[KVQBackend]:
    """Base class of the platform's backends, which knows its limits."""
    if compat.is_cpu():
        from kvq_plugin.serving.backend import CPUBackend

        return CPUBackend
    from kvq_plugin.serving.gpu import GPUBackend

    return GPUBackend


def backends() -> dict[KVFormat, type[KVQBackend]]:
    """The formats that the platform has kernels for, and their backends."""
    if compat.is_cpu():
        from kvq_plugin.serving.backend import BACKENDS
    else:
        from kvq_plugin.serving.gpu import BACKENDS
    return BACKENDS
