# SPDX-License-Identifier: Apache-2.0
"""What fixed codes decode to: stored with a cache, it tells whether its reader decodes alike."""

from __future__ import annotations

import torch
from torch import Tensor

from rq_hf.cache_file import Tensors
from rq_hf.cache_header import Header
from rq_hf.config import RotorQuantConfig
from rq_hf.packed_states import make_codec
from rq_hf.quant.seeding import generator
from rq_hf.quant.tiles import TileCodec

_PROBED_TOKENS = 8
# far above float32 rounding of unit vectors, far below the step of a level
_PROBE_TOLERANCE = 1e-5


def make_codecs(header: Header) -> dict[str, TileCodec]:
    """Returns every codec that the layers use, by the name of its probe."""
    codings = [header.coding(i) for i in range(len(header.layers))]
    return {probe_name(*x): make_codec(*x) for x in codings if x is not None}


def probe_name(settings: RotorQuantConfig, head_dim: int) -> str:
    """Returns the name of the tensor that a codec with these settings decodes to."""
    return f"probes.{head_dim}.{settings.key_bits}.{settings.value_bits}"


def make_probe(codec: TileCodec) -> Tensor:
    """Returns what arbitrary codes of scale 1 decode to: keys and values, float32 `[2, 8, D]`.

    Stored, it tells whether the reader's rotations, codebooks and bit order are the writer's.
    """
    layout = codec.layout
    shape = (1, 1, 1, layout.record_words)
    words = torch.randint(-(2**31), 2**31, shape, generator=generator(0, "probe"))
    scales = torch.ones(1, 1, 1, layout.scale_rows, layout.tile_length, dtype=torch.float16)
    states = codec.decode(words.to(torch.int32), scales)
    return torch.cat(states, 1)[0, :, :_PROBED_TOKENS]


def check_probes(codecs: dict[str, TileCodec], tensors: Tensors) -> None:
    """Refuses codes that would decode to something else than they did for their writer."""
    for name, codec in codecs.items():
        mine, stored = make_probe(codec), tensors[name]
        if mine.shape != stored.shape or (mine - stored).abs().max() > _PROBE_TOLERANCE:
            raise ValueError(
                "the cache was packed with other rotations or codebooks than are made here, so it "
                "would decode to something else; load it with the version that saved it, and "
                "rebuild codebooks that are not the package's own (rq-hf codebooks clear)"
            )
