# SPDX-License-Identifier: Apache-2.0
"""The bit layout: against the address formulas, bit by bit, and through round trips."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from rq_hf.quant.packing import (
    Order,
    TileLayout,
    fragment_fits,
    pack_codes,
    pack_scales,
    unpack_codes,
    unpack_scales,
)

FRAGMENT = [
    (bits, rows, columns)
    for bits in (1, 2, 3, 4)
    for rows, columns in [(32, 128), (96, 128), (128, 64), (64, 64), (128, 128), (64, 256)]
] + [
    (2, 16, 128),
    (2, 32, 64),
    (4, 16, 128),
    (4, 16, 64),
    (4, 48, 256),
    (3, 256, 128),
    (1, 32, 384),
]
PLAIN = [(bits, 32, columns) for bits in range(1, 9) for columns in (64, 80, 96, 128, 256)] + [
    (3, 64, 112),
    (5, 128, 48),
    (2, 96, 72),
    (8, 64, 1),
]
MATRICES: list[tuple[Order, int, int, int]] = [
    *(("fragment", *matrix) for matrix in FRAGMENT),
    *(("plain", *matrix) for matrix in PLAIN),
]
LAYOUTS = [
    TileLayout(128, 2, 2),
    TileLayout(128, 3, 3),
    TileLayout(128, 4, 4),
    TileLayout(128, 2, 3, sketch_size=128),
    TileLayout(128, 3, 4, sketch_size=64),
    TileLayout(64, 1, 2, sketch_size=64),
    TileLayout(64, 4, 4, sketch_size=64),
    TileLayout(64, 3, 3),
    TileLayout(256, 3, 2, sketch_size=256),
    TileLayout(256, 4, 4),
    TileLayout(80, 3, 3, sketch_size=80),
    TileLayout(96, 4, 4),
    TileLayout(112, 2, 8),
    TileLayout(128, 5, 4, sketch_size=40),
]


def random_codes(*shape: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator)


def random_words(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)


def one_bit(bit: int) -> int:
    """The int32 in which one bit is set."""
    return 1 << bit if bit < 31 else -(1 << 31)


def random_tile(
    layout: TileLayout, *batch: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    length, dim, sketch = layout.tile_length, layout.head_dim, layout.sketch_size
    return (
        random_codes(*batch, length, dim, bits=layout.key_bits, seed=3 * seed),
        random_codes(*batch, length, dim, bits=layout.value_bits, seed=3 * seed + 1),
        random_codes(*batch, length, sketch, bits=1, seed=3 * seed + 2) if sketch else None,
    )


def places_128(row: int, column: int, bits: int, rows: int) -> list[tuple[int, int]]:
    """(word, bit) of each bit of a code, lowest first, in a fragment matrix of 128 columns."""
    mt, h, g = row // 16, row // 8 % 2, row % 8
    m, rest = divmod(column, 64 if bits == 4 else 32)
    ks, kk, t, j = rest // 32, rest // 16 % 2, rest // 4 % 4, rest % 4
    if bits in (2, 4):
        slices = 2 if bits == 4 else 1
        word = ((((mt * slices + ks) * 8 + g) * 4 + t) * 2 + h) * 2 + kk
        start = 4 * (j + 4 * m) if bits == 4 else 4 * (j + 4 * (m & 1)) + 2 * (m >> 1)
        return [(word, start + bit) for bit in range(bits)]
    word = (((mt // 2 * 8 + g) * 4 + t) * 2 + mt % 2) * 2 + h
    nibble = 4 * (j + 4 * kk)
    plane = rows * 4
    if bits == 1:
        return [(word, nibble + m)]
    if m < 3:
        return [(m * plane + word, nibble + bit) for bit in range(3)]
    return [(bit * plane + word, nibble + 3) for bit in range(3)]


def read_places(words: list[int], places: list[tuple[int, int]]) -> int:
    return sum((words[word] >> bit & 1) << index for index, (word, bit) in enumerate(places))


def unpack_128(words: Tensor, bits: int) -> Tensor:
    """Fragment words, int32 [W] -> codes [R, 128], by whole axes instead of by addresses."""
    shifts = torch.arange(8) * 4
    nibbles = (words.long()[:, None] >> shifts) & 15
    if bits in (1, 3):
        x = nibbles.reshape(bits, -1, 8, 4, 2, 2, 2, 4)
        if bits == 1:
            operands = [x[0] >> m & 1 for m in range(4)]
        else:
            operands = [*(x & 7), sum((x[p] >> 3) << p for p in range(3))]
        axes = "operand mp g t mlo h kk j"
        matrix = torch.stack([torch.as_tensor(operand) for operand in operands])
        order = "mp mlo h g operand kk t j"
    else:
        x = nibbles.reshape(-1, bits // 2, 8, 4, 2, 2, 2, 4).movedim(-2, 0)
        matrix = x if bits == 4 else torch.cat([x & 3, x >> 2])
        axes = "operand mt ks g t h kk j"
        order = "mt h g operand ks kk t j"
    places = [axes.split().index(axis) for axis in order.split()]
    return matrix.permute(places).reshape(-1, 128)


@pytest.mark.parametrize(("order", "bits", "rows", "columns"), MATRICES)
def test_codes_survive_and_fill_every_bit(
    order: Order, bits: int, rows: int, columns: int, device: torch.device
) -> None:
    codes = random_codes(2, 3, rows, columns, bits=bits).to(device)
    words = pack_codes(codes, bits, order)
    assert words.dtype == torch.int32
    assert words.shape == (2, 3, rows * columns * bits // 32)
    assert words.is_contiguous()
    assert torch.equal(unpack_codes(words, bits, rows, columns, order), codes)


@pytest.mark.parametrize(("order", "bits", "rows", "columns"), MATRICES)
def test_words_survive(order: Order, bits: int, rows: int, columns: int) -> None:
    words = random_words(rows * columns * bits // 32)
    codes = unpack_codes(words, bits, rows, columns, order)
    assert codes.dtype == torch.uint8
    assert torch.equal(pack_codes(codes, bits, order), words)


SMALL: list[tuple[Order, int, int, int]] = [
    *(("fragment", bits, 32, 128) for bits in (1, 2, 3, 4)),
    *(("fragment", bits, 64, 64) for bits in (1, 2, 3, 4)),
    *(("fragment", bits, 32, 256) for bits in (1, 2, 3, 4)),
    *(("plain", bits, 32, 24) for bits in range(1, 9)),
]


@pytest.mark.parametrize(("order", "bits", "rows", "columns"), SMALL)
def test_each_bit_of_the_words_is_a_bit_of_the_codes(
    order: Order, bits: int, rows: int, columns: int
) -> None:
    total = rows * columns * bits
    number = torch.arange(total).reshape(rows, columns, bits)
    found = torch.zeros(total // 32, 32, dtype=torch.int64)
    # the bits of the codes are numbered, and their numbers packed digit by digit
    for digit in range(total.bit_length()):
        codes = ((number >> digit & 1) << torch.arange(bits)).sum(-1).to(torch.uint8)
        words = pack_codes(codes, bits, order).long()
        found |= (words[:, None] >> torch.arange(32) & 1) << digit
    assert torch.equal(found.flatten().sort().values, torch.arange(total))


@pytest.mark.parametrize(("order", "bits", "rows", "columns"), SMALL)
def test_one_bit_of_a_word_changes_one_bit_of_one_code(
    order: Order, bits: int, rows: int, columns: int
) -> None:
    words = random_words(rows * columns * bits // 32)
    codes = unpack_codes(words, bits, rows, columns, order)
    positions = random.Random(bits)
    for bit in range(32):
        flipped = words.clone()
        flipped[positions.randrange(len(words))] ^= one_bit(bit)
        changes = unpack_codes(flipped, bits, rows, columns, order) ^ codes
        changed = changes[changes != 0].tolist()
        assert len(changed) == 1
        assert changed[0].bit_count() == 1


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [64, 128, 256])
def test_fragment_address_of_128_columns(bits: int, rows: int) -> None:
    words = random_words(rows * 4 * bits)
    codes = unpack_codes(words, bits, rows, 128, "fragment")
    numbers = words.tolist()
    positions = random.Random(rows + bits)
    for _ in range(100):
        row, column = positions.randrange(rows), positions.randrange(128)
        assert codes[row, column] == read_places(numbers, places_128(row, column, bits, rows))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_fragment_axes_of_128_columns(bits: int) -> None:
    words = random_words(128 * 4 * bits)
    codes = unpack_codes(words, bits, 128, 128, "fragment")
    assert torch.equal(codes.long(), unpack_128(words, bits))


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_64_columns_are_joined_halves(bits: int) -> None:
    codes = random_codes(128, 64, bits=bits)
    joined = torch.cat([codes[:64], codes[64:]], dim=1)
    assert torch.equal(pack_codes(codes, bits, "fragment"), pack_codes(joined, bits, "fragment"))


def test_64_columns_of_4_bits_are_two_operands_of_32() -> None:
    codes = random_codes(64, 64, bits=4)
    words = pack_codes(codes, 4, "fragment").tolist()
    for row in range(64):
        for column in range(64):
            m, kk, t, j = column // 32, column // 16 % 2, column // 4 % 4, column % 4
            word = 128 * (row // 16) + 4 * (4 * (row % 8) + t) + 2 * (row // 8 % 2) + kk
            assert words[word] >> 4 * (j + 4 * m) & 15 == codes[row, column]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_blocks_follow_one_another(bits: int) -> None:
    codes = random_codes(64, 384, bits=bits)
    blocks = [pack_codes(block, bits, "fragment") for block in codes.split(128, dim=1)]
    assert torch.equal(pack_codes(codes, bits, "fragment"), torch.cat(blocks))


@pytest.mark.parametrize(
    ("head_dim", "token", "dim", "words"),
    [
        (128, 77, 102, [341, 853, 1365]),
        (64, 109, 38, [128 + 85, 384 + 85, 640 + 85]),
        (256, 77, 128 + 102, [1536 + 341, 1536 + 853, 1536 + 1365]),
    ],
)
def test_example_of_the_drawing(head_dim: int, token: int, dim: int, words: list[int]) -> None:
    codes = torch.zeros(128, head_dim, dtype=torch.uint8)
    codes[token, dim] = 7
    packed = pack_codes(codes, 3, "fragment")
    assert packed.nonzero().flatten().tolist() == words
    assert packed[words].tolist() == [1 << 11] * 3


@pytest.mark.parametrize("bits", range(1, 9))
def test_plain_address(bits: int) -> None:
    rows, columns = 96, 40
    codes = random_codes(rows, columns, bits=bits)
    words = pack_codes(codes, bits, "plain").tolist()
    positions = random.Random(bits)
    for _ in range(100):
        row, column = positions.randrange(rows), positions.randrange(columns)
        start = (row // 32 * columns + column) * bits
        places = [(start + plane, row % 32) for plane in range(bits)]
        assert codes[row, column] == read_places(words, places)


@pytest.mark.parametrize(("order", "bits"), [("fragment", 3), ("fragment", 2), ("plain", 5)])
def test_codes_and_words_may_be_views(order: Order, bits: int, device: torch.device) -> None:
    wide = random_codes(2, 128, 256, bits=bits).to(device)
    for codes in (wide.transpose(-1, -2)[:, :128], wide[:, :, 128:], wide[:1].expand(3, -1, -1)):
        rows, columns = codes.shape[-2:]
        words = pack_codes(codes, bits, order)
        assert torch.equal(words, pack_codes(codes.contiguous(), bits, order))
        record = torch.stack([words, ~words], dim=-1)
        assert torch.equal(unpack_codes(record[..., 0], bits, rows, columns, order), codes)


@pytest.mark.parametrize(("order", "bits"), [("fragment", 1), ("fragment", 3), ("plain", 3)])
@pytest.mark.parametrize("batch", [(), (0,), (2, 0), (1, 2, 3)])
def test_any_batch(order: Order, bits: int, batch: tuple[int, ...]) -> None:
    codes = random_codes(*batch, 64, 128, bits=bits)
    words = pack_codes(codes, bits, order)
    assert words.shape == (*batch, 256 * bits)
    assert torch.equal(unpack_codes(words, bits, 64, 128, order), codes)


@pytest.mark.parametrize(
    ("order", "bits"), [("fragment", b) for b in (1, 2, 3, 4)] + [("plain", 3)]
)
def test_higher_bits_of_a_code_are_dropped(order: Order, bits: int) -> None:
    codes = random_codes(64, 128, bits=8)
    low = codes & (2**bits - 1)
    assert torch.equal(pack_codes(codes, bits, order), pack_codes(low, bits, order))


@pytest.mark.parametrize(
    ("rows", "columns", "bits", "fits"),
    [
        *((128, columns, bits, True) for columns in (64, 128, 256) for bits in (1, 2, 3, 4)),
        *((128, columns, bits, False) for columns in (32, 80, 96, 192, 0) for bits in (1, 2, 3, 4)),
        *((128, 128, bits, False) for bits in (0, 5, 8)),
        (16, 128, 2, True),
        (16, 128, 4, True),
        (16, 128, 1, False),
        (16, 128, 3, False),
        (32, 64, 2, True),
        (16, 64, 2, False),
        (16, 64, 4, True),
        (64, 64, 3, True),
        (32, 64, 3, False),
        (80, 128, 2, True),
        (80, 128, 3, False),
        (0, 128, 2, False),
    ],
)
def test_fragment_fits(rows: int, columns: int, bits: int, fits: bool) -> None:
    assert fragment_fits(rows, columns, bits) is fits
    if not fits:
        with pytest.raises(ValueError, match="do not fit fragment order"):
            pack_codes(torch.zeros(rows, columns, dtype=torch.uint8), bits, "fragment")


def test_what_cannot_be_packed_is_refused() -> None:
    codes = torch.zeros(32, 128, dtype=torch.uint8)
    with pytest.raises(ValueError, match="uint8"):
        pack_codes(codes.int(), 2, "plain")
    with pytest.raises(ValueError, match="uint8"):
        pack_codes(codes[0], 2, "plain")
    with pytest.raises(ValueError, match="must be one of fragment, plain"):
        pack_codes(codes, 2, "columns")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="do not fit plain order"):
        pack_codes(codes, 9, "plain")
    with pytest.raises(ValueError, match="multiple of 32"):
        pack_codes(codes[:31], 2, "plain")


def test_what_cannot_be_unpacked_is_refused() -> None:
    words = random_words(256)
    with pytest.raises(ValueError, match=r"int32 \[\.\.\., 256\]"):
        unpack_codes(words[:-1], 2, 32, 128, "plain")
    with pytest.raises(ValueError, match="int32"):
        unpack_codes(words.long(), 2, 32, 128, "plain")
    with pytest.raises(ValueError, match="do not fit"):
        unpack_codes(words, 8, 8, 128, "plain")


@pytest.mark.parametrize("length", [8, 64, 128])
def test_scales_of_a_lane_are_neighbours(length: int, device: torch.device) -> None:
    scales = torch.randn(2, 3, length, device=device).half()
    packed = pack_scales(scales)
    for token in range(length):
        g, i = token % 8, token // 8
        assert torch.equal(packed[..., g * (length // 8) + i], scales[..., token])
    assert torch.equal(unpack_scales(packed), scales)


@pytest.mark.parametrize("move", [pack_scales, unpack_scales])
def test_scales_of_an_odd_number_of_tokens_are_refused(move: object) -> None:
    assert callable(move)
    with pytest.raises(ValueError, match="multiple of 8"):
        move(torch.ones(2, 12))
    assert move(torch.ones(0, 3, 16)).shape == (0, 3, 16)


@pytest.mark.parametrize(
    ("layout", "length", "order", "words", "nominal_bits"),
    [
        (TileLayout(128, 2, 2), 128, "fragment", (1024, 1024, 0), 2.125),
        (TileLayout(128, 3, 3), 128, "fragment", (1536, 1536, 0), 3.125),
        (TileLayout(128, 4, 4), 64, "fragment", (1024, 1024, 0), 4.125),
        (TileLayout(128, 3, 4), 128, "fragment", (1536, 2048, 0), 3.625),
        (TileLayout(128, 2, 3, 128), 128, "fragment", (1024, 1536, 512), 3.1875),
        (TileLayout(64, 4, 4, 64), 64, "fragment", (512, 512, 128), 4.875),
        (TileLayout(64, 2, 2), 128, "fragment", (512, 512, 0), 2.25),
        (TileLayout(256, 1, 3), 128, "fragment", (1024, 3072, 0), 2.0625),
        (TileLayout(80, 3, 3), 128, "plain", (960, 960, 0), 3.2),
        (TileLayout(128, 2, 2, 40), 128, "plain", (1024, 1024, 160), 2.34375),
        (TileLayout(128, 5, 2), 128, "plain", (2560, 1024, 0), 3.625),
        (TileLayout(1, 8, 8), 128, "plain", (32, 32, 0), 24.0),
    ],
)
def test_sizes_of_a_tile(
    layout: TileLayout,
    length: int,
    order: str,
    words: tuple[int, int, int],
    nominal_bits: float,
) -> None:
    assert layout.tile_length == length
    assert layout.order == order
    assert (layout.key_words, layout.value_words, layout.sign_words) == words
    assert layout.record_words == sum(words)
    assert layout.scale_rows == (3 if layout.sketch_size else 2)
    assert layout.nominal_bits == nominal_bits


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_tiles_survive(layout: TileLayout, device: torch.device) -> None:
    keys, values, signs = random_tile(layout, 2, 3)
    keys, values = keys.to(device), values.to(device)
    signs = None if signs is None else signs.to(device)
    records = layout.pack(keys, values, signs)
    assert records.shape == (2, 3, layout.record_words)
    key_codes, value_codes, sign_codes = layout.unpack(records)
    assert torch.equal(key_codes, keys)
    assert torch.equal(value_codes, values)
    assert (sign_codes is None) == (signs is None)
    if sign_codes is not None and signs is not None:
        assert torch.equal(sign_codes, signs)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_record_is_keys_values_signs(layout: TileLayout) -> None:
    keys, values, signs = random_tile(layout)
    turned = values.T if layout.order == "fragment" else values
    parts = [
        pack_codes(keys, layout.key_bits, layout.order),
        pack_codes(turned, layout.value_bits, layout.order),
    ]
    if signs is not None:
        parts.append(pack_codes(signs, 1, layout.order))
    assert torch.equal(layout.pack(keys, values, signs), torch.cat(parts))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_one_bit_of_a_record_changes_one_code(layout: TileLayout) -> None:
    record = random_words(layout.record_words)
    before = layout.unpack(record)
    positions = random.Random(1)
    for bit in range(32):
        flipped = record.clone()
        flipped[positions.randrange(len(record))] ^= one_bit(bit)
        pairs = zip(layout.unpack(flipped), before, strict=True)
        changes = [(new ^ old).count_nonzero() for new, old in pairs if new is not None]
        assert sum(changes) == 1


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_no_tiles(layout: TileLayout) -> None:
    records = layout.pack(*random_tile(layout, 2, 0))
    assert records.shape == (2, 0, layout.record_words)
    keys, values, _ = layout.unpack(records)
    assert keys.shape == values.shape == (2, 0, layout.tile_length, layout.head_dim)
    assert layout.merge(records, records, 5).shape == records.shape


MERGED = [
    TileLayout(64, 3, 2, sketch_size=64),
    TileLayout(64, 1, 3),
    TileLayout(128, 4, 4, sketch_size=128),
    TileLayout(256, 4, 4),
    TileLayout(72, 4, 4),
    TileLayout(48, 5, 3, sketch_size=20),
]


@pytest.mark.parametrize("layout", MERGED, ids=str)
def test_merge_takes_each_token_from_its_tile(layout: TileLayout, device: torch.device) -> None:
    old = random_words(1, layout.record_words, seed=1).to(device)
    new = random_words(1, layout.record_words, seed=2).to(device)
    before, after = layout.unpack(old), layout.unpack(new)
    for kept in range(layout.tile_length + 1):
        merged = layout.unpack(layout.merge(old, new, kept))
        for part, first, rest in zip(merged, before, after, strict=True):
            if part is None or first is None or rest is None:
                assert layout.sketch_size == 0
                continue
            assert torch.equal(part, torch.cat([first[:, :kept], rest[:, kept:]], dim=1))


@pytest.mark.parametrize("layout", [TileLayout(64, 3, 3), TileLayout(64, 4, 4)], ids=str)
def test_merged_scales_take_each_token_from_its_tile(layout: TileLayout) -> None:
    old, new = torch.randn(2, 5, 3, layout.tile_length).half()
    for kept in range(layout.tile_length + 1):
        merged = layout.merge_scales(pack_scales(old), pack_scales(new), kept)
        expected = torch.cat([old[..., :kept], new[..., kept:]], dim=-1)
        assert torch.equal(unpack_scales(merged), expected)


@pytest.mark.parametrize("kept", [-1, 129])
def test_merge_outside_the_tile_is_refused(kept: int) -> None:
    layout = TileLayout(64, 2, 2)
    records, scales = random_words(layout.record_words), torch.ones(2, 128)
    with pytest.raises(ValueError, match="from 0 to 128"):
        layout.merge(records, records, kept)
    with pytest.raises(ValueError, match="from 0 to 128"):
        layout.merge_scales(scales, scales, kept)


def test_merge_of_different_shapes_is_refused() -> None:
    layout = TileLayout(64, 2, 2)
    records, scales = random_words(2, layout.record_words), torch.ones(2, 128)
    with pytest.raises(ValueError, match="one shape"):
        layout.merge(records, records[:1], 5)
    with pytest.raises(ValueError, match="new_records must be int32"):
        layout.merge(records, records[:, 1:], 5)
    with pytest.raises(ValueError, match="one shape and dtype"):
        layout.merge_scales(scales, scales.half(), 5)
    with pytest.raises(ValueError, match=r"\[\.\.\., 128\]"):
        layout.merge_scales(scales[:, :64], scales[:, :64], 5)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((128, 0, 2), "key_bits must be from 1 to 8, got 0"),
        ((128, 2, 9), "value_bits must be from 1 to 8, got 9"),
        ((0, 2, 2), "head_dim must be at least 1, got 0"),
        ((128, 2, 2, -1), "sketch_size must be 0"),
    ],
)
def test_impossible_layouts_are_refused(numbers: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TileLayout(*numbers)


def test_tiles_of_another_shape_are_refused() -> None:
    layout = TileLayout(128, 2, 3, sketch_size=64)
    keys, values, signs = random_tile(layout, 2)
    assert signs is not None
    with pytest.raises(ValueError, match=r"key_codes must be uint8 \[2, 128, 128\]"):
        layout.pack(keys[:, :64], values, signs)
    with pytest.raises(ValueError, match="value_codes"):
        layout.pack(keys, values[:1], signs)
    with pytest.raises(ValueError, match="value_codes"):
        layout.pack(keys, values.int(), signs)
    with pytest.raises(ValueError, match=r"signs must be uint8 \[2, 128, 64\]"):
        layout.pack(keys, values, signs[..., :32])
    with pytest.raises(ValueError, match="signs must be given"):
        layout.pack(keys, values)
    with pytest.raises(ValueError, match="signs must be None"):
        TileLayout(128, 2, 3).pack(keys, values, signs)
    with pytest.raises(ValueError, match="records must be int32"):
        layout.unpack(random_words(2, layout.record_words + 1))
