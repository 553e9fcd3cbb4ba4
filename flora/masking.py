"""A client's side of a sum that shows the server nothing but the sum: masks that cancel in pairs, and a way back for dropouts.

Client u sends x_u + PRG(b_u) + Σ_{v > u} PRG(s_uv) - Σ_{v < u} PRG(s_uv) mod 2^64. s_uv is agreed with X25519, so the pairs' masks
cancel where both arrive. b_u and the key behind s_uv are Shamir-shared among all clients: of a client that dropped out the
survivors give the key's shares, which removes what it left in the others' sums; of one that arrived b_u's, which uncovers the sum.
Never both of one client, or its x_u would be bare; so a `Party` answers once. Shares travel through the server under AES-GCM.

The server follows the protocol but is curious (honest but curious). This does not protect
* from a server that lies about who dropped out, to some clients for the one secret and to others for the other, and has clients on
  its side: each honest one answers once, so it takes c >= 2 threshold - clients of them, and nobody compares notes;
* from Sybils: a server that runs threshold many clients, or all but one, reads the rest;
* from a server that puts its own keys in the place of clients' (there is no PKI; sign `keys()` where there is one);
* from malicious clients: nobody sees a single update, so nothing bounds its norm or finds poison; a false share fails the round;
* what the sum itself tells: of two clients each knows the other's, and an aggregate's factors may show what one client had alone;
* who takes part, when, how many words are sent, ranks, and what rounding to steps leaves.

Everything that travels is bytes of a length that is known beforehand, bound to the round; whatever else comes raises MessageError.
Reference: Bonawitz et al. 2017, "Practical secure aggregation for privacy-preserving machine learning", figure 4, without its
consistency check.
"""
import hashlib
import json
import secrets
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from flora.errors import MessageError, StrategyError, needs
from flora.keystream import words

KEYS, SHARES, MASKED, REVEAL, ROSTER, DELIVERY, REQUEST = range(1, 8)       # kinds of messages
HEADER = struct.Struct("<4sBxH16s")                                         # magic, kind, sender, context: 24 bytes, words aligned
SEALED = 12 + 64 + 16                                                       # nonce, a share of each secret, tag
SERVER = 0xFFFF


@dataclass(frozen=True)
class Session:
    """What all parties agree on before a round, and what every mask and message is bound to.

    label: the run, the round and how numbers are written; names: of all clients invited, in one order; threshold: how many must
    stay to the end; sizes: words by layer. Raises StrategyError for a client alone or twice, and for a threshold of
    half of them or less.
    """
    label: str
    names: tuple[str, ...]
    threshold: int
    sizes: Mapping[str, int]

    def __post_init__(self) -> None:
        count = len(self.names)
        if len(set(self.names)) != count:
            twice = sorted({name for name in self.names if self.names.count(name) > 1})
            raise StrategyError(f"expected every client once; got {twice} more than once. Give every client its own name.")
        if not 2 <= count <= 4096:
            raise StrategyError(f"expected 2 to 4096 clients; got {count}. A sum over one client is that client's update: sample "
                                "more clients.")
        if type(self.threshold) is not int or not count < 2 * self.threshold <= 2 * count:
            raise StrategyError(f"expected a threshold of {count // 2 + 1} to {count}, more than half of {count} clients, so that "
                                f"no two groups can each uncover a sum; got {self.threshold!r}")

    @cached_property
    def context(self) -> bytes:
        """16 bytes that stand for all of this."""
        text = json.dumps([self.label, self.names, self.threshold, list(self.sizes.items())])
        return hashlib.blake2b(text.encode(), digest_size=16, person=b"flora-session").digest()

    @cached_property
    def count(self) -> int:
        """Words that a client sends."""
        return sum(self.sizes.values())

    def pack(self, kind: int, sender: int, *payload: bytes) -> bytes:
        """A message."""
        return b"".join([HEADER.pack(b"FSA1", kind, sender, self.context), *payload])

    def unpack(self, data: bytes, kind: int, size: int | None = None) -> tuple[int, memoryview]:
        """(sender, payload) of a message of this round, this kind and size bytes. Raises MessageError."""
        if not isinstance(data, (bytes, bytearray, memoryview)) or len(data) < HEADER.size:
            raise MessageError(f"expected a message of at least {HEADER.size} bytes; got {type(data).__name__} of "
                               f"{len(data) if hasattr(data, '__len__') else 'no'} bytes")
        magic, got, sender, context = HEADER.unpack_from(data)
        if magic != b"FSA1" or got != kind:
            raise MessageError(f"expected a message of secure aggregation of kind {kind}; got {magic!r}, kind {got}")
        if context != self.context:
            raise MessageError(f"expected a message of this round ({self.label!r}, {len(self.names)} clients); got another "
                               "round's, or one of a client with other settings. Give all clients the same.")
        if (sender != SERVER and sender >= len(self.names)) or (sender == SERVER) != (kind >= ROSTER):
            raise MessageError(f"expected a sender out of {len(self.names)} clients; got number {sender}")
        payload = memoryview(data)[HEADER.size:]
        if size is not None and len(payload) != size:
            raise MessageError(f"{self.who(sender)}: expected {size:,} bytes; got {len(payload):,}")
        return sender, payload

    def who(self, index: int) -> str:
        return "the server" if index == SERVER else f"client {self.names[index]}"

    def entries(self, payload: memoryview, size: int) -> dict[int, bytes]:
        """What a server's list holds by client: (number, size bytes) each, numbers rising. Raises MessageError."""
        step = 2 + size
        if len(payload) % step or len(payload) > step * len(self.names):
            raise MessageError(f"expected at most {len(self.names)} entries of {step} bytes; got {len(payload)} bytes")
        found = [(int.from_bytes(payload[at:at + 2], "little"), bytes(payload[at + 2:at + step]))
                 for at in range(0, len(payload), step)]
        numbers = [number for number, _ in found]
        if any(a >= b for a, b in pairwise(numbers)) or (numbers and numbers[-1] >= len(self.names)):
            raise MessageError(f"expected clients' numbers that rise and stay below {len(self.names)}; got {numbers[:20]}")
        return dict(found)

    def masks(self, key: bytes) -> Iterator[tuple[slice, np.ndarray]]:
        """A mask layer by layer, and where in the line of words each belongs."""
        at = 0
        for layer, count in self.sizes.items():
            yield slice(at, at + count), words(key, f"mask/{self.label}/{layer}", count)
            at += count


