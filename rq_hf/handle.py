# SPDX-License-Identifier: Apache-2.0
"""Tensors that stand for a layer's keys or values, and answer what attention code asks of them.

`update` gives these to the model in place of dense tensors. They have the shape of what they
stand for and no storage. Attention code does little with its keys and values: it repeats them for
grouped queries, transposes them, and passes them to `scaled_dot_product_attention` or two
`matmul`s. These few calls are answered here, from the packed store. Any other operation decodes
the layer: right, and slower; it is counted, and warned of once. What would write to keys or values
is refused: a decoded copy would take it, and attention would go on with the packed store.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal, NoReturn, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

Role = Literal["key", "value"]
# dimensions shown: b batch, h KV heads, r repeats of a head, n tokens, d head_dim
Form = Literal["bhnd", "bhdn", "bhrnd"]


class Source(Protocol):
    """What a handle stands for; `rq_hf.sources` has the implementations."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    device: torch.device

    def sdpa(
        self,
        query: Tensor,
        *,
        mask: Tensor | None,
        dropout: float,
        causal: bool,
        scale: float | None,
    ) -> Tensor | None:
        """Returns attention for queries `[B, Hq, L, D]`, or None where it cannot."""

    def scores(self, query: Tensor) -> Tensor | None:
        """Returns query @ keys^T `[B, Hq, L, N]`, or None."""

    def mix(self, weights: Tensor) -> Tensor | None:
        """Returns weights @ values `[B, Hq, L, D]`, or None."""

    def dense(self, role: Role) -> Tensor:
        """Returns the keys or values themselves, `[B, Hk, N, D]`."""

    def count(self, door: str) -> None:
        """Notes which way attention was computed."""


