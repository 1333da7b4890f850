# SPDX-License-Identifier: Apache-2.0
"""What every entry of ROTATIONS promises: orthogonal, reproducible, the same in all its forms."""

import pytest
import torch
from torch import Tensor

from rq_hf.quant.rotations import ROTATIONS, make_rotation
from rq_hf.quant.rotations.base import Rotation
from rq_hf.quant.seeding import generator

HEAD_DIMS = [1, 2, 3, 4, 5, 7, 64, 80, 96, 100, 112, 128, 256]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DRAWN = [name for name in ROTATIONS if name != "none"]

every_rotation = pytest.mark.parametrize("name", ROTATIONS)
every_head_dim = pytest.mark.parametrize("head_dim", HEAD_DIMS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def vectors(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator(0, "vectors"), dtype=torch.float64).to(dtype)


def precision(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def construction_error(head_dim: int) -> float:
    """Bound on the entries of R R^T - I, for R computed in float64.

    Roundings of products of D terms add up as random steps do, to sqrt(D) eps. A layer of rotors
    is within 4 eps of orthogonal and at most 7 follow each other; QR is within sqrt(D) eps.
    """
    return 8 * head_dim**0.5 * precision(torch.float64)


@every_rotation
@every_head_dim
@every_dtype
def test_matrix_is_orthogonal(name: str, head_dim: int, dtype: torch.dtype) -> None:
    matrix = make_rotation(name, head_dim, 0).matrix(dtype=dtype).double()
    # Rounding an entry moves it by at most eps / 2 of its size, hence a product of two unit rows by
    # at most eps (Cauchy-Schwarz)
    bound = precision(dtype) + construction_error(head_dim)
    assert matrix.shape == (head_dim, head_dim)
    assert (matrix @ matrix.T - torch.eye(head_dim)).abs().max() <= bound


@pytest.mark.parametrize("name", ["rotor", "butterfly", "none"])
@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, 6, 16, 160])  # shuffles of the last three are odd
def test_determinant_is_one(name: str, head_dim: int) -> None:
    for seed in range(4):
        matrix = make_rotation(name, head_dim, seed).matrix(dtype=torch.float64)
        bound = head_dim * construction_error(head_dim)
        assert abs(torch.linalg.det(matrix) - 1) <= bound


@every_rotation
@every_head_dim
@every_dtype
def test_forward_and_inverse_are_the_matrix(name: str, head_dim: int, dtype: torch.dtype) -> None:
    rotation = make_rotation(name, head_dim, 0)
    x = vectors(5, 2, head_dim, dtype=dtype)
    matrix = rotation.matrix(dtype=torch.float64)
    # One rounding of the matrix, one of the result, and D of a product in float32 or better
    wide = precision(torch.promote_types(dtype, torch.float32))
    bound = (precision(dtype) + (head_dim + 1) * wide) * x.double().norm(dim=-1, keepdim=True)
    for result, expected in [
        (rotation.forward(x), x.double() @ matrix.T),
        (rotation.inverse(x), x.double() @ matrix),
    ]:
        assert result.dtype == dtype
        assert ((result.double() - expected).abs() <= bound).all()


@every_rotation
@every_head_dim
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_norms_stay_and_vectors_come_back(name: str, head_dim: int, dtype: torch.dtype) -> None:
    rotation = make_rotation(name, head_dim, 0)
    x = vectors(50, head_dim, dtype=dtype)
    y = rotation.forward(x)
    # Each product of D terms errs by at most D eps / 2 of the norms, and there are D of them
    bound = head_dim**1.5 * precision(dtype) + construction_error(head_dim)
    assert ((y.norm(dim=-1) - x.norm(dim=-1)).abs() <= bound * x.norm(dim=-1)).all()
    assert ((rotation.inverse(y) - x).norm(dim=-1) <= 2 * bound * x.norm(dim=-1)).all()


@every_rotation
@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 1, 3, 64)], ids=str)
def test_any_batch_shape(name: str, shape: tuple[int, ...]) -> None:
    x = vectors(*shape)
    assert make_rotation(name, 64, 0).forward(x).shape == shape