def listed(entries: Mapping[int, bytes]) -> bytes:
    """A server's list, as Session.entries reads it."""
    return b"".join(number.to_bytes(2, "little") + entries[number] for number in sorted(entries))


def hashed(session: Session, key: bytes, use: str, *numbers: int) -> bytes:
    """32 bytes of a secret for one use in this round."""
    text = session.context + use.encode() + b"".join(n.to_bytes(2, "little") for n in numbers)
    return hashlib.blake2b(text, key=key, digest_size=32, person=b"flora-masking").digest()


def public_of(secret: bytes) -> bytes:
    """The X25519 public key of a secret of 32 bytes."""
    with needs("pycryptodome", "secure"):
        from Crypto.Protocol import DH
    return DH.import_x25519_private_key(secret).public_key().export_key(format="raw")


def agreed(secret: bytes, public: bytes) -> bytes:
    """What X25519 agrees on, 32 bytes, to be hashed before use. Raises MessageError for a public key that is none."""
    with needs("pycryptodome", "secure"):
        from Crypto.Protocol import DH
    try:
        return bytes(DH.key_agreement(static_priv=DH.import_x25519_private_key(secret),
                                      static_pub=DH.import_x25519_public_key(public), kdf=bytes))
    except ValueError as error:
        raise MessageError(f"expected an X25519 public key; got one that no secret belongs to ({error})") from error


