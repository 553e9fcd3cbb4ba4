"""One stable number from a seed and the names of what it is for, the same on every machine and in every order of use."""
import hashlib


def derive(*parts: int | str) -> int:
    """A 62-bit seed from a hash of its parts, e.g. derive(seed, client, round, "order")."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 2
