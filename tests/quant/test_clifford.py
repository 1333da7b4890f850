# SPDX-License-Identifier: Apache-2.0
"""Cl(3,0) against a table made by sorting words, power series and known rotations."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rq_hf.quant.clifford import (
    compose,
    embed,
    embed_even,
    exp_bivector,
    extract,
    geometric_product,
    grade,
    matrix_to_rotor,
    norm,
    random_rotors,
    reverse,
    rotor_to_matrix,
    sandwich,
)

WORDS = ["", "1", "2", "3", "12", "13", "23", "123"]
EPS = torch.finfo(torch.float64).eps
DTYPES = [torch.float32, torch.float64]
# A product sums 8 terms: its components err by at most 8 u |a| |b| (Cauchy-Schwarz), u = eps / 2,
# so by 4 sqrt(8) eps |a| |b| < 12 eps |a| |b| in norm. Two in a row: 24 eps, and 32 leaves room
# for the rounding of unit rotors themselves.
TWO_PRODUCTS = 32


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rotors(n: int, seed: int = 0) -> Tensor:
    return random_rotors(n, torch.Generator().manual_seed(seed))


def sorted_word(word: str) -> tuple[int, str]:
    """Sign and sorted form of a product of basis vectors: swaps cost -1, equal neighbours go."""
    for i in range(len(word) - 1):
        left, right = word[i], word[i + 1]
        if left == right:
            return sorted_word(word[:i] + word[i + 2 :])
        if left > right:
            sign, rest = sorted_word(word[:i] + right + left + word[i + 2 :])
            return -sign, rest
    return 1, word


def series_exp(b: Tensor, terms: int = 40) -> Tensor:
    total = term = torch.eye(8, dtype=b.dtype)[0].expand_as(b)
    for k in range(1, terms):
        term = geometric_product(term, b) / k
        total = total + term
    return total


def up_to_sign(a: Tensor, b: Tensor) -> float:
    return float(torch.minimum((a - b).abs().amax(-1), (a + b).abs().amax(-1)).max())


@pytest.mark.parametrize("i", range(8))
@pytest.mark.parametrize("j", range(8))
def test_product_of_basis_elements(i: int, j: int) -> None:
    sign, word = sorted_word(WORDS[i] + WORDS[j])
    basis = torch.eye(8, dtype=torch.float64)
    expected = sign * basis[WORDS.index(word)]
    assert torch.equal(geometric_product(basis[i], basis[j]), expected)


def test_product_is_associative() -> None:
    a, b, c = (random(500, seed=s) for s in range(3))
    left = geometric_product(geometric_product(a, b), c)
    right = geometric_product(a, geometric_product(b, c))
    # |a b| <= sqrt(8) |a| |b|; each side makes two products
    bound = 2 * TWO_PRODUCTS * math.sqrt(8) * EPS * norm(a) * norm(b) * norm(c)
    assert ((left - right).norm(dim=-1) <= bound).all()
    assert left.norm(dim=-1).min() > 0


def test_product_is_not_commutative() -> None:
    a, b = random(1), random(1, seed=1)
    assert (geometric_product(a, b) - geometric_product(b, a)).norm() > 0.1


def test_reverse_turns_products_round() -> None:
    a, b = random(500), random(500, seed=1)
    left = reverse(geometric_product(a, b))
    right = geometric_product(reverse(b), reverse(a))
    assert ((left - right).norm(dim=-1) <= TWO_PRODUCTS * EPS * norm(a) * norm(b)).all()


def test_reverse_of_words() -> None:
    signs = [sorted_word(word[::-1])[0] for word in WORDS]
    assert torch.equal(reverse(torch.eye(8)), torch.diag(torch.tensor(signs, dtype=torch.float)))


def test_grades_sum_to_the_whole() -> None:
    a = random(5)
    for k in range(4):
        kept = torch.tensor([len(word) == k for word in WORDS])
        assert torch.equal(grade(a, k)[:, kept], a[:, kept])
        assert (grade(a, k)[:, ~kept] == 0).all()


def test_norm_is_the_scalar_part_of_a_reverse_a() -> None:
    a = random(500)
    squared = geometric_product(a, reverse(a))[:, 0]
    assert ((norm(a) ** 2 - squared).abs() <= TWO_PRODUCTS * EPS * squared).all()


@pytest.mark.parametrize("size", [0.0, 1e-300, 1e-160, 1e-9, 1e-4, 1.0, 3.0])
def test_exp_equals_its_series(size: float) -> None:
    b = grade(random(50), 2)
    b = size * b / norm(b).unsqueeze(-1)
    # Terms of the series are as large as exp(size) and each is rounded
    bound = TWO_PRODUCTS * EPS * math.exp(size) * max(1.0, size)
    error = exp_bivector(b) - series_exp(b)
    assert error.abs().max() <= bound
    # The bivector part is held to its own, possibly tiny, size
    assert grade(error, 2).abs().max() <= bound * size


def test_exp_of_zero_is_one() -> None:
    one = torch.eye(8, dtype=torch.float64)[0]
    assert torch.equal(exp_bivector(torch.zeros(2, 8, dtype=torch.float64)), one.expand(2, 8))


def test_exp_reads_the_bivector_only() -> None:
    x = random(10)
    assert torch.equal(exp_bivector(x), exp_bivector(grade(x, 2)))


@pytest.mark.parametrize(
    ("blade", "first", "second"), [(4, 0, 1), (5, 0, 2), (6, 1, 2)], ids=["e12", "e13", "e23"]
)
@pytest.mark.parametrize("angle", [0.0, 1e-6, 1.0, math.pi / 2, math.pi, 5.0, -2.0])
def test_rotor_turns_from_the_first_vector_to_the_second(
    blade: int, first: int, second: int, angle: float
) -> None:
    rotor = exp_bivector(-angle / 2 * torch.eye(8, dtype=torch.float64)[blade])
    expected = torch.eye(3, dtype=torch.float64)
    expected[first, first] = expected[second, second] = math.cos(angle)
    expected[second, first], expected[first, second] = math.sin(angle), -math.sin(angle)
    assert (rotor_to_matrix(rotor) - expected).abs().max() <= TWO_PRODUCTS * EPS


def test_rotors_have_unit_norm() -> None:
    r = torch.cat([rotors(500), exp_bivector(3 * random(500))])
    one = torch.eye(8, dtype=torch.float64)[0]
    assert (geometric_product(r, reverse(r)) - one).abs().max() <= TWO_PRODUCTS * EPS
    assert (norm(r) - 1).abs().max() <= 4 * EPS
    assert (r[:, [1, 2, 3, 7]] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sandwich_of_a_vector_is_a_vector(dtype: torch.dtype) -> None:
    x = embed(torch.randn(500, 3, generator=torch.Generator().manual_seed(0), dtype=dtype))[:, 0]
    turned = sandwich(rotors(500).to(dtype), x)
    bound = TWO_PRODUCTS * torch.finfo(dtype).eps * norm(x)
    for other in (0, 2, 3):
        assert (norm(grade(turned, other)) <= bound).all()
    assert ((norm(turned) - norm(x)).abs() <= bound).all()
    assert (norm(turned - x) > 0.01 * norm(x)).any()


def test_sandwich_follows_composition() -> None:
    first, second, x = rotors(200), rotors(200, seed=1), random(200, seed=2)
    at_once = sandwich(compose(second, first), x)
    in_turn = sandwich(second, sandwich(first, x))
    assert ((at_once - in_turn).norm(dim=-1) <= 4 * TWO_PRODUCTS * EPS * norm(x)).all()


def test_matrices_follow_composition() -> None:
    first, second = rotors(200), rotors(200, seed=1)
    product = rotor_to_matrix(second) @ rotor_to_matrix(first)
    difference = rotor_to_matrix(compose(second, first)) - product
    assert difference.abs().max() <= 4 * TWO_PRODUCTS * EPS
    assert (product - rotor_to_matrix(first) @ rotor_to_matrix(second)).abs().max() > 0.1


@pytest.mark.parametrize("dtype", DTYPES)
def test_matrix_acts_as_the_sandwich(dtype: torch.dtype) -> None:
    r = rotors(200).to(dtype)
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(1), dtype=dtype)
    through_matrix = (rotor_to_matrix(r) @ x.unsqueeze(-1)).squeeze(-1)
    through_sandwich = extract(sandwich(r, embed(x)[:, 0]).unsqueeze(-2), 3)
    bound = 2 * TWO_PRODUCTS * torch.finfo(dtype).eps * x.norm(dim=-1, keepdim=True)
    assert ((through_matrix - through_sandwich).abs() <= bound).all()


def test_matrices_are_rotations() -> None:
    matrices = rotor_to_matrix(rotors(500))
    one = torch.eye(3, dtype=torch.float64)
    assert (matrices @ matrices.mT - one).abs().max() <= 2 * TWO_PRODUCTS * EPS
    assert (torch.linalg.det(matrices) - 1).abs().max() <= 6 * TWO_PRODUCTS * EPS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "angle", [0.0, 1e-12, 1e-5, 2.0, math.pi - 1e-5, math.pi - 1e-12, math.pi, 5.0]
)
def test_rotor_of_a_matrix_at_any_angle(angle: float, dtype: torch.dtype) -> None:
    planes = torch.cat([torch.eye(8, dtype=torch.float64)[4:7], grade(random(200), 2)])
    planes = planes / norm(planes).unsqueeze(-1)
    expected = exp_bivector(-angle / 2 * planes).to(dtype)
    found = matrix_to_rotor(rotor_to_matrix(expected))
    assert found.dtype == dtype
    assert up_to_sign(found, expected) <= 2 * TWO_PRODUCTS * torch.finfo(dtype).eps


def test_rotor_of_a_random_matrix() -> None:
    expected = rotors(2000).view(4, 500, 8)
    found = matrix_to_rotor(rotor_to_matrix(expected))
    assert found.shape == expected.shape
    assert up_to_sign(found, expected) <= 2 * TWO_PRODUCTS * EPS


@pytest.mark.parametrize("d", [1, 2, 3, 4, 5, 64, 80, 96])
@pytest.mark.parametrize("batch", [(), (2,), (2, 0, 3)], ids=str)
def test_embedded_vectors_come_back(d: int, batch: tuple[int, ...]) -> None:
    x = torch.randn(*batch, d, generator=torch.Generator().manual_seed(0))
    m = embed(x)
    assert m.shape == (*batch, math.ceil(d / 3), 8)
    assert torch.equal(grade(m, 1), m)
    assert torch.equal(extract(m, d), x)


def test_random_rotors_are_uniform() -> None:
    n = 20000
    matrices = rotor_to_matrix(rotors(n)).flatten(-2)
    # An entry of a Haar rotation is uniform on [-1, 1]: moments 0, 1/3, 0, 1/5
    for power, moment in [(1, 0.0), (2, 1 / 3), (3, 0.0), (4, 1 / 5)]:
        deviation = math.sqrt(1 / (2 * power + 1) - moment**2)
        means = (matrices**power).mean(0)
        assert ((means - moment).abs() <= 4.5 * deviation / math.sqrt(n)).all()


def test_random_rotors_follow_the_generator() -> None:
    assert torch.equal(rotors(5), rotors(5))
    assert not torch.equal(rotors(5), rotors(5, seed=1))
    assert rotors(0).shape == (0, 8)


BINARY: list[Callable[[Tensor, Tensor], Tensor]] = [geometric_product, compose, sandwich]


@pytest.mark.parametrize("function", BINARY)
def test_batches_broadcast(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    a, b = random(4, 1, 3), random(2, 3, seed=1)
    result = function(a, b)
    assert result.shape == (4, 2, 3, 8)
    alone = function(a[3, 0, 2], b[1, 2])
    assert (result[3, 1, 2] - alone).norm() <= TWO_PRODUCTS * EPS * alone.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", BINARY)
def test_half_types_are_rounded_once(
    function: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype
) -> None:
    a, b = random(50, dtype=dtype), random(50, seed=1, dtype=dtype)
    result = function(a, b)
    assert result.dtype == dtype
    assert torch.equal(result, function(a.float(), b.float()).to(dtype))


@pytest.mark.parametrize("function", [norm, exp_bivector, rotor_to_matrix])
def test_half_types_of_one_argument(function: Callable[[Tensor], Tensor]) -> None:
    x = random(50, dtype=torch.bfloat16)
    assert torch.equal(function(x), function(x.float()).bfloat16())


def test_types_are_promoted() -> None:
    product = geometric_product(random(2, dtype=torch.float32), random(2))
    assert product.dtype == torch.float64


def test_arguments_may_be_named() -> None:
    a, b = rotors(2)
    assert torch.equal(compose(first=a, second=b), geometric_product(b, a))


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="8 components"):
        geometric_product(torch.ones(3), torch.ones(8))
    with pytest.raises(ValueError, match="floating point"):
        geometric_product(torch.ones(8, dtype=torch.int64), torch.ones(8))
    with pytest.raises(ValueError, match="grades"):
        grade(torch.ones(8), 4)
    with pytest.raises(ValueError, match="multivectors"):
        extract(torch.ones(2, 8), 7)
    with pytest.raises(ValueError, match="even components"):
        embed_even(torch.ones(8))
    with pytest.raises(ValueError, match="shape"):
        matrix_to_rotor(torch.eye(4))
    with pytest.raises(ValueError, match="determinant"):
        matrix_to_rotor(-torch.eye(3))
