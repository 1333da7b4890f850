# SPDX-License-Identifier: Apache-2.0
"""Every formula against plain float64 loops; sequences of a batch against the same alone."""

import math

import pytest
import torch
from torch import Tensor

from rq_hf.quant.measurement import MIN_TOKENS, StatisticsSettings, measure
from rq_hf.quant.preconditioning import Preconditioner
from rq_hf.quant.rope import RopeTable
from rq_hf.quant.seeding import generator

EPS = torch.finfo(torch.float32).eps
CONVENTIONS = {"half_split": False, "interleaved": True}
FIELDS = ("pre_mean", "post_mean", "balance", "value_mean")


def normal(*shape: int, label: str = "x") -> Tensor:
    stream = generator(0, "preconditioning", label)
    return torch.randn(*shape, generator=stream, dtype=torch.float64).float()


def table(rotary_dim: int, interleaved: bool | None, base: float = 10_000.0) -> RopeTable:
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    return RopeTable(1.0 / base**exponent, interleaved)


def slow_rotation(x: Tensor, rope: RopeTable, start: int, sign: int = 1) -> Tensor:
    """float64, one pair at a time."""
    out = x.double().clone()
    half = rope.rotary_dim // 2
    for pair in range(half):
        i, j = (2 * pair, 2 * pair + 1) if rope.interleaved else (pair, pair + half)
        theta = float(rope.inv_freq[pair])
        angles = [sign * (start + row) * theta for row in range(x.shape[-2])]
        cos = torch.tensor([math.cos(angle) for angle in angles], dtype=torch.float64)
        sin = torch.tensor([math.sin(angle) for angle in angles], dtype=torch.float64)
        a, b = x[..., i].double(), x[..., j].double()
        out[..., i], out[..., j] = a * cos - b * sin, b * cos + a * sin
    return out


def biased_keys(
    rope: RopeTable, shape: tuple[int, int, int, int], start: int, size: float = 10.0
) -> Tensor:
    """Noise of variance 1 about a constant that was added before RoPE."""
    batch, heads, count, dim = shape
    bias = size * normal(batch, heads, 1, dim, label="bias")
    return rope.rotate(bias, start, count) + normal(*shape, label="noise")


def rms(x: Tensor, dim: int) -> Tensor:
    return x.double().square().mean(dim).sqrt()


def assert_same(a: Preconditioner, b: Preconditioner) -> None:
    for name in FIELDS:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def row(p: Preconditioner, index: int) -> Preconditioner:
    return p.map(lambda x: x[index : index + 1])


class TestRopeTable:
    @pytest.mark.parametrize("interleaved", CONVENTIONS.values(), ids=CONVENTIONS)
    @pytest.mark.parametrize("rotary_dim", [64, 32, 2])
    @pytest.mark.parametrize("start", [0, 5, 10**6 - 3])
    def test_turns_pairs_by_position(self, interleaved: bool, rotary_dim: int, start: int) -> None:
        rope, x = table(rotary_dim, interleaved), normal(2, 3, 7, 64)
        # of each pair: two products, a sum, and cosine and sine rounded once
        bound = 4 * EPS * x.abs().max() * math.sqrt(2)
        for sign, turn in ((1, rope.rotate), (-1, rope.unrotate)):
            error = turn(x, start).double() - slow_rotation(x, rope, start, sign)
            assert error.abs().max() <= bound
        assert torch.equal(rope.rotate(x, start)[..., rotary_dim:], x[..., rotary_dim:])

    @pytest.mark.parametrize("interleaved", CONVENTIONS.values(), ids=CONVENTIONS)
    def test_one_vector_for_many_positions(self, interleaved: bool) -> None:
        rope, x = table(32, interleaved), normal(2, 3, 1, 48)
        turned = rope.rotate(x, 9, 20)
        assert torch.equal(turned, rope.rotate(x.expand(-1, -1, 20, -1), 9))

    def test_a_kept_range_serves_its_parts(self) -> None:
        kept, fresh = table(64, False), table(64, False)
        kept.cos_sin(100, 5000)
        for start, count in ((100, 5000), (4000, 7), (100, 1), (99, 3), (5099, 2)):
            expected = fresh.cos_sin(start, count)
            assert all(
                torch.equal(a, b) for a, b in zip(kept.cos_sin(start, count), expected, strict=True)
            )
            fresh._last.clear()

    def test_half_types_are_computed_in_float32(self) -> None:
        rope, x = table(64, False), normal(1, 1, 4, 64).bfloat16()
        assert torch.equal(rope.rotate(x, 3), rope.rotate(x.float(), 3))

    def test_refusals(self) -> None:
        with pytest.raises(ValueError, match="conventions"):
            table(8, None).rotate(normal(1, 8), 0)
        with pytest.raises(ValueError, match="another layer"):
            table(16, False).rotate(normal(1, 8), 0)
        with pytest.raises(ValueError, match="inv_freq"):
            RopeTable(torch.ones(2, 2))

    def test_an_unknown_convention_lists_both(self) -> None:
        unknown = table(8, None)
        assert [t.interleaved for t in unknown.conventions] == [False, True]
        assert table(8, True).conventions[0].interleaved is True


