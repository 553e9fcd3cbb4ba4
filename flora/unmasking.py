"""The server's side of a sum under masks (masking.py): it forwards, adds up, and takes off the masks that are left.

What is left in the sum are the own masks of the clients that arrived and, of those that shared and dropped out, what their pairs
put in. Survivors' shares give the seeds of the first and the keys of the second, checked against what was announced, so that a
false share raises instead of leaving noise. The sum is formed as vectors arrive; none is kept.
"""
from collections.abc import Callable, Iterator

import numpy as np

from flora.errors import MessageError, StrategyError
from flora.masking import (
    DELIVERY,
    KEYS,
    MASKED,
    REQUEST,
    REVEAL,
    ROSTER,
    SEALED,
    SERVER,
    SHARES,
    Session,
    hashed,
    joined,
    listed,
    pair_key,
    public_of,
)


class Tally:
    """One round at the server: what came by client, and the sum.

    take_keys(...)*, roster(), take_shares(...)*, delivery(client)*, take_masked(...)*, request(), take_reveal(...)*, total().
    Each take_ keeps the data of one client's message; names(kind) says who sent that of a step.
    Raises MessageError for what is malformed, from another round, late, or comes twice, and leaves everything as it was;
    StrategyError where fewer clients than the threshold are left.
    """

    def __init__(self, session: Session):
        self.session = session
        self._came: dict[int, dict[int, bytes]] = {KEYS: {}, SHARES: {}, MASKED: {}, REVEAL: {}}
        self._open = KEYS
        self._sum = np.zeros(session.count, np.uint64)

    def _take(self, data: bytes, kind: int, size: Callable[[], int]) -> tuple[int, memoryview]:
        """(sender, payload) of a message that is due."""
        sender, payload = self.session.unpack(data, kind)
        who = self.session.who(sender)
        if self._open != kind:
            raise MessageError(f"{who}: expected nothing of step {kind}, as step {self._open} is under way; got a message. It came "
                               "too late, or too early: leave it out.")
        if sender in self._came[kind] or (kind > KEYS and sender not in self._came[kind - 1]):
            raise MessageError(f"{who}: expected one message of step {kind} from each client that took step {kind - 1}; got "
                               + ("a second one" if sender in self._came[kind] else "one of another client"))
        if len(payload) != size():
            raise MessageError(f"{who}: expected {size():,} bytes; got {len(payload):,}")
        return sender, payload

    def _close(self, kind: int) -> dict[int, bytes]:
        """What came in this step, which is over from now on."""
        came, need = self._came[kind], self.session.threshold
        if self._open not in (kind, kind + 1):
            raise StrategyError(f"expected step {kind} to be under way; it is step {self._open}")
        if len(came) < need:
            raise StrategyError(f"expected at least {need} of {len(self.session.names)} clients (the threshold) in step {kind}; "
                                f"got {len(came)}: {self.names(kind)}. The round is void: nothing of it can be uncovered. Start "
                                "another.")
        self._open = kind + 1
        return came

    def names(self, kind: int) -> list[str]:
        """The clients that took this step."""
        return [self.session.names[number] for number in sorted(self._came[kind])]

    def take_keys(self, data: bytes) -> None:
        """The public keys of one client."""
        sender, payload = self._take(data, KEYS, lambda: 96)
        self._came[KEYS][sender] = bytes(payload)

    def roster(self) -> bytes:
        """All keys, for everybody."""
        return self.session.pack(ROSTER, SERVER, listed(self._close(KEYS)))

    def take_shares(self, data: bytes) -> None:
        """The shares of one client for all others."""
        sender, payload = self._take(data, SHARES, lambda: SEALED * (len(self._came[KEYS]) - 1))
        self._came[SHARES][sender] = bytes(payload)

    def delivery(self, client: str) -> bytes:
        """What the others sealed for this client."""
        came, me = self._close(SHARES), self.session.names.index(client)
        places = {sender: [n for n in sorted(self._came[KEYS]) if n != sender].index(me) for sender in came if sender != me}
        return self.session.pack(DELIVERY, SERVER, listed({sender: came[sender][SEALED * place:SEALED * (place + 1)]
                                                           for sender, place in places.items()}))

    def take_masked(self, data: bytes) -> None:
        """One client's words under masks, which are added to the sum."""
        sender, payload = self._take(data, MASKED, lambda: 8 * self.session.count)
        self._sum += np.frombuffer(payload, "<u8")
        self._came[MASKED][sender] = b""

    def request(self) -> bytes:
        """Who arrived, for those who did."""
        return self.session.pack(REQUEST, SERVER, listed(self._close(MASKED)))

    def take_reveal(self, data: bytes) -> None:
        """What one client knows of the secrets that the request names."""
        sender, payload = self._take(data, REVEAL, lambda: 32 * len(self._came[SHARES]))
        self._came[REVEAL][sender] = bytes(payload)

    def total(self) -> dict[str, np.ndarray]:
        """The sum of all clients that arrived, uint64 by layer."""
        session, answers = self.session, dict(sorted(self._close(REVEAL).items())[:self.session.threshold])
        out = self._sum.copy()
        for place, number in enumerate(sorted(self._came[SHARES])):
            secret = joined({answer: payload[32 * place:32 * (place + 1)] for answer, payload in answers.items()})
            for where, mask in self._left(number, secret):
                out[where] -= mask
        ends = np.cumsum([0, *session.sizes.values()])
        return {layer: out[start:end] for layer, start, end in zip(session.sizes, ends, ends[1:], strict=False)}

    def _left(self, number: int, secret: bytes) -> Iterator[tuple[slice, np.ndarray]]:
        """The masks that this client left in the sum, as they are to be subtracted."""
        session, keys = self.session, self._came[KEYS]
        arrived = number in self._came[MASKED]
        announced = keys[number][64:] if arrived else keys[number][32:64]
        if announced != (hashed(session, secret, "commitment") if arrived else public_of(secret)):
            raise MessageError(f"{session.who(number)}: expected shares of the secret that it announced; those that came give "
                               "another. A client sent false shares: the round is void, start another.")
        if arrived:
            yield from session.masks(secret)
            return
        for other in self._came[MASKED]:
            for where, mask in session.masks(pair_key(session, secret, number, other, keys[other][32:64])):
                yield where, mask if other < number else np.negative(mask)
