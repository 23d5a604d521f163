"""First on a server's PYTHONPATH, this gives it the exact products of exact_engine.py.

Python imports it in every process it starts; soak.py is who puts it there.
"""

import wrapt


def _exact(_module) -> None:
    from exact_engine import exact_products

    exact_products()


wrapt.register_post_import_hook(_exact, "vllm.model_executor.layers.vocab_parallel_embedding")
