"""``kvq allocate``: the right KV cache for each layer under a budget of memory.

``measure.py`` has an engine show what each format costs each layer (``probe.py`` is inside it),
``solve.py`` chooses, ``output.py`` writes the checkpoint that serves the choice.
"""
