"""The masks: the server gets the sum of those who stayed, and from everything that it holds nothing of one client."""
import secrets

import numpy as np
import pytest
from masked import NAMES, STEPS, Round, lists, looks_random, session, summed, vectors

pytest.importorskip("Crypto", reason="pycryptodome is missing: no mask was tested; pip install 'flora[secure]'")

from flora.errors import MessageError, StrategyError
from flora.masking import HEADER, KEYS, MASKED, REVEAL, agreed, hashed, joined, pair_key, public_of, split


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("who", NAMES)
def test_any_client_may_drop_out_at_any_step(who, step):
    of = session()
    values = vectors(of)
    done = Round(of, values, {who: step}).until()
    stayed = [n for n in NAMES if n != who or step == "reveal"]
    assert lists(done.tally.total()) == summed(of, values, stayed) and done.tally.names(MASKED) == stayed


def test_as_many_may_drop_out_as_the_threshold_lets_go():
    of = session()
    values = vectors(of)
    for dropped in ({}, {"a": "masked", "e": "masked"}, {"a": "shares", "c": "masked"}, {"b": "keys", "c": "reveal"},
                    {"a": "reveal", "b": "reveal"}):
        stayed = [n for n in NAMES if dropped.get(n) in (None, "reveal")]
        assert lists(Round(of, values, dropped).until().tally.total()) == summed(of, values, stayed)
    two = session("ab", 2)
    assert lists(Round(two, vectors(two)).until().tally.total()) == summed(two, vectors(two), "ab")


@pytest.mark.parametrize("step", STEPS)
def test_fewer_than_the_threshold_void_the_round(step):
    done = Round(session(), vectors(session()), {"a": step, "b": "masked" if step == "reveal" else step, "c": step})
    with pytest.raises(StrategyError, match=r"at least 3 of 5 clients \(the threshold\) in step \d; got 2: .*Start another"):
        done.until().tally.total()


def test_the_server_sees_noise():
    """Zeros and large numbers look alike under the masks, each against what it hides and against the other."""
    of = session(sizes=[("q", 40_000)])
    zeros, ramp = np.zeros(of.count, np.uint64), np.arange(of.count, dtype=np.uint64) << np.uint64(40)
    values = {name: ramp if name in "ace" else zeros for name in NAMES}
    done = Round(of, values).until()
    assert not looks_random(ramp) and not looks_random(zeros)
    for name in NAMES:
        assert looks_random(done.words(name), ramp.astype(float))
        for other in NAMES:
            assert name == other or looks_random(done.words(name) - done.words(other), ramp.astype(float))
    assert not looks_random(done.tally.total()["q"])


def test_two_rounds_of_the_same_update_share_nothing():
    values = vectors(session(), 1)
    rounds = [Round(session(label=label), values).until() for label in ("run/0", "run/1", "run/1")]
    for name in NAMES:
        one, two, three = (r.words(name) for r in rounds)
        assert not ((one == two) | (two == three) | (one == three)).any()
    own = session(label="run/1")
    key = secrets.token_bytes(32)                               # one key would not do it either: labels and layers have their own
    streams = [mask for of in (session(), own) for _, mask in of.masks(key)]
    assert not any((a[:30] == b[:30]).any() for i, a in enumerate(streams) for b in streams[:i])


def test_what_the_server_holds_does_not_bare_a_client():
    """All answers in, one client gone: of those who arrived the server has the seed, never the key; of the other the reverse."""
    of = session(sizes=[("q", 20_000)])
    values = {name: np.full(of.count, 7, np.uint64) for name in NAMES}
    done = Round(of, values, {"c": "masked"}).until()
    assert done.tally.total()["q"].tolist() == [28] * of.count
    keys, answers = done.tally._came[KEYS], done.tally._came[REVEAL]
    for place, name in enumerate(NAMES):
        parts = {number: answers[number][32 * place:32 * place + 32] for number in sorted(answers)[:3]}
        secret = joined(parts)
        is_key, is_seed = public_of(secret) == keys[place][32:64], hashed(of, secret, "commitment") == keys[place][64:]
        assert (is_key, is_seed) == ((True, False) if name == "c" else (False, True))
    # all that it can take off of one vector: the client's own mask, and the dropped client's pair
    a_seed = joined({n: answers[n][:32] for n in sorted(answers)[:3]})
    c_key = joined({n: answers[n][64:96] for n in sorted(answers)[:3]})
    (_, own), = of.masks(a_seed)
    (_, pair), = of.masks(pair_key(of, c_key, 2, 0, keys[0][32:64]))
    left = done.words("a") - own - pair
    assert looks_random(left) and not (left == 7).any()
    party = done.parties["a"]                                   # what it lacks: the keys of a's pairs with those who arrived
    for other in (1, 3, 4):
        (_, pair), = of.masks(pair_key(of, party._secret, 0, other, keys[other][32:64]))
        left = left - pair
        assert (left == 7).all() == (other == 4)


def test_a_vector_that_comes_too_late_stays_masked():
    """What the second mask is for: the key of a client that was given up is known by then, and takes off all its pairs."""
    of = session(sizes=[("q", 20_000)])
    done = Round(of, {name: np.full(of.count, 7, np.uint64) for name in NAMES}, {"c": "masked"}).until("shares")
    delivery = done.tally.delivery("c")
    done.masked()
    done.reveal()
    late = np.frombuffer(done.parties["c"].masked(delivery, done.values["c"])[HEADER.size:], "<u8")
    keys, answers = done.tally._came[KEYS], done.tally._came[REVEAL]
    key = joined({n: answers[n][64:96] for n in sorted(answers)[:3]})
    for other in (0, 1, 3, 4):
        (_, pair), = of.masks(pair_key(of, key, 2, other, keys[other][32:64]))
        late = late - pair if other > 2 else late + pair
    assert looks_random(late) and not (late == 7).any()
    (_, own), = of.masks(done.parties["c"]._seed)
    assert (late - own == 7).all()


def test_shares_below_the_threshold_tell_nothing():
    secret = secrets.token_bytes(32)
    shares = dict(enumerate(split(secret, 3, 5)))
    assert all(len(share) == 32 for share in shares.values())
    assert joined({n: shares[n] for n in (4, 0, 2)}) == secret == joined({n: shares[n] for n in (1, 2, 3)})
    assert joined({n: shares[n] for n in (0, 1)}) != secret and secret not in shares.values()


def test_a_pair_agrees_and_others_do_not():
    a, b, c = (secrets.token_bytes(32) for _ in range(3))
    assert agreed(a, public_of(b)) == agreed(b, public_of(a)) != agreed(c, public_of(a))
    nine = bytes([9]) + bytes(31)                               # RFC 7748, section 5.2: k = u = 9, once
    assert agreed(nine, nine).hex() == "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079" == public_of(nine).hex()
    for low in (bytes(32), b"\x01" + bytes(31)):                                # points of low order
        with pytest.raises(MessageError, match="expected an X25519 public key"):
            agreed(a, low)
