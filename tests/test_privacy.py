"""Privacy of clients: what is released, how far one client moves it, and the noise on it, rule by rule."""
import math
from dataclasses import replace

import pytest
import torch
from rounds import LAYERS, Rounds, plain, within
from tiny import adapter, dense, same

from flora import Broadcast, Update, aggregate
from flora.accountant import epsilon
from flora.adapter import Adapter, pad
from flora.errors import ConfigError
from flora.frames import core, frame
from flora.privacy import ClientPrivacy, Population, clip_factor, delta_norm, poisson_sample, private_broadcast
from flora.proven import PROVEN
from flora.strategies import strategy_named

KEY = bytes(range(32))
QUIET = ClientPrivacy(1e9, 0.0)
FACTORS = [name for name in PROVEN if name != "flora"]
RANK = 3


def ranks_of(name):
    return [5, 3, 2, 2] if strategy_named(name).mixed_ranks else [RANK] * 4


def round_of(name, version=0):
    """What was sent in a round, and what four clients answer: some training on what trains."""
    run = Rounds(name, ranks_of(name))
    for _ in range(version + 1):
        sent, updates = run.server.broadcast, run.round()
    return sent, updates


def released(name, updates, sent, privacy=QUIET, fraction=1.0, key=KEY):
    return private_broadcast(updates, name, sent, privacy, Population(LAYERS, ranks_of(name), fraction), key)


def numbers(name, broadcast, train):
    """Everything that a release has, in the coordinates in which it is released, as one vector in fp64."""
    if name == "flora":
        return torch.cat([dense(a).flatten() for a in broadcast.merge.values()])
    if train == "core":
        return torch.cat([core(Adapter(a.A.double(), a.B, a.scale), frame(a.shape, a.rank, broadcast.frame, n)[0]).flatten()
                          for n, a in broadcast.start.items()])
    return torch.cat([getattr(a, f).double().flatten() for a in broadcast.start.values() for f in train])


def scaled(update, sent, factor):
    """The same update, its move from where it started `factor` times as long."""
    begun = sent.start or {}
    out = {}
    for n, a in update.adapters.items():
        if n in begun:
            A, B = begun[n].A[:a.rank], begun[n].B[:, :a.rank]
            out[n] = Adapter(A + factor * (a.A - A), B + factor * (a.B - B), a.scale)
        else:
            out[n] = Adapter(a.A, a.B * factor, a.scale)
    return replace(update, adapters=out)


@pytest.mark.parametrize("ranks", [(1,), (4, 2), (7, 5)])
def test_the_norm_of_a_product_is_that_of_the_dense_one(ranks):
    for i, rank in enumerate(ranks):
        a = adapter(rank, (13, 7), i)
        size, slack = delta_norm(a)
        exact = float(dense(a).norm())
        assert size == pytest.approx(exact, rel=1e-13) and 0 < slack < 1e-10 * exact


def test_the_clip_is_joint_and_exact():
    a, b = adapter(4, (13, 7), 1), adapter(2, (5, 11), 2)
    exact = math.hypot(float(dense(a).norm()), float(dense(b).norm()))
    parts = [delta_norm(a), delta_norm(b)]
    assert clip_factor(parts, exact / 3) == pytest.approx(1 / 3, rel=1e-11)
    assert clip_factor(parts, 2 * exact) == 1.0 == clip_factor([], 1.0)
    assert clip_factor([(math.nan, 0.0)], 1.0) == 0.0 == clip_factor([(math.inf, 1.0)], 1.0)
    assert 0.0 < clip_factor([(1e200, 0.0)], 1.0) < 1e-199


