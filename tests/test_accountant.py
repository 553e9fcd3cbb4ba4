"""What noise costs: against closed forms and bounds worked out here, not against the library that does the accounting."""
import math
import sys

import pytest

from flora.accountant import epsilon, noise_for
from flora.errors import ConfigError
from flora.privacy import ClientPrivacy
from flora.privacy import epsilon as run_epsilon


def gaussian_delta(z, eps):
    """Balle and Wang 2018, theorem 8: δ(ε) of the Gaussian mechanism at sensitivity 1 and σ = z."""
    def cdf(x):
        return 0.5 * math.erfc(-x / math.sqrt(2.0))

    return cdf(0.5 / z - eps * z) - math.exp(eps) * cdf(-0.5 / z - eps * z)


def rdp_epsilon(z, delta, rounds):
    """The best of Rényi's orders, rounds · α / (2 z²) + log(1 / δ) / (α - 1) (Mironov 2017): an upper bound without sampling."""
    return min(rounds * a / (2 * z * z) + math.log(1 / delta) / (a - 1) for a in (1 + i / 20 for i in range(1, 4000)))


@pytest.mark.parametrize(("z", "rounds"), [(0.7, 1), (1.0, 1), (4.0, 1), (3.0, 10), (10.0, 200)])
def test_with_everybody_in_every_round_it_is_the_analytic_gaussian(z, rounds):
    eps = epsilon(z, 1e-5, rounds)
    assert gaussian_delta(z / math.sqrt(rounds), eps) == pytest.approx(1e-5, rel=1e-4)
    assert eps <= rdp_epsilon(z, 1e-5, rounds)


@pytest.mark.parametrize("rounds", [1, 10])
def test_a_sample_of_nearly_all_costs_what_all_cost(rounds):
    """The composed and the closed form meet; the composed one is never below what it should be."""
    assert epsilon(2.0, 1e-5, rounds) * 0.999 <= epsilon(2.0, 1e-5, rounds, 0.999999) <= epsilon(2.0, 1e-5, rounds) * 1.001


def test_one_sampled_round_is_the_exact_mixture():
    """Both directions of add and remove, integrated on a grid: δ(ε) = max of E_P[(1 - e^(ε - L))₊] with P, Q in either order."""
    z, q, delta = 0.8, 0.2, 1e-4
    eps = epsilon(z, delta, 1, q)
    step, without, mixed = 1e-3, [], []
    for i in range(-12_000, 14_000):
        x = i * step
        here, there = (math.exp(-(x - c)**2 / (2 * z * z)) / (z * math.sqrt(2 * math.pi)) for c in (0.0, 1.0))
        without.append(here)
        mixed.append((1 - q) * here + q * there)
    exact = max(sum(max(0.0, a - math.exp(eps) * b) for a, b in zip(p, other, strict=True)) * step
                for p, other in ((mixed, without), (without, mixed)))
    assert 0.97 * delta < exact <= 1.001 * delta


def test_it_grows_with_rounds_and_sampling_and_falls_with_noise():
    by_rounds = [epsilon(1.0, 1e-5, t, 0.1) for t in (0, 1, 10, 100)]
    assert by_rounds == sorted(by_rounds) and by_rounds[0] == 0.0 and by_rounds[1] > 0
    assert epsilon(1.0, 1e-5, 10, 0.05) < epsilon(1.0, 1e-5, 10, 0.1) < epsilon(1.0, 1e-5, 10, 1.0)
    assert epsilon(2.0, 1e-5, 10, 0.1) < epsilon(1.0, 1e-5, 10, 0.1)
    assert epsilon(0.0, 1e-5, 1) == math.inf
    assert run_epsilon(ClientPrivacy(3.0, 1.0, 1e-6), 10, 0.1) == epsilon(1.0, 1e-6, 10, 0.1) > epsilon(1.0, 1e-5, 10, 0.1)


@pytest.mark.parametrize(("target", "rounds", "q"), [(1.0, 3, 1.0), (8.0, 1, 1.0), (4.0, 100, 0.05)])
def test_the_noise_for_an_epsilon_inverts(target, rounds, q):
    z = noise_for(target, 1e-5, rounds, q)
    assert 0.99 * target < epsilon(z, 1e-5, rounds, q) <= target


@pytest.mark.parametrize(("call", "message"), [
    (lambda: epsilon(1.0, 0.0, 1), "delta: expected a probability"), (lambda: epsilon(1.0, 1e-5, -1), "rounds: expected"),
    (lambda: epsilon(1.0, 1e-5, 1, 0.0), "q: expected"), (lambda: epsilon(-1.0, 1e-5, 1), "noise_multiplier: expected"),
    (lambda: noise_for(0.0, 1e-5, 1), "positive, finite epsilon"), (lambda: noise_for(1.0, 1e-5, 0), "at least 1 round")])
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ConfigError, match=r"expected dp-accounting; .*pip install 'flora\[privacy\]'"):
        epsilon(1.0, 1e-5, 1)
