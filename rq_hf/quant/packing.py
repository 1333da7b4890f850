# SPDX-License-Identifier: Apache-2.0
"""Bit layout of packed codes, signs and scales: the one place that knows where a bit lies.

A tile is T tokens of one KV head: T = 64 where keys and values both have 4 bits, else 128. Its
record is one run of int32 words without a gap or a spare bit:

    +----------------------+------------------------+--------------------+
    | keys                 | values                 | signs              |
    | T*D*key_bits/32      | T*D*value_bits/32      | T*M/32 words       |
    +----------------------+------------------------+--------------------+

Each part is a matrix of codes: all parts in fragment order or, if one of them does not fit that,
all in plain order. Signs are codes of one bit, 1 = negative. Bit 0 is a word's lowest bit.

                  keys              values            signs
    fragment      [tokens, dims]    [dims, tokens]    [tokens, rows of the sketch]
    plain         [tokens, dims]    [tokens, dims]    [tokens, rows of the sketch]

Fragment order
--------------
Lane 4 g + t of a warp finds its share of the 8-bit A operands of `mma.m16n8k32` (PTX ISA,
"Matrix Fragments for mma.m16n8k32") in consecutive words. It takes 1 to 4 bits, 64 or a multiple
of 128 columns, and rows a multiple of 32 (1, 3 bits) or 16 (2, 4 bits), counted after joining.
To find the code at (row, column) of a matrix of R rows:

1. Blocks and halves. Columns are cut into blocks of 128, each stored whole, one behind the other.
   64 columns make up such a block by joining halves, except at 4 bits, where they are a block of
   64. From here on row and column count within the block (R: rows after joining).

       D = 64, 1-3 bits, R = 128 -> 64           D = 256
                column 0..63  64..127                    column 0..127  128..255
              +-------------+-------------+            +--------------+--------------+
       row 0  | row 0       | row 64      |     row 0  |              |              |
        ...   |  ...        |  ...        |      ...   | block 0      | block 1      |
       row 63 | row 63      | row 127     |            |              |              |
              +-------------+-------------+            +--------------+--------------+

2. Digits. mt counts 16 rows, mp 32 rows; m is the operand.

       row    = 16 mt + 8 h + g             mt = 2 mp + mlo;  h, mlo: 0, 1;  g: 0..7
       column = 32 m + 16 kk + 4 t + j      1, 2, 3 bits;  m: 0..3;  kk: 0, 1;  t, j: 0..3
       column = 64 m + 32 ks + 16 kk + 4 t + j       4 bits, block of 128;  m, ks: 0, 1
       column = 32 m + 16 kk + 4 t + j               4 bits, block of 64;   m: 0, 1;  ks = 0

3. Word. A chunk is 128 words, what a warp loads at once: 4 words (16 bytes) a lane.

       word = 128 chunk + 4 (4 g + t) + w

       bits   chunk                                   w
        1     block (R/32) + mp                       2 mlo + h
        2     block (R/16) + mt                       2 h + kk
        3     (3 block + x) (R/32) + mp               2 mlo + h     in each plane x = 0, 1, 2
        4     2 (block (R/16) + mt) + ks              2 h + kk      block of 128
        4     mt                                      2 h + kk      block of 64

4. Bits. A word is two halves of four nibbles, numbered by j. The upper half holds

       kk = 1 (1 and 3 bits; lower: kk = 0),  m = 1, 3 (2 bits; lower: 0, 2),  m = 1 (4 bits; 0).

       bit  31    28 27    24 23    20 19    16 15    12 11     8 7      4 3      0
            +-------+--------+--------+--------+--------+--------+--------+-------+
            | j = 3 | j = 2  | j = 1  | j = 0  | j = 3  | j = 2  | j = 1  | j = 0 |
            +-------+--------+--------+--------+--------+--------+--------+-------+
            |------------ upper half ----------|------------ lower half ----------|

       bit of the nibble      3             2             1             0
                        +-------------+-------------+-------------+-------------+
       1 bit            |    m = 3    |    m = 2    |    m = 1    |    m = 0    |
                        +-------------+-------------+-------------+-------------+
       2 bits, lower    |           m = 2           |           m = 0           |
               upper    |           m = 3           |           m = 1           |
                        +---------------------------+---------------------------+
       3 bits, plane x  | m = 3 bit x |                  m = x                  |
                        +-------------+-----------------------------------------+
       4 bits, lower    |                         m = 0                         |
               upper    |                         m = 1                         |
                        +-------------------------------------------------------+

   So a code of 3 bits lies in plane m, or for m = 3 one bit in each plane, lowest in plane 0.

Example: 3-bit keys, D = T = 128, token 77, dim 102. Row 77 = 16 * 4 + 8 + 5: mp = 2, mlo = 0,
h = 1, g = 5. Column 102 = 32 * 3 + 6: m = 3, kk = 0, t = 1, j = 2. Chunk 4 x + 2, lane 21, w = 1:
bit 11 of the words 341, 853 and 1365. For D = 64, token 109, dim 38 joins at row
109 - 64 = 45, column 38 + 64 = 102: as above but mp = 1 and R = 64, thus chunk 2 x + 1. For
D = 256, token 77, dim 128 + 102 lies one block (R * 128 * 3 / 32 = 1536 words) after dim 102.

Plain order
-----------
Any number of columns C, 1 to 8 bits, R a multiple of 32. A code is spread over `bits` words:
bit p of the code is bit (row % 32) of

       word = ((row // 32) C + column) bits + p

Scales
------
float16 [S, T]: keys, values and, with signs, residuals. Token g + 8 i is at position g T/8 + i, so
that the tokens of a lane's rows are neighbours:

       position   0   1   2  ..  T/8-1  |  T/8  T/8+1  ..         |  ..  |  ..  T-1
       token      0   8  16  ..  T-8    |   1     9    ..  T-7    |  ..  |  ..  T-1
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rq_hf.quant.code_matrix import Order, check_words, fragment_fits, pack_codes, unpack_codes

__all__ = [
    "Order",
    "TileLayout",
    "fragment_fits",
    "pack_codes",
    "pack_scales",
    "unpack_codes",
    "unpack_scales",
]


def pack_scales(scales: Tensor) -> Tensor:
    """Numbers of the tokens of a tile, [..., T], in the order in which they are stored.

    Raises:
        ValueError: T is not a multiple of 8.
    """
    _check_scales(scales)
    return scales.unflatten(-1, (scales.shape[-1] // 8, 8)).transpose(-1, -2).flatten(-2)


def unpack_scales(scales: Tensor) -> Tensor:
    """Stored numbers, [..., T], in the order of the tokens: undoes `pack_scales`.

    Raises:
        ValueError: T is not a multiple of 8.
    """
    _check_scales(scales)
    return scales.unflatten(-1, (8, scales.shape[-1] // 8)).transpose(-1, -2).flatten(-2)


def _check_scales(scales: Tensor) -> None:
    if scales.ndim < 1 or scales.shape[-1] % 8:
        raise ValueError(
            f"scales must be [..., T] with T a multiple of 8, got {list(scales.shape)}"
        )


@dataclass(frozen=True)
class TileLayout:
    """Sizes and order of the record of a tile of tokens.

    Attributes:
        head_dim: Numbers of a key or value, D.
        key_bits: Bits of a key code, 1 to 8.
        value_bits: Bits of a value code, 1 to 8.
        sketch_size: Sign bits of a key's residual, M; 0 for none.
    """

    head_dim: int
    key_bits: int
    value_bits: int
    sketch_size: int = 0

    def __post_init__(self) -> None:
        for name in ("key_bits", "value_bits"):
            if not 1 <= getattr(self, name) <= 8:
                raise ValueError(f"{name} must be from 1 to 8, got {getattr(self, name)}")
        if self.head_dim < 1:
            raise ValueError(f"head_dim must be at least 1, got {self.head_dim}")
        if self.sketch_size < 0:
            raise ValueError(f"sketch_size must be 0 (no signs) or more, got {self.sketch_size}")

    @property
    def tile_length(self) -> int:
        """Tokens of a tile, T."""
        return 64 if self.key_bits == self.value_bits == 4 else 128

    @property
    def order(self) -> Order:
        """The order of keys, values and signs: `"fragment"` if all of them fit it."""
        length = self.tile_length
        fits = (
            fragment_fits(length, self.head_dim, self.key_bits)
            and fragment_fits(self.head_dim, length, self.value_bits)
            and (self.sketch_size == 0 or fragment_fits(length, self.sketch_size, 1))
        )
        return "fragment" if fits else "plain"

    @property
    def key_words(self) -> int:
        """Words of the keys."""
        return self.tile_length * self.head_dim * self.key_bits // 32

    @property
    def value_words(self) -> int:
        """Words of the values."""
        return self.tile_length * self.head_dim * self.value_bits // 32

    @property
    def sign_words(self) -> int:
        """Words of the signs; 0 without a sketch."""
        return self.tile_length * self.sketch_size // 32

    @property
    def record_words(self) -> int:
        """Words of a record, W."""
        return self.key_words + self.value_words + self.sign_words

    @property
    def scale_rows(self) -> int:
        """Scales a token, S: key, value and, with a sketch, residual."""
        return 3 if self.sketch_size else 2

    @property
    def nominal_bits(self) -> float:
        """Bits stored for a number of a key or value, scales included."""
        numbers = 2 * self.tile_length * self.head_dim
        return (32 * self.record_words + 16 * self.scale_rows * self.tile_length) / numbers

    def pack(self, key_codes: Tensor, value_codes: Tensor, signs: Tensor | None = None) -> Tensor:
        """Records of tiles.

        Args:
            key_codes: [..., T, D], uint8, below `2**key_bits`.
            value_codes: [..., T, D], uint8, below `2**value_bits`.
            signs: [..., T, M], uint8, 1 = negative; None without a sketch.

        Returns:
            [..., W], int32.

        Raises:
            ValueError: A shape or dtype does not match, or signs are missing or not wanted.
        """
        batch = tuple(key_codes.shape[:-2])
        self._check_part("key_codes", key_codes, batch, self.head_dim)
        self._check_part("value_codes", value_codes, batch, self.head_dim)
        parts = [
            pack_codes(key_codes, self.key_bits, self.order),
            pack_codes(self._turn_values(value_codes), self.value_bits, self.order),
        ]
        if (signs is None) != (self.sketch_size == 0):
            raise ValueError(
                f"signs must be {'given' if signs is None else 'None'} for sketch_size="
                f"{self.sketch_size}"
            )
        if signs is not None:
            self._check_part("signs", signs, batch, self.sketch_size)
            parts.append(pack_codes(signs, 1, self.order))
        return torch.cat(parts, -1)

    def unpack(self, records: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Key codes, value codes and signs of records, [..., W], int32: undoes `pack`.

        Raises:
            ValueError: `records` is not int32 or its rows are not as long as a record.
        """
        check_words("records", records, self.record_words)
        length, order = self.tile_length, self.order
        keys, values, signs = records.split([self.key_words, self.value_words, self.sign_words], -1)
        shape = (length, self.head_dim) if order == "plain" else (self.head_dim, length)
        return (
            unpack_codes(keys, self.key_bits, length, self.head_dim, order),
            self._turn_values(unpack_codes(values, self.value_bits, *shape, order)),
            unpack_codes(signs, 1, length, self.sketch_size, order) if self.sketch_size else None,
        )

    def merge(self, old_records: Tensor, new_records: Tensor, kept: int) -> Tensor:
        """Records with the first `kept` tokens of the old records and the rest of the new ones.

        Args:
            old_records: [..., W], int32.
            new_records: [..., W], int32, of the same shape.
            kept: Tokens to keep, 0 to T. Their bits are copied, not computed anew.

        Returns:
            [..., W], int32.

        Raises:
            ValueError: `kept` is out of range or the records do not match.
        """
        check_words("old_records", old_records, self.record_words)
        check_words("new_records", new_records, self.record_words)
        _check_same_shape(old_records, new_records)
        # every bit belongs to one token, so a record of all-ones codes is the mask of its tokens
        ones = self._is_kept(kept, old_records.device).to(torch.uint8)[:, None] * 255
        codes = ones.expand(-1, self.head_dim)
        signs = ones.expand(-1, self.sketch_size) if self.sketch_size else None
        mask = self.pack(codes, codes, signs)
        return (old_records & mask) | (new_records & ~mask)

    def merge_scales(self, old_scales: Tensor, new_scales: Tensor, kept: int) -> Tensor:
        """Packed scales, [..., T], with those of the first `kept` tokens from `old_scales`.

        Raises:
            ValueError: `kept` is out of range or the scales do not match.
        """
        _check_same_shape(old_scales, new_scales)
        if old_scales.shape[-1:] != (self.tile_length,):
            raise ValueError(
                f"scales must be [..., {self.tile_length}], got {list(old_scales.shape)}"
            )
        mask = pack_scales(self._is_kept(kept, old_scales.device))
        return torch.where(mask, old_scales, new_scales)

    def _turn_values(self, codes: Tensor) -> Tensor:
        """[tokens, dims] <-> the rows and columns in which values are packed."""
        return codes.transpose(-1, -2) if self.order == "fragment" else codes

    def _is_kept(self, kept: int, device: torch.device) -> Tensor:
        if not 0 <= kept <= self.tile_length:
            raise ValueError(f"kept must be from 0 to {self.tile_length} tokens, got {kept}")
        return torch.arange(self.tile_length, device=device) < kept

    def _check_part(self, name: str, codes: Tensor, batch: tuple[int, ...], columns: int) -> None:
        expected = (*batch, self.tile_length, columns)
        if codes.dtype != torch.uint8 or tuple(codes.shape) != expected:
            raise ValueError(
                f"{name} must be uint8 {list(expected)}, got {codes.dtype} {list(codes.shape)}"
            )


def _check_same_shape(old: Tensor, new: Tensor) -> None:
    if old.shape != new.shape or old.dtype != new.dtype:
        raise ValueError(
            "old and new must have one shape and dtype, got "
            f"{list(old.shape)} {old.dtype} and {list(new.shape)} {new.dtype}"
        )
