# SPDX-License-Identifier: Apache-2.0
"""Layers of rotors with shuffles between them: every output depends on every input."""

import math
from functools import cache

import torch
from torch import Tensor

from rq_hf.quant.clifford import embed_even
from rq_hf.quant.rotations.base import Rotation
from rq_hf.quant.rotations.rotor import append_left_over, block_diagonal


class ButterflyRotation(Rotation):
    """Product of layers of equalised rotors on three coordinates, with perfect 3-shuffles between.

    As a fast Fourier transform of radix 3 does, each layer triples the number of inputs that an
    output depends on. There are as many layers as it takes to reach them all: 5 for D = 64, 80 and
    96, 6 for 128, 7 for 256. (Where several paths lead from an input to an output they may cancel:
    in any one draw a few entries in a hundred are zero.) The determinant is +1. Cost when applied
    layer by layer: 3 D products a layer, against D^2 for a dense rotation.
    """

    name = "butterfly"

    def _build(self, generator: torch.Generator) -> Tensor:
        shuffle = perfect_shuffle(self.head_dim)
        matrix = _draw_layer(self.head_dim, generator)
        for _ in range(layer_count(self.head_dim) - 1):
            matrix = _draw_layer(self.head_dim, generator) @ matrix[shuffle]
        # A shuffle may be an odd permutation; one sign makes the whole a rotation again
        if torch.linalg.slogdet(matrix).sign < 0:
            matrix[0] = -matrix[0]
        return matrix


def equalised_rotors(n: int, generator: torch.Generator) -> Tensor:
    """`n` rotors, [n, 8], float64, drawn from the 32 whose matrices have entries +-1/3 and +-2/3.

    One of their components along 1, e12, e13 and e23 is 0, the others are +-1/sqrt(3). Where the
    scalar is the 0, the rotor turns by pi about (+-1, +-1, +-1). Three coordinates cannot all be
    shared out evenly (no orthogonal matrix has nothing but +-1/sqrt(3)); this is close to it, so
    that fewer layers are needed than with uniformly random rotors.
    """
    signs = 2 * torch.randint(2, (n, 4), generator=generator, device="cpu").double() - 1
    absent = torch.randint(4, (n, 1), generator=generator, device="cpu")
    return embed_even(signs.scatter(1, absent, 0.0) / math.sqrt(3))


def _draw_layer(head_dim: int, generator: torch.Generator) -> Tensor:
    """One layer, [D, D]; two coordinates left over turn by +-45 degrees, equalised as well."""
    rotors = equalised_rotors(head_dim // 3, generator)
    sign = 2 * torch.randint(2, (1,), generator=generator, device="cpu").double() - 1
    return block_diagonal(append_left_over(rotors, head_dim, sign * math.pi / 8), head_dim)


def perfect_shuffle(head_dim: int) -> list[int]:
    """Order in which a layer's outputs enter the next: every third one, from each of three starts.

    Where 3 does not divide D the order is rolled by one, so that other coordinates are left over.
    """
    order = [i for start in range(3) for i in range(start, head_dim, 3)]
    return order[1:] + order[:1] if head_dim % 3 else order


@cache
def layer_count(head_dim: int) -> int:
    """Fewest layers after which every output depends on every input.

    Not less than log3 D, nor than one more where a coordinate is left over in the first layer.
    """
    layer = torch.block_diag(*[torch.ones(3, 3, device="cpu")] * -(-head_dim // 3))
    layer = layer[:head_dim, :head_dim]
    reach, count = layer, 1
    while not reach.all():
        reach = (layer @ reach[perfect_shuffle(head_dim)]).clamp(max=1)
        count += 1
    return count
