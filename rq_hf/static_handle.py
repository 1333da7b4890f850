# SPDX-License-Identifier: Apache-2.0
"""Handles whose every part is a tensor, a number or a name, so that they can be compiled.

They answer what those of `rq_hf.handle` do. A step of `scaled_dot_product_attention` is one
operator on the packed buffers. All else decodes the layer to as many rows as the cache has room
for; those behind the last token are zero, and the model's mask hides them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from rq_hf.handle import Form, Role
from rq_hf.static_ops import StaticTensors, attend_static, decode_static


class StaticHandle(torch.Tensor):
    """Keys or values of a static layer, without storage of their own.

    Args:
        tensors: `StaticTensors`, one after the other.
        role: What it stands for.
        form: Dimensions shown, see `rq_hf.handle.Form`.
        repeats: How often each head is shown.
        dtype: Dtype shown.
        length: Tokens that the cache has room for: as many are shown.
        sink_length: Sinks of the layer.
        recipe: Name of its `Recipe`.
    """

    role: Role
    form: Form

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
        shape: tuple[int, ...]
        if form == "bhnd":
            shape = (batch, heads * repeats, length, head_dim)
        elif form == "bhdn":
            shape = (batch, heads * repeats, head_dim, length)
        else:
            shape = (batch, heads, repeats, length, head_dim)
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
        (
            self.exact_keys,
            self.exact_values,
            self.records,
            self.scales,
            self.counts,
            self.padding,
            self.pre_mean,
            self.post_mean,
            self.balance,
            self.value_mean,
        ) = tensors
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
        return [
            self.exact_keys,
            self.exact_values,
            self.records,
            self.scales,
            self.counts,
            self.padding,
            self.pre_mean,
            self.post_mean,
            self.balance,
            self.value_mean,
        ]

    def options(self, **changes: Any) -> dict[str, Any]:
        """Returns the other arguments, but for `changes`."""
        own = {
            "role": self.role,
            "form": self.form,
            "repeats": self.repeats,
            "dtype": self.shown,
            "length": self.length,
            "sink_length": self.sink_length,
            "recipe": self.recipe,
        }
        return {**own, **changes}

    def seen(self, **changes: Any) -> StaticHandle:
        """Returns the same states seen in another way."""
        return StaticHandle(*self.tensors(), **self.options(**changes))

    def attend(
        self,
        query: Tensor,
        *,
        mask: Tensor | None,
        scale: float | None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Returns attention of the newest token's queries `[B, Hq, L, D]` to all tokens."""
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return attend_static(
            query, self.tensors(), mask, sinks, scale, softcap, self.sink_length, self.recipe
        )

    def dense(self) -> Tensor:
        """Returns the states as an ordinary tensor of this shape."""
        decoded = decode_static(self.tensors(), self.length, self.sink_length, self.recipe)
        states = decoded[0 if self.role == "key" else 1].to(self.shown)
        if self.form == "bhrnd":
            return states[:, :, None].expand(-1, -1, self.repeats, -1, -1)
        states = states.repeat_interleave(self.repeats, 1) if self.repeats > 1 else states
        return states.transpose(2, 3) if self.form == "bhdn" else states

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        answer = ANSWERS.get(func)
        if answer is not None:
            result = answer(*args, **kwargs)
            if result is not NotImplemented:
                return result
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # the host's stub says instance method
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0].seen()
        return func(*tree_map(_decode, args), **tree_map(_decode, kwargs or {}))


def _decode(thing: Any) -> Any:
    return thing.dense() if isinstance(thing, StaticHandle) else thing


def _getitem(states: Any, index: Any) -> Any:
    if not isinstance(states, StaticHandle) or states.form != "bhnd":
        return NotImplemented
    if not isinstance(index, tuple):
        return NotImplemented
    if len(index) == 5 and index[2] is None and states.repeats == 1:
        whole = _is_all(index[0]) and _is_all(index[1]) and _is_all(index[3]) and _is_all(index[4])
        return states.seen(form="bhrnd") if whole else NotImplemented
    whole = len(index) <= 4 and all(_is_all(part) for part in index)
    return states if whole else NotImplemented


def _is_all(index: Any) -> bool:
    return isinstance(index, slice) and index == slice(None)


def _expand(states: Any, *sizes: Any) -> Any:
    if not isinstance(states, StaticHandle) or states.form != "bhrnd" or states.repeats != 1:
        return NotImplemented
    sizes = tuple(sizes[0]) if isinstance(sizes[0], Sequence) else sizes
    return states.seen(repeats=sizes[2]) if len(sizes) == 5 else NotImplemented


def _reshape(states: Any, *sizes: Any) -> Any:
    if not isinstance(states, StaticHandle) or states.form != "bhrnd":
        return NotImplemented
    sizes = tuple(sizes[0]) if isinstance(sizes[0], Sequence) else sizes
    batch, heads, repeats, length, head_dim = states.shape
    merged = sizes == (batch, heads * repeats, length, head_dim)
    return states.seen(form="bhnd") if merged else NotImplemented


def _repeat_interleave(states: Any, repeats: Any = None, dim: Any = None, **kwargs: Any) -> Any:
    if not isinstance(states, StaticHandle) or states.form != "bhnd" or states.repeats != 1:
        return NotImplemented
    plain = isinstance(repeats, int) and dim in (1, -3) and not kwargs
    return states.seen(repeats=repeats) if plain else NotImplemented


def _to(states: Any, *args: Any, **kwargs: Any) -> Any:
    only_dtype = len(args) == 1 and isinstance(args[0], torch.dtype) and not kwargs
    if isinstance(states, StaticHandle) and only_dtype:
        return states.seen(dtype=args[0])
    return NotImplemented


def _float(states: Any) -> Any:
    return _to(states, torch.float32)


def _contiguous(states: Any, **kwargs: Any) -> Any:
    return states if isinstance(states, StaticHandle) else NotImplemented


def _transpose(states: Any, dim0: int, dim1: int) -> Any:
    if not isinstance(states, StaticHandle) or sorted((dim0 % 4, dim1 % 4)) != [2, 3]:
        return NotImplemented
    if states.form == "bhrnd":
        return NotImplemented
    return states.seen(form="bhdn" if states.form == "bhnd" else "bhnd")


def _sdpa(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if not isinstance(key, StaticHandle) or not isinstance(value, StaticHandle):
        return NotImplemented
    if isinstance(query, StaticHandle) or (key.role, value.role) != ("key", "value"):
        return NotImplemented
    if (key.form, value.form) != ("bhnd", "bhnd") or key.records is not value.records:
        return NotImplemented
    if dropout_p or is_causal or (torch.is_grad_enabled() and query.requires_grad):
        return NotImplemented
    return key.attend(query, mask=attn_mask, scale=scale)


def _matmul(left: Any, right: Any) -> Any:
    # once here: below it would be decoded for the reshapes that a product is made of
    return torch.matmul(_decode(left), _decode(right))


ANSWERS: dict[Callable, Callable] = {
    torch.Tensor.__getitem__: _getitem,
    torch.Tensor.expand: _expand,
    torch.Tensor.reshape: _reshape,
    torch.Tensor.repeat_interleave: _repeat_interleave,
    torch.repeat_interleave: _repeat_interleave,
    torch.Tensor.to: _to,
    torch.Tensor.float: _float,
    torch.Tensor.contiguous: _contiguous,
    torch.Tensor.transpose: _transpose,
    torch.transpose: _transpose,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    F.scaled_dot_product_attention: _sdpa,
}