class TestMeans:
    @pytest.mark.parametrize("count", [MIN_TOKENS, 63, 500])
    @pytest.mark.parametrize("rotary_dim", [80, 20])
    @pytest.mark.parametrize("interleaved", CONVENTIONS.values(), ids=CONVENTIONS)
    def test_are_the_means(self, count: int, rotary_dim: int, interleaved: bool) -> None:
        rope, start = table(rotary_dim, interleaved), 1000
        keys = biased_keys(rope, (2, 2, count, 80), start, size=3.0)
        values = normal(2, 2, count, 80, label="values") + 2
        pre = slow_rotation(keys, rope, start, -1).mean(2)
        post = keys.double().mean(2)
        # each number is rounded in the rotation, then the mean once: sums are float64
        bound = (4 * math.sqrt(2) + 1) * EPS * keys.abs().max()
        for choice, expected in (("pre_rope", pre), ("post_rope", post)):
            settings = StatisticsSettings(choice, balance=False)
            got = measure(keys, values, start=start, rope=rope, settings=settings)
            mean, other = got.pre_mean, got.post_mean
            if choice == "post_rope":
                mean, other = other, mean
            assert (mean.double() - expected).abs().max() <= bound
            assert not other.any()
            assert (got.value_mean.double() - values.double().mean(2)).abs().max() <= bound
            assert torch.equal(got.balance, torch.ones_like(got.balance))

    def test_of_many_spans(self) -> None:
        rope, start = table(64, False), 1021
        keys = biased_keys(rope, (1, 2, 3000, 64), start)
        got = measure(keys, keys, start=start, rope=rope, settings=StatisticsSettings("pre_rope"))
        expected = rope.unrotate(keys, start).double().mean(2)
        # the same float32 numbers, summed in float64: the result is rounded, nothing else
        for mean, wanted in ((got.pre_mean, expected), (got.value_mean, keys.double().mean(2))):
            assert ((mean - wanted).abs() <= EPS * wanted.abs()).all()

    def test_without_rope_before_is_after(self) -> None:
        keys = normal(1, 2, 40, 16) + 3
        a, b = (
            measure(keys, keys, start=0, rope=None, settings=StatisticsSettings(choice))
            for choice in ("pre_rope", "post_rope")
        )
        assert_same(a, b)
        assert a.rope is None and a.post_mean.mean() > 2.5

    def test_can_be_left_out(self) -> None:
        keys = normal(1, 2, 40, 16) + 3
        settings = StatisticsSettings("none", balance=False, value_mean=False)
        got = measure(keys, keys, start=0, rope=table(16, False), settings=settings)
        assert_same(got, Preconditioner.identity(keys))
        assert torch.equal(got.precondition_keys(keys, 0), keys)
        assert torch.equal(got.center_values(keys), keys)


