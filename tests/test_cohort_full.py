"""Full fine-tuning: each client trains the base's own weights, from the base, and leaves no trace on it."""
from dataclasses import replace

import pytest
import torch
from plain_training import off, train
from tiny import TARGETS, adapter, llama, quantise, token_rows

import flora
from flora import Broadcast, Cohort, LocalClient, TrainConfig
from flora.errors import ConfigError, TargetError
from flora.layer import matrix
from flora.nn import target_shapes

SHAPES = target_shapes(llama(), TARGETS)
CONFIG = TrainConfig(1e-2, max_steps=4, per_device_train_batch_size=2, max_grad_norm=0.3, lr_scheduler_type="linear",
                     weight_decay=0.1, shuffle=False)
FULL = Broadcast(train="weight", version=3)


def client_of(k=0, **own):
    return LocalClient(f"c{k}", token_rows(6, seed=k), **own)


def by_hand(client, config=CONFIG, names=tuple(SHAPES), dtype=torch.float64):
    model = llama(dtype=dtype)
    model.requires_grad_(False)
    weights = {name: model.get_submodule(name).weight for name in names}
    losses = train(model, weights.values(), client, config)
    return {name: w.detach() for name, w in weights.items()}, losses


def state(model):
    return {name: (id(p), p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}


def unchanged(model, before):
    return all(id(p) == before[n][0] and torch.equal(p, before[n][1]) and p.requires_grad == before[n][2] and p.grad is None
               for n, p in model.named_parameters())


def test_every_client_is_fine_tuned_from_the_base_and_the_base_is_put_back():
    """Also the published error: clients of one model object that train on each other's result."""
    model = llama(dtype=torch.float64)
    for name, p in model.named_parameters():
        p.requires_grad_("norm" in name or "q_proj" in name)
    before, base = state(model), {name: model.get_submodule(name).weight.detach().clone() for name in SHAPES}
    clients = [client_of(0), client_of(1, max_steps=2, learning_rate=3e-3), client_of(2, layers=[1])]
    updates = Cohort(model, clients, CONFIG, TARGETS).fit(FULL)
    assert unchanged(model, before) and [u.client for u in updates] == ["c0", "c1", "c2"]
    for client, update in zip(clients, updates, strict=True):
        names = [name for name in SHAPES if client.layers is None or ".1." in name]
        exact, losses = by_hand(client, names=names)
        assert update.adapters == {} and list(update.base) == names and update.base_version == 3
        for name, w in update.base.items():
            # the loss's gradient is fp32 on both sides (6e-8), and AdamW's first steps divide each number's by its own size
            assert tuple(w.shape) == SHAPES[name] and off(w, exact[name], base[name]) < 1e-5
        assert update.metrics["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
        assert (update.num_examples, update.metrics["steps"]) == (6, client.max_steps or 4)


def test_a_client_whose_loss_is_not_finite_is_left_out_and_spoils_nobody():
    model = llama(dtype=torch.float64)
    before = state(model)
    good = [client_of(0), client_of(1)]
    cohort = Cohort(model, [good[0], client_of(9, learning_rate=1e200), good[1]], CONFIG, TARGETS)
    updates = cohort.fit(FULL)
    assert [u.client for u in updates] == ["c0", "c1"] and "finite" in cohort.failures["c9"] and unchanged(model, before)
    for update, alone in zip(updates, Cohort(model, good, CONFIG, TARGETS).fit(FULL), strict=True):
        assert all(torch.equal(w, alone.base[name]) for name, w in update.base.items())
    once = replace(CONFIG, max_steps=1, lr_scheduler_type="constant")
    cohort = Cohort(llama(), [client_of(9, learning_rate=1e39)], once, TARGETS)
    assert cohort.fit(FULL) == [] and "finite factors" in cohort.failures["c9"]       # its only loss was fine


def test_an_interruption_puts_the_base_back():
    model = llama().train(False)
    model.lm_head.weight.requires_grad_(False)
    before = state(model)

    def stop(name, step, *_):
        if (name, step) == ("c1", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Cohort(model, [client_of(0), client_of(1)], CONFIG, TARGETS).fit(FULL, on_step=stop)
    assert unchanged(model, before) and not model.training


def test_a_bf16_base_trains_in_fp32_and_sends_bf16():
    """Steps of 1e-5 are less than the last bit of most weights: they count once they have added up."""
    model = llama(dtype=torch.bfloat16)
    before, small = state(model), replace(CONFIG, learning_rate=1e-5, max_steps=60, lr_scheduler_type="constant")
    base = {name: model.get_submodule(name).weight.detach().clone() for name in SHAPES}
    [update] = Cohort(model, [client_of()], small, TARGETS).fit(FULL)
    assert unchanged(model, before) and all(w.dtype == torch.bfloat16 for w in update.base.values())

    def changed(weights):
        return sum(int((weights[name] != base[name]).sum()) for name in SHAPES)

    plain, _ = by_hand(client_of(), small, dtype=torch.bfloat16)
    assert changed(update.base) > 2 * changed(plain)


def test_fedavg_of_weights_is_loaded_by_the_next_round():
    model, losses = llama(), []
    broadcast = flora.STRATEGIES["full"].begin(SHAPES, [1], 0)
    for version in range(3):
        updates = Cohort(model, [client_of(0), client_of(1)], CONFIG, TARGETS).fit(replace(broadcast, version=version, run="r"))
        losses.append(sum(u.metrics["loss"] for u in updates))
        broadcast = flora.aggregate(updates, "full")
        mean = {name: (updates[0].base[name].double() + updates[1].base[name].double()) / 2 for name in SHAPES}
        assert all(float((broadcast.base[n] - mean[n]).norm()) <= 1e-6 * float(mean[n].norm()) for n in SHAPES)
    assert losses[2] < losses[1] < losses[0]
    assert all(not torch.equal(model.get_submodule(n).weight, llama().get_submodule(n).weight) for n in SHAPES)


def test_fedprox_holds_weights_near_the_base():
    base = {name: llama().get_submodule(name).weight.detach() for name in SHAPES}
    moved = []
    for mu in (0.0, 10.0):
        [update] = Cohort(llama(), [client_of()], replace(CONFIG, proximal_mu=mu), TARGETS).fit(FULL)
        moved.append(sum(float((w - base[name]).norm()) for name, w in update.base.items()))
    assert moved[1] < 0.8 * moved[0]


def test_weights_stored_transposed_come_as_out_in():
    from oracles import gpt2

    model = gpt2(torch.float64)
    before = state(model)
    [update] = Cohort(model, [LocalClient("c", token_rows(6))], CONFIG, ("c_attn",)).fit(FULL)
    for name, w in update.base.items():
        own = matrix(model.get_submodule(name)).detach()
        assert w.shape == own.shape and 0 < float((w - own).abs().max()) < 0.1          # four steps of at most 1e-2
    assert unchanged(model, before)


def test_what_cannot_be_fine_tuned_is_refused():
    start = {name: adapter(2, shape) for name, shape in SHAPES.items()}
    cohort = Cohort(quantise(llama()), [client_of()], CONFIG, TARGETS)
    with pytest.raises(ConfigError, match="q_proj: expected a plain floating-point weight.*Int8Linear"):
        cohort.fit(FULL)
    held = llama()
    flora.nn.accumulate(held, start)
    with pytest.raises(ConfigError, match="Accumulated"):
        Cohort(held, [client_of()], CONFIG, TARGETS).fit(FULL)
    for broadcast, frozen in ((replace(FULL, start=start), None), (FULL, start)):
        with pytest.raises(ConfigError, match="neither a start nor frozen ranks"):
            Cohort(llama(), [client_of()], CONFIG, TARGETS).fit(broadcast, frozen)
    with pytest.raises(TargetError, match="shares its weight"):
        Cohort(llama(), [client_of()], CONFIG, ("lm_head",))
