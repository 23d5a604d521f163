"""What every Python process of `make test` starts with: garbage is looked for less often.

A quarter of the processors' time went there while tests ran that start engines: importing vLLM
makes millions of objects, and none of them is garbage.
"""

import gc

gc.set_threshold(50_000, 20, 20)