@every_rotation
def test_non_contiguous_vectors(name: str) -> None:
    rotation = make_rotation(name, 64, 0)
    x = vectors(64, 6).T
    bound = 64 * precision(torch.float64) * x.norm(dim=-1, keepdim=True)
    assert ((rotation.forward(x) - rotation.forward(x.contiguous())).abs() <= bound).all()


@every_rotation
@every_head_dim
def test_matrix_follows_from_the_seed(name: str, head_dim: int) -> None:
    kind = ROTATIONS[name]
    first, second = (kind(head_dim, generator(7, "same")) for _ in range(2))
    assert torch.equal(first.matrix(dtype=torch.float64), second.matrix(dtype=torch.float64))


@pytest.mark.parametrize("name", DRAWN)
def test_seeds_and_labels_change_the_matrix(name: str) -> None:
    keys = [(0,), (1,), (0, "key"), (0, "value"), (0, "key", 0), (0, "key", 1), (0, "key", "1")]
    flat = [make_rotation(name, 96, *key).matrix(dtype=torch.float64).flatten() for key in keys]
    for i, first in enumerate(flat):
        for second in flat[:i]:
            # Independent entries beside zeros: a coarse bound on the correlation, which is 1 for
            # equal matrices
            assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.5


@every_rotation
def test_equal_arguments_share_one_rotation(name: str) -> None:
    assert make_rotation(name, 64, 3, "key") is make_rotation(name, 64, 3, "key")
    assert make_rotation(name, 64, 3, "key").head_dim == 64
    assert ROTATIONS[name].name == name


@every_rotation
def test_matrices_are_kept_per_type(name: str) -> None:
    rotation = make_rotation(name, 64, 0)
    for dtype in DTYPES:
        matrix = rotation.matrix("cpu", dtype)
        assert matrix.dtype == dtype
        assert matrix is rotation.matrix(torch.device("cpu"), dtype)
    assert rotation.matrix() is rotation.matrix("cpu", torch.float32)


@every_rotation
def test_matrices_lie_on_the_device(name: str, device: torch.device) -> None:
    rotation = make_rotation(name, 96, 0)
    matrix = rotation.matrix(device)
    assert matrix.device.type == device.type
    assert matrix is rotation.matrix(matrix.device)
    assert torch.equal(matrix.cpu(), rotation.matrix())
    x = vectors(10, 96)
    bound = 96 * precision(torch.float64) * x.norm(dim=-1, keepdim=True)
    assert ((rotation.forward(x.to(device)).cpu() - rotation.forward(x)).abs() <= bound).all()


@every_rotation
def test_default_device_does_not_matter(name: str) -> None:
    with torch.device("meta"):
        rotation = ROTATIONS[name](80, generator(0))
        matrix = rotation.matrix()
    assert torch.equal(matrix, ROTATIONS[name](80, generator(0)).matrix())


@every_rotation
def test_matrix_made_under_inference_mode_takes_gradients(name: str) -> None:
    with torch.inference_mode():
        rotation = ROTATIONS[name](64, generator(0))
        rotation.matrix()
    x = vectors(3, 64, dtype=torch.float32).requires_grad_()
    (rotation.forward(x) ** 2).sum().backward()
    assert x.grad is not None
    # The gradient of |R x|^2 is 2 x
    assert (x.grad - 2 * x).abs().max() <= 4 * 64 * precision(torch.float32) * x.norm()


@every_rotation
def test_autocast_does_not_lower_the_precision(name: str) -> None:
    rotation = make_rotation(name, 64, 0)
    x = vectors(10, 64, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = rotation.forward(x)
    assert torch.equal(result, rotation.forward(x))


@every_rotation
def test_wrong_vectors_are_refused(name: str) -> None:
    rotation = make_rotation(name, 64, 0)
    for method in (rotation.forward, rotation.inverse):
        with pytest.raises(ValueError, match="64 coordinates"):
            method(torch.ones(2, 63))
        with pytest.raises(ValueError, match="floating point"):
            method(torch.ones(2, 64, dtype=torch.int64))


@every_rotation
def test_empty_dimension_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        make_rotation(name, 0, 0)


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match="rotor, butterfly, dense, hadamard, none"):
        make_rotation("givens", 64, 0)


def test_base_class_is_abstract() -> None:
    with pytest.raises(TypeError):
        Rotation(64, generator(0))  # type: ignore[abstract]
