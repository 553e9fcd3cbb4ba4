"""Fixed point in 64 bits: exact to half a step, and an error where a sum could wrap."""
import numpy as np
import pytest
import torch

from flora.errors import AdapterError, ConfigError
from flora.ring import Ring, to_numbers, to_words


def test_the_ring_is_exact_up_to_half_a_step_and_never_wraps():
    for clients in (1, 2, 3, 10, 1000):
        ring = Ring(clients, 30, 0.5)
        assert ring.step == 2.0**-31 and int(ring.limit) * clients <= 2**63 - 1 < int(np.nextafter(ring.limit, 2**64)) * clients * 2
        edge = torch.tensor([ring.limit, -ring.limit, 0.0, 1.0], dtype=torch.float64) * ring.step
        words = to_words(edge, ring)
        total = sum((words for _ in range(clients)), np.zeros(4, np.uint64))
        assert torch.equal(to_numbers(words, ring), edge) and torch.allclose(to_numbers(total, ring), clients * edge, rtol=1e-15)
        with pytest.raises(AdapterError, match="of at most .* so that .* cannot overflow 64 bits"):
            to_words(torch.tensor([np.nextafter(ring.limit, 2**64) * ring.step], dtype=torch.float64), ring)
    values = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert float((to_numbers(to_words(values, Ring(2, 12)), Ring(2, 12)) - values).abs().max()) <= 2.0**-13
    for wrong in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(AdapterError, match="finite numbers; got NaN or infinity"):
            to_words(torch.tensor([1.0, wrong]), Ring(2))
    assert len(to_words(torch.zeros(0), Ring(2))) == 0
    for bad in ({"bits": 63}, {"bits": -1}, {"bits": 1.5}, {"unit": 0.0}, {"unit": float("nan")}, {"unit": -1.0}):
        with pytest.raises(ConfigError, match="expected"):
            Ring(2, **bad)
    with pytest.raises(ConfigError, match="clients in a sum"):
        Ring(0)
