"""What is added to a client's gradient: FedProx's pull to the start, HetLoRA's push on high ranks, which prunes them."""
from dataclasses import replace

import pytest
import torch
from plain_training import beside, off, train
from tiny import TARGETS, adapter, llama, near, same, token_rows

from flora import Broadcast, Cohort, LocalClient, TrainConfig
from flora.nn import target_shapes

SHAPES = target_shapes(llama(), TARGETS)
RANK = 5
CONFIG = TrainConfig(1e-2, max_steps=5, per_device_train_batch_size=2, max_grad_norm=0.3, weight_decay=0.1, shuffle=False)
START = {name: adapter(RANK, shape, i, dtype=torch.float64) for i, (name, shape) in enumerate(SHAPES.items())}


def client_of(k=0, rank=RANK):
    return LocalClient(f"c{k}", token_rows(6, seed=k), rank, 2.0 * rank)


def by_hand(client, config, term):
    """The trained factors and the losses; term(factors, start): what is added to the loss that is differentiated."""
    factors = {(name, f): getattr(a, f).clone() for name, a in START.items() for f in "AB"}
    start = {key: f.clone() for key, f in factors.items()}
    model = beside(llama(dtype=torch.float64), {
        name: lambda name=name, a=a: (factors[name, "B"] * a.scale.double()) @ factors[name, "A"] for name, a in START.items()})
    model.requires_grad_(False)
    return factors, train(model, factors.values(), client, config, lambda: term(factors, start))


def fit(client, config, broadcast=None):
    [update] = Cohort(llama(dtype=torch.float64), [client], config, TARGETS).fit(broadcast or Broadcast(start=START))
    return update


def agree(update, expected, losses):
    for (name, f), exact in expected.items():
        assert off(getattr(update.adapters[name], f), exact, getattr(START[name], f)) < 1e-5
    assert update.metrics["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.3])
def test_fedprox_is_the_loss_with_half_the_squared_distance(max_grad_norm):
    """What is reported is the loss without it."""
    config = replace(CONFIG, proximal_mu=2.0, max_grad_norm=max_grad_norm)
    agree(fit(client_of(), config), *by_hand(client_of(), config, lambda now, start: sum(
        (now[key] - start[key]).square().sum() for key in now)))
    plain = fit(client_of(), replace(config, proximal_mu=0.0))
    assert not near(plain.adapters, fit(client_of(), config).adapters, 1e-3)


def test_fedprox_keeps_clients_nearer_and_apart_from_each_other():
    def moved(update):
        return sum(float((getattr(a, f) - getattr(START[n], f)).norm()) for n, a in update.adapters.items() for f in "AB")

    near_by, far = (Cohort(llama(dtype=torch.float64), [client_of(0), client_of(1)], replace(CONFIG, proximal_mu=mu), TARGETS).fit(
        Broadcast(start=START)) for mu in (10.0, 0.0))
    assert all(moved(a) < 0.8 * moved(b) for a, b in zip(near_by, far, strict=True))
    assert near(near_by[1].adapters, fit(client_of(1), replace(CONFIG, proximal_mu=10.0)).adapters)


def tail(factors, keep):
    return sum(factors[name, "B"][:, keep:].norm() * factors[name, "A"][keep:].norm() for name in START)


def test_hetlora_adds_the_product_of_norms_above_the_rank_that_is_kept():
    config = replace(CONFIG, rank_decay=0.7, rank_penalty=0.1, learning_rate=1e-3)
    expected, losses = by_hand(client_of(), config, lambda now, start: 0.1 * tail(now, 3))      # ⌊0.7 · 5⌋
    update = fit(client_of(), config)
    assert all(a.rank == 3 for a in update.adapters.values())                      # it shrank, so they are cut
    for (name, f), exact in expected.items():
        kept = exact[:3] if f == "A" else exact[:, :3]
        begun = getattr(START[name], f)
        assert off(getattr(update.adapters[name], f), kept, begun[:3] if f == "A" else begun[:, :3]) < 1e-5
    assert update.metrics["loss"] == pytest.approx(sum(losses) / 5, rel=1e-6)


def test_ranks_are_kept_where_what_they_hold_grew():
    """From B = 0 everything grows; a penalty has no gradient there, and breaks nothing."""
    clients = [client_of(0, 5), client_of(1, 1), client_of(2, 8)]
    config = replace(CONFIG, rank_decay=0.7, rank_penalty=1e-3)
    updates = Cohort(llama(dtype=torch.float64), clients, config, TARGETS).fit(Broadcast())
    assert [{a.rank for a in u.adapters.values()} for u in updates] == [{5}, {1}, {8}]
    for update, client in zip(updates, clients, strict=True):
        assert near(update.adapters, fit(client, config, Broadcast()).adapters)
    assert same(fit(client_of(), replace(CONFIG, rank_penalty=5.0)).adapters, fit(client_of(), CONFIG).adapters)    # no decay: none


def test_one_client_of_a_cohort_prunes_and_another_does_not():
    clients = [LocalClient("shrinks", token_rows(6), RANK, 10.0, start=START), LocalClient("grows", token_rows(6), RANK, 10.0)]
    config = replace(CONFIG, rank_decay=0.7, rank_penalty=0.5, learning_rate=1e-3)
    updates = Cohort(llama(dtype=torch.float64), clients, config, TARGETS).fit(Broadcast())
    assert [{a.rank for a in u.adapters.values()} for u in updates] == [{3}, {5}]
