# SPDX-License-Identifier: Apache-2.0
"""The Clifford algebra Cl(3,0): products of multivectors, and rotors as rotations of space.

A multivector is a tensor whose last dimension holds 8 components in the order 1, e1, e2, e3, e12,
e13, e23, e123; all other dimensions are batch and broadcast. Results have the promoted type of the
inputs; half types are computed in float32 and rounded once.

A rotor is an even multivector R with R ~R = 1. It turns a vector x into R x ~R; with
R = exp(-a/2 e12) the turn is by the angle a from e1 towards e2. Source: Doran and Lasenby,
"Geometric Algebra for Physicists", chapters 2 and 4.
"""

from collections.abc import Callable
from functools import reduce, wraps
from itertools import chain
from typing import ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")

# A basis element as a set of bits: bit i - 1 is set if e_i is a factor
_MASKS = (0b000, 0b001, 0b010, 0b100, 0b011, 0b101, 0b110, 0b111)
_GRADES = torch.tensor([mask.bit_count() for mask in _MASKS], device="cpu")
_EVEN = (0, 4, 5, 6)


def _swap_sign(left: int, right: int) -> int:
    """Sign of the product of two basis elements: each swap of neighbours on the way costs a -1."""
    swaps = sum((left >> shift & right).bit_count() for shift in (1, 2))
    return -1 if swaps % 2 else 1


# Component k of a b is the sum over i of _SIGNS[k, i] a_i b_j with j = _PARTNERS[k, i]
_PARTNERS = torch.tensor([[_MASKS.index(k ^ i) for i in _MASKS] for k in _MASKS], device="cpu")
_SIGNS = torch.tensor([[_swap_sign(i, k ^ i) for i in _MASKS] for k in _MASKS], device="cpu")


def _half_types_in_float32(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Let a function of tensors compute in float32 or better, and round its result once."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        dtype = reduce(torch.promote_types, (_float_type(x) for x in chain(args, kwargs.values())))
        wide = torch.promote_types(dtype, torch.float32)
        widened = [x.to(wide) for x in args]  # type: ignore[attr-defined]
        named = {name: x.to(wide) for name, x in kwargs.items()}  # type: ignore[attr-defined]
        return function(*widened, **named).to(dtype)

    return wrapped


def _float_type(x: object) -> torch.dtype:
    if not (isinstance(x, Tensor) and x.is_floating_point()):
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"expected a tensor of floating point numbers, got {kind}; convert it")
    return x.dtype


def _check_components(*multivectors: Tensor) -> None:
    for x in multivectors:
        if x.ndim == 0 or x.shape[-1] != 8:
            raise ValueError(
                f"a multivector has 8 components in its last dimension, got shape {tuple(x.shape)};"
                " embed() makes multivectors of vectors"
            )


@_half_types_in_float32
def geometric_product(a: Tensor, b: Tensor) -> Tensor:
    """Geometric product a b, [..., 8], of multivectors [..., 8] whose batch shapes broadcast."""
    _check_components(a, b)
    terms = _SIGNS.to(b) * b[..., _PARTNERS.to(b.device)]
    return (a.unsqueeze(-2) * terms).sum(-1)


def compose(second: Tensor, first: Tensor) -> Tensor:
    """Rotor [..., 8] that turns as `first` does and then as `second` does."""
    return geometric_product(second, first)


def reverse(a: Tensor) -> Tensor:
    """Reverse ~a, [..., 8]: every product of vectors in the opposite order. Exact in any type."""
    _check_components(a)
    return torch.where((_GRADES >= 2).to(a.device), -a, a)


def grade(a: Tensor, k: int) -> Tensor:
    """Part of grade `k` of a multivector, [..., 8], with zeros in place of the other grades.

    Args:
        a: Multivectors, [..., 8].
        k: 0 scalar, 1 vector, 2 bivector, 3 trivector.

    Raises:
        ValueError: If `k` is not one of these, or `a` is not a multivector.
    """
    _check_components(a)
    if k not in (0, 1, 2, 3):
        raise ValueError(f"Cl(3,0) has the grades 0, 1, 2 and 3, got {k}")
    return torch.where(torch.eq(_GRADES, k).to(a.device), a, 0)


@_half_types_in_float32
def norm(a: Tensor) -> Tensor:
    """Norm [...] of multivectors [..., 8]: the root of the scalar part of a ~a."""
    _check_components(a)
    # Every basis element times its own reverse is +1 in Cl(3,0)
    return torch.linalg.vector_norm(a, dim=-1)