class StandIn(torch.Tensor):
    """Keys or values of a layer without storage of their own.

    Attributes:
        role: What it stands for.
        form: Dimensions shown.
        repeats: How often each head is shown.
    """

    role: Role
    form: Form
    repeats: int

    def seen(
        self,
        *,
        form: Form | None = None,
        repeats: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> StandIn:
        """Returns the same states seen in another way."""
        raise NotImplementedError

    def decoded(self) -> Tensor:
        """Returns the states `[B, Hk, N, D]` in the dtype shown."""
        raise NotImplementedError

    def count(self, door: str) -> bool:
        """Notes which way attention was computed; False if nobody keeps account."""
        raise NotImplementedError

    def decoded_for(self, operation: str) -> Tensor:
        """Returns what `dense` does, for an operation that is not answered.

        Counts the operation, and warns of it once.
        """
        counted = self.count(f"decoded for {operation}")
        if counted and operation not in _warned and not torch.compiler.is_compiling():
            _warned.add(operation)
            warnings.warn(
                f"the operation '{operation}' is not known on packed {self.role}s: the layer is "
                "decoded to a dense tensor for it, which is right but slower",
                stacklevel=2,
            )
        return self.dense()

    def refuse_writing(self, operation: str) -> NoReturn:
        """Refuses to be changed in place.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            f"the operation '{operation}' would write to packed {self.role}s, which can only be "
            f"read: nothing was changed. Write to a copy, {self.role}s.clone(), and give that to "
            "what comes next"
        )

    def stands_beside(self, other: StandIn) -> bool:
        """Whether `other` is of the same layer, as it is now."""
        raise NotImplementedError

    def sdpa(
        self,
        query: Tensor,
        *,
        mask: Tensor | None,
        dropout: float,
        causal: bool,
        scale: float | None,
    ) -> Tensor | None:
        """Returns attention of queries `[B, Hq, L, D]` to the layer, or None where it cannot."""
        raise NotImplementedError

    def product(self, left: Any, right: Any) -> Any:
        """Returns left @ right, of which it is one, or NotImplemented."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """Returns the states as an ordinary tensor of this shape, perhaps shared: do not write."""
        states = self.decoded()
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
        name = func.overloadpacket.__name__
        _refuse_writing(func, args, kwargs or {})
        return func(
            *tree_map(lambda x: decode(x, name), args),
            **tree_map(lambda x: decode(x, name), kwargs or {}),
        )


class Handle(StandIn):
    """Keys or values of a layer that grows.

    Args:
        source: What they are, and how attention is computed.
        role: See `StandIn`, as for the next two.
        form: See there.
        repeats: See there.
        dtype: Dtype shown; the source's if None.
    """

    source: Source
    _shape: torch.Size
    _dtype: torch.dtype

    @staticmethod
    def __new__(
        cls,
        source: Source,
        role: Role,
        form: Form = "bhnd",
        repeats: int = 1,
        dtype: torch.dtype | None = None,
    ) -> Handle:
        shape, dtype = shape_of(source.shape, form, repeats), dtype or source.dtype
        handle = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=source.device)
        handle.source, handle.role, handle.form, handle.repeats = source, role, form, repeats
        handle._shape, handle._dtype = torch.Size(shape), dtype
        return handle

    @property
    def shape(self) -> torch.Size:  # type: ignore[override] # the host's stub says attribute
        """The shape. Asked for often, and torch's own attribute would pass through the answers."""
        return self._shape

    @classmethod
    # one call is a handful of host code, which a compiler would take apart
    @torch.compiler.disable(reason="handles are read by the host")
    def __torch_function__(
        cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return super().__torch_function__(func, types, args, kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Handle({self.role}, shape={tuple(self.shape)})"

    def seen(
        self,
        *,
        form: Form | None = None,
        repeats: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> Handle:
        repeats = self.repeats if repeats is None else repeats
        return Handle(self.source, self.role, form or self.form, repeats, dtype or self._dtype)

    def decoded(self) -> Tensor:
        return self.source.dense(self.role).to(self._dtype)

    def count(self, door: str) -> bool:
        self.source.count(door)
        return True

    def stands_beside(self, other: StandIn) -> bool:
        return isinstance(other, Handle) and self.source is other.source

    def sdpa(self, query: Tensor, **options: Any) -> Tensor | None:
        return self.source.sdpa(query, **options)

    def product(self, left: Any, right: Any) -> Any:
        if right is not self or isinstance(left, StandIn) or left.dim() != 4:
            return NotImplemented
        result = None
        if self.role == "key" and self.form == "bhdn":
            result = self.source.scores(left)
        elif self.role == "value" and self.form == "bhnd":
            result = self.source.mix(left)
        return NotImplemented if result is None else result


def shape_of(shape: tuple[int, int, int, int], form: Form, repeats: int) -> tuple[int, ...]:
    """Returns the shape in which states `[B, Hk, N, D]` are shown."""
    batch, heads, tokens, head_dim = shape
    if form == "bhnd":
        return batch, heads * repeats, tokens, head_dim
    if form == "bhdn":
        return batch, heads * repeats, head_dim, tokens
    return batch, heads, repeats, tokens, head_dim


_warned: set[str] = set()


def decode(thing: Any, operation: str) -> Any:
    """Returns `thing`, decoded for an operation if it stands for states."""
    return thing.decoded_for(operation) if isinstance(thing, StandIn) else thing


def _refuse_writing(func: Any, args: Any, kwargs: Any) -> None:
    for place, name in _written(func):
        argument = args[place] if place < len(args) else kwargs.get(name)
        for thing in tree_leaves(argument):
            if isinstance(thing, StandIn):
                thing.refuse_writing(func.overloadpacket.__name__)


@cache
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    """Returns places and names of the arguments that an operator writes to."""
    return tuple(
        (place, argument.name)
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


ANSWERS: dict[Callable, Callable] = {}


def _answers(*functions: Callable) -> Callable[[Callable], Callable]:
    def register(answer: Callable) -> Callable:
        ANSWERS.update(dict.fromkeys(functions, answer))
        return answer

    return register


_WHOLE = slice(None)


def _is_all(index: Any, states: StandIn, dim: int) -> bool:
    """Whether an index takes a dimension whole."""
    if not isinstance(index, slice):
        return False
    if index == _WHOLE:
        return True
    # the shape is asked for last: it may be another call
    begins = index.start in (None, 0) and index.step in (None, 1)
    return begins and (index.stop is None or index.stop == states.shape[dim])


@_answers(torch.Tensor.__getitem__)
def _getitem(states: Any, index: Any) -> Any:
    if not isinstance(states, StandIn) or states.form != "bhnd" or not isinstance(index, tuple):
        return NotImplemented
    if len(index) == 5 and index[2] is None and states.repeats == 1:
        whole = _is_all(index[0], states, 0) and _is_all(index[1], states, 1)
        whole = whole and _is_all(index[3], states, 2) and _is_all(index[4], states, 3)
        return states.seen(form="bhrnd") if whole else NotImplemented
    if len(index) <= 4 and all(_is_all(part, states, dim) for dim, part in enumerate(index)):
        return states
    return NotImplemented


@_answers(torch.Tensor.__setitem__)
def _setitem(states: Any, index: Any, value: Any) -> Any:
    # torch would write to a view of what is decoded for it
    if isinstance(states, StandIn):
        states.refuse_writing("setitem")
    return NotImplemented


@_answers(torch.Tensor.data.__set__)  # type: ignore[attr-defined] # the host's stub says attribute
def _set_data(states: Any, value: Any) -> Any:
    if isinstance(states, StandIn):
        states.refuse_writing("data")
    return NotImplemented


def _sizes(sizes: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], Sequence) else sizes


@_answers(torch.Tensor.expand)
def _expand(states: Any, *sizes: Any) -> Any:
    wanted = _sizes(sizes)
    if not isinstance(states, StandIn) or states.form != "bhrnd" or states.repeats != 1:
        return NotImplemented
    return states.seen(repeats=wanted[2]) if len(wanted) == 5 else NotImplemented


@_answers(torch.Tensor.reshape)
def _reshape(states: Any, *sizes: Any) -> Any:
    if not isinstance(states, StandIn) or states.form != "bhrnd":
        return NotImplemented
    batch, heads, repeats, tokens, head_dim = states.shape
    merged = _sizes(sizes) == (batch, heads * repeats, tokens, head_dim)
    return states.seen(form="bhnd") if merged else NotImplemented


@_answers(torch.Tensor.repeat_interleave, torch.repeat_interleave)
def _repeat_interleave(states: Any, repeats: Any = None, dim: Any = None, **kwargs: Any) -> Any:
    plain = isinstance(states, StandIn) and states.form == "bhnd" and states.repeats == 1
    if plain and isinstance(repeats, int) and dim in (1, -3) and not kwargs:
        return states.seen(repeats=repeats)
    return NotImplemented


@_answers(torch.Tensor.to)
def _to(states: Any, *args: Any, **kwargs: Any) -> Any:
    only_dtype = len(args) == 1 and isinstance(args[0], torch.dtype) and not kwargs
    if isinstance(states, StandIn) and only_dtype:
        return states.seen(dtype=args[0])
    return NotImplemented


@_answers(torch.Tensor.float)
def _float(states: Any) -> Any:
    return _to(states, torch.float32)


@_answers(torch.Tensor.contiguous)
def _contiguous(states: Any, **kwargs: Any) -> Any:
    return states if isinstance(states, StandIn) else NotImplemented


@_answers(torch.Tensor.transpose, torch.transpose)
def _transpose(states: Any, dim0: int, dim1: int) -> Any:
    swapped: dict[Form, Form] = {"bhnd": "bhdn", "bhdn": "bhnd"}
    if isinstance(states, StandIn) and states.form in swapped and {dim0 % 4, dim1 % 4} == {2, 3}:
        return states.seen(form=swapped[states.form])
    return NotImplemented


@_answers(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
def _matmul(left: Any, right: Any) -> Any:
    one = right if isinstance(right, StandIn) else left
    return one.product(left, right) if isinstance(one, StandIn) else NotImplemented


@_answers(F.scaled_dot_product_attention)
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
    stand_ins = isinstance(key, StandIn) and isinstance(value, StandIn)
    if not stand_ins or isinstance(query, StandIn) or not key.stands_beside(value):
        return NotImplemented
    if (key.role, value.role, key.form, value.form) != ("key", "value", "bhnd", "bhnd"):
        return NotImplemented
    result = key.sdpa(query, mask=attn_mask, dropout=dropout_p, causal=is_causal, scale=scale)
    return NotImplemented if result is None else result