class TestAuto:
    settings = StatisticsSettings("auto")

    @pytest.mark.parametrize("known", [True, False])
    @pytest.mark.parametrize("interleaved", CONVENTIONS.values(), ids=CONVENTIONS)
    def test_finds_a_bias_before_rope(self, interleaved: bool, known: bool) -> None:
        rope = table(64, interleaved)
        keys = biased_keys(rope, (2, 3, 200, 64), start=4)
        told = rope if known else table(64, None)
        got = measure(keys, keys, start=4, rope=told, settings=self.settings)
        assert got.rope is not None and got.rope.interleaved is interleaved
        assert got.pre_mean.any(-1).all() and not got.post_mean.any()
        left = keys - got.key_mean(4, 200)
        # the noise had variance 1, of which the mean takes 1 / n along
        assert left.square().mean() == pytest.approx(1.0, rel=0.05)

    def test_finds_a_constant_after_rope(self) -> None:
        keys = normal(2, 3, 200, 64) + 4 * normal(2, 3, 1, 64, label="constant")
        got = measure(keys, keys, start=4, rope=table(64, False), settings=self.settings)
        assert got.rope is None
        assert got.post_mean.any(-1).all() and not got.pre_mean.any()

    @pytest.mark.parametrize("count", [MIN_TOKENS, 64, 400])
    def test_leaves_keys_without_a_mean_alone(self, count: int) -> None:
        keys = normal(2, 8, count, 64)
        got = measure(keys, keys, start=4, rope=table(64, None), settings=self.settings)
        assert got.rope is None and not got.post_mean.any() and not got.pre_mean.any()

    def test_decides_by_head(self) -> None:
        rope = table(64, False)
        keys = normal(1, 3, 200, 64)
        keys[:, 0] += 4 * normal(1, 1, 64, label="constant")
        keys[:, 1] = biased_keys(rope, (1, 1, 200, 64), start=0)[:, 0]
        got = measure(keys, keys, start=0, rope=rope, settings=self.settings)
        assert got.pre_mean.any(-1).tolist() == [[False, True, False]]
        assert got.post_mean.any(-1).tolist() == [[True, False, False]]

    def test_survives_a_table_of_another_width(self) -> None:
        keys = normal(1, 2, 40, 16) + 3
        got = measure(keys, keys, start=0, rope=table(64, False), settings=self.settings)
        assert got.rope is None and got.post_mean.any(-1).all()


class TestBalance:
    def measured(
        self, keys: Tensor, power: Tensor | None, limit: float = 4.0, choice: str = "none"
    ) -> Tensor:
        settings = StatisticsSettings(choice, balance_limit=limit)
        got = measure(
            keys, keys, start=7, rope=table(64, True), settings=settings, query_power=power
        )
        return got.balance

    @pytest.mark.parametrize("with_queries", [True, False])
    @pytest.mark.parametrize("limit", [1.0, 1.5, 4.0, 100.0])
    @pytest.mark.parametrize("choice", ["pre_rope", "none"])
    def test_is_the_root_of_the_ratio(self, with_queries: bool, limit: float, choice: str) -> None:
        spread = torch.exp(normal(2, 3, 1, 64, label="spread"))
        keys = normal(2, 3, 90, 64) * spread + 1
        power = torch.exp(2 * normal(2, 3, 64, label="queries")) if with_queries else None
        residual = keys.double()
        if choice == "pre_rope":
            pre = slow_rotation(keys, table(64, True), 7, -1).mean(2, keepdim=True)
            residual = residual - slow_rotation(pre.expand(-1, -1, 90, -1), table(64, True), 7)
        ratio = 1 / rms(residual, 2)
        if power is not None:
            ratio = power.double().sqrt() * ratio
        expected = ratio.sqrt()
        expected = expected / expected.prod(-1, keepdim=True) ** (1 / 64)
        expected = expected.clamp(1 / limit, limit)
        got = self.measured(keys, power, limit, choice)
        # a residual is off by 15 roundings of the largest key: of the mean, of the mean turned
        # to its position, and of the difference; the square root halves it, for a channel's own
        # power and for the average over channels; one more for the result
        error = 16 * EPS * keys.abs().max() / rms(residual, 2).min()
        assert (got / expected - 1).abs().max() <= error

    def test_a_dead_channel_is_clamped_and_spoils_no_other(self) -> None:
        keys = normal(1, 1, 200, 64)
        keys[..., 5] = 0
        power = torch.ones(1, 1, 64)
        power[..., 9] = 0
        got = self.measured(keys, power)[0, 0]
        assert got[5] == 4.0 and got[9] == 0.25
        others = got[[i for i in range(64) if i not in (5, 9)]]
        # noise of a power of 200 numbers: sqrt(2 / 200) / 4, times 4 sigma
        assert (others - 1).abs().max() < 0.1

    def test_nothing_to_balance(self) -> None:
        zero = torch.zeros(1, 2, 40, 64)
        assert torch.equal(self.measured(zero, None), torch.ones(1, 2, 64))
        keys = normal(1, 2, 40, 64)
        silent = self.measured(keys, torch.zeros(1, 2, 64))
        assert torch.equal(silent, self.measured(keys, None))


