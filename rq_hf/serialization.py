# SPDX-License-Identifier: Apache-2.0
"""A cache saved to one file, and loaded: it continues to the bit where it stopped.

    header    settings, and what each layer holds, see `cache_header`
    tensors   layers.<i>.*   what layer i holds, buffers cut to the part in use
              ropes.<j>      inv_freq of position embeddings, each once
              probes.<name>  what fixed codes decode to, one a codec, see `cache_probe`

Rotations, sketches and codebooks follow from the settings and are not in the file. A change of
anything that decoding needs is a new format (`cache_file.FORMAT`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, cache_utils
from transformers.cache_utils import DynamicSlidingWindowLayer

from rq_hf import cache_file
from rq_hf.cache import RotorQuantCache
from rq_hf.cache_file import SAVE_AGAIN, Tensors
from rq_hf.cache_header import MEANS, PACKED, Header, LayerRecord, dtype_name, form_of
from rq_hf.cache_linear import check_linear, describe_linear, fill_linear
from rq_hf.cache_model import check_model
from rq_hf.cache_probe import check_probes, make_codecs, make_probe, probe_name
from rq_hf.config import RotorQuantConfig
from rq_hf.layers import RotorQuantLayer
from rq_hf.model_layers import make_layer
from rq_hf.places import Places, place_layers
from rq_hf.quant.preconditioning import Preconditioner
from rq_hf.quant.rope import RopeTable
from rq_hf.quant.tiles import TileCodec
from rq_hf.sliding import RotorQuantSlidingLayer, covers
from rq_hf.storage import RowBuffer

# those that can be saved; what stands for a layer that reads another's states holds nothing, and
# is older transformers' way not to have it at all
_HOST_KINDS: dict[str, Any] = {
    name: getattr(cache_utils, name)
    for name in (
        "DynamicLayer",
        "DynamicSlidingWindowLayer",
        "LinearAttentionLayer",
        "LinearAttentionAndFullAttentionLayer",
        "LinearAttentionAndSlidingWindowAttentionLayer",
        "DummyLayer",
    )
    if hasattr(cache_utils, name)
}
# of statistics that were kept from an earlier prompt
_KEPT = "kept_"


def save_cache(cache: RotorQuantCache, path: str | os.PathLike[str]) -> None:
    """Writes a cache to a file.

    The file appears under its name when it is complete and on disk; a failure, or the end of the
    process, before that leaves what was there. Prompt states that wait for their queries are
    packed without them.

    Args:
        cache: The cache; its layers may be packed, or the host's that grow or hold states of
            linear attention, Mamba and convolutions.
        path: Where to; an existing file is replaced.

    Raises:
        ValueError: A layer is of a kind whose state cannot be saved.
        OSError: The file cannot be written.
    """
    header, tensors = _collect(cache)
    cache_file.write(Path(path), header.to_json(), tensors)


def load_cache(
    path: str | os.PathLike[str],
    config: PreTrainedConfig | None = None,
    *,
    device: Places = "cpu",
    revertible: bool = False,
) -> RotorQuantCache:
    """Returns the cache that `save_cache` wrote.

    Nothing in the file is executed. Whether a cache is offloaded or revertible is not part of it.

    Args:
        path: The file.
        config: The model's config, to make sure that the cache is this model's, and to find out
            which attention it uses; without it the layers are made as the file describes them.
        device: Where the tensors go: one device, or that of every layer by its index.
        revertible: See `RotorQuantCache`.

    Raises:
        ValueError: The file is damaged, of another kind or of a newer format, the cache is another
            model's, or a layer has no device.
        OSError: The file cannot be read.
    """
    path = Path(path)
    # buffers made in inference mode could not be written outside of it
    with torch.inference_mode(False):
        text, tensors = cache_file.read(path)
        try:
            header = Header.parse(text)
            cache = _make_cache(header, config, revertible)
            for layer, record in zip(cache.layers, header.layers, strict=True):
                check_linear(layer, record)
            codecs = make_codecs(header)
            _check_tensors(header, codecs, tensors)
            check_probes(codecs, tensors)
            places = place_layers(device, len(cache.layers))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        ropes = [RopeTable(tensors[f"ropes.{j}"], known) for j, known in enumerate(header.ropes)]
        for i, (layer, record) in enumerate(zip(cache.layers, header.layers, strict=True)):
            own = {name: tensors.pop(f"layers.{i}.{name}").to(places[i]) for name in record.tensors}
            _fill(layer, record, own, ropes)
    return cache


def _collect(cache: RotorQuantCache) -> tuple[Header, Tensors]:
    for packed in cache.packed_layers:
        packed.settle()
    if torch.accelerator.is_available():
        # the host offloads its layers without waiting for the copies
        torch.accelerator.synchronize()
    ropes: list[RopeTable] = []
    records, tensors = [], {}
    for i, layer in enumerate(cache.layers):
        record, own = _describe(i, layer, ropes)
        records.append(record)
        tensors.update({f"layers.{i}.{name}": tensor for name, tensor in own.items()})
    tensors.update({f"ropes.{j}": table.inv_freq for j, table in enumerate(ropes)})
    header = Header(
        quantization=cache.quantization.to_dict(),
        layers=records,
        ropes=[table.interleaved for table in ropes],
        grows=cache.layer_class_to_replicate is not None,
    )
    tensors.update({name: make_probe(codec) for name, codec in make_codecs(header).items()})
    return header, _separate(tensors)


def _describe(index: int, layer: Any, ropes: list[RopeTable]) -> tuple[LayerRecord, Tensors]:
    if isinstance(layer, RotorQuantLayer):
        return _describe_packed(layer, ropes)
    if type(layer) in _HOST_KINDS.values():
        return _describe_host(layer)
    raise ValueError(
        f"layer {index} is a {type(layer).__name__}, whose state cannot be saved; packed layers "
        f"can, and {', '.join(_HOST_KINDS)}. Keep the text, and run the prompt again"
    )


def _describe_packed(layer: RotorQuantLayer, ropes: list[RopeTable]) -> tuple[LayerRecord, Tensors]:
    sliding = _describe_window(layer)
    rope = _index_of(layer.rope, ropes)
    statistics, store = layer.statistics, layer.store
    means = layer.preconditioner or layer.kept
    kept = _means_of(layer.kept, _KEPT)
    mean_rope = None if means is None else _index_of(means.rope, ropes)
    if store is None:
        batch, kv_heads, head_dim = (0, 0, 0) if means is None else means.balance.shape
        record = LayerRecord(
            PACKED,
            tensors=list(kept),
            batch=batch,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rope=rope,
            mean_rope=mean_rope,
            **sliding,
        )
        return record, kept
    keys, values = store.exact.view()
    records, scales = store.tiles.view()
    found = {
        "keys": keys,
        "values": values,
        "records": records,
        "scales": scales,
        "query_total": statistics.total,
        "query_count": statistics.count,
        "query_padding": statistics.padding,
        "padding": layer.padding,
        **_means_of(layer.preconditioner),
        **kept,
    }
    own = {name: tensor for name, tensor in found.items() if tensor is not None}
    record = LayerRecord(
        PACKED,
        tensors=list(own),
        dtype=dtype_name(keys),
        batch=keys.shape[0],
        kv_heads=keys.shape[1],
        head_dim=keys.shape[3],
        sinks=store.sinks,
        packed_length=store.packed_length,
        tiles=store.tiles.length,
        tail=store.tail,
        rope=rope,
        mean_rope=mean_rope,
        **sliding,
    )
    return record, own


def _means_of(statistics: Preconditioner | None, prefix: str = "") -> Tensors:
    """Returns the tensors of frozen or kept statistics by their names in the file."""
    if statistics is None:
        return {}
    return {prefix + name: getattr(statistics, name) for name in MEANS}


def _describe_window(layer: Any) -> dict[str, Any]:
    """Returns the fields of a layer's record that only one with a window has."""
    if not isinstance(layer, (DynamicSlidingWindowLayer, RotorQuantSlidingLayer)):
        return {}
    return {
        "sliding_window": layer.sliding_window,
        "cumulative_length": layer.get_seq_length(),
        "record_past": layer.record_past,
    }


