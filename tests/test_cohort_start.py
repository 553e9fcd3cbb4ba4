"""Where a client's training starts, what acts beside it, and what stays still: starts, frozen ranks, depth, A or B alone."""
import pytest
import torch
from tiny import TARGETS, adapter, dense, llama, near, same, token_rows

import flora
from flora import Adapter, Broadcast, Cohort, LocalClient, TrainConfig
from flora.errors import TargetError
from flora.member import starting_adapters
from flora.nn import lora_layers, target_shapes

SHAPES = target_shapes(llama(), TARGETS)
LAYER = "model.layers.0.self_attn.q_proj"
ROWS = token_rows(6)
CONFIG = TrainConfig(learning_rate=1e-2, max_steps=3, per_device_train_batch_size=2)
ONE_STEP = TrainConfig(learning_rate=1e-2, max_steps=1, per_device_train_batch_size=6, shuffle=False)


def start_of(rank, seed=0, shapes=SHAPES, alpha=None):
    return {name: adapter(rank, shape, seed + i, alpha) for i, (name, shape) in enumerate(shapes.items())}


def fit(client, broadcast, config=CONFIG, model=None, frozen=None):
    [update] = Cohort(model or llama(), [client], config, TARGETS).fit(broadcast, frozen)
    return update


def client_of(rank=4, alpha=8.0, **own):
    return LocalClient("c", ROWS, rank, alpha, **own)


def moved(update, start, factor):
    return [name for name in start if not torch.equal(getattr(update.adapters[name], factor), getattr(start[name], factor))]


def test_a_start_above_the_rank_is_cut_and_keeps_the_scale_sent():
    start = start_of(16, alpha=3.0)
    begun = starting_adapters(client_of(4, 100.0), start, SHAPES, 0, 1)
    for name, a in begun.items():
        assert torch.equal(a.A, start[name].A[:4]) and torch.equal(a.B, start[name].B[:, :4])
        assert a.scale.tolist() == start[name].scale[:4].tolist()
    assert same(starting_adapters(client_of(16), start, SHAPES, 0, 1), start)
    assert fit(client_of(4), Broadcast(start=start)).adapters[LAYER].scale.tolist() == start[LAYER].scale[:4].tolist()


def test_a_start_under_the_rank_is_filled_with_fresh_ranks_of_the_clients_own_scale():
    start = start_of(3, alpha=1.5)
    begun = starting_adapters(client_of(8, 32.0), start, SHAPES, 0, 1)
    for name, a in begun.items():
        assert a.rank == 8 and torch.equal(a.A[:3], start[name].A) and torch.equal(a.B[:, :3], start[name].B)
        assert a.scale.tolist() == [0.5] * 3 + [4.0] * 5 and not a.B[:, 3:].any() and bool(a.A[3:].any(1).all())
        assert torch.equal(dense(a), dense(start[name]))


def test_fresh_starts_have_zero_b_own_scale_and_depend_on_seed_client_version_and_layer():
    one = starting_adapters(client_of(4, 8.0), None, SHAPES, 0, 1)
    assert all(not a.B.any() and a.scale.tolist() == [2.0] * 4 for a in one.values())
    assert same(one, starting_adapters(client_of(4, 8.0), {}, SHAPES, 0, 1))
    other = LocalClient("d", ROWS, 4, 8.0)
    for again in (starting_adapters(client_of(), None, SHAPES, 1, 1), starting_adapters(client_of(), None, SHAPES, 0, 2),
                  starting_adapters(other, None, SHAPES, 0, 1)):
        assert all(not torch.equal(again[name].A, one[name].A) for name in SHAPES)
    assert len({float(a.A[0, 0]) for a in one.values()}) == len(one)
    part = starting_adapters(client_of(), None, {LAYER: SHAPES[LAYER]}, 0, 1)
    assert torch.equal(part[LAYER].A, one[LAYER].A)


