# SPDX-License-Identifier: Apache-2.0
"""Arguments of a call, taken apart into tensors and a key that equal calls share."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


class CannotBeKept(Exception):
    """An argument is of a kind that cannot be compared or copied."""


def take_apart(
    arguments: Any, cache: object, device: torch.device, tensors: list[Tensor]
) -> Hashable:
    """Returns a key that calls share which differ in the numbers of tensors alone.

    Args:
        arguments: Tensors, plain values and the cache, in dicts, lists and tuples.
        cache: The cache, which is the same in each call.
        device: Where tensors must be.
        tensors: All tensors are appended here, in the order of the arguments.

    Raises:
        CannotBeKept: There is something else among the arguments, or a tensor elsewhere.
    """
    if isinstance(arguments, Tensor):
        if arguments.device != device or type(arguments) is not Tensor:
            raise CannotBeKept
        tensors.append(arguments)
        return Tensor, arguments.shape, arguments.dtype
    if arguments is cache:
        return "cache"
    if type(arguments) is dict:
        return dict, tuple(
            (name, take_apart(x, cache, device, tensors)) for name, x in arguments.items()
        )
    if type(arguments) in (list, tuple):
        return type(arguments), tuple(take_apart(x, cache, device, tensors) for x in arguments)
    if isinstance(arguments, _PLAIN):
        # True == 1 == 1.0
        return type(arguments), arguments
    raise CannotBeKept


def put_together(arguments: Any, tensors: Iterator[Tensor]) -> Any:
    """Returns the arguments with other tensors, in the order of `take_apart`."""
    if isinstance(arguments, Tensor):
        return next(tensors)
    if type(arguments) is dict:
        return {name: put_together(x, tensors) for name, x in arguments.items()}
    if type(arguments) in (list, tuple):
        return type(arguments)(put_together(x, tensors) for x in arguments)
    return arguments
