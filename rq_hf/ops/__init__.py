# SPDX-License-Identifier: Apache-2.0
"""The hot operations on packed keys and values.

Shape letters: B batch, Hq query heads, Hk KV heads, G = Hq / Hk, L queries, N tokens of a
sequence, T tokens of a tile, D head_dim, M rows of the sketch, W words of a record, S rows of
scales.
"""

from rq_hf.ops.attend import attend, chooses_triton
from rq_hf.ops.view import ExactRows, LayerView

__all__ = ["ExactRows", "LayerView", "attend", "chooses_triton"]