def _describe_host(layer: Any) -> tuple[LayerRecord, Tensors]:
    linear, own = describe_linear(layer)
    facts: dict[str, Any] = {**_describe_window(layer), "linear": linear}
    keys, values = (getattr(layer, name, None) for name in ("keys", "values"))
    if keys is None or values is None:
        return LayerRecord(type(layer).__name__, tensors=list(own), **facts), own
    own = {"keys": keys, "values": values, **own}
    # before its first states the layer holds tensors of one dimension
    batch, heads, tokens, head_dim = keys.shape if keys.dim() == 4 else (0, 0, 0, 0)
    record = LayerRecord(
        type(layer).__name__,
        tensors=list(own),
        dtype=dtype_name(keys),
        batch=batch,
        kv_heads=heads,
        head_dim=head_dim,
        tail=tokens,
        **facts,
    )
    return record, own


def _index_of(table: RopeTable | None, tables: list[RopeTable]) -> int | None:
    """Returns the place of a table in `tables`, where it is added if it is new."""
    if table is None:
        return None
    for j, other in enumerate(tables):
        mine, known = table.inv_freq, other.inv_freq
        same = table.interleaved is other.interleaved and mine.dtype == known.dtype
        if same and torch.equal(mine, known):
            return j
    tables.append(table)
    return len(tables) - 1


