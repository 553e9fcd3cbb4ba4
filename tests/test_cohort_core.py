"""Fed-SB's clients: a core trains before a fixed factor, as autograd would train it, in one batch with others."""
from dataclasses import replace

import pytest
import torch
from oracles import check
from plain_training import beside, off, train
from tiny import TARGETS, llama, near, token_rows

import flora
from flora import Adapter, Broadcast, Cohort, LocalClient, TrainConfig
from flora.errors import ConfigError
from flora.frames import core, frame
from flora.nn import target_shapes
from flora.strategies import STRATEGIES

SHAPES = target_shapes(llama(), TARGETS)
RANK, SEED = 4, 11
CONFIG = TrainConfig(1e-2, max_steps=6, per_device_train_batch_size=2, max_grad_norm=0.3, lr_scheduler_type="cosine",
                     warmup_steps=2, weight_decay=0.1, shuffle=False)


def client_of(k=0, **own):
    return LocalClient(f"c{k}", token_rows(7, seed=k), RANK, 8.0, **own)


def frames(dtype=torch.float64):
    return {name: frame(shape, RANK, SEED, name)[0].to(dtype) for name, shape in SHAPES.items()}


def start_of(dtype=torch.float64, still=False):
    """Fed-SB's begin, with cores that are not zeros unless still."""
    first = STRATEGIES["fedsb"].begin(SHAPES, [RANK], SEED, 1.5)
    draw = torch.Generator().manual_seed(0)
    cores = {name: torch.randn(RANK, RANK, generator=draw, dtype=torch.float64) * (not still) for name in SHAPES}
    start = {name: Adapter((cores[name] @ frames()[name]).to(dtype), a.B.to(dtype), a.scale) for name, a in first.start.items()}
    return replace(first, start=start)


def by_hand(broadcast, dtype, client, config=CONFIG):
    """The trained cores and the losses."""
    F, start = frames(dtype), broadcast.start
    R = {name: (a.A.to(dtype) @ F[name].T).clone() for name, a in start.items()}
    model = beside(llama(dtype=dtype), {
        name: lambda name=name, a=a: (a.B.to(dtype) * a.scale.to(dtype)) @ (R[name] @ F[name]) for name, a in start.items()})
    model.requires_grad_(False)
    begun = {name: r.detach().clone() for name, r in R.items()}
    losses = train(model, R.values(), client, config, lambda: config.proximal_mu / 2 * sum(
        (R[name] - begun[name]).square().sum() for name in R))
    return {name: r.detach() for name, r in R.items()}, losses


@pytest.mark.parametrize("mu", [0.0, 3.0])
@pytest.mark.parametrize("still", [True, False])
def test_a_core_trains_as_autograd_trains_it(still, mu):
    """In fp64, but for the loss, which both take in fp32. Also with FedProx, beside which the gradient's size counts: AdamW alone
    does not see it."""
    client, broadcast, config = client_of(), start_of(still=still), replace(CONFIG, proximal_mu=mu)
    [update] = Cohort(llama(dtype=torch.float64), [client], config, TARGETS).fit(broadcast)
    exact, losses = by_hand(broadcast, torch.float64, client, config)
    for name, a in update.adapters.items():
        begun = broadcast.start[name]
        assert off(a.A, exact[name] @ frames()[name], begun.A) < 1e-6
        assert torch.equal(a.B, begun.B) and torch.equal(a.scale, begun.scale)
    assert update.metrics["loss"] == pytest.approx(sum(losses) / 6, rel=1e-6)


def test_a_core_in_fp32_is_as_near_to_fp64_as_plain_pytorch():
    client = client_of()
    [update] = Cohort(llama(), [client], CONFIG, TARGETS).fit(start_of(torch.float32))
    broadcast = start_of(torch.float32)
    (plain, _), (exact, _) = (by_hand(broadcast, dtype, client) for dtype in (torch.float32, torch.float64))
    got = {name: core(a, frames(torch.float32)[name]) for name, a in update.adapters.items()}
    check(*(torch.cat([one[name].flatten() for name in SHAPES]) for one in (got, plain, exact)))


def test_cores_in_company_are_cores_alone():
    model, broadcast = llama(dtype=torch.float64), start_of()
    clients = [client_of(0), client_of(1, layers=[1]), client_of(2, max_steps=3)]
    together = Cohort(model, clients, CONFIG, TARGETS).fit(broadcast)
    for client, update in zip(clients, together, strict=True):
        [alone] = Cohort(model, [client], CONFIG, TARGETS).fit(broadcast)
        assert near(update.adapters, alone.adapters) and not near(update.adapters, {
            name: broadcast.start[name] for name in update.adapters})
        for name, a in update.adapters.items():
            F = frames()[name]
            assert float((core(a, F) @ F - a.A).norm()) <= 1e-6 * float(a.A.norm())


def test_two_rounds_of_fedsb_learn_and_stay_in_the_frame():
    model, broadcast, losses = llama(), STRATEGIES["fedsb"].begin(SHAPES, [RANK], SEED), []
    for version in range(2):
        updates = Cohort(model, [client_of(0), client_of(1)], CONFIG, TARGETS).fit(replace(broadcast, version=version))
        losses.append(sum(u.metrics["loss"] for u in updates))
        broadcast = flora.aggregate(updates, "fedsb", seed=SEED)
    assert losses[1] < losses[0] and broadcast.frame == SEED


def test_what_is_no_core_of_this_frame_is_refused():
    broadcast, model = start_of(), llama(dtype=torch.float64)
    short = {name: a for name, a in broadcast.start.items() if "q_proj" not in name}
    for wrong, says in ((replace(broadcast, frame=SEED + 1), "frame"), (replace(broadcast, start=None), "start of its rank"),
                        (replace(broadcast, start=short), "start of its rank")):
        with pytest.raises(ConfigError, match=says):
            Cohort(model, [client_of()], CONFIG, TARGETS).fit(wrong)
        assert not flora.nn.lora_layers(model)
    with pytest.raises(ConfigError, match="client 'd'.*rank"):
        Cohort(model, [LocalClient("d", token_rows(3), RANK - 1, 8.0)], CONFIG, TARGETS).fit(broadcast)
    for settings in ({"adalora_keep": 0.5}, {"rank_decay": 0.9}):
        for train_what in ("core", "A", "weight"):
            with pytest.raises(ConfigError, match=next(iter(settings))):
                Cohort(model, [client_of()], replace(CONFIG, **settings), TARGETS).fit(Broadcast(train=train_what))
    with pytest.raises(ConfigError, match="rank_decay"):
        replace(CONFIG, adalora_keep=0.5, rank_decay=0.9)