class TestMaps:
    start = 1019

    def setup_method(self) -> None:
        self.rope = table(48, False)
        self.keys = biased_keys(self.rope, (2, 2, 1500, 64), self.start, size=50.0)
        self.values = normal(2, 2, 1500, 64, label="values") + 5
        power = torch.exp(normal(2, 2, 64, label="queries"))
        self.p = measure(
            self.keys,
            self.values,
            start=self.start,
            rope=self.rope,
            settings=StatisticsSettings(),
            query_power=power,
        )

    def test_scores_are_kept(self) -> None:
        query = normal(2, 2, 5, 64, label="q").double()
        new = self.p.precondition_keys(self.keys, self.start).double()
        mean = self.p.key_mean(self.start, 1500).double()
        balance = self.p.balance[:, :, None].double()
        exact = query @ self.keys.double().mT
        got = (query / balance) @ new.mT + query @ mean.mT
        # k - mean and the product with the balance are rounded once each
        size = query.abs() @ (self.keys.abs() + mean.abs()).double().mT
        assert ((got - exact).abs() <= 2 * EPS * size).all()
        assert (got - query @ mean.mT).abs().max() > 1

    def test_mean_term_is_the_rotated_mean(self) -> None:
        some = self.p.key_mean(self.start + 40, 60)
        pre = self.p.pre_mean[:, :, None].expand(-1, -1, 60, -1)
        expected = slow_rotation(pre, self.rope, self.start + 40)
        assert (some - expected).abs().max() <= 6 * EPS * pre.abs().max()

    def test_rows_may_come_in_parts(self) -> None:
        whole = self.p.precondition_keys(self.keys, self.start)
        for a, b in ((0, 1), (1, 130), (130, 1500)):
            part = self.p.precondition_keys(self.keys[:, :, a:b], self.start + a)
            assert torch.equal(part, whole[:, :, a:b])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_restores(self, dtype: torch.dtype) -> None:
        keys, values = self.keys.to(dtype), self.values.to(dtype)
        new = self.p.precondition_keys(keys, self.start)
        assert new.dtype == torch.float32
        back = self.p.restore_keys(new, self.start, dtype)
        size = keys.float().abs() + self.p.key_mean(self.start, 1500).abs()
        eps = torch.finfo(dtype).eps
        assert back.dtype == dtype
        assert ((back.float() - keys.float()).abs() <= (4 * EPS + eps) * size).all()
        back = self.p.restore_values(self.p.center_values(values), dtype)
        size = values.float().abs() + self.p.value_mean[:, :, None].abs()
        assert back.dtype == dtype
        assert ((back.float() - values.float()).abs() <= (2 * EPS + eps) * size).all()

    def test_centres(self) -> None:
        for x in (
            self.p.center_values(self.values),
            self.rope.unrotate(
                self.p.precondition_keys(self.keys, self.start) / self.p.balance[:, :, None],
                self.start,
            ),
        ):
            assert x.double().mean(2).abs().max() <= 20 * EPS * self.keys.abs().max()

    def test_inputs_stay_as_they_are_in_any_layout(self) -> None:
        turned = self.keys.transpose(1, 2).contiguous().transpose(1, 2)
        copy = turned.clone()
        new = self.p.precondition_keys(turned, self.start)
        assert torch.equal(turned, copy)
        assert torch.equal(new, self.p.precondition_keys(self.keys, self.start))
        got = measure(
            turned, turned, start=self.start, rope=self.rope, settings=StatisticsSettings()
        )
        assert torch.equal(got.pre_mean, self.p.pre_mean)

    def test_map_reorders(self) -> None:
        order = torch.tensor([1, 0, 0])
        moved = self.p.map(lambda x: x[order])
        assert moved.rope is self.p.rope
        new = moved.precondition_keys(self.keys[order], self.start)
        assert torch.equal(new, self.p.precondition_keys(self.keys, self.start)[order])
        assert torch.equal(
            moved.center_values(self.values[order]), self.p.center_values(self.values)[order]
        )


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_queries_that_are_not_finite_balance_nothing(number: float) -> None:
    keys, settings = torch.randn(1, 1, 40, 16), StatisticsSettings()
    power = torch.ones(1, 1, 16)
    power[..., 3] = number
    options = {"start": 0, "rope": None, "settings": settings}
    measured = measure(keys, keys, query_power=power, **options)
    assert torch.equal(measured.balance, measure(keys, keys, query_power=None, **options).balance)


