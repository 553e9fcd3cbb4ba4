"""Errors of published code that concern aggregation, each by name and for every rule it could come back in; and no dense tensor."""
import pytest
import torch
from rounds import Rounds, error, updates_of, wanted
from tiny import adapter, dense
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flora
from flora.adapter import Adapter
from flora.nn import LoRALinear
from flora.strategies import STRATEGIES, aggregate
from flora.versions import bring_to

SHARED = {"ffa": "A", "rolora": "A", "fedsvd": "A", "fedsb": "B"}
EXACT = ["flora", "fedex", "ffa", "rolora", "fedsvd", "fedsb"]
MIXED = sorted(name for name, strategy in STRATEGIES.items() if strategy.mixed_ranks and not strategy.dense and not strategy.home)


def total(broadcast, layer):
    return sum(dense(part[layer]) for part in (broadcast.merge, broadcast.start) if part is not None)


AGGREGATING = sorted(set(STRATEGIES) - {"full", "standalone"})


@pytest.mark.parametrize("name", AGGREGATING)
def test_published_error_average_is_p0_times_client_0(name):
    """Every client counts, and none alone: two clients that swap places give the same, and another second client something else."""
    one, two, three = updates_of([3] * 3, shapes={"l": (13, 7)}, shared=SHARED.get(name, ""), examples=[2, 2, 2])
    here = aggregate([one, two], name)
    seen = (lambda b: b.start["l"].A.double()) if name == "fedsa" else (lambda b: total(b, "l"))
    assert error(seen(aggregate([two, one], name)), seen(here)) < 1e-5
    assert error(seen(aggregate([one, three], name)), seen(here)) > 1e-2


@pytest.mark.parametrize("name", AGGREGATING)
def test_published_error_p_k_applied_twice(name):
    """Equal clients: the answer is that adapter again, neither halved nor quartered, at any alpha."""
    update = updates_of([3], [11.0], shapes={"l": (13, 7)}, shared=SHARED.get(name, ""))[0]
    twins = [flora.Update(update.adapters, n, {}, 0, f"c{n}") for n in (1, 2, 5)]
    broadcast = aggregate(twins, name)
    if name == "fedsa":
        assert error(broadcast.start["l"].A, update.adapters["l"].A) < 1e-6
    else:
        options = {"threshold": 1.0} if name == "florist" else {}
        assert error(total(aggregate(twins, name, **options), "l"), dense(update.adapters["l"])) < 1e-6


@pytest.mark.parametrize("rank", [13, 7])
@pytest.mark.parametrize("name", AGGREGATING)
def test_published_error_factors_told_apart_by_shape(name, rank):
    """A rank equal to a feature size on either side, and square factors."""
    shapes = {"l": (13, 7), "square": (rank, rank)}
    updates = updates_of([rank] * 3, shapes=shapes, shared=SHARED.get(name, ""))
    broadcast = aggregate(updates, name)
    for layer, shape in shapes.items():
        got = (broadcast.start or broadcast.merge)[layer]
        assert got.shape == shape
        if name in EXACT:
            assert error(total(broadcast, layer), wanted(updates, layer)) < 1e-6


@pytest.mark.parametrize("name", MIXED)
def test_published_error_stacked_rank_is_r_times_clients(name):
    """Any rank list, and part of the clients."""
    for ranks in ([5, 3, 1], [1], [2, 7]):
        updates = updates_of(ranks, shapes={"l": (40, 30)})
        broadcast = aggregate(updates, name)
        if broadcast.merge:
            assert broadcast.merge["l"].rank == sum(ranks) and error(total(broadcast, "l"), wanted(updates, "l")) < 1e-6
        elif name != "florist":
            assert broadcast.start["l"].rank == max(ranks)


