"""What the tests of the masks share: sessions, rounds of which every message is kept, and a test of randomness."""
import numpy as np

from flora.masking import HEADER, Party, Session
from flora.unmasking import Tally

STEPS = ("keys", "shares", "masked", "reveal")
NAMES = tuple("abcde")


def session(names=NAMES, threshold=3, sizes=(("q", 70), ("v", 30)), label="run/0"):
    return Session(label, tuple(names), threshold, dict(sizes))


def vectors(of, seed=0):
    draw = np.random.default_rng(seed)
    return {name: draw.integers(0, 2**64, of.count, dtype=np.uint64) for name in of.names}


class Round:
    """A round whose every message is kept; dropped: the first step that a client does not take."""

    def __init__(self, of, values, dropped=None):
        self.of, self.values, self.dropped, self.sent = of, values, dropped or {}, {}
        self.tally, self.parties = Tally(of), {name: Party(of, name) for name in of.names}

    def until(self, last="reveal"):
        for step in STEPS[:STEPS.index(last) + 1]:
            getattr(self, step)()
        return self

    def taking(self, step):
        return [(n, p) for n, p in self.parties.items() if self.dropped.get(n) not in STEPS[:STEPS.index(step) + 1]]

    def keys(self):
        for name, party in self.taking("keys"):
            self.sent["keys", name] = party.keys()
            self.tally.take_keys(self.sent["keys", name])

    def shares(self):
        self.roster = self.tally.roster()
        for name, party in self.taking("shares"):
            self.sent["shares", name] = party.shares(self.roster)
            self.tally.take_shares(self.sent["shares", name])

    def masked(self):
        for name, party in self.taking("masked"):
            self.sent["masked", name] = party.masked(self.tally.delivery(name), self.values[name])
            self.tally.take_masked(self.sent["masked", name])

    def reveal(self):
        request = self.tally.request()
        for name, party in self.taking("reveal"):
            self.sent["reveal", name] = party.reveal(request)
            self.tally.take_reveal(self.sent["reveal", name])

    def words(self, name):
        return np.frombuffer(self.sent["masked", name][HEADER.size:], "<u8")


def summed(of, values, names):
    """{layer: sum} in Python's integers."""
    line = [sum(int(values[n][i]) for n in names) % 2**64 for i in range(of.count)]
    out, at = {}, 0
    for layer, count in of.sizes.items():
        out[layer], at = line[at:at + count], at + count
    return out


def lists(total):
    return {layer: words.tolist() for layer, words in total.items()}


def looks_random(words, against=None):
    """Bits balanced, bytes even (chi-square), unrelated to what they hide: none of it more than 4.5 deviations off."""
    raw = np.frombuffer(words.tobytes(), np.uint8)
    counts, expected = np.bincount(raw, minlength=256), len(raw) / 256
    chi = (((counts - expected)**2 / expected).sum() - 255) / (2 * 255)**0.5
    bits = np.unpackbits(raw).reshape(len(words), 64).mean(0)
    balance = np.abs(bits - 0.5).max() * 2 * len(words)**0.5
    related = 0.0 if against is None else abs(np.corrcoef(words.view(np.int64).astype(float), against)[0, 1]) * len(words)**0.5
    return bool(abs(chi) < 4.5 and balance < 4.5 and related < 4.5)
