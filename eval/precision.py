# SPDX-License-Identifier: Apache-2.0
"""Linear layers in a narrower type than the activations around them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel


class NarrowLinear(nn.Module):
    """A linear layer computed in `dtype`; what goes in and comes out keeps its own."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
        bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)


def narrow_linear_layers(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replaces the decoder's linear layers by ones that compute in `dtype`.

    The head stays: rounded logits would blur small divergences.

    Raises:
        ValueError: The model has none of PyTorch's linear layers.
    """
    found = [
        (module, name, child)
        for module in model.get_decoder().modules()
        for name, child in module.named_children()
        if type(child) is nn.Linear
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no torch.nn.Linear: leave out --linear-dtype")
    for module, name, child in found:
        setattr(module, name, NarrowLinear(child, dtype))
