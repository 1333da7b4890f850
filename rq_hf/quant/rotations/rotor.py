# SPDX-License-Identifier: Apache-2.0
"""One layer of random rotors, each turning three neighbouring coordinates (RotorQuant)."""

import torch
from torch import Tensor

from rq_hf.quant.clifford import embed_even, exp_bivector, random_rotors, rotor_to_matrix
from rq_hf.quant.rotations.base import Rotation


class RotorRotation(Rotation):
    """Block-diagonal rotation by rotors of Cl(3,0), uniform on Spin(3).

    Two coordinates left over turn in their plane, by a rotor with no parts but 1 and e12; a single
    one stays. Nothing is padded. An outlier is spread over three coordinates only, whatever D is:
    this is the layer RotorQuant was first described with, and `butterfly` is its full-mixing form.

    Attributes:
        rotors: [ceil(D / 3), 8], float64, one for every group of coordinates.
    """

    name = "rotor"

    def _build(self, generator: torch.Generator) -> Tensor:
        self.rotors = random_rotors(self.head_dim // 3, generator)
        if self.head_dim % 3:
            half_turn = torch.rand(1, generator=generator, dtype=torch.float64, device="cpu")
            self.rotors = append_left_over(self.rotors, self.head_dim, 2 * torch.pi * half_turn)
        return block_diagonal(self.rotors, self.head_dim)


def append_left_over(rotors: Tensor, head_dim: int, half_angle: Tensor) -> Tensor:
    """Rotors [D // 3, 8] and, where 3 does not divide D, one more for the coordinates left over.

    Args:
        rotors: Rotors of the full groups, [D // 3, 8].
        head_dim: Number of coordinates D.
        half_angle: Half of the angle, in radians, by which two coordinates turn, [1]. It is not
            used where a single one is left over.
    """
    left_over = head_dim % 3
    if left_over == 0:
        return rotors
    plane = embed_even(rotors.new_tensor([[0.0, -1.0, 0.0, 0.0]]))
    last = exp_bivector((half_angle if left_over == 2 else 0.0 * half_angle) * plane)
    return torch.cat([rotors, last])


def block_diagonal(rotors: Tensor, head_dim: int) -> Tensor:
    """Matrix [D, D] that turns each group of three coordinates by its rotor, [ceil(D / 3), 8].

    The last rotor must leave alone the coordinates beyond D.
    """
    return torch.block_diag(*rotor_to_matrix(rotors))[:head_dim, :head_dim].contiguous()
