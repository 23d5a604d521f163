"""transformers' models with products that do not depend on the batch, as exact_engine's for vLLM.

``torch.nn.Linear`` in float64, rounded once: what remains between one forward pass and many is then
the cache's and attention's doing.
"""

from __future__ import annotations

import torch


def exact_products(monkeypatch) -> None:
    """Until *monkeypatch* undoes it."""
    wide: dict[int, torch.Tensor] = {}

    def forward(self, x):
        weight = self.weight
        if weight.data_ptr() not in wide:
            wide[weight.data_ptr()] = weight.detach().double().T
        y = x.double() @ wide[weight.data_ptr()]
        return (y if self.bias is None else y + self.bias.double()).to(x.dtype)

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