@pytest.mark.parametrize("version", [0, 1, 2])
@pytest.mark.parametrize("name", PROVEN)
def test_without_noise_and_with_a_huge_clip_it_is_the_plain_rule_of_equal_weights(name, version):
    sent, updates = round_of(name, version)
    got = released(name, updates, sent)
    options = {"sent": sent.start} if name != "flora" else {}
    options |= {"seed": sent.frame} if name == "fedsb" else {}
    expected = aggregate(updates, name, **({} if name == "hetlora" else {"weights": "uniform"}), **options)
    assert (got.version, got.train, got.frame, got.run) == (expected.version, expected.train, expected.frame, sent.run)
    assert list(got.merge or got.start) == list(expected.merge or expected.start) == list(LAYERS)
    for layer in LAYERS:
        if name == "flora":
            p = [0.25] * 4
            exact = sum(0.25 * dense(u.adapters[layer]) for u in updates)
            assert within(dense(got.merge[layer]), plain(updates, layer, p), exact) and got.start is None
            continue
        one, other = got.start[layer], expected.start[layer]
        assert one.rank == other.rank and torch.equal(one.scale, other.scale) and got.merge is None
        wanted = dense(other)
        assert float((dense(one) - wanted).norm()) <= 1e-6 * float(wanted.norm()) + 1e-12
        untrained = {"A": "B", "B": "A", "core": "B"}.get(sent.train) if name != "fedsvd" else None
        if untrained:
            assert getattr(one, untrained) is getattr(sent.start[layer], untrained)


@pytest.mark.parametrize("size", [1.0, 1e4, 1e12])
@pytest.mark.parametrize("name", PROVEN)
def test_one_client_moves_the_release_by_no_more_than_the_clip(name, size):
    """Removed, added, replaced by anything: C / m at most for one that comes or goes, and that much for a client that is large."""
    sent, updates = round_of(name, 0 if name == "flora" else 2)
    privacy = ClientPrivacy(0.05, 0.0, rank=99)
    large = [*updates[:2], scaled(updates[2], sent, size), updates[3]]
    for fraction in (1.0, 0.5):
        m = 4 * fraction
        rule = "ffa" if name == "fedsvd" else name             # fedsvd: an SVD of this release, which another test looks at
        with_it, without = (numbers(rule, released(rule, some, sent, privacy, fraction), sent.train)
                            for some in (large, large[:2] + large[3:]))
        distance = float((with_it - without).norm())
        assert distance == pytest.approx(0.05 / m, rel=1e-3)    # they are stored in fp32
        nobody = numbers(rule, released(rule, [], sent, privacy, fraction), sent.train)
        assert float((with_it - nobody).norm()) <= 4 * 0.05 / m * 1.001


@pytest.mark.parametrize("name", PROVEN)
def test_a_client_below_the_clip_is_not_touched(name):
    sent, updates = round_of(name)
    small = [scaled(u, sent, 1e-3) for u in updates]
    one, other = (released(name, small, sent, ClientPrivacy(c, 0.0)) for c in (1.0, 1e9))
    assert same(one.merge or one.start, other.merge or other.start)


def test_a_layer_alone_does_not_set_the_clip():
    """The norm is over all layers: one that is small next to another is scaled as that one is."""
    sent, [update, *_] = round_of("flora")
    first, second = LAYERS
    update = replace(update, adapters={first: update.adapters[first], second: update.adapters[second] * 1e-3})
    got = released("flora", [update], sent, ClientPrivacy(0.01, 0.0)).merge
    whole = math.hypot(*(float(dense(update.adapters[n]).norm()) for n in LAYERS))
    for n in LAYERS:
        exact = dense(update.adapters[n]) * 0.01 / whole / 4
        assert float((dense(got[n]) - exact).norm()) < 1e-6 * float(exact.norm())


def test_factors_that_cancel_move_nothing_by_their_rounding():
    """B = [b, b], A = [a; -a + tiny], of size 1e15 each: ΔW is small, what fp64 makes of it is not."""
    draw = torch.Generator().manual_seed(5)
    b, a = (1e15 * torch.randn(n, generator=draw, dtype=torch.float64) for n in (13, 7))
    evil = Adapter(torch.stack([a, -a * (1 + 1e-15)]), torch.stack([b, b], 1), 1.0)
    sent = Broadcast()
    for name in LAYERS:
        there = Update({name: evil if name == "blocks.0.q" else Adapter(torch.zeros(1, 11), torch.zeros(5, 1), 1.0)}, 1, client="x")
        got = released("flora", [there], sent, ClientPrivacy(1.0, 0.0))
        assert float(numbers("flora", got, "AB").norm()) <= 0.25


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["flora", "ffa"])
def test_numbers_that_are_not_finite_count_as_zero(name, bad):
    """An error would tell that somebody's training failed."""
    sent, updates = round_of(name)
    first = next(iter(LAYERS))
    a = updates[1].adapters[first]
    broken = replace(updates[1], adapters={**updates[1].adapters, first: Adapter(a.A, a.B.clone().fill_(bad), a.scale)})
    got, expected = (released(name, some, sent) for some in ([updates[0], broken], [updates[0]]))
    assert same(got.merge or got.start, expected.merge or expected.start)