def split(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Shamir's shares of 32 bytes, 32 bytes each, for clients 0 to count - 1: threshold of them give the secret, fewer nothing."""
    with needs("pycryptodome", "secure"):
        from Crypto.Protocol.SecretSharing import Shamir
    halves = [Shamir.split(threshold, count, secret[at:at + 16]) for at in (0, 16)]
    return [first + second for (_, first), (_, second) in zip(*halves, strict=True)]


def joined(shares: Mapping[int, bytes]) -> bytes:
    """The secret of exactly threshold many shares by client."""
    with needs("pycryptodome", "secure"):
        from Crypto.Protocol.SecretSharing import Shamir
    return b"".join(Shamir.combine([(number + 1, share[at:at + 16]) for number, share in shares.items()]) for at in (0, 16))


def pair_key(session: Session, secret: bytes, me: int, other: int, public: bytes) -> bytes:
    """The key of the mask that two clients share."""
    return hashed(session, agreed(secret, public), "pair", min(me, other), max(me, other))


class Party:
    """One client (name) in one round: its secrets, and its four messages, each given once and in this order.

    keys() -> shares(roster) -> masked(delivery, words) -> reveal(request). Raises MessageError for what the server should not have
    sent, StrategyError where a message is asked for twice or out of order: a second answer could bare what the first one hid.
    """

    def __init__(self, session: Session, name: str):
        self.session, self.me, self._done = session, session.names.index(name), 0
        self._channel, self._secret, self._seed = (secrets.token_bytes(32) for _ in range(3))
        self._publics: dict[int, tuple[bytes, bytes]] = {}
        self._held: dict[int, bytes] = {}

    def _turn(self, kind: int) -> None:
        if kind != self._done + 1:
            raise StrategyError(f"{self.session.who(self.me)}: expected step {self._done + 1} of a round; got step {kind}. "
                                "A step is taken once: a new round has new parties.")
        self._done = kind

    def keys(self) -> bytes:
        """Two public keys (of the channel, of the masks) and a commitment to the seed of the own mask: 96 bytes."""
        self._turn(KEYS)
        self._own = public_of(self._channel) + public_of(self._secret) + hashed(self.session, self._seed, "commitment")
        return self.session.pack(KEYS, self.me, self._own)

    def shares(self, roster: bytes) -> bytes:
        """The shares of both secrets for every other client of the roster, each sealed for it."""
        self._turn(SHARES)
        session = self.session
        entries = session.entries(session.unpack(roster, ROSTER)[1], 96)
        if entries.get(self.me) != self._own:
            raise MessageError(f"expected a roster with the keys that {session.who(self.me)} sent; got other ones, or none")
        if len(entries) < session.threshold:
            raise MessageError(f"expected a roster of at least {session.threshold} clients; got {len(entries)}")
        if len({entry[at:at + 32] for entry in entries.values() for at in (0, 32)}) != 2 * len(entries):
            raise MessageError("expected every public key once in the roster; got one twice")
        self._publics = {number: (entry[:32], entry[32:64]) for number, entry in entries.items()}
        pairs = [a + b for a, b in zip(*(split(s, session.threshold, len(session.names)) for s in (self._secret, self._seed)),
                                       strict=True)]
        self._held[self.me] = pairs[self.me]
        others = [number for number in sorted(entries) if number != self.me]
        return session.pack(SHARES, self.me, *(self._seal(number, pairs[number]) for number in others))

    def _cipher(self, sender: int, receiver: int, nonce: bytes) -> object:
        """AES-256-GCM under a key of this pair, direction and round."""
        with needs("pycryptodome", "secure"):
            from Crypto.Cipher import AES
        common = agreed(self._channel, self._publics[sender + receiver - self.me][0])
        return AES.new(hashed(self.session, common, "channel", sender, receiver), AES.MODE_GCM, nonce=nonce)

    def _seal(self, receiver: int, shares: bytes) -> bytes:
        nonce = secrets.token_bytes(12)
        return nonce + b"".join(self._cipher(self.me, receiver, nonce).encrypt_and_digest(shares))

    def _open(self, sender: int, sealed: bytes) -> bytes:
        try:
            return self._cipher(sender, self.me, sealed[:12]).decrypt_and_verify(sealed[12:-16], sealed[-16:])
        except ValueError as error:
            raise MessageError(f"{self.session.who(sender)}: expected shares sealed for {self.session.who(self.me)}; got bytes "
                               f"that do not open ({error})") from error

    def masked(self, delivery: bytes, values: np.ndarray) -> bytes:
        """The words (values, uint64, in the order of session.sizes) under the masks of all clients whose shares arrived."""
        self._turn(MASKED)
        session = self.session
        if values.dtype != np.uint64 or values.shape != (session.count,):
            raise StrategyError(f"expected {session.count} words (uint64); got {values.dtype} {values.shape}")
        entries = session.entries(session.unpack(delivery, DELIVERY)[1], SEALED)
        if self.me in entries or not set(entries) < set(self._publics) or len(entries) + 1 < session.threshold:
            raise MessageError(f"expected shares of at least {session.threshold - 1} other clients of the roster; got those of "
                               f"{sorted(entries)}")
        self._held |= {number: self._open(number, sealed) for number, sealed in entries.items()}
        out = values.copy()
        for where, mask in session.masks(self._seed):
            out[where] += mask
        for other in entries:
            add = np.add if self.me < other else np.subtract
            for where, mask in session.masks(pair_key(session, self._secret, self.me, other, self._publics[other][1])):
                add(out[where], mask, out=out[where])
        return session.pack(MASKED, self.me, memoryview(out.astype("<u8", copy=False)).cast("B"))

    def reveal(self, request: bytes) -> bytes:
        """One share of 32 bytes of every client that shared: of who arrived its mask's, of who dropped out its key's."""
        self._turn(REVEAL)
        session = self.session
        arrived = set(session.entries(session.unpack(request, REQUEST)[1], 0))
        if self.me not in arrived or not arrived <= set(self._held) or len(arrived) < session.threshold:
            raise MessageError(f"expected at least {session.threshold} clients that shared, {session.who(self.me)} among them; "
                               f"got {sorted(arrived)}")
        return session.pack(REVEAL, self.me, *(self._held[number][32:] if number in arrived else self._held[number][:32]
                                               for number in sorted(self._held)))
