"""What noise costs: the (ε, δ) of Gaussian noise that is added round after round to a sum of clipped contributions.

One round adds N(0, (z C)²) to a sum of which one party's part has norm C at most, each party taking part with probability q,
independently and in secret (Poisson sampling). Rounds are composed by their privacy loss distributions (dp-accounting, imported
when it is asked), rounded so that ε comes out too large, never too small. Adjacency: one party added or removed.

Reference: Abadi et al. 2016, arXiv 1607.00133; Koskela et al. 2020, arXiv 1906.03049; Zhu et al. 2022, arXiv 2106.08567.
"""
import math

from flora.errors import ConfigError, needs

EXTRA = "privacy"
STEP = 1e-4                                                     # of the discretised privacy loss


def _check(delta: float, rounds: int, q: float) -> None:
    if not 0.0 < delta < 1.0:
        raise ConfigError(f"delta: expected a probability in (0, 1), well under 1 / clients; got {delta}")
    if int(rounds) != rounds or rounds < 0:
        raise ConfigError(f"rounds: expected a number of rounds of at least 0; got {rounds}")
    if not 0.0 < q <= 1.0:
        raise ConfigError(f"q: expected a probability of being sampled in (0, 1]; got {q}")


def _epsilon(z: float, delta: float, rounds: int, q: float) -> float:
    """ε for settings that are good: in closed form where everybody is in every round (the analytic Gaussian mechanism of
    Balle and Wang 2018, arXiv 1805.06530, of z / √rounds), else composed."""
    with needs("dp-accounting", EXTRA):
        import dp_accounting as dp
        from dp_accounting import pld
    if rounds == 0 or z == 0:
        return 0.0 if rounds == 0 else math.inf
    if q == 1.0:
        return float(dp.get_epsilon_gaussian(z / math.sqrt(rounds), delta))
    accountant = pld.PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE, STEP)
    event = dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(q, dp.GaussianDpEvent(z)), int(rounds))
    return float(accountant.compose(event).get_epsilon(delta))


def epsilon(noise_multiplier: float, delta: float, rounds: int, q: float = 1.0) -> float:
    """ε at this delta after so many rounds with z = noise_multiplier: 0 for none, infinity without noise.

    q: the probability that a client is sampled in a round. For one example of a client, which is in one step of every epoch,
    rounds is how often it is used and q is 1: nothing is gained from sampling. Raises ConfigError.
    """
    _check(delta, rounds, q)
    if not 0.0 <= noise_multiplier < math.inf:
        raise ConfigError(f"noise_multiplier: expected a number >= 0; got {noise_multiplier}")
    return _epsilon(noise_multiplier, delta, rounds, q)


def noise_for(target: float, delta: float, rounds: int, q: float = 1.0) -> float:
    """The smallest z (to 1e-3 of it) whose ε at this delta after so many rounds is `target` at most. Raises ConfigError."""
    _check(delta, rounds, q)
    if not 0.0 < target < math.inf or rounds == 0:
        raise ConfigError(f"expected a positive, finite epsilon and at least 1 round; got {target} and {rounds}")
    low = high = 1.0
    while _epsilon(high, delta, rounds, q) > target:
        low, high = high, 2.0 * high
    while low == high or _epsilon(low, delta, rounds, q) <= target:     # from above: little noise takes long to account for
        low, high = low / 2.0, low
    while high - low > 1e-3 * high:
        middle = (low + high) / 2.0
        low, high = (middle, high) if _epsilon(middle, delta, rounds, q) > target else (low, middle)
    return high