class TestBatches:
    """A sequence is measured as if it were alone and not padded.

    Float64 sums in another order differ by 1e-16 or so of their size, and rounding to float32 hides
    that in all but one of some hundred million numbers: none here, so these compare to the bit.
    """

    start, count, paddings = 4, 1500, (0, 37, 1100, 1501 - MIN_TOKENS)

    def setup_method(self) -> None:
        self.rope = table(64, False)
        shape = (4, 2, self.count, 64)
        self.keys = biased_keys(self.rope, shape, self.start)
        self.values = normal(*shape, label="values") + 1
        self.power = torch.exp(normal(4, 2, 64, label="queries"))
        first = torch.tensor(self.paddings)[:, None]
        self.valid = torch.arange(self.count)[None] >= first

    def measured(self, keys: Tensor, values: Tensor, choice: str) -> Preconditioner:
        return measure(
            keys,
            values,
            start=self.start,
            rope=self.rope,
            settings=StatisticsSettings(choice),
            query_power=self.power,
            valid=self.valid,
        )

    def alone(self, index: int, choice: str) -> Preconditioner:
        skip = self.paddings[index]
        return measure(
            self.keys[index : index + 1, :, skip:].clone(),
            self.values[index : index + 1, :, skip:].clone(),
            start=self.start + skip,
            rope=RopeTable(self.rope.inv_freq),
            settings=StatisticsSettings(choice),
            query_power=self.power[index : index + 1],
        )

    @pytest.mark.parametrize(
        ("choice", "garbage"),
        [
            ("auto", 1e4),
            ("auto", 3e38),
            ("auto", math.nan),
            ("pre_rope", 1e4),
            ("post_rope", 1e4),
        ],
    )
    def test_padding_does_not_count(self, choice: str, garbage: float) -> None:
        hole = ~self.valid[:, None, :, None]
        keys = self.keys.masked_fill(hole, garbage)
        values = self.values.masked_fill(hole, garbage)
        got = self.measured(keys, values, choice)
        for index in range(3):
            assert_same(row(got, index), self.alone(index, choice))
            assert row(got, index).balance.std() > 0.01
        # one token too few
        assert_same(row(got, 3), Preconditioner.identity(keys[3:]))

    def test_rows_do_not_mix(self) -> None:
        other = self.keys.clone()
        other[0], other[2] = 100 * other[0] + 7, 0
        a = self.measured(self.keys, self.values, "auto")
        b = self.measured(other, self.values, "auto")
        assert_same(row(a, 1), row(b, 1))
        assert not torch.equal(a.pre_mean[0], b.pre_mean[0])

    @pytest.mark.parametrize("interleaved", CONVENTIONS.values(), ids=CONVENTIONS)
    def test_an_offset_of_positions_cancels(self, interleaved: bool) -> None:
        rope, offset = table(64, interleaved), 37
        keys = biased_keys(rope, (1, 2, 300, 64), start=1000)
        residuals = []
        for start in (1000, 1000 - offset):
            got = measure(keys, keys, start=start, rope=rope, settings=StatisticsSettings())
            assert got.rope is not None
            residuals.append(got.precondition_keys(keys, start))
        # the means differ by a turn: two residuals, each off by 15 roundings of the largest key
        # as in TestBalance, times a balance of at most 4
        bound = 4.0 * 2 * 15 * EPS * keys.abs().max()
        assert (residuals[0] - residuals[1]).abs().max() <= bound
        assert residuals[0].std() > 0.5


