"""Sums of mixed ranks from their sketches, against dense fp64; and whether the reported error is the true one."""
import math

import numpy as np
import pytest
import torch
from oracles import relative
from rounds import within
from tiny import adapter, dense

from flora.adapter import Adapter, stack
from flora.errors import AdapterError
from flora.seeds import derive
from flora.sketch import TESTS, plan, recover, sketch

SHAPES = [(1, 1), (1, 7), (13, 7), (7, 13), (97, 64), (64, 97), (300, 41), (41, 300), (211, 211)]


def falling(shape, rank, decades, seed=0):
    """An adapter whose singular values fall by so many decades, and its dense ΔW."""
    draw = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(side, rank, generator=draw, dtype=torch.float64)).Q for side in shape)
    sigma = torch.logspace(0, -decades, rank, dtype=torch.float64)
    a = Adapter(V.T.contiguous(), U * sigma, 1.0)
    return a, dense(a)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ranks", [(1,), (4, 1), (8, 3, 3, 1)], ids=str)
def test_the_sum_comes_back_from_the_sum_of_sketches(shape, ranks):
    adapters = [adapter(rank, shape, seed) for seed, rank in enumerate(ranks)]
    of_layer = plan(shape, sum(ranks), 5, "layer")
    found, quality = recover(sum(sketch(a, of_layer) for a in adapters), of_layer)
    exact, plain = sum(dense(a) for a in adapters), sum(float(a.scale[0]) * (a.B @ a.A) for a in adapters)
    assert within(dense(found), plain, exact)
    assert found.shape == shape and found.rank == quality.rank == min(*shape, sum(ranks)) and found.A.dtype == torch.float32
    assert quality.error < 2e-7 and quality.rounding == 0.0


@pytest.mark.parametrize("shape", [(64, 48), (48, 64), (9, 7)], ids=str)
def test_sketches_are_linear_and_as_long_as_planned(shape):
    one, other, of_layer = adapter(3, shape, 1), adapter(2, shape, 2), plan(shape, 5, 0)
    both = sketch(stack([one * 0.25, other * -3.0]), of_layer)
    parts = 0.25 * sketch(one, of_layer) - 3.0 * sketch(other, of_layer)
    assert both.shape == (of_layer.size,) and both.dtype == torch.float64 and relative(both, parts) < 1e-6


def test_a_layer_never_costs_more_than_itself():
    for shape in [(n, m) for n in (1, 2, 30, 64, 192, 576) for m in (1, 17, 576, 1536)]:
        for width in (1, 16, 160, 2000):
            of_layer = plan(shape, width, 0)
            long, short = max(shape), min(shape)
            assert of_layer.size <= long * short
            assert of_layer.size == (long * of_layer.w + (of_layer.v + TESTS) * short if of_layer.w else long * short)
            assert of_layer.w in (0, width + 8) and of_layer.w < short
    assert plan((576, 576), 160, 0).w == 168 and plan((192, 576), 160, 0).w == 0
    assert plan((1536, 576), 160, 0).size == plan((576, 1536), 160, 0).size


def test_the_test_matrices_are_what_they_are_said_to_be():
    """Y of the identity's columns is Ω itself; written out here from Philox's words."""
    shape, rows = (211, 60), 60
    of_layer = plan(shape, 4, "run", 2, "layer")
    assert of_layer.seed == derive("run", 2, "layer")
    eye = torch.zeros(shape[0], rows, dtype=torch.float64)
    eye[:rows] = torch.eye(rows, dtype=torch.float64)
    Y = sketch(Adapter(torch.eye(rows, dtype=torch.float64), eye, 1.0), of_layer)[:shape[0] * of_layer.w].view(shape[0], -1)
    raw = np.random.Philox(key=derive(of_layer.seed, "right")).random_raw(rows * of_layer.w)
    drawn = torch.from_numpy(((raw >> 11).astype(np.float64) * 2.0**-52 - 1.0) * math.sqrt(3)).view(rows, of_layer.w)
    assert torch.allclose(Y[:rows], drawn, rtol=0, atol=1e-14) and not bool(Y[rows:].any())
    assert float(drawn.abs().max()) <= math.sqrt(3)
    assert abs(float(drawn.mean())) < 4 / drawn.numel()**0.5 and abs(float(drawn.square().mean()) - 1) < 4 / drawn.numel()**0.5
    a = adapter(2, shape)
    views = [sketch(a, plan(shape, 4, *seed)) for seed in (("run", 2, "layer"), ("run", 3, "layer"), ("run", 2, "other"))]
    assert torch.equal(views[0], sketch(a, of_layer)) and not (views[0] == views[1]).any() and not (views[0] == views[2]).any()


