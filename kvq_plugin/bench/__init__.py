"""Benchmarks: our kernels and engines against vLLM's own, interleaved in one run.

Every figure is a median of interleaved repetitions, because a shared machine's speed changes
from minute to minute while the ratio of two things measured in turn does not.
"""