class TestRefusals:
    def test_settings(self) -> None:
        with pytest.raises(ValueError, match="pre_rope"):
            StatisticsSettings(key_mean="median")
        for limit in (0.5, math.inf, math.nan):
            with pytest.raises(ValueError, match="balance_limit"):
                StatisticsSettings(balance_limit=limit)

    @pytest.mark.parametrize(
        ("changed", "match"),
        [
            ({"values": torch.zeros(1, 2, 20, 8)}, "one shape"),
            ({"keys": torch.zeros(1, 2, 0, 16), "values": torch.zeros(1, 2, 0, 16)}, "one token"),
            ({"query_power": torch.ones(1, 4, 16)}, "heads of a group"),
            ({"valid": torch.ones(1, 20)}, "bool"),
            ({"valid": torch.ones(1, 21, dtype=torch.bool)}, "tokens"),
            ({"rope": table(32, False), "settings": StatisticsSettings("pre_rope")}, "turns 32"),
        ],
    )
    def test_shapes(self, changed: dict, match: str) -> None:
        keys = normal(1, 2, 20, 16)
        arguments = {
            "keys": keys,
            "values": keys,
            "start": 0,
            "rope": None,
            "settings": StatisticsSettings(),
        }
        with pytest.raises(ValueError, match=match):
            measure(**{**arguments, **changed})


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [16, 64])
def test_inner_products_are_those_with_the_turned_vector(
    interleaved: bool, rotary_dim: int
) -> None:
    rope = table(rotary_dim, interleaved)
    x, vector = normal(2, 3, 5, 64).double(), normal(2, 3, 1, 64, label="vector").double()
    turned = slow_rotation(vector.expand(2, 3, 70, 64), rope, 1000)
    wanted = x @ turned.transpose(-1, -2)
    actual = rope.inner_products(x, vector, 1000, 70)
    # the table itself is float32
    torch.testing.assert_close(actual, wanted, rtol=0, atol=64 * EPS * float(wanted.abs().max()))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [16, 64])
def test_turns_by_channel_are_the_same_turns(interleaved: bool, rotary_dim: int) -> None:
    rope, x = table(rotary_dim, interleaved), normal(2, 3, 70, 64)
    cos, sin = rope.channels(1000, 70, 64)
    assert cos.shape == sin.shape == (70, 64)
    assert torch.equal(x * cos - rope.partner(x) * sin, rope.rotate(x, 1000))
    assert torch.equal(x * cos + rope.partner(x) * sin, rope.unrotate(x, 1000))
    with pytest.raises(ValueError, match="turns"):
        rope.channels(0, 1, rotary_dim - 2)


def test_mean_scores_are_products_with_the_means() -> None:
    rope = table(64, False)
    keys = biased_keys(rope, (2, 3, 300, 64), 4)
    query = normal(2, 3, 2, 5, 64)
    for settings in (StatisticsSettings("pre_rope"), StatisticsSettings("post_rope")):
        statistics = measure(keys, keys, start=4, rope=rope, settings=settings)
        means = statistics.key_mean(50, 40)
        wanted = query @ means.transpose(2, 3)[:, :, None]
        actual = statistics.mean_scores(query, 50, 40).expand_as(wanted)
        bound = 64 * EPS * float(wanted.abs().max())
        torch.testing.assert_close(actual, wanted, rtol=0, atol=bound)


def test_long_tables_are_not_kept() -> None:
    rope = table(16, False)
    rope.cos_sin(0, 8192)
    kept = rope._last["cpu"][1]
    assert kept.shape == (8192, 8)
    cos, _ = rope.cos_sin(0, 20_000)
    assert cos.shape == (20_000, 8)
    assert rope._last["cpu"][1] is kept