def test_a_layer_missing_from_the_start_is_drawn_fresh():
    start = start_of(4, shapes={LAYER: SHAPES[LAYER]})
    begun = starting_adapters(client_of(), start, SHAPES, 0, 0)
    assert list(begun) == list(SHAPES) and torch.equal(begun[LAYER].B, start[LAYER].B)
    assert not any(bool(a.B.any()) for name, a in begun.items() if name != LAYER)


def test_what_stayed_at_home_takes_the_place_of_the_start():
    home, sent = start_of(4, 1), start_of(4, 2)
    assert same(fit(client_of(start=home), Broadcast(start=sent)).adapters, fit(client_of(), Broadcast(start=home)).adapters)
    assert not same(fit(client_of(start=home), Broadcast(start=sent)).adapters, fit(client_of(), Broadcast(start=sent)).adapters)


@pytest.mark.parametrize(("train", "still", "moving"), [("A", "B", "A"), ("B", "A", "B")])
def test_one_factor_trains_and_the_other_keeps_its_bits(train, still, moving):
    start = start_of(4)
    for config in (CONFIG, TrainConfig(learning_rate=1e-2, max_steps=3, per_device_train_batch_size=2, weight_decay=0.5)):
        update = fit(client_of(), Broadcast(start=start, train=train), config)
        assert moved(update, start, still) == [] and moved(update, start, moving) == list(start)
    both = fit(client_of(), Broadcast(start=start))
    assert moved(both, start, "A") == moved(both, start, "B") == list(start)


def losses_of(client, broadcast, config=ONE_STEP, model=None, frozen=None):
    """The first step's loss: what the client's forward gives before anything has changed."""
    seen = []
    Cohort(model or llama(), [client], config, TARGETS).fit(broadcast, frozen, lambda *step: seen.append(step[3]))
    return seen[0]


def merged(*sets):
    model = llama()
    for adapters in sets:
        flora.merge(model, adapters)
    return model


# One forward pass of 2 blocks in fp32, its products grouped otherwise: a few hundred roundings of 6e-8 at most.
FORWARD = 1e-5


def test_layers_limits_what_trains_while_the_rest_of_the_start_acts():
    start = start_of(4)
    deep = client_of(layers=[1])
    update = fit(deep, Broadcast(start=start))
    assert set(update.adapters) == {name for name in SHAPES if ".1." in name}
    assert moved(update, {name: start[name] for name in update.adapters}, "A") == list(update.adapters)
    whole = losses_of(client_of(), Broadcast(start=start))
    assert losses_of(deep, Broadcast(start=start)) == whole
    assert abs(whole - losses_of(client_of(), Broadcast(), model=merged(start))) < FORWARD
    assert abs(whole - losses_of(client_of(), Broadcast())) > 1e-3
    with pytest.raises(TargetError, match=r"layers=\[7\]"):
        fit(client_of(layers=[7]), Broadcast())


def test_the_rest_of_the_start_stands_still():
    """The same as training over a base that holds the rest, up to the rounding that AdamW's division passes on."""
    start = start_of(4)
    rest, own = ({name: a for name, a in start.items() if (".1." in name) == mine} for mine in (False, True))
    beside = fit(client_of(layers=[1]), Broadcast(start=start))
    over = fit(client_of(layers=[1]), Broadcast(start=own), model=merged(rest))
    for name, a in over.adapters.items():
        for factor in ("A", "B"):
            moved_by = getattr(a, factor) - getattr(start[name], factor)
            assert float((getattr(beside.adapters[name], factor) - getattr(a, factor)).norm() / moved_by.norm()) < 1e-3


def test_layers_that_do_not_train_get_no_dropout():
    """They act as frozen ranks do: with every trained factor at zero nothing is left to drop."""
    start = {name: a if ".0." in name else Adapter(a.A, torch.zeros_like(a.B), a.scale) for name, a in start_of(4).items()}
    heavy = TrainConfig(learning_rate=1e-2, max_steps=1, per_device_train_batch_size=6, shuffle=False, lora_dropout=0.9)
    deep = client_of(layers=[1])
    assert losses_of(deep, Broadcast(start=start), heavy) == losses_of(deep, Broadcast(start=start))
    assert losses_of(client_of(), Broadcast(start=start), heavy) != losses_of(client_of(), Broadcast(start=start))


