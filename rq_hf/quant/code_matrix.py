# SPDX-License-Identifier: Apache-2.0
"""Packing of one matrix of codes, in either of the two orders that `packing` draws."""

from typing import Literal

import torch
from torch import Tensor

from rq_hf.quant import fragment_order, plain_order

Order = Literal["fragment", "plain"]

_ORDERS = {"fragment": fragment_order, "plain": plain_order}
_ACCEPTED = {
    "fragment": (
        "1 to 4 bits, 64 or a multiple of 128 columns, and rows a multiple of 32 (1, 3 bits) or "
        "16 (2, 4 bits), twice that for 64 columns of 1 to 3 bits; order='plain' takes more"
    ),
    "plain": "1 to 8 bits, rows a multiple of 32 and at least one column; pad the rows",
}


def fragment_fits(rows: int, columns: int, bits: int) -> bool:
    """Whether `rows` x `columns` codes of `bits` bits can be packed in fragment order."""
    return fragment_order.fits(rows, columns, bits)


def pack_codes(codes: Tensor, bits: int, order: Order) -> Tensor:
    """Words that hold a matrix of codes.

    Args:
        codes: Codes below `2**bits`, [..., R, C], uint8; higher bits are dropped.
        bits: Bits of a code: 1 to 4 in fragment order, 1 to 8 in plain order.
        order: `"fragment"` or `"plain"`.

    Returns:
        [..., R * C * bits // 32], int32.

    Raises:
        ValueError: `codes` is no uint8 matrix, or its shape or `bits` do not fit the order.
    """
    if codes.dtype != torch.uint8 or codes.ndim < 2:
        raise ValueError(
            f"codes must be uint8 [..., rows, columns], got {codes.dtype} {list(codes.shape)}"
        )
    rows, columns = codes.shape[-2:]
    _check_fit(rows, columns, bits, order)
    return _ORDERS[order].pack(codes, bits)


def unpack_codes(words: Tensor, bits: int, rows: int, columns: int, order: Order) -> Tensor:
    """Codes, [..., R, C], uint8, of words, [..., R * C * bits // 32], int32: undoes `pack_codes`.

    Raises:
        ValueError: The words are not int32 or not as many as the codes need, or `rows`,
            `columns` and `bits` do not fit the order.
    """
    _check_fit(rows, columns, bits, order)
    check_words("words", words, rows * columns * bits // 32)
    return _ORDERS[order].unpack(words, bits, rows, columns)


def check_words(name: str, words: Tensor, length: int) -> None:
    """Raise ValueError unless `words` is [..., length], int32."""
    if words.dtype != torch.int32 or words.ndim < 1 or words.shape[-1] != length:
        raise ValueError(
            f"{name} must be int32 [..., {length}], got {words.dtype} {list(words.shape)}"
        )


def _check_fit(rows: int, columns: int, bits: int, order: str) -> None:
    if order not in _ORDERS:
        raise ValueError(f"order must be one of {', '.join(_ORDERS)}, got {order!r}")
    if not _ORDERS[order].fits(rows, columns, bits):
        raise ValueError(
            f"{rows} rows and {columns} columns of {bits} bits do not fit {order} order, which "
            f"needs {_ACCEPTED[order]}"
        )
