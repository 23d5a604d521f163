"""What every Python process of `make test` starts with: garbage is looked for less often.

A quarter of the processors' time went there while tests ran that start engines: importing vLLM
makes millions of objects, and none of them is garbage. And each engine looked through them four
times as it started and ended, 2 of its 3 seconds.
"""

import gc
import sys

gc.set_threshold(50_000, 20, 20)
collect, freeze = gc.collect, gc.freeze


def collect_what_came_later(generation: int = 2) -> int:
    """What is there when somebody asks for the first time stays; but not in pytest's processes."""
    if "pytest" not in sys.modules and gc.get_freeze_count() == 0:
        freeze()
        # vLLM freezes an engine's objects, and unfreezes everything when it ends.
        gc.freeze = gc.unfreeze = lambda: None
    return collect(generation)


gc.collect = collect_what_came_later