@pytest.mark.parametrize("name", PROVEN)
def test_the_noise_has_the_standard_deviation_that_the_clip_asks_for(name):
    """z C / m on every number that is released, and none on what was fixed. 200 keys; the bounds are of 5 standard errors."""
    sent, updates = round_of(name)
    rule = "ffa" if name == "fedsvd" else name
    z, C, fraction = 1.5, 0.2, 0.5
    still = numbers(rule, released(rule, updates, sent, ClientPrivacy(C, 0.0, rank=99), fraction), sent.train)
    drawn = torch.stack([numbers(rule, released(rule, updates, sent, ClientPrivacy(C, z, rank=99), fraction, bytes([i]) * 32),
                                 sent.train) - still for i in range(200)]) / (z * C / (4 * fraction))
    count = drawn.numel()
    assert float(drawn.std()) == pytest.approx(1.0, abs=5 / math.sqrt(2 * count))
    assert abs(float(drawn.mean())) < 5 / math.sqrt(count)
    spread = drawn.std(0)
    assert float((spread - 1).abs().max()) < 0.3               # every number has some: 0.05 is one standard error
    correlation = (drawn.T @ drawn / 200).fill_diagonal_(0.0)
    assert float(correlation.abs().max()) < 0.45               # and each its own: 0.07 is one standard error


def test_noise_is_of_the_key_the_run_and_the_round_alone():
    sent, updates = round_of("ffa")
    loud = ClientPrivacy(1.0, 1.0)
    first = released("ffa", updates, sent, loud)
    assert same(first.start, released("ffa", updates[::-1], sent, loud).start)
    later = [replace(u, base_version=1) for u in updates]
    others = [released("ffa", updates, sent, loud, key=bytes(32)), released("ffa", later, replace(sent, version=1), loud),
              released("ffa", updates, replace(sent, run="another"), loud)]
    noises = [torch.cat([(o.start[n].B - released("ffa", updates, sent).start[n].B).flatten() for n in LAYERS])
              for o in (first, *others)]
    for i, one in enumerate(noises):
        for other in noises[:i]:
            assert abs(float(torch.cosine_similarity(one, other, 0))) < 5 / math.sqrt(len(one))
    assert "key" not in repr(loud) and "noise" not in str(first.run)


def test_blocks_of_noise_differ(monkeypatch):
    """A layer larger than a block has as much noise as its numbers, not the same block again."""
    monkeypatch.setattr("flora.privacy.BLOCK", 13)
    sent, _ = round_of("ffa")
    B = released("ffa", [], sent, ClientPrivacy(1.0, 1.0)).start["blocks.0.q"].B.T.flatten()
    assert len(B) == 39 and len(set(B.tolist())) == 39 and float((B[:13] - B[26:]).abs().min()) > 1e-4


@pytest.mark.parametrize("name", PROVEN)
def test_a_round_without_clients_is_released_as_noise(name):
    """It would tell, otherwise, that nobody was sampled."""
    sent, updates = round_of(name)
    got = released(name, [], sent, ClientPrivacy(1.0, 1.0))
    full = released(name, updates, sent, ClientPrivacy(1.0, 1.0))
    assert got.version == sent.version + 1 and list(got.merge or got.start) == list(LAYERS)
    assert [a.rank for a in (got.merge or got.start).values()] == [a.rank for a in (full.merge or full.start).values()]
    assert not same(got.merge or got.start, full.merge or full.start)


def test_what_travels_of_flora_has_a_public_rank_and_no_factor_of_a_client():
    sent, updates = round_of("flora")
    for privacy, fraction, rank in ((QUIET, 1.0, 7), (QUIET, 0.25, 3), (ClientPrivacy(1.0, 1.0, rank=2), 1.0, 2)):
        merge = released("flora", updates[:1], sent, privacy, fraction).merge
        assert {a.rank for n, a in merge.items()} == {min(rank, *LAYERS[n]) for n in LAYERS}
    a = released("flora", updates[:1], sent).merge["blocks.0.v"]
    rows = torch.nn.functional.normalize(updates[0].adapters["blocks.0.v"].A, dim=1)
    assert float((rows @ torch.nn.functional.normalize(a.A, dim=1).T).abs().max()) < 0.999


