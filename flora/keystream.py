"""Random numbers that nobody can guess who lacks the key: AES-256 in counter mode, for masks and for noise.

A label says what the numbers are for; every label has a stream of its own, so one secret serves a whole run. Needs pycryptodome
(`pip install 'flora[secure]'`), which is imported only when numbers are drawn.
"""
import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flora.errors import ConfigError, needs

KEY_BYTES = 32


def words(key: bytes, label: str, count: int) -> np.ndarray:
    """uint64 (count,): the stream of this key and label. Raises ConfigError where pycryptodome is missing or the key is short."""
    with needs("pycryptodome", "secure"):
        from Crypto.Cipher import AES
    if len(key) != KEY_BYTES:
        raise ConfigError(f"expected a key of {KEY_BYTES} bytes; got {len(key)}. Make one with secrets.token_bytes({KEY_BYTES}).")
    own = hashlib.blake2b(label.encode(), key=key, digest_size=32, person=b"flora-stream").digest()
    out = np.empty(count, "<u8")
    AES.new(own, AES.MODE_CTR, nonce=bytes(8)).encrypt(bytes(out.nbytes), memoryview(out).cast("B") if count else None)
    return out


def normal(key: bytes, label: str, shape: Sequence[int]) -> Tensor:
    """Independent standard normal numbers, fp64 of this shape, on the CPU (Box and Muller, 53 bits a uniform)."""
    count = math.prod(shape)
    half = (count + 1) // 2
    bits = torch.from_numpy((words(key, label, 2 * half) >> np.uint64(11)).astype(np.float64))
    uniform = (bits + 0.5) * 2.0**-53                           # in (0, 1): never 0, whose logarithm there is not
    radius, angle = (-2.0 * uniform[:half].log()).sqrt(), 2.0 * math.pi * uniform[half:]
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count].reshape(tuple(shape))
