# SPDX-License-Identifier: Apache-2.0
"""States of linear attention, Mamba and convolutions in a saved cache.

The host's layers hold such states by number, most of them one of each kind, and beside them what
each convolution has been told. In the file they are `conv_states.<j>` and `recurrent_states.<j>`.
"""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import LinearAttentionCacheLayerMixin

from rq_hf.cache_file import SAVE_AGAIN, Tensors
from rq_hf.cache_header import CONV, RECURRENT, LayerRecord, LinearRecord, form_of

KINDS = (CONV, RECURRENT)


def describe_linear(layer: Any) -> tuple[LinearRecord | None, Tensors]:
    """Returns what a layer of the host holds of such states; None if it is of another kind."""
    if not isinstance(layer, LinearAttentionCacheLayerMixin):
        return None, {}
    numbers = range(layer.number_of_states)
    found = {f"{kind}.{j}": getattr(layer, kind)[j] for kind in KINDS for j in numbers}
    own = {name: state for name, state in found.items() if state is not None}
    record = LinearRecord(
        states=layer.number_of_states,
        filled=[layer.has_previous_state[j] for j in numbers],
        kernels=[layer.conv_kernel_size[j] for j in numbers],
        record_past=layer.record_past,
        forms={name: list(form_of(state)) for name, state in own.items()},
    )
    return record, own


def check_linear(layer: Any, record: LayerRecord) -> None:
    """Refuses a record that is not of this layer, which is still empty.

    Raises:
        ValueError: One is of linear attention and the other is not, or the tensors are others.
    """
    linear, held = record.linear, isinstance(layer, LinearAttentionCacheLayerMixin)
    listed = {name for name in record.tensors if name.startswith(KINDS)}
    if held != (linear is not None) or listed != set(linear.forms if linear else ()):
        raise ValueError(
            f"the states of linear attention are not those of a {record.kind}; {SAVE_AGAIN}"
        )


def fill_linear(layer: Any, record: LinearRecord, own: Tensors) -> None:
    """Puts the states back into an empty layer, which makes room for them as it always does."""
    # before the states: those of a past that is recorded have no fixed address
    layer.record_past = record.record_past
    for j in range(record.states):
        conv, recurrent = (own.get(f"{kind}.{j}") for kind in KINDS)
        if conv is not None:
            layer.lazy_initialization(
                conv_states=conv, state_idx=j, conv_kernel_size=record.kernels[j]
            )
            if record.record_past:
                layer.conv_states[j] = conv
            else:
                layer.conv_states[j].copy_(conv)
        if recurrent is not None:
            layer.lazy_initialization(recurrent_states=recurrent, state_idx=j)
            layer.recurrent_states[j].copy_(recurrent)
        layer.has_previous_state[j] = record.filled[j]
