# SPDX-License-Identifier: Apache-2.0
"""Launch of the append kernel.

Triton's own way inspects every argument anew, which for as many as here takes far longer than the
kernel. From one step of a layer to the next, only the new token and the scratch lie elsewhere: a
launch is kept under all else that it depends on, and made again with these put in.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rq_hf.ops.append import Buffers
from rq_hf.ops.triton.append import append_kernel
from rq_hf.ops.triton.arguments import Rows, Statistics
from rq_hf.ops.triton.encode_launch import codec_arguments, rows_of
from rq_hf.ops.triton.launching import Launched, current_stream, interpreting, on_device
from rq_hf.ops.triton.means import Pairing, pairs, turns
from rq_hf.ops.triton.tables import keep_for_graphs
from rq_hf.quant.preconditioning import Preconditioner
from rq_hf.quant.tiles import TileCodec


class Known(NamedTuple):
    """A launch to be made again.

    Attributes:
        launched: It.
        places: Where it has the new keys, the new values and the scratch.
        scratch: Shape of the scratch.
        tables: Those that it reads, which must live as long.
    """

    launched: Launched
    places: list[int]
    scratch: torch.Size
    tables: Any


# oldest first: a layer has one, or a few where its new tokens come in several layouts
_known: OrderedDict[tuple, Known] = OrderedDict()
_MOST_KNOWN = 1024


# launches are not for torch.compile to look into
@torch.compiler.disable
def append_tokens(
    codec: TileCodec, preconditioner: Preconditioner, key: Tensor, value: Tensor, buffers: Buffers
) -> None:
    """See `rq_hf.ops.append`."""
    new = rows_of(key), rows_of(value)
    with on_device(key.device):
        signature = _signature(codec, preconditioner, new, buffers)
        known = _known.get(signature)
        if known is None:
            shared, options = shared_arguments(codec, preconditioner, buffers)
            known = _launch(preconditioner, new, buffers, shared, options)
            if known is not None:
                _remember(signature, known)
            return
        keep_for_graphs(known.tables, key.device)
        scratch = torch.empty(known.scratch, device=key.device)
        values = known.launched.values.copy()
        for place, argument in zip(known.places, (*new, scratch), strict=True):
            values[place] = _by_address(argument)
        known.launched.run(current_stream(), values)


def shared_arguments(
    codec: TileCodec, preconditioner: Preconditioner, buffers: Buffers
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the arguments of the kernel that many layers share, and options of its launch."""
    device, rope = buffers.records.device, preconditioner.rope
    pairing = Pairing.of(rope)
    constants, options = codec_arguments(codec, buffers.exact_values.dtype, pairing, device)
    angles = turns(rope, buffers.sink_length, buffers.records.shape[2], codec, device)
    dims = pairs(pairing, codec.head_dim, device)[0]
    return {"turns": angles, "PAIRS": dims, **constants}, options


def _arguments(
    preconditioner: Preconditioner,
    new: tuple[Rows, Rows],
    buffers: Buffers,
    tables: dict[str, Any],
) -> dict[str, Any]:
    """Returns all arguments of the kernel."""
    pre = preconditioner
    batch, heads, rows, _ = buffers.exact_keys.shape
    scratch = batch * heads, 2, 8 * tables["shape"].padded.value
    return {
        "new_keys": new[0],
        "new_values": new[1],
        "EXACT_KEYS": buffers.exact_keys,
        "EXACT_VALUES": buffers.exact_values,
        "statistics": Statistics(pre.pre_mean, pre.post_mean, pre.balance, pre.value_mean),
        "RECORDS": buffers.records,
        "SCALES": buffers.scales,
        "LENGTH": buffers.length,
        "BASE": buffers.base,
        "COUNTS": buffers.counts,
        "NOT_FINITE": buffers.not_finite,
        "SCRATCH": torch.empty(scratch, device=buffers.records.device),
        "heads": heads,
        "tiles": buffers.records.shape[2],
        "rows": rows,
        "sinks": buffers.sink_length,
        "kept": buffers.residual_length,
        "room": buffers.max_length,
        **tables,
    }


def _launch(
    preconditioner: Preconditioner,
    new: tuple[Rows, Rows],
    buffers: Buffers,
    tables: dict[str, Any],
    options: dict[str, Any],
) -> Known | None:
    """Launches the kernel in Triton's way; returns None in its interpreter."""
    # where they come from, those asked for last push out the others
    keep_for_graphs(tables, buffers.records.device)
    arguments = _arguments(preconditioner, new, buffers, tables)
    scratch = arguments["SCRATCH"]
    grid = scratch.shape[0], 2
    if interpreting():
        append_kernel[grid](**arguments, **options)
        return None
    names = append_kernel.arg_names
    ordered = {name: arguments[name] for name in names}
    constants = {name: ordered.pop(name) for name in ("RULE", "CENTER_LAST")}
    compiled = append_kernel[grid](*ordered.values(), **constants, **options)
    launched = Launched(compiled, grid, [_by_address(arguments[name]) for name in names])
    places = [names.index(name) for name in ("new_keys", "new_values", "SCRATCH")]
    return Known(launched, places, scratch.shape, tables)


def _remember(signature: tuple, known: Known) -> None:
    while len(_known) >= _MOST_KNOWN:
        _known.popitem(last=False)
    _known[signature] = known


def _signature(
    codec: TileCodec, preconditioner: Preconditioner, new: tuple[Rows, Rows], buffers: Buffers
) -> tuple:
    """All that a launch depends on, but for what is put in.

    Tensors are there as addresses, which keeps none of them alive; codec and RoPE table, of which
    the kernel reads what was made of them, are there themselves.
    """
    pre = preconditioner
    return (
        codec,
        pre.rope,
        *[x.data_ptr() for x in (pre.pre_mean, pre.post_mean, pre.balance, pre.value_mean)],
        *[x.data_ptr() if isinstance(x, Tensor) else x for x in buffers],
        buffers.exact_keys.shape,
        buffers.exact_keys.dtype,
        buffers.records.shape,
        buffers.records.device,
        # alignment too is what a kernel is compiled for
        *[(rows[1:], rows.data.dtype, rows.data.data_ptr() % 16) for rows in new],
    )


def _by_address(argument: Any) -> Any:
    """Returns an argument as launches take it: addresses in place of tensors."""
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return tuple(map(_by_address, argument)) if isinstance(argument, tuple) else argument
