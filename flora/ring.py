"""Real numbers as whole steps in the ring of 64-bit words, in which masks cancel and sums are exact.

x becomes round(x / step) mod 2^64 with step = unit · 2^-bits. The sum of K clients is right as long as it stays inside ±2^63, so
each client is held to (2^63 - 1) / K: a number beyond that raises, since a sum that wrapped would look like any other. The error
of a sum is at most K steps / 2. Reference: Bonawitz et al. 2017, "Practical secure aggregation", section 4.
"""
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flora.errors import AdapterError, ConfigError


@dataclass(frozen=True)
class Ring:
    """How numbers are written, the same for all clients of a sum and public.

    clients: how many may be summed; bits: of the fraction, 0 to 62; unit: what 2^bits steps are, about the size of the numbers
    where that is far from 1. Raises ConfigError.
    """
    clients: int
    bits: int = 30
    unit: float = 1.0

    def __post_init__(self) -> None:
        if not (type(self.clients) is int and 1 <= self.clients <= 1 << 20):
            raise ConfigError(f"expected 1 to {1 << 20:,} clients in a sum; got {self.clients!r}")
        if not (type(self.bits) is int and 0 <= self.bits <= 62):
            raise ConfigError(f"expected 0 to 62 fractional bits; got {self.bits!r}")
        if not 2.0**-500 < self.unit < 2.0**500:
            raise ConfigError(f"expected a positive, finite unit; got {self.unit!r}")

    @property
    def step(self) -> float:
        """The distance between two numbers."""
        return float(self.unit) * 2.0**-self.bits

    @property
    def limit(self) -> float:
        """The most steps, up or down, that one client may send: the largest fp64 number that is not above (2^63 - 1) / clients."""
        most = (2**63 - 1) // self.clients
        return float(most) if int(float(most)) <= most else math.nextafter(float(most), 0.0)


def to_words(values: Tensor, ring: Ring, what: str = "") -> np.ndarray:
    """uint64 of values (n,) fp64. what: named in errors. Raises AdapterError for NaN, infinity and numbers out of range."""
    steps = (values.detach().double() / ring.step).round()
    largest = float(steps.abs().max()) if steps.numel() else 0.0
    if not math.isfinite(largest):
        raise AdapterError(f"{what}: expected finite numbers; got NaN or infinity. Training went wrong: leave the client out.")
    if largest > ring.limit:
        raise AdapterError(f"{what}: expected numbers of at most {ring.limit * ring.step:.6g}, so that {ring.clients} clients "
                           f"cannot overflow 64 bits; got {largest * ring.step:.6g}. Raise unit ({ring.unit:g}) or lower bits "
                           f"({ring.bits}).")
    return steps.numpy().astype(np.int64).view(np.uint64)


def to_numbers(words: np.ndarray, ring: Ring) -> Tensor:
    """fp64 (n,) of words, or of a sum of them over as many clients as the ring is for."""
    return torch.from_numpy(words.view(np.int64).astype(np.float64)) * ring.step
