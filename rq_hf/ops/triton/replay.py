# SPDX-License-Identifier: Apache-2.0
"""Calls that differ from an earlier one by a few numbers: its launches, with these put in.

From one generated token to the next, all that changes for a layer are the addresses of query, new
token, mask, result and workspace, the mask's strides, and how many tokens its tail has. All else is
in the signature of a call, by value: equal signatures are equal launches, whatever has happened to
the objects that they were taken from.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from rq_hf.ops.triton.attend_launch import Call, Inputs
from rq_hf.ops.triton.launching import Launch, Launched, current_stream, kind_of
from rq_hf.ops.triton.prepare import prepare
from rq_hf.ops.triton.tables import keep_for_graphs
from rq_hf.ops.triton.workspace import exact_chunk, take_memory
from rq_hf.ops.view import ExactRows

# oldest first: a layer in use adds one every 64 tokens, and does not come back to it
_replays: OrderedDict[tuple, Replay] = OrderedDict()
_MOST_REPLAYS = 512

_MASK_STRIDES = ("mask_batch", "mask_head", "mask_query", "mask_token")


def recall(key: tuple) -> Replay | None:
    """Returns the launches of a call with this signature, if there was one."""
    return _replays.get(key)


def remember(key: tuple, replay: Replay) -> None:
    """Keeps launches for calls to come, in place of the oldest."""
    while len(_replays) >= _MOST_REPLAYS:
        _replays.popitem(last=False)
    _replays[key] = replay


def signature(inputs: Inputs) -> tuple:
    """All that the launches of a call depend on, but for what `Replay.run` puts in.

    Tensors are there as addresses, which keeps none of them alive; codec and RoPE table, of which
    kernels read what was made of them, are there themselves.
    """
    query, view, pieces, mask, logits, scale, causal, softcap = inputs[:8]
    records, scales, pre = view.records, view.scales, view.preconditioner
    return (
        query.device,
        query.dtype,
        query.shape,
        query.stride(),
        query.data_ptr() % 16,
        scale,
        causal,
        inputs.causal_in_tiles,
        softcap,
        inputs.stores_newest,
        None if inputs.not_finite is None else inputs.not_finite.data_ptr(),
        view.codec,
        view.offset,
        view.packed_start,
        view.packed_length,
        records.data_ptr(),
        records.shape,
        records.stride(),
        scales.data_ptr(),
        scales.stride(),
        None if view.padding is None else view.padding.data_ptr(),
        None if view.counts is None else view.counts.data_ptr(),
        None if pre is None else pre.rope,
        None if pre is None else pre.pre_mean.data_ptr(),
        None if pre is None else pre.post_mean.data_ptr(),
        None if pre is None else pre.balance.data_ptr(),
        None if pre is None else pre.value_mean.data_ptr(),
        None if mask is None else _mask_signature(mask),
        None if logits is None else (logits.dtype, logits.data_ptr()),
        *[_rows_signature(rows) for rows in pieces[:2]],
        *[_newest_signature(rows) for rows in pieces[2:]],
        _lengths(pieces, exact_chunk(query.shape[3])),
    )


def _mask_signature(mask: Tensor) -> tuple:
    return mask.dtype, mask.data_ptr() % 16, *map(kind_of, mask.stride())


def _rows_signature(rows: ExactRows) -> tuple:
    keys, values = rows.keys, rows.values
    return keys.dtype, values.dtype, keys.data_ptr(), values.data_ptr(), keys.stride()


def _newest_signature(rows: ExactRows) -> tuple:
    """Of tokens that lie elsewhere in every step."""
    keys, values = rows.keys, rows.values
    aligned = keys.data_ptr() % 16, values.data_ptr() % 16
    return keys.dtype, values.dtype, aligned, keys.stride()


def _lengths(pieces: list[ExactRows], chunk: int) -> tuple:
    """Tokens of the pieces; of the tail, its parts of `chunk` tokens."""
    lengths = [rows.keys.shape[2] for rows in pieces]
    if len(lengths) > 1:
        lengths[1] = -(-lengths[1] // chunk)
    return tuple(lengths)


class Replay:
    """The launches of one call, for others of the same signature.

    Args:
        call: The call.
        launches: Its launches.
        launched: What became of these.
    """

    def __init__(self, call: Call, launches: list[Launch], launched: list[Launched]) -> None:
        # addresses of these are in the launches
        self._tables, self._angles = call.tables, call.angles
        space = call.space
        self._room = space.whole.numel()
        self._offsets = [piece.data_ptr() - space.whole.data_ptr() for piece in space.pieces]
        # in the order of `_numbers`
        sources: list[Tensor | str] = [call.query, call.out, "count0", "index1", "last", "in_tiles"]
        sources += space.pieces
        for rows in call.pieces[2:]:
            sources += [rows.keys, rows.values]
        if call.masked:
            sources += [call.mask, *_MASK_STRIDES]
        self._launched = [
            (each, _places(wanted, sources))
            for wanted, each in zip(launches, launched, strict=True)
        ]

    def run(self, inputs: Inputs) -> Tensor:
        """Launches what the call would, and returns its result."""
        query = inputs.query
        keep_for_graphs(self._angles, query.device)
        whole = take_memory(self._room, query.device)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        numbers = self._numbers(inputs, whole, out)
        stream = current_stream()
        for launched, places in self._launched:
            values = launched.values.copy()
            for place, number in places:
                values[place] = numbers[number]
            launched.run(stream, values)
        return out

    def _numbers(self, inputs: Inputs, whole: Tensor, out: Tensor) -> list[int]:
        """What is put into the launches."""
        pieces, mask, start = inputs.pieces, inputs.mask, inputs.view.packed_start
        count = pieces[1].keys.shape[2] if len(pieces) > 1 else 0
        index = pieces[0].keys.shape[2] + inputs.view.packed_length + count
        last, base = inputs.last_seen, whole.data_ptr()
        numbers = [inputs.query.data_ptr(), out.data_ptr(), count, index, last, last - start]
        numbers += [base + offset for offset in self._offsets]
        for rows in pieces[2:]:
            numbers += [rows.keys.data_ptr(), rows.values.data_ptr()]
        if mask is not None:
            numbers += [mask.data_ptr(), *mask.stride()]
        return numbers


def _places(launch: Launch, sources: list[Tensor | str]) -> list[tuple[int, int]]:
    """Arguments that are one of `sources`, tensors or names: their places, and which it is."""
    known = {x if isinstance(x, str) else id(x): number for number, x in enumerate(sources)}
    # the packed part counts tokens from its own first
    known["last_seen"] = known["last" if launch.kernel is prepare else "in_tiles"]
    names = launch.kernel.arg_names[: len(launch.args)]
    found = [
        known.get(name, known.get(id(argument)))
        for name, argument in zip(names, launch.args, strict=True)
    ]
    return [(place, number) for place, number in enumerate(found) if number is not None]
