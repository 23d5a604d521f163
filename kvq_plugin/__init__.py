"""Quantized KV caches for vLLM: formats, kernels, serving, calibration, measurement.

Importing this package imports torch at most: never vllm, triton or transformers.
"""

from kvq_plugin.formats import FORMATS, KVFormat, get_format

__version__ = "0.1.0"
__all__ = ["FORMATS", "KVFormat", "get_format", "__version__"]
