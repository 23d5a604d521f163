"""engine_jobs with matrix products that do not depend on the batch: the script of a process.

vLLM's matrix products add in an order that depends on the shape of the batch, and one bit of K that
differs is another code now and then, 0.09 nats for int8 and 0.3 for 4 bits. With the products in
float64, rounded once, what an engine answers depends on its KV cache alone: two schedules of one
request must agree to the last bit.
"""

from __future__ import annotations

import sys

import engine_jobs


def exact_products() -> None:
    """Exchange the products of unquantized layers; weights stay as the checkpoint has them."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    engine_jobs.choose_cos()
    wide = {}  # made once: 0.3 s a step otherwise

    def apply(self, layer, x, bias=None):
        weight = layer.weight
        if weight.data_ptr() not in wide:
            wide[weight.data_ptr()] = weight.detach().double().T
        y = x.double() @ wide[weight.data_ptr()]
        return (y if bias is None else y + bias.double()).to(x.dtype)

    def process_weights_after_loading(self, layer):
        wide.clear()  # a new model: addresses come again

    for method in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod):
        method.apply = apply
        method.process_weights_after_loading = process_weights_after_loading


if __name__ == "__main__":
    exact_products()
    engine_jobs._main(*sys.argv[1:])