def _separate(tensors: Tensors) -> Tensors:
    """Returns the tensors contiguous on the CPU, none in the memory of another."""
    result: Tensors = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return result


def _check_tensors(header: Header, codecs: dict[str, TileCodec], tensors: Tensors) -> None:
    """Refuses tensors that are not those the header lists."""
    expected = {f"ropes.{j}" for j in range(len(header.ropes))}
    expected |= set(codecs)
    for i, record in enumerate(header.layers):
        coding = header.coding(i)
        layout = None if coding is None else codecs[probe_name(*coding)].layout
        forms = dict(record.forms(layout))
        forms |= {_KEPT + name: forms[name] for name in MEANS if name in forms}
        for name in record.tensors:
            full = f"layers.{i}.{name}"
            expected.add(full)
            tensor = tensors.get(full)
            if tensor is None or forms.get(name) not in (None, form_of(tensor)):
                raise ValueError(
                    f"{full} is {None if tensor is None else form_of(tensor)}, the header says "
                    f"{forms.get(name)}; {SAVE_AGAIN}"
                )
    if expected != set(tensors):
        raise ValueError(f"there are tensors that the header does not list; {SAVE_AGAIN}")


def _make_cache(
    header: Header, config: PreTrainedConfig | None, revertible: bool
) -> RotorQuantCache:
    """Returns a cache of empty layers: those of the model, or those that the header describes."""
    if config is not None:
        cache = RotorQuantCache(config=config, quantization=header.settings, revertible=revertible)
        check_model(header, cache, config)
        return cache
    cache = RotorQuantCache(quantization=header.settings, revertible=revertible)
    cache.layers = [_make_layer(i, x, header.settings) for i, x in enumerate(header.layers)]
    # what reset() puts in place of them
    cache._keep_empty_layers()
    if not header.grows:
        cache.layer_class_to_replicate = None
    return cache


def _make_layer(index: int, record: LayerRecord, settings: RotorQuantConfig) -> Any:
    own, window = settings.for_layer(index), record.sliding_window
    if record.kind == PACKED and own is not None:
        if window is not None and covers(own, window):
            raise ValueError(f"layer {index} is packed, but its window fits the exact tail")
        return make_layer(settings, index, sliding_window=window)
    if record.kind not in _HOST_KINDS:
        raise ValueError(f"layer {index} is of an unknown kind, {record.kind!r}")
    options = {} if window is None else {"sliding_window": window}
    if record.linear is not None:
        options["number_of_states"] = record.linear.states
    return _HOST_KINDS[record.kind](**options)


def _fill(layer: Any, record: LayerRecord, own: Tensors, ropes: list[RopeTable]) -> None:
    if record.kind == PACKED:
        _fill_packed(layer, record, own, ropes)
        return
    if record.linear is not None:
        fill_linear(layer, record.linear, own)
    if "keys" in own:
        layer.lazy_initialization(own["keys"], own["values"])
        layer.keys, layer.values = own["keys"], own["values"]
    if record.sliding_window is not None:
        layer.cumulative_length = record.cumulative_length
        layer.record_past = record.record_past


def _fill_packed(
    layer: RotorQuantLayer, record: LayerRecord, own: Tensors, ropes: list[RopeTable]
) -> None:
    layer.rope = None if record.rope is None else ropes[record.rope]
    if isinstance(layer, RotorQuantSlidingLayer):
        layer.record_past = record.record_past
    rope = None if record.mean_rope is None else ropes[record.mean_rope]
    layer.kept = _statistics_in(own, rope, _KEPT)
    if "keys" not in own:
        return
    layer.lazy_initialization(own["keys"], own["values"])
    assert layer.store is not None
    layer.store.exact = _buffer(own["keys"], own["values"])
    layer.store.tiles = _buffer(own["records"], own["scales"])
    layer.store.packed_length = record.packed_length
    layer.store.dropped = record.dropped
    layer.statistics.total = own.get("query_total")
    layer.statistics.count = own.get("query_count")
    layer.statistics.padding = own.get("query_padding")
    layer.padding = own.get("padding")
    layer.preconditioner = _statistics_in(own, rope)


def _statistics_in(own: Tensors, rope: RopeTable | None, prefix: str = "") -> Preconditioner | None:
    """Returns the statistics that `_means_of` gave these names, if they are there."""
    if not all(prefix + name in own for name in MEANS):
        return None
    return Preconditioner(**{name: own[prefix + name] for name in MEANS}, rope=rope)


def _buffer(*tensors: Tensor) -> RowBuffer:
    buffer = RowBuffer(*tensors)
    buffer.length = tensors[0].shape[2]
    return buffer
