"""The keyed streams: the same for the same key and label, unlike any other's, and as random as they are said to be."""
import hashlib
import sys

import numpy as np
import pytest
import torch
from Crypto.Cipher import AES

from flora.errors import ConfigError
from flora.keystream import KEY_BYTES, normal, words

KEY = bytes(range(KEY_BYTES))


def test_it_is_aes_256_in_counter_mode_under_a_key_of_the_label():
    own = hashlib.blake2b(b"mask 3", key=KEY, digest_size=32, person=b"flora-stream").digest()
    blocks = b"".join(AES.new(own, AES.MODE_ECB).encrypt(bytes(8) + i.to_bytes(8, "big")) for i in range(3))
    assert words(KEY, "mask 3", 5).tobytes() == blocks[:40]


def test_key_and_label_alone_decide():
    assert np.array_equal(words(KEY, "a", 100)[:40], words(KEY, "a", 40)) and len(words(KEY, "a", 0)) == 0
    others = [words(KEY, "b", 100), words(bytes(32), "a", 100)]
    assert not any((words(KEY, "a", 100) == other).any() for other in others)


def test_normal_numbers_are_normal():
    count = 200_001
    drawn = normal(KEY, "noise", (count,))
    assert drawn.dtype == torch.float64 and torch.equal(drawn.reshape(3, -1), normal(KEY, "noise", (3, count // 3)))
    ordered, expected = drawn.sort().values, (torch.arange(count) + 0.5) / count
    distance = (torch.special.ndtr(ordered) - expected).abs().max()
    assert float(distance) < 1.63 / count**0.5                  # Kolmogorov and Smirnov, 1 %
    assert abs(float(drawn[:-1] @ drawn[1:]) / count) < 4 / count**0.5 and float(drawn.abs().max()) > 4
    assert normal(KEY, "x", ()).shape == () and normal(KEY, "x", (0, 3)).shape == (0, 3)


def test_what_is_missing_is_said(monkeypatch):
    with pytest.raises(ConfigError, match="a key of 32 bytes; got 5"):
        words(b"short", "a", 1)
    monkeypatch.setitem(sys.modules, "Crypto.Cipher", None)
    with pytest.raises(ConfigError, match=r"expected pycryptodome; .*pip install 'flora\[secure\]'"):
        words(KEY, "a", 1)