def test_fedsvd_is_an_svd_of_the_release_of_ffa():
    sent, updates = round_of("fedsvd")
    loud = ClientPrivacy(0.3, 1.0)
    one, other = (released(name, updates, sent, loud).start for name in ("fedsvd", "ffa"))
    for n in LAYERS:
        assert float((dense(one[n]) - dense(other[n])).norm()) < 1e-5 * float(dense(other[n]).norm())
        assert torch.allclose(one[n].A @ one[n].A.T, torch.eye(RANK), atol=1e-5)
        squares = one[n].B.T @ one[n].B
        assert float((squares - squares.diag().diag()).abs().max()) < 1e-4 * float(squares.max())


def test_a_rank_that_some_clients_lack_counts_as_zero_by_the_public_ranks():
    """zeropad: the start fades there by the share of all clients that have it, sampled or not; moves are of own ranks alone."""
    sent, updates = round_of("zeropad")
    for some in ([], updates[:1], updates):
        got = released("zeropad", some, sent)
        for n in LAYERS:
            rest = sum(((pad(u.adapters[n], 5).A - pad(Adapter(sent.start[n].A[:u.adapters[n].rank], sent.start[n].B[
                :, :u.adapters[n].rank], 2.0), 5).A) / 4 for u in some), torch.zeros(()))
            kept = torch.tensor([1.0, 1.0, 0.5, 0.25, 0.25])[:, None]
            assert torch.allclose(got.start[n].A, sent.start[n].A * kept + rest, atol=1e-6)


def test_an_attack_at_large_epsilon_gains_what_is_allowed_and_not_more():
    """The best test there is of whether a client took part, the projection on its move: its rates obey (ε, δ), and its gain is what
    accounting assumes, so the noise is neither too small nor far too large."""
    sent, updates = round_of("ffa")
    z, trials = 0.5, 400
    loud, me = ClientPrivacy(0.1, z), scaled(updates[2], sent, 1e3)
    base, moved = (numbers("ffa", released("ffa", some, sent, ClientPrivacy(0.1, 0.0)), "B")
                   for some in (updates[:2], [*updates[:2], me]))
    direction = (moved - base) / (moved - base).norm()
    scores = {there: torch.stack([direction @ (numbers("ffa", released("ffa", [*updates[:2], *extra], sent, loud, key=bytes(
        [i % 256, i // 256 + 2 * there]) * 16), "B") - base) for i in range(trials)]) for there, extra in ((0, []), (1, [me]))}
    delta = 1e-3
    bound = epsilon(z, delta, 1)
    for threshold in torch.linspace(-0.02, 0.05, 15):
        true, false = (float((scores[there] > threshold).double().mean()) for there in (1, 0))
        assert true <= math.exp(bound) * (false + 3 * math.sqrt(false / trials) + 3 / trials) + delta
    spread = float(torch.cat([scores[there] - scores[there].mean() for there in (0, 1)]).std())
    assert float(scores[1].mean() - scores[0].mean()) / spread == pytest.approx(1 / z, rel=0.1)


def test_each_client_is_sampled_by_itself():
    names = [f"c{i}" for i in range(50)]
    rounds = [poisson_sample(names, 0.3, KEY, t) for t in range(400)]
    counts = torch.tensor([len(r) for r in rounds], dtype=torch.float64)
    assert float(counts.mean()) == pytest.approx(15, abs=5 * math.sqrt(50 * 0.21 / 400))
    assert float(counts.var()) == pytest.approx(50 * 0.21, rel=0.35)         # binomial: a fixed number would have none
    assert rounds[3] == poisson_sample(names, 0.3, KEY, 3) != rounds[4] and rounds[3] != poisson_sample(names, 0.3, bytes(32), 3)
    assert set(rounds[3]) - {"new"} == set(poisson_sample([*names, "new"], 0.3, KEY, 3)) - {"new"}
    assert poisson_sample(names, 1.0, KEY, 0) == names
    with pytest.raises(ConfigError, match="q: expected"):
        poisson_sample(names, 0.0, KEY, 0)
