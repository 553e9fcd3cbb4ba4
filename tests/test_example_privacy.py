"""Privacy of examples: the cohort's clipped, noisy gradients against one backward pass an example, and what they must not show."""
import math
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from plain_training import beside, loss_of
from tiny import TARGETS, adapter, llama, near, same, token_rows

from flora import Broadcast, Cohort, LocalClient, TrainConfig
from flora.data.batches import training_steps
from flora.errors import ConfigError
from flora.keystream import normal
from flora.losses import CausalLM
from flora.nn import target_shapes
from flora.per_example import Examples, digest, epsilon, uses_in_a_round
from flora.versions import resume_at

SHAPES = target_shapes(llama(), TARGETS)
RANK, KEY = 3, bytes(range(32))
START = {name: adapter(RANK, shape, i, dtype=torch.float64) for i, (name, shape) in enumerate(SHAPES.items())}
SENT = Broadcast(start=START, train="B", run="r")
CONFIG = TrainConfig(1e-2, max_steps=5, per_device_train_batch_size=3, shuffle=False, example_clip=0.4, example_noise=0.0,
                     example_key=KEY)


def client_of(k=0, count=7, rows=None):
    return LocalClient(f"c{k}", rows or token_rows(count, seed=k), RANK, 2.0 * RANK)


def fit(clients, config, broadcast=SENT, changes=None, **options):
    one, model = isinstance(clients, LocalClient), llama(dtype=torch.float64, **(changes or {}))
    resume_at(model, broadcast.run, broadcast.version, merged=True)
    cohort = Cohort(model, [clients] if one else clients, config, TARGETS, **options)
    updates = cohort.fit(broadcast)
    assert cohort.failures == {}
    return updates[0] if one else updates


def by_hand(client, config, noise=None):
    """B trained by one backward pass for each example, dense products and torch's AdamW, in fp64; how long each gradient was.

    noise(step): a vector over the layers in their order, B with its ranks outermost."""
    Bs = {n: a.B.clone().requires_grad_(True) for n, a in START.items()}
    model = beside(llama(dtype=torch.float64), {
        n: lambda n=n, a=a: (Bs[n] * a.scale.double()) @ a.A for n, a in START.items()})
    model.requires_grad_(False)
    optimizer = torch.optim.AdamW(Bs.values(), config.learning_rate, weight_decay=config.weight_decay)
    size, norms = config.per_device_train_batch_size * config.gradient_accumulation_steps, []
    epoch = [client.rows[i:i + size] for i in range(0, len(client.rows), size)]
    for step in range(config.max_steps):
        total = [torch.zeros_like(B) for B in Bs.values()]
        for row in epoch[step % len(epoch)]:
            gradients = torch.autograd.grad(loss_of(model, [row]), list(Bs.values()))
            norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())
            for sum_, g in zip(total, gradients, strict=True):
                sum_ += g * min(1.0, config.example_clip / norms[-1])
        drawn = noise(step) if noise else torch.zeros(sum(B.numel() for B in Bs.values()))
        for B, sum_, part in zip(Bs.values(), total, drawn.split([B.numel() for B in Bs.values()]), strict=True):
            B.grad = (sum_ + part.view(B.T.shape).T) / size
        if config.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(Bs.values(), config.max_grad_norm)
        optimizer.step()
    return Bs, norms


def agree(update, Bs):
    for n, a in update.adapters.items():
        assert torch.equal(a.A, START[n].A)
        moved = (Bs[n].detach() - START[n].B).norm()
        assert float((a.B - Bs[n].detach()).norm()) < 1e-5 * float(moved)


@pytest.mark.parametrize("changes", [
    {}, {"gradient_accumulation_steps": 2}, {"example_clip": 1e6}, {"max_grad_norm": 0.0, "weight_decay": 0.1},
    {"per_device_train_batch_size": 1}], ids=str)
def test_it_is_one_backward_pass_an_example(changes):
    """The batch size divides, not the rows of a short last step; clips are joint over layers."""
    config = replace(CONFIG, **changes)
    Bs, norms = by_hand(client_of(), config)
    if config.example_clip < 1 and len(norms) > 5:
        assert min(norms) < config.example_clip < max(norms)   # some are clipped, some are not
    agree(fit(client_of(), config), Bs)


def test_noise_is_added_once_a_step_in_units_of_the_clip():
    config = replace(CONFIG, example_noise=0.7)
    count = sum(a.B.numel() for a in START.values())
    Bs, _ = by_hand(client_of(), config, lambda step: 0.7 * 0.4 * normal(KEY, f"example/r/c0/0/{digest(START)}/{step}", (count,)))
    agree(fit(client_of(), config), Bs)