def test_frozen_ranks_act_and_do_not_train():
    frozen, start = start_of(5, 7), start_of(4)
    with_them = losses_of(client_of(), Broadcast(start=start), frozen=frozen)
    assert abs(with_them - losses_of(client_of(), Broadcast(start=start), model=merged(frozen))) < FORWARD
    assert abs(with_them - losses_of(client_of(), Broadcast(start=start))) > 1e-3
    copies = {name: Adapter(a.A.clone(), a.B.clone(), a.scale.clone()) for name, a in frozen.items()}
    update = fit(client_of(), Broadcast(start=start), frozen=frozen)
    assert same(frozen, copies) and all(a.rank == 4 for a in update.adapters.values())
    assert not same(update.adapters, fit(client_of(), Broadcast(start=start)).adapters)


def test_frozen_ranks_of_layers_that_do_not_train_act_too():
    """A client of the last block sees its group's progress in the first block, with a start there and without."""
    frozen = start_of(5, 7)
    deep = client_of(layers=[1])
    for start in (None, start_of(4)):
        expected = losses_of(deep, Broadcast(start=start), model=merged(frozen))
        assert abs(losses_of(deep, Broadcast(start=start), frozen=frozen) - expected) < FORWARD
    with pytest.raises(TargetError, match="nowhere"):
        fit(deep, Broadcast(), frozen={"nowhere.0.q": adapter(2, (4, 4))})


def test_each_client_may_have_frozen_ranks_of_its_own():
    clients = [LocalClient(f"c{k}", token_rows(5, seed=k), 4, 8) for k in range(3)]
    frozen = [start_of(5, 7), None, start_of(2, 9)]
    model = llama(dtype=torch.float64)
    together = Cohort(model, clients, CONFIG, TARGETS).fit(Broadcast(), frozen)
    for client, ranks, update in zip(clients, frozen, together, strict=True):
        [alone] = Cohort(model, [client], CONFIG, TARGETS).fit(Broadcast(), ranks)
        assert near(alone.adapters, update.adapters)
    assert not near(together[1].adapters, Cohort(model, [clients[1]], CONFIG, TARGETS).fit(Broadcast(), frozen[0])[0].adapters)


@pytest.mark.parametrize("rank", [16, 24, 1])
def test_a_rank_equal_to_a_feature_size_or_one_trains(rank):
    update = fit(client_of(rank, 2.0 * rank), Broadcast())
    assert {name: a.shape for name, a in update.adapters.items()} == SHAPES
    assert all(a.rank == rank and bool(a.B.any()) for a in update.adapters.values())


def test_a_start_for_another_model_is_refused_and_nothing_stays_attached():
    model = llama()
    for start in ({"nowhere": adapter(2, (4, 4))}, {LAYER: adapter(4, (5, 5))}):
        with pytest.raises(TargetError):
            fit(client_of(), Broadcast(start=start), model=model)
        assert not lora_layers(model)


def test_a_merge_without_a_version_of_its_own_is_not_lost():
    model, clean, merge = llama(), llama(), start_of(3)
    cohort = Cohort(model, [client_of(2)], CONFIG, TARGETS)
    cohort.fit(Broadcast())
    for _ in range(2):
        cohort.fit(Broadcast(merge=merge))                      # version 0, as the broadcast before it
    flora.merge(clean, merge)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), clean.parameters(), strict=True))


def test_a_client_behind_a_strategy_that_never_merges_has_missed_nothing():
    cohort = Cohort(llama(), [client_of(2)], CONFIG, TARGETS)
    for version in (0, 3):
        assert cohort.fit(Broadcast(start=start_of(2), version=version, run="r"))[0].base_version == version


def test_an_update_is_a_copy_on_the_cpu():
    start = start_of(4)
    update = fit(client_of(), Broadcast(start=start, train="A"))
    assert all(not a.A.requires_grad and not a.B.requires_grad and a.A.device.type == "cpu" for a in update.adapters.values())
    update.adapters[LAYER].B.zero_()
    assert bool(start[LAYER].B.any())
