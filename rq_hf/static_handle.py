# SPDX-License-Identifier: Apache-2.0
"""Handles whose every part is a tensor, a number or a name, so that they can be compiled.

A step of `scaled_dot_product_attention` is one operator on the packed buffers. All that
`rq_hf.handle` has no answer to decodes the layer to as many rows as the cache has room for; those
behind the last token are zero, and the model's mask hides them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rq_hf.handle import Form, Role, StandIn, shape_of
from rq_hf.static_ops import StaticTensors, attend_static, decode_static
from rq_hf.static_sources import Keeper


class StaticHandle(StandIn):
    """Keys or values of a static layer.

    Args:
        tensors: `StaticTensors`, one after the other.
        role: See `StandIn`, as for the next two.
        form: See there.
        repeats: See there.
        dtype: Dtype shown.
        length: Tokens that the cache has room for: as many are shown.
        sink_length: Sinks of the layer.
        recipe: Name of its `Recipe`.

    Attributes:
        layer: The layer, where nothing is compiled: it counts calls, and is told what fails.
    """

    # one of the `StaticTensors`, all of which are attributes
    records: Tensor
    layer: Keeper | None = None

    @staticmethod
    def __new__(
        cls,
        *tensors: Tensor,
        role: Role,
        form: Form,
        repeats: int,
        dtype: torch.dtype,
        length: int,
        sink_length: int,
        recipe: str,
    ) -> StaticHandle:
        batch, heads, _, head_dim = tensors[0].shape
        shape = shape_of((batch, heads, length, head_dim), form, repeats)
        return torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=tensors[0].device
        )

    def __init__(
        self,
        *tensors: Tensor,
        role: Role,
        form: Form,
        repeats: int,
        dtype: torch.dtype,
        length: int,
        sink_length: int,
        recipe: str,
    ) -> None:
        for name, tensor in zip(StaticTensors._fields, tensors, strict=True):
            setattr(self, name, tensor)
        self.role, self.form, self.repeats = role, form, repeats
        self.shown, self.length = dtype, length
        self.sink_length, self.recipe = sink_length, recipe

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"StaticHandle({self.role}, shape={tuple(self.shape)})"

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        return list(StaticTensors._fields), self.options()

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], options: dict[str, Any], size: Any, stride: Any
    ) -> StaticHandle:
        return StaticHandle(*(inner[name] for name in StaticTensors._fields), **options)

    def tensors(self) -> list[Tensor]:
        """Returns the `StaticTensors`."""
        return [getattr(self, name) for name in StaticTensors._fields]

    def options(self) -> dict[str, Any]:
        """Returns the other arguments."""
        return {
            "role": self.role,
            "form": self.form,
            "repeats": self.repeats,
            "dtype": self.shown,
            "length": self.length,
            "sink_length": self.sink_length,
            "recipe": self.recipe,
        }

    def seen(self, **changes: Any) -> StaticHandle:
        again = StaticHandle(*self.tensors(), **{**self.options(), **changes})
        if not torch.compiler.is_compiling():
            again.layer = self.layer
        return again

    def count(self, door: str) -> bool:
        if torch.compiler.is_compiling() or self.layer is None:
            return False
        self.layer.count(door)
        return True

    def decoded(self) -> Tensor:
        decoded = decode_static(self.tensors(), self.length, self.sink_length, self.recipe)
        return decoded[0 if self.role == "key" else 1].to(self.shown)

    def stands_beside(self, other: StandIn) -> bool:
        return isinstance(other, StaticHandle) and self.records is other.records

    def sdpa(
        self,
        query: Tensor,
        *,
        mask: Tensor | None,
        dropout: float,
        causal: bool,
        scale: float | None,
    ) -> Tensor | None:
        if dropout or causal or (torch.is_grad_enabled() and query.requires_grad):
            return None
        return self.attend(query, mask=mask, scale=scale)

    def attend(
        self,
        query: Tensor,
        *,
        mask: Tensor | None,
        scale: float | None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Returns attention of the newest token's queries `[B, Hq, L, D]` to all tokens.

        Raises:
            ValueError: The mask has fewer columns than the cache has room for tokens: how many
                there are is not known here.
        """
        layer = None if torch.compiler.is_compiling() else self.layer
        if layer is None:
            return self._attend(query, mask, scale, softcap, sinks)
        layer.check_usable()
        try:
            return self._attend(query, mask, scale, softcap, sinks)
        except Exception as error:
            layer.refused(error, 1)
            raise

    def _attend(
        self,
        query: Tensor,
        mask: Tensor | None,
        scale: float | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        if mask is not None and mask.shape[-1] < self.length:
            raise ValueError(
                f"the mask of a step has {mask.shape[-1]} columns, but a static cache needs one "
                f"for each of the {self.length} tokens that it has room for (max_cache_len); hide "
                "those that are not there yet"
            )
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return attend_static(
            query, self.tensors(), mask, sinks, scale, softcap, self.sink_length, self.recipe
        )

    def product(self, left: Any, right: Any) -> Any:
        # once here: below it would be decoded for the reshapes that a product is made of
        return torch.matmul(_known(left), _known(right))


def _known(thing: Any) -> Any:
    """Returns `thing`, decoded for a product if it stands for states; no cause for a warning."""
    if not isinstance(thing, StandIn):
        return thing
    thing.count("decoded for matmul")
    return thing.dense()
