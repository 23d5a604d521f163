"""engine_jobs in a vLLM that lacks a name the plugin needs and vLLM does not."""

from __future__ import annotations

import sys

import engine_jobs

if __name__ == "__main__":
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    type.__delattr__(AttentionBackendEnum, "is_overridden")
    engine_jobs._main(*sys.argv[1:])