@pytest.mark.parametrize("budget", [1, 40, 4000])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_company_and_passes_change_nothing(budget, dropout):
    config = replace(CONFIG, example_noise=0.3, lora_dropout=dropout)
    clients = [client_of(0, 7), client_of(1, 2), client_of(2, 5)]
    together = fit(clients, config, max_tokens_per_batch=budget)
    for client, update in zip(clients, together, strict=True):
        assert near(update.adapters, fit(client, config).adapters)


class Still(CausalLM):
    """Padded batches."""
    packs = False


def test_padded_batches_give_the_same():
    clients = [client_of(0), client_of(1)]
    for one, other in zip(fit(clients, CONFIG), fit(clients, replace(CONFIG, loss=Still())), strict=True):
        assert near(one.adapters, other.adapters)


def gradients(rows, model=None, where=(SENT, "c0"), **changes):
    """The gradient of each step, as the client's optimiser gets it."""
    seen = []

    class Spy(Examples):
        def finish(self, k):
            super().finish(k)
            seen.append(torch.cat([p.grad.flatten().clone() for p in self.members[k].parameters]))

    with patch("flora.loop.Examples", Spy):
        fit(replace(client_of(rows=rows), name=where[1]), replace(CONFIG, **changes), where[0], changes=model)
    return seen


@pytest.mark.parametrize("other", ["longer", "unlabelled"])
def test_one_example_moves_the_sum_by_no_more_than_the_clip(other):
    """Counted as zero: C / b; put in the place of another: twice that. Nothing else of the step changes, not how it is divided."""
    rows = token_rows(3, seed=1)
    changed = dict(rows[1], labels=[-100] * len(rows[1]["labels"])) if other == "unlabelled" else token_rows(1, 9, 40, 2)[0]
    for clip in (1e-3, 0.05):
        before, after = (gradients(some, example_clip=clip, max_steps=1)[0] for some in (rows, [rows[0], changed, rows[2]]))
        distance, most = float((before - after).norm()), clip / 3
        assert distance == pytest.approx(most, rel=1e-9) if other == "unlabelled" else 0 < distance <= 2 * most * (1 + 1e-9)


def test_dropout_of_the_model_itself_does_not_carry_an_example_over_to_others():
    """What the third example adds is the same beside any second one: masks are drawn anew for each, not in a row."""
    first, third = token_rows(2, seed=1)
    silent = dict(third, labels=[-100] * len(third["labels"]))
    added = []
    for second in (token_rows(1, 5, 6, 2)[0], token_rows(1, 6, 40, 30)[0]):
        one, other = (gradients([first, second, last], {"attention_dropout": 0.5}, max_steps=1)[0] for last in (third, silent))
        added.append(one - other)
    assert float((added[0] - added[1]).norm()) < 1e-9 * float(added[0].norm())
    [other] = gradients([first, token_rows(1, 5, 6, 2)[0], third], max_steps=1)
    assert float((other - one).norm()) > 1e-3 * float(one.norm())                   # there is dropout


def test_a_step_without_labels_is_taken_on_noise():
    """Were it left out, the number of steps, or which noise is whose, would tell which rows have labels."""
    rows = [dict(row, labels=[-100] * len(row["labels"])) for row in token_rows(3, 1)] + token_rows(2, 2)
    config = replace(CONFIG, example_noise=1.0, max_steps=None, num_train_epochs=2.0)
    update = fit(client_of(rows=rows), config)
    assert update.metrics["steps"] == 4
    count = sum(a.B.numel() for a in START.values())
    steps = gradients(rows, example_noise=1.0, max_steps=2)
    assert torch.allclose(steps[0], 0.4 * normal(KEY, f"example/r/c0/0/{digest(START)}/0", (count,)) / 3, atol=1e-12)
    assert not torch.allclose(steps[1], 0.4 * normal(KEY, f"example/r/c0/0/{digest(START)}/1", (count,)) / 3, atol=1e-6)
    nothing = fit(client_of(rows=rows[:3]), config)
    assert nothing.metrics["steps"] == 2 and not same(nothing.adapters, START)


class Explodes(CausalLM):
    """The loss of rows that hold the token 47 is not finite."""

    def __call__(self, model, batch):
        bad = torch.tensor([47.0 if 47 in row["input_ids"] else 0.0 for row in batch.rows])
        return super().__call__(model, batch) * torch.where(bad > 0, math.nan, 1.0)


def test_an_example_whose_gradient_is_not_finite_counts_as_zero():
    """A client that fails would tell that it holds such an example."""
    rows = token_rows(3, seed=1, vocabulary=40)
    broken = dict(rows[1], input_ids=[*rows[1]["input_ids"][:-1], 47])
    silent = dict(rows[1], labels=[-100] * len(rows[1]["labels"]))
    one, other = (fit(client_of(rows=[rows[0], row, rows[2]]), replace(CONFIG, loss=Explodes())) for row in (broken, silent))
    assert near(one.adapters, other.adapters, 1e-9) and math.isfinite(one.metrics["loss"])