@pytest.mark.parametrize("decades", [0, 4, 9])
@pytest.mark.parametrize("shape", [(300, 200), (200, 300)], ids=str)
def test_small_singular_values_are_not_amplified(shape, decades):
    """The conditioning is that of ΨᵀQ, whatever the matrix."""
    a, exact = falling(shape, 20, decades)
    of_layer = plan(shape, 20, 1)
    found, quality = recover(sketch(a, of_layer), of_layer)
    assert relative(dense(found), exact) < 2e-7 and quality.condition < 40
    noisy = sketch(a, of_layer) + 1e-8 * torch.randn(of_layer.size, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    found, quality = recover(noisy, of_layer, 1e-8)
    error = relative(dense(found), exact)
    assert error < 3 * quality.rounding < 3e-5 and quality.error / 2 < error < 2 * quality.error


def test_the_condition_follows_v_and_w():
    """κ(ΨᵀQ) over thirty seeds is about (√v + √w) / (√v - √w), never more than three times that."""
    a = adapter(20, (300, 200))
    conditions = []
    for seed in range(30):
        of_layer = plan((300, 200), 20, seed)
        conditions.append(recover(sketch(a, of_layer), of_layer)[1].condition)
    expected = (math.sqrt(of_layer.v) + math.sqrt(of_layer.w)) / (math.sqrt(of_layer.v) - math.sqrt(of_layer.w))
    assert 0.5 * expected < sorted(conditions)[15] < 1.5 * expected and max(conditions) < 3 * expected


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)], ids=str)
@pytest.mark.parametrize("decades", [0, 1, 3])
def test_too_small_a_width_is_reported(shape, decades):
    """The estimate never saw the recovery, nor the recovery it: right within a factor of 2, over five seeds."""
    a, exact = falling(shape, 60, decades)
    for seed in range(5):
        of_layer = plan(shape, 20, seed)
        found, quality = recover(sketch(a, of_layer), of_layer)
        true = relative(dense(found), exact)
        assert true > 1e-3 and 0.5 * true < quality.error < 2 * true
        best = float(torch.linalg.svdvals(exact)[of_layer.w:].norm() / exact.norm())
        assert best <= true < 8 * best                          # near the best of that rank, which is what it then gives


def test_awkward_sums():
    shape = (60, 50)
    of_layer = plan(shape, 3, 0)
    assert of_layer.w
    for plans in (of_layer, plan((8, 9), 3, 0)):
        zero, quality = recover(torch.zeros(plans.size, dtype=torch.float64), plans, 1e-9)
        assert zero.rank == 1 and not bool(dense(zero).any()) and (quality.error, quality.rank) == (0.0, 1)
    spike = Adapter(torch.zeros(1, 50), torch.zeros(60, 1), 5.0)
    spike.A[0, 7], spike.B[3, 0] = 2.0, 1.0
    assert relative(dense(recover(sketch(spike, of_layer), of_layer)[0]), dense(spike)) < 1e-7
    one = adapter(3, shape, 1)
    gone, quality = recover(sketch(one, of_layer) + sketch(one * -1.0, of_layer), of_layer, 1e-9)
    assert float(dense(gone).norm()) < 1e-7
    half = adapter(3, shape, 1, dtype=torch.bfloat16)
    assert relative(dense(recover(sketch(half, of_layer), of_layer)[0]), dense(half)) < 1e-7


def test_ranks_of_rounding_are_left_out():
    a, exact = falling((300, 200), 6, 1)
    for width in (20, 150):                                     # sketched, and sent as it is
        of_layer = plan((300, 200), width, 2)
        rounded = (sketch(a, of_layer) * 2.0**20).round() * 2.0**-20
        found, quality = recover(rounded, of_layer, 2.0**-20 / 12**0.5)
        assert found.rank == quality.rank == 6 and relative(dense(found), exact) < 2 * quality.error < 1e-3
        assert (of_layer.w == 0) == (width == 150)


def test_what_does_not_fit_is_refused():
    of_layer = plan((60, 50), 3, 0)
    with pytest.raises(AdapterError, match="expected a width of at least 1, the rank of the sum; got 0"):
        plan((60, 50), 0, 0)
    with pytest.raises(AdapterError, match=r"an adapter for a weight \(60, 50\) \(out, in\); got one for \(50, 60\)"):
        sketch(adapter(2, (50, 60)), of_layer)
    broken = adapter(2, (60, 50))
    broken.A[1, 2] = math.nan
    with pytest.raises(AdapterError, match="expected finite factors; got NaN"):
        sketch(broken, of_layer)
    with pytest.raises(AdapterError, match=rf"expected {of_layer.size} numbers, the sketches of a layer"):
        recover(torch.zeros(of_layer.size - 1, dtype=torch.float64), of_layer)
