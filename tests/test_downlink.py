"""The form in which a merge travels: never more bytes than promised, never more error, and everybody's base the same."""
from itertools import pairwise

import pytest
import torch
from rounds import Rounds, error, updates_of, wanted
from tiny import adapter, dense, llama, same

from flora.adapter import Adapter, stack
from flora.client import LocalClient
from flora.downlink import Downlink, lighter
from flora.errors import ConfigError, StrategyError
from flora.messages import Broadcast, decode, encode, size
from flora.nn import merge as merge_into
from flora.nn import target_shapes, weights
from flora.server import Server
from flora.strategies import aggregate
from flora.versions import bring_to

SHAPES = {"a.q": (24, 16), "a.v": (9, 40)}
RANKS = [12, 5, 3]


def sent(downlink, base=None, shapes=SHAPES, ranks=RANKS):
    broadcast = aggregate(updates_of(ranks, shapes=shapes), "flora")
    return broadcast, *lighter(broadcast, downlink, base)


def test_a_stack_is_sent_as_it_is():
    broadcast, out, lost = sent(Downlink())
    assert out is broadcast and lost == 0.0
    nothing = Broadcast(start={"l": adapter(2, (3, 3))}, version=1)
    assert lighter(nothing, Downlink("auto")) == (nothing, 0.0)


def test_compressed_loses_nothing_but_rounding_and_no_rank_is_left_over():
    broadcast, out, lost = sent(Downlink("compressed"))
    assert 0 < lost < 1e-6 and out.base is None
    for layer, shape in SHAPES.items():
        assert out.merge[layer].rank == min(*shape, sum(RANKS))
        assert error(dense(out.merge[layer]), dense(broadcast.merge[layer])) < 1e-6


@pytest.mark.parametrize("tol", [0.5, 0.1, 1e-2])
def test_threshold_keeps_its_error_and_no_rank_more_than_that_needs(tol):
    broadcast, out, lost = sent(Downlink("threshold", tol))
    total = 0.0
    for layer, a in broadcast.merge.items():
        sigma = torch.linalg.svdvals(dense(a))
        kept = out.merge[layer].rank
        assert error(dense(out.merge[layer]), dense(a)) <= tol
        assert (sigma[kept - 1:] ** 2).sum() > tol**2 * (sigma**2).sum()
        total += float((dense(out.merge[layer]) - dense(a)).norm()) ** 2
    whole = sum(float(dense(a).norm()) ** 2 for a in broadcast.merge.values())
    assert lost == pytest.approx((total / whole) ** 0.5, rel=1e-4)


def test_dense_sends_the_new_weights():
    base = {layer: torch.randn(shape) for layer, shape in SHAPES.items()}
    before = {layer: w.clone() for layer, w in base.items()}
    broadcast, out, lost = sent(Downlink("dense"), base)
    assert out.merge is None and lost == 0.0 and same_tensors(base, before)
    for layer, w in base.items():
        assert error(out.base[layer], w.double() + dense(broadcast.merge[layer])) < 1e-6
    with pytest.raises(ConfigError, match="weights of the base"):
        sent(Downlink("dense"))


def same_tensors(a, b):
    return set(a) == set(b) and all(torch.equal(a[n], b[n]) for n in a)


def test_auto_takes_the_fewest_bytes_that_the_error_allows():
    shapes = {"wide": (40, 40), "long": (8, 64), "low": (40, 40)}
    merge = {"wide": adapter(30, (40, 40)), "long": adapter(6, (8, 64)), "low": adapter(2, (40, 40))}
    merge["low"] = stack([merge["low"], merge["low"] * 0.5])               # rank 4 that holds 2
    base = {layer: torch.randn(shape) for layer, shape in shapes.items()}
    out, lost = lighter(Broadcast(merge=merge, version=1), Downlink("auto"), base)
    assert set(out.base) == {"wide"} and set(out.merge) == {"long", "low"} and lost < 1e-6
    assert same({"l": out.merge["long"]}, {"l": merge["long"]}) and out.merge["low"].rank == 2
    for how in ("stack", "compressed", "dense"):
        assert size(out) < size(lighter(Broadcast(merge=merge, version=1), Downlink(how), base)[0])
    half = {layer: w.bfloat16() for layer, w in base.items()}
    assert "long" in lighter(Broadcast(merge=merge, version=1), Downlink("auto"), half)[0].base      # two bytes a number
    out, lost = lighter(Broadcast(merge=merge, version=1), Downlink("auto", 0.3))
    assert out.base is None and 0 < lost <= 0.3 and size(out) < size(Broadcast(merge=merge, version=1))