def test_noise_is_of_the_key_the_client_the_run_and_the_step():
    """Variance z C / b on each number; another key, client, version or run has another; no key, one that nobody knows."""
    rows, loud = token_rows(3, seed=1), {"example_noise": 2.0, "max_steps": 1}
    still, count = gradients(rows, max_steps=1)[0], sum(a.B.numel() for a in START.values())
    noises = [gradients(rows, **loud, example_key=key)[0] - still for key in (KEY, bytes(32), None, None)]
    noises += [gradients(rows, None, where, **loud)[0] - still for where in (
        (replace(SENT, version=1), "c0"), (replace(SENT, run="s"), "c0"), (SENT, "c1"))]
    other = {n: replace(a, B=a.B * (1 + 1e-13)) for n, a in START.items()}        # the same to the eye, and another start
    noises.append(gradients(rows, None, (replace(SENT, start=other), "c0"), **loud)[0] - still)
    noises.append(gradients(rows, example_noise=2.0, learning_rate=1e-12, max_steps=2)[1] - still)
    for i, one in enumerate(noises):
        assert float(one.std()) == pytest.approx(2.0 * 0.4 / 3, abs=5 * 2.0 * 0.4 / 3 / math.sqrt(2 * count))
        assert all(abs(float(torch.cosine_similarity(one, other, 0))) < 5 / math.sqrt(count) for other in noises[:i])
    config = replace(CONFIG, **loud)
    assert same(fit(client_of(), config).adapters, fit(client_of(), config).adapters)
    assert "example_key" not in repr(CONFIG) and str(KEY) not in repr(CONFIG)


def test_fedprox_and_kept_moments_come_after_the_noise():
    states = {}
    config = replace(CONFIG, example_noise=0.5, proximal_mu=2.0)
    one = fit(client_of(), config, optimizer_states=states)
    assert not near(one.adapters, fit(client_of(), replace(config, proximal_mu=0.0)).adapters, 1e-3)
    assert set(states) == {"c0"} and not near(fit(client_of(), config, optimizer_states=states).adapters, one.adapters, 1e-3)


@pytest.mark.parametrize(("rows", "batch", "steps", "epochs", "uses"), [
    (7, 3, None, 1.0, 1), (7, 3, None, 2.5, 3), (7, 3, 3, 1.0, 1), (7, 3, 4, 1.0, 2), (2, 8, 5, 1.0, 5)])
def test_how_often_an_example_is_used(rows, batch, steps, epochs, uses):
    """Counted: in a run of so many steps no row is drawn more often than it says, and some row is drawn so often."""
    config = TrainConfig(1e-3, max_steps=steps, per_device_train_batch_size=batch, num_train_epochs=epochs, example_clip=1.0,
                         example_noise=1.0)
    assert uses_in_a_round(rows, config) == uses
    assert uses_in_a_round(rows, replace(config, max_steps=99), steps or uses * -(-rows // batch)) == uses
    drawn = training_steps(range(rows), batch, 1, True, 0, units=lambda row: 1)
    taken = steps or math.ceil(epochs * -(-rows // batch))
    held = [row for _ in range(taken) for part in next(drawn) for row in part]
    assert max(held.count(i) for i in range(rows)) == uses
    assert epsilon(config, 1e-5, uses) == pytest.approx(epsilon(replace(config, example_noise=1 / math.sqrt(uses)), 1e-5, 1))
    assert epsilon(replace(config, example_clip=0.0, example_noise=0.0), 1e-5, 1) == math.inf


@pytest.mark.parametrize("train", ["AB", "A", "core", "weight"])
def test_it_is_refused_where_anything_but_B_trains(train):
    with pytest.raises(ConfigError, match='example_clip: expected a broadcast that trains "B" alone'):
        fit(client_of(), CONFIG, Broadcast(start=None if train == "weight" else START, train=train))


@pytest.mark.parametrize(("changes", "message"), [
    ({"adalora_keep": 0.5}, "adalora_keep: expected none with example_clip"), ({"rank_decay": 0.9}, "rank_decay: expected none"),
    ({"example_clip": 0.0, "example_noise": 1.0}, "example_noise: expected 0 without example_clip"),
    ({"example_clip": -1.0}, "example_clip: expected"), ({"example_noise": math.inf}, "example_noise: expected"),
    ({"example_key": b"short"}, "example_key: expected 32 bytes; got 5")])
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **changes)
