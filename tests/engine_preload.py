"""What an engine's process imports, whatever its jobs are: once for all forks of it.

Nothing here may start a thread or run on several: a fork has none of them. The two there are belong
to the OpenBLAS of numpy and of cv2, which start theirs anew in a fork.
"""

import contextlib
import gc

from kvq_plugin import _native

# On a processor with AMX vLLM's own attention uses tiles that nobody asked Linux for, and a tiny
# model without the plugin is an illegal instruction; with large ones oneDNN has asked.
_native.supported_isas()

from vllm import LLM  # noqa: E402, F401 - `import vllm` alone leaves it for later

with contextlib.suppress(ImportError):  # another platform's
    import vllm.v1.worker.cpu_worker  # noqa: F401

gc.collect()  # what this finds is not looked at again: tests/startup