def test_a_server_and_its_clients_hold_the_same_base_after_every_form():
    shapes = target_shapes(llama(), ("q_proj", "down_proj"))
    for how, tol in (("stack", 0.0), ("compressed", 0.0), ("threshold", 0.2), ("dense", 0.0), ("auto", 0.1)):
        clients = [LocalClient(f"c{k}", [{"input_ids": [1], "labels": [1]}], rank) for k, rank in enumerate((8, 4))]
        server = Server("flora", clients, Broadcast(run=how), downlink=Downlink(how, tol))
        model, other = llama(), llama()
        for version in range(2):
            updates = updates_of([8, 4], shapes=shapes, version=version)
            broadcast = server.close(updates, weights(model, list(shapes)))
            assert server.downlink_error <= tol + 1e-6 and bring_to(model, broadcast)
            bring_to(other, decode(encode(broadcast, server.before), shapes, given=server.before))
            for name, weight in weights(model, list(shapes)).items():
                assert torch.equal(weight, weights(other, [name])[name])
        if how != "threshold" and not tol:
            plain = llama()
            for version in range(2):
                merge_into(plain, aggregate(updates_of([8, 4], shapes=shapes, version=version), "flora").merge)
            for name in shapes:
                assert error(weights(model, [name])[name], weights(plain, [name])[name]) < 1e-5


def test_who_missed_a_round_of_weights_needs_weights():
    shapes = {"a": (6, 5)}
    clients = [LocalClient("c0", [{"input_ids": [1], "labels": [1]}], 4)]
    server = Server("flora", clients, Broadcast(), downlink=Downlink("dense"))
    base = {"a": torch.zeros(6, 5)}
    for version in range(3):
        server.close(updates_of([4], shapes=shapes, version=version), base)
        base = dict(server.broadcast.base)
    assert server.catch_up(0).base is not None
    mixed = Server("flora", clients, Broadcast(merge={"a": adapter(1, (6, 5))}, base={"b": torch.zeros(2, 2)}, version=5))
    with pytest.raises(StrategyError, match="Give weights"):
        mixed.catch_up(2)


def test_the_warm_start_is_cut_from_what_is_compressed_too():
    """The rest of a warm start holds its own start twice, with both signs: at full rank it has R - r ranks."""
    ranks = [6, 4, 4]
    run = Rounds("flora", ranks, shapes={"l": (40, 50)}, options={"start": "warm"})
    run.server.downlink = Downlink("compressed")
    updates = run.round()
    assert run.server.broadcast.merge["l"].rank == sum(ranks) - min(ranks)
    assert error(run.model()["l"], wanted(updates, "l")) < 1e-6


@pytest.mark.parametrize("bad", [{"how": "zip"}, {"how": "auto", "tol": 1.0}, {"how": "auto", "tol": -0.1}])
def test_a_downlink_that_there_is_not_is_refused(bad):
    with pytest.raises(ConfigError, match="expected a downlink"):
        Downlink(**bad)


def test_more_tolerance_is_never_more_bytes():
    a = Adapter(torch.randn(20, 30) * torch.logspace(0, -4, 20)[:, None], torch.randn(25, 20), 1.0)
    sizes = [size(lighter(Broadcast(merge={"l": a}), Downlink("auto", tol))[0]) for tol in (0.0, 1e-3, 1e-2, 0.1, 0.5)]
    assert all(after <= before for before, after in pairwise(sizes)) and sizes[-1] < sizes[0] / 3
