"""What a party of secure aggregation does not take: malformed, late and doubled messages, false shares, too few clients."""
import sys

import numpy as np
import pytest
from masked import NAMES, Round, lists, session, summed, vectors

pytest.importorskip("Crypto", reason="pycryptodome is missing: no mask was tested; pip install 'flora[secure]'")

from flora.errors import ConfigError, MessageError, StrategyError
from flora.masking import DELIVERY, HEADER, MASKED, REQUEST, ROSTER, SERVER, SHARES, Party, listed
from flora.unmasking import Tally


def test_late_and_second_messages_are_refused_and_change_nothing():
    of = session()
    values = vectors(of)
    done = Round(of, values).until("masked")
    for take, step in ((done.tally.take_keys, "keys"), (done.tally.take_shares, "shares")):
        with pytest.raises(MessageError, match="client a: expected nothing of step"):
            take(done.sent[step, "a"])
    with pytest.raises(MessageError, match="client a: expected one message of step 3 .*got a second one"):
        done.tally.take_masked(done.sent["masked", "a"])
    done.reveal()
    with pytest.raises(MessageError, match="client b: expected nothing of step 3, as step 4 is under way"):
        done.tally.take_masked(done.sent["masked", "b"])
    with pytest.raises(MessageError, match="got a second one"):
        done.tally.take_reveal(done.sent["reveal", "c"])
    assert lists(done.tally.total()) == summed(of, values, NAMES)
    stranger = Round(of, values, {"c": "shares"}).until("shares")
    stranger.tally.delivery("a")
    with pytest.raises(MessageError, match="client c: .*got one of another client"):
        stranger.tally.take_masked(of.pack(MASKED, 2, bytes(8 * of.count)))


def test_malformed_bytes_are_refused_and_change_nothing():
    of = session()
    values = vectors(of)
    done = Round(of, values).until("shares")
    for name, party in done.parties.items():
        good = party.masked(done.tally.delivery(name), values[name])
        bad = [good[:n] for n in (0, 1, HEADER.size - 1, HEADER.size, HEADER.size + 1, len(good) - 8, len(good) - 1)]
        bad += [good + b"\0", good + bytes(8), None, "text", 7, [1, 2]]
        bad += [good[:at] + bytes([good[at] ^ 0x80]) + good[at + 1:] for at in (*range(5), *range(6, HEADER.size))]
        for data in bad:
            with pytest.raises(MessageError):
                done.tally.take_masked(data)
        done.sent["masked", name] = good
        done.tally.take_masked(good)
    done.reveal()
    assert lists(done.tally.total()) == summed(of, values, NAMES)
    with pytest.raises(MessageError, match="a message of this round .*got another round's"):
        Tally(session(label="run/1")).take_keys(done.sent["keys", "a"])
    for change in ({"threshold": 4}, {"sizes": [("q", 71), ("v", 29)]}, {"names": "abcdf"}):
        assert session(**change).context != of.context


def test_a_client_takes_each_step_once_and_in_order():
    of = session()
    fresh = Party(of, "a")
    with pytest.raises(StrategyError, match="client a: expected step 1 of a round; got step 3"):
        fresh.masked(b"", vectors(of)["a"])
    done = Round(of, vectors(of)).until()
    party = done.parties["a"]
    for again in (lambda: party.masked(b"", vectors(of)["b"]), lambda: party.reveal(b""), party.keys):
        with pytest.raises(StrategyError, match="A step is taken once"):
            again()


def begun(of, last):
    done = Round(of, vectors(of)).until(last)
    return done, done.parties["a"]


def test_a_client_checks_what_the_server_sends():
    of = session()
    done = Round(of, vectors(of)).until("keys")
    entries = {n: done.sent["keys", name][HEADER.size:] for n, name in enumerate(NAMES)}
    bad = {"the keys that client a sent": [{**entries, 0: entries[1]}, {n: entries[n] for n in (1, 2, 3)}],
           "at least 3 clients; got 2": [{n: entries[n] for n in (0, 1)}],
           "every public key once": [{**entries, 2: entries[1]}]}
    for match, rosters in bad.items():
        for roster in rosters:
            party = Party(of, "a")
            party.keys()
            party._own = entries[0]
            with pytest.raises(MessageError, match=match):
                party.shares(of.pack(ROSTER, SERVER, listed(roster)))
    for data in (of.pack(ROSTER, SERVER, listed(entries)[:-1]), of.pack(ROSTER, 1, listed(entries)), of.pack(SHARES, 1),
                 of.pack(ROSTER, SERVER, listed(entries)[98:] + listed(entries)[:98])):
        party = Party(of, "a")
        party.keys()
        with pytest.raises(MessageError):
            party.shares(data)


@pytest.mark.parametrize("change", [lambda e: {n: e[n] for n in (1,)}, lambda e: {**e, 0: e[1]},
                                    lambda e: {**e, 1: e[2]}, lambda e: {**e, 1: e[1][:-1] + bytes([e[1][-1] ^ 1])}],
                         ids=["few", "itself", "another's", "changed"])
def test_a_client_opens_only_what_was_sealed_for_it(change):
    of = session()
    done, party = begun(of, "shares")
    entries = of.entries(of.unpack(done.tally.delivery("a"), DELIVERY)[1], 92)
    with pytest.raises(MessageError):
        party.masked(of.pack(DELIVERY, SERVER, listed(change(entries))), vectors(of)["a"])


@pytest.mark.parametrize("arrived", [(1, 2, 3, 4), (0, 1), ()], ids=["without it", "few", "none"])
def test_a_client_gives_shares_for_a_sum_of_enough_alone(arrived):
    of = session()
    party = begun(of, "masked")[1]
    with pytest.raises(MessageError, match="expected at least 3 clients that shared, client a among them"):
        party.reveal(of.pack(REQUEST, SERVER, listed(dict.fromkeys(arrived, b""))))


def test_a_false_share_voids_the_round():
    of = session()
    for place, who in ((0, "a"), (2, "c")):                     # of a's seed, of c's key
        done = Round(of, vectors(of), {"c": "masked"}).until("masked")
        request = done.tally.request()
        for name in "abde":
            data = bytearray(done.parties[name].reveal(request))
            data[HEADER.size + 32 * place] ^= name == "b"
            done.tally.take_reveal(bytes(data))
        with pytest.raises(MessageError, match=f"client {who}: expected shares of the secret that it announced"):
            done.tally.total()


def test_who_may_take_part():
    with pytest.raises(StrategyError, match=r"every client once; got \['a'\]"):
        session("aba", 2)
    for names in ("", "a"):
        with pytest.raises(StrategyError, match="2 to 4096 clients; got .* that client's update"):
            session(names, 1)
    for threshold in (0, 2, 6, 3.0, None):
        with pytest.raises(StrategyError, match="a threshold of 3 to 5, more than half of 5 clients"):
            session(threshold=threshold)
    with pytest.raises(StrategyError, match="a threshold of 3 to 4"):
        session("abcd", 2)
    done, party = begun(session(), "shares")
    with pytest.raises(StrategyError, match=r"expected 100 words \(uint64\); got int64 \(100,\)"):
        party.masked(done.tally.delivery("a"), np.zeros(100, np.int64))


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "Crypto.Protocol", None)
    with pytest.raises(ConfigError, match=r"expected pycryptodome; .*pip install 'flora\[secure\]'"):
        Party(session(), "a").keys()