@pytest.mark.parametrize("name", MIXED)
def test_published_error_one_alpha_for_mixed_ranks(name):
    """A client alone gets back what it trained, whatever the others' ranks and alphas would make of its scale."""
    for rank, alpha in ((8, 16.0), (2, 16.0), (4, 3.0)):
        update = updates_of([rank], [alpha], shapes={"l": (40, 30)})[0]
        options = {"threshold": 1.0} if name == "florist" else {}
        run = {"ranks": [8, 4, 2], "scale": 7.0} if "scale" in STRATEGIES[name].options and name != "florist" else {}
        assert error(total(aggregate([update], name, **options, **run), "l"), dense(update.adapters["l"])) < 1e-6


@pytest.mark.parametrize("name", [*EXACT, "warm"])
def test_published_error_the_residual_added_transposed(name):
    """Silent on a square layer: what the model computes is checked, not the shape; through LoRALinear and merge, on (8, 8)."""
    options = {"start": "warm"} if name == "warm" else {}
    run = Rounds("flora" if name == "warm" else name, [3, 3], shapes={"l": (8, 8)}, options=options)
    updates = run.round()
    model = torch.nn.Sequential()
    model.add_module("l", torch.nn.Linear(8, 8, bias=False))
    model.l.weight.data.zero_()
    bring_to(model, run.server.broadcast)
    start, x = run.server.broadcast.start, torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    if start is not None:
        with flora.nn.applied(model, start) as layers:
            assert isinstance(layers["l"], LoRALinear)
            got = model(x)
    else:
        got = model(x)
    assert error(got.detach(), x.double() @ wanted(updates, "l").T) < 1e-5


@pytest.mark.parametrize("name", sorted(set(AGGREGATING) - set(MIXED)))
def test_published_error_factors_of_other_shapes_broadcast_in_an_average(name):
    """(4, .) and (1, .) would broadcast silently."""
    with pytest.raises(flora.errors.StrategyError, match=r"ranks \[4, 1\]"):
        aggregate(updates_of([4, 1], shared=SHARED.get(name, "")), name)


def test_published_error_clients_of_full_fine_tuning_share_one_model():
    """The average reads each client's weights and writes into none of them."""
    weights = [torch.full((3, 2), float(k)) for k in range(3)]
    updates = [flora.Update({}, 1, {}, 0, f"c{k}", base={"l": w}) for k, w in enumerate(weights)]
    out = aggregate(updates, "full").base["l"]
    assert out.tolist() == [[1.0, 1.0]] * 3 and [float(w[0, 0]) for w in weights] == [0.0, 1.0, 2.0]
    assert out.data_ptr() not in {w.data_ptr() for w in weights}


@pytest.fixture
def one_thread():
    """Layers are then taken in this thread, which the watch sees."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Largest(TorchDispatchMode):
    """Watches the largest tensor that any operation gives."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


WATCHED = {name: {} for name in AGGREGATING} | {"warm": {"start": "warm"}, "shared": {"start": "shared"}}


@pytest.mark.parametrize("name", WATCHED)
def test_nothing_as_large_as_the_weight_is_formed(name, one_thread):
    """On (601, 503), 302,303 numbers; the factors of four clients, stacked twice over, are 35,328."""
    shape, strategy = (601, 503), "flora" if name in ("warm", "shared") else name
    updates = updates_of([4] * 4, shapes={"l": shape}, shared=SHARED.get(strategy, ""))
    with Largest() as seen:
        aggregate(updates, strategy, **WATCHED[name])
    assert 0 < seen.numel <= 2 * 16 * sum(shape) < shape[0] * shape[1] / 8


def test_the_watch_sees_a_dense_tensor():
    a = adapter(4, (601, 503), 1)
    with Largest() as seen:
        a.delta()
    assert seen.numel == 601 * 503
    weights = [flora.Update({}, 1, base={"l": torch.zeros(61, 53)})]
    with Largest() as seen:
        aggregate(weights, "full")
    assert seen.numel == 61 * 53 and Adapter(a.A, a.B, 1.0).rank == 4
