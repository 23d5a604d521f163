"""``kvq eval``'s tasks: questions from a seed or from LongBench, asked of every KV cache.

``items`` makes the questions, ``longbench`` reads a file of them, ``results`` compares the answers,
``tables`` and ``page`` show that, ``asked`` holds what one command asks.
"""