@_half_types_in_float32
def exp_bivector(b: Tensor) -> Tensor:
    """Rotor exp(B) = cos|B| + sin|B| / |B| B, [..., 8], exact also as B goes to 0.

    Args:
        b: Multivectors, [..., 8]. Only the bivector part B is read. To turn by an angle, in
            radians, in the plane of the unit bivector I, pass -angle / 2 I.
    """
    bivector = grade(b, 2)
    angle = norm(bivector).unsqueeze(-1)
    # torch.sinc(x) is sin(pi x) / (pi x), with its limit 1 at 0
    rotor = torch.sinc(angle / torch.pi) * bivector
    return rotor + grade(angle.cos().expand_as(rotor), 0)


@_half_types_in_float32
def sandwich(rotor: Tensor, x: Tensor) -> Tensor:
    """Sandwich R x ~R, all 8 components, [..., 8], of `rotor` and `x`, [..., 8] each."""
    return geometric_product(geometric_product(rotor, x), reverse(rotor))


@_half_types_in_float32
def rotor_to_matrix(rotor: Tensor) -> Tensor:
    """Rotation matrix A, [..., 3, 3], of a rotor [..., 8]: A x are the components of R x ~R."""
    _check_components(rotor)
    images = sandwich(rotor.unsqueeze(-2), _basis_vectors(rotor))
    return images[..., 1:4].mT


@_half_types_in_float32
def matrix_to_rotor(matrix: Tensor) -> Tensor:
    """Rotor [..., 8] of a rotation matrix, [..., 3, 3]; of the pair R, -R one is returned.

    With f_i the image of e_i and X any even multivector, X + sum_i f_i X e_i = 4 <~R X>_0 R. The
    four even basis elements X thus give R times 4 times one of its components; the largest of the
    four is at least 2, so that no angle is special.

    Raises:
        ValueError: If the shape is wrong, or a determinant is not positive (no rotation).
    """
    if matrix.shape[-2:] != (3, 3):
        raise ValueError(f"expected matrices of shape [..., 3, 3], got {tuple(matrix.shape)}")
    if not bool((torch.linalg.det(matrix) > 0).all()):
        raise ValueError("only rotations have rotors, got a matrix whose determinant is not +1")
    candidates = _rotor_candidates(matrix)
    sizes = norm(candidates)
    largest = sizes.argmax(-1)[..., None, None].expand(*sizes.shape[:-1], 1, 8)
    chosen = candidates.gather(-2, largest).squeeze(-2)
    return chosen / norm(chosen).unsqueeze(-1)


def _rotor_candidates(matrix: Tensor) -> Tensor:
    """The four multiples of the rotor, [..., 4, 8], described in `matrix_to_rotor`."""
    basis = embed_even(torch.eye(4, dtype=matrix.dtype, device=matrix.device))
    images = embed(matrix.mT).squeeze(-2)
    products = geometric_product(images.unsqueeze(-3), basis.unsqueeze(-2))  # [..., 4, 3, 8]
    return basis + geometric_product(products, _basis_vectors(matrix)).sum(-2)


def _basis_vectors(like: Tensor) -> Tensor:
    return embed(torch.eye(3, dtype=like.dtype, device=like.device)).squeeze(-2)


def embed(x: Tensor) -> Tensor:
    """Vectors [..., d] as multivectors of grade 1, [..., ceil(d / 3), 8].

    Three neighbouring coordinates make one multivector; the last one is padded with zeros.
    """
    groups = -(-x.shape[-1] // 3)
    padded = torch.nn.functional.pad(x, (0, 3 * groups - x.shape[-1]))
    return torch.nn.functional.pad(padded.unflatten(-1, (groups, 3)), (1, 4))


def extract(m: Tensor, d: int) -> Tensor:
    """Coordinates [..., d] of the grade-1 parts of multivectors [..., ceil(d / 3), 8].

    Raises:
        ValueError: If the multivectors are not as many as `embed` makes of `d` coordinates.
    """
    _check_components(m)
    if m.ndim < 2 or m.shape[-2] != -(-d // 3):
        raise ValueError(f"{d} coordinates need {-(-d // 3)} multivectors, got {tuple(m.shape)}")
    return m[..., 1:4].flatten(-2)[..., :d]


def embed_even(components: Tensor) -> Tensor:
    """Even multivectors [..., 8] of the components along 1, e12, e13 and e23, [..., 4]."""
    if components.shape[-1] != 4:
        raise ValueError(f"expected 4 even components, got shape {tuple(components.shape)}")
    result = components.new_zeros(*components.shape[:-1], 8)
    result[..., _EVEN] = components
    return result


def random_rotors(n: int, generator: torch.Generator) -> Tensor:
    """`n` rotors, [n, 8], float64, uniform (Haar) on Spin(3), the unit sphere of R^4."""
    points = torch.randn(n, 4, generator=generator, dtype=torch.float64, device="cpu")
    return embed_even(points / torch.linalg.vector_norm(points, dim=-1, keepdim=True))
