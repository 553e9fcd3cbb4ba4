"""The training loop: a client's step against a plain loop of PEFT and transformers, and clients that do not touch each other."""
import math

import pytest
import torch
from tiny import TARGETS, adapter, llama, near, same, token_rows

import flora
from flora import Broadcast, Cohort, LocalClient, TrainConfig
from flora.errors import ConfigError, RunError, TargetError
from flora.nn import lora_layers, target_shapes
from flora.versions import resume_at

SHAPES = target_shapes(llama(), TARGETS)
CONFIG = TrainConfig(learning_rate=1e-2, max_steps=3, per_device_train_batch_size=2, seed=5)
LOST = {"input_ids": [4, 5, 6], "labels": [-100] * 3}
HUGE = 1e200                                                    # a learning rate that makes the second step's loss NaN


def start_of(rank, seed=0, dtype=torch.float32, layers=SHAPES):
    return {name: adapter(rank, shape, seed + i, dtype=dtype) for i, (name, shape) in enumerate(layers.items())}


def clients_of(ranks=(8, 4, 1), rows=6):
    return [LocalClient(f"c{k}", token_rows(rows + k, seed=k), rank, 2 * rank) for k, rank in enumerate(ranks)]


def fit(clients, config=CONFIG, broadcast=None, model=None, **options):
    model = model or llama()
    cohort = Cohort(model, clients, config, TARGETS, **options)
    updates = cohort.fit(broadcast or Broadcast())
    assert not lora_layers(model)
    return updates


def changed(**settings):
    return TrainConfig(**{**{f: getattr(CONFIG, f) for f in CONFIG.__dataclass_fields__}, **settings})


def by_hand(client, config, start):
    """The same training with PEFT's layers, torch's AdamW, transformers' loss and schedule; float64; rows in their order."""
    from peft import LoraConfig, get_peft_model
    from transformers import get_scheduler

    model = get_peft_model(llama(dtype=torch.float64), LoraConfig(
        r=client.rank, lora_alpha=client.alpha, target_modules=list(TARGETS)), autocast_adapter_dtype=False)
    parameters = dict(model.named_parameters())
    factors = {(name, f): parameters[f"base_model.model.{name}.lora_{f}.default.weight"] for name in start for f in "AB"}
    with torch.no_grad():
        for (name, f), parameter in factors.items():
            parameter.copy_(getattr(start[name], f))
    optimizer = torch.optim.AdamW(factors.values(), config.learning_rate, weight_decay=config.weight_decay)
    kind = "constant_with_warmup" if config.lr_scheduler_type == "constant" else config.lr_scheduler_type
    schedule = get_scheduler(kind, optimizer, config.warmup_steps, config.max_steps)
    size = config.per_device_train_batch_size
    epoch = [client.rows[i:i + size] for i in range(0, len(client.rows), size)]
    steps = [epoch[i:i + config.gradient_accumulation_steps] for i in range(0, len(epoch), config.gradient_accumulation_steps)]
    model.train()
    losses = []
    for step in range(config.max_steps):
        batches = steps[step % len(steps)]
        tokens = sum(label != -100 for rows in batches for row in rows for label in row["labels"][1:])
        losses.append(0.0)                                      # of the step: the sum over its micro-batches
        for rows in batches:
            width = max(len(row["input_ids"]) for row in rows)
            pad = [width - len(row["input_ids"]) for row in rows]
            ids = torch.tensor([row["input_ids"] + [0] * p for row, p in zip(rows, pad, strict=True)])
            labels = torch.tensor([row["labels"] + [-100] * p for row, p in zip(rows, pad, strict=True)])
            mask = torch.tensor([[1] * (width - p) + [0] * p for p in pad])
            loss = model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=tokens).loss
            loss.backward()
            losses[-1] += loss.item()
        if config.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(factors.values(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return {key: parameter.detach() for key, parameter in factors.items()}, losses


@pytest.mark.parametrize("settings", [
    {}, {"lr_scheduler_type": "linear"}, {"lr_scheduler_type": "cosine", "warmup_steps": 2},
    {"warmup_steps": 3, "max_grad_norm": 0.0}, {"gradient_accumulation_steps": 3, "max_grad_norm": 0.05, "weight_decay": 0.1},
    {"per_device_train_batch_size": 64}], ids=str)
def test_a_client_trains_as_the_plain_loop_does(settings):
    """Seven rows in twos: short batches, short steps and a second epoch. In fp64 but for the loss, which both take in fp32."""
    config = changed(max_steps=6, shuffle=False, **settings)
    client, start = LocalClient("c", token_rows(7, seed=1), 4, 6.0), start_of(4, dtype=torch.float64)
    start = {name: flora.Adapter(a.A, a.B, 1.5) for name, a in start.items()}
    [update] = fit([client], config, Broadcast(start=start), llama(dtype=torch.float64))
    expected, losses = by_hand(client, config, start)
    for (name, factor), exact in expected.items():
        moved = (exact - getattr(start[name], factor)).norm()
        got = getattr(update.adapters[name], factor)
        assert got.dtype == torch.float64 and float(moved) > 1e-3
        # the loss's gradient carries fp32's 6e-8; AdamW divides by its own size, so its relative error stays of that order
        assert float((got - exact).norm() / moved) < 1e-6
    assert update.metrics["loss"] == pytest.approx(sum(losses) / 6, rel=1e-6)
    assert update.metrics["last_loss"] == pytest.approx(losses[-1], rel=1e-6)
    assert (update.metrics["steps"], update.num_examples, update.client, update.base_version) == (6, 7, "c", 0)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_client_is_the_same_alone_in_company_and_in_any_order(dropout):
    clients, config = clients_of(), changed(lora_dropout=dropout)
    model = llama(dtype=torch.float64)
    together = fit(clients, config, model=model)
    assert [u.client for u in together] == ["c0", "c1", "c2"]
    assert [u.adapters["model.layers.0.self_attn.q_proj"].rank for u in together] == [8, 4, 1]
    backwards = fit(clients[::-1], config, model=model)
    torch.manual_seed(99)                                       # nor does the process's own randomness matter
    for k, client in enumerate(clients):
        [alone] = fit([client], config, model=model)
        for other in (alone, backwards[2 - k]):
            assert near(other.adapters, together[k].adapters)
            metrics = {name: value for name, value in together[k].metrics.items() if "second" not in name}
            assert metrics == pytest.approx({name: value for name, value in other.metrics.items() if "second" not in name})
    assert same(fit(clients, config, model=model)[1].adapters, together[1].adapters)


def test_seed_name_version_and_dropout_change_the_update():
    [client] = clients_of((4,))
    first = fit([client])[0].adapters
    assert same(first, fit([client])[0].adapters)
    renamed = LocalClient("other", client.rows, client.rank, client.alpha)
    for other in (fit([client], changed(seed=6)), fit([renamed]), fit([client], broadcast=Broadcast(version=1)),
                  fit([client], changed(lora_dropout=0.3)), fit([client], changed(shuffle=False))):
        assert not same(first, other[0].adapters)


def test_fit_leaves_the_processs_random_numbers_alone():
    state = torch.random.get_rng_state()
    fit(clients_of(), changed(lora_dropout=0.3))
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_client_that_fails_is_left_out_and_takes_nothing_from_the_others():
    good = clients_of((8, 4))
    bad = LocalClient("bad", token_rows(4), 4, 8, learning_rate=HUGE)
    mute = LocalClient("mute", [LOST, LOST], 4)
    model = llama(dtype=torch.float64)
    cohort = Cohort(model, [good[0], bad, mute, good[1]], CONFIG, TARGETS)
    updates = cohort.fit(Broadcast())
    assert [u.client for u in updates] == ["c0", "c1"] and list(cohort.failures) == ["bad", "mute"]
    assert "finite loss" in cohort.failures["bad"] and "of 3. Lower its learning rate" in cohort.failures["bad"]
    assert "has a label" in cohort.failures["mute"]
    for update, alone in zip(updates, fit(good, model=model), strict=True):
        assert near(update.adapters, alone.adapters)
    cohort.clients = good
    cohort.fit(Broadcast())
    assert cohort.failures == {}


def test_an_update_that_is_not_finite_never_leaves_the_client():
    """One step's loss is fine; what the step made is not."""
    cohort = Cohort(llama(), [LocalClient("c", token_rows(4), 4, 8, learning_rate=1e39)], changed(max_steps=1), TARGETS)
    assert cohort.fit(Broadcast()) == [] and "finite" in cohort.failures["c"]


def test_rows_without_labels_are_passed_over():
    rows = token_rows(4)
    [update] = fit([LocalClient("c", [rows[0], LOST, LOST, LOST, rows[1]], 4)], changed(shuffle=False, max_steps=2))
    [plain] = fit([LocalClient("c", [rows[0], LOST, rows[1]], 4)], changed(shuffle=False, max_steps=2))
    assert same(update.adapters, plain.adapters)                # in twos: [row, LOST], [LOST, LOST] skipped, [row]


@pytest.mark.parametrize("own", [{}, {"max_steps": 1}, {"learning_rate": 1e-4}])
def test_what_a_client_sets_for_itself_counts(own):
    rows = token_rows(5)
    [update] = fit([LocalClient("c", rows, 4, 8, **own)])
    [plain] = fit([LocalClient("c", rows, 4, 8)], changed(**own))
    assert same(update.adapters, plain.adapters)
    assert bool(own) != same(update.adapters, fit([LocalClient("c", rows, 4, 8)])[0].adapters)


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 4), (2.0, 8), (0.5, 2), (0.01, 1)])
def test_epochs_are_counted_in_steps(epochs, steps):
    seen = []
    client = LocalClient("c", token_rows(7), 2)
    Cohort(llama(), [client], changed(max_steps=None, num_train_epochs=epochs), TARGETS).fit(
        Broadcast(), on_step=lambda *step: seen.append(step))
    assert [(name, step, of) for name, step, of, _ in seen] == [("c", i + 1, steps) for i in range(steps)]
    assert all(math.isfinite(loss) for *_, loss in seen)


def test_max_tokens_per_batch_changes_only_rounding():
    """Passes of 1, 13 and 40 padded tokens; dropout and rows without labels too. Sums in fp32 come in another order, which
    three AdamW steps of 1e-2 keep under 1e-3 of what they moved."""
    rows = [*token_rows(5), LOST, *token_rows(4, seed=9)]
    config = changed(per_device_train_batch_size=5, gradient_accumulation_steps=2, lora_dropout=0.3)
    start = start_of(4)
    [whole] = fit([LocalClient("c", rows, 4, 8)], config, Broadcast(start=start))
    for limit in (1, 13, 40):
        [cut] = fit([LocalClient("c", rows, 4, 8)], config, Broadcast(start=start), max_tokens_per_batch=limit)
        for name, a in whole.adapters.items():
            for factor in ("A", "B"):
                moved = getattr(a, factor) - getattr(start[name], factor)
                assert float((getattr(cut.adapters[name], factor) - getattr(a, factor)).norm() / moved.norm()) < 1e-3
        assert cut.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-5)


def test_a_bf16_base_keeps_its_bits_and_trains_fp32_adapters():
    model = llama(dtype=torch.bfloat16)
    before = {name: p.clone() for name, p in model.named_parameters()}
    updates = fit(clients_of(), model=model)
    assert all(torch.equal(p, before[name]) and p.dtype == torch.bfloat16 for name, p in model.named_parameters())
    assert all(a.A.dtype == a.B.dtype == torch.float32 and bool(a.B.any()) for u in updates for a in u.adapters.values())


# --- the base, and what is put back ---------------------------------------------------------------------------------


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_published_error_merged_once_for_every_client_of_a_process():
    model, clean = llama(), llama()
    merge = start_of(6)
    flora.merge(clean, merge)
    for client in clients_of():                                 # several cohorts, as virtual clients of one process have
        cohort = Cohort(model, [client], CONFIG, TARGETS)
        cohort.fit(Broadcast(merge=merge, version=1, run="r"))
        cohort.fit(Broadcast(merge=merge, version=1, run="r"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), clean.parameters(), strict=True))
    Cohort(model, clients_of((2,)), CONFIG, TARGETS).fit(Broadcast(merge=merge, version=2, run="r"))
    flora.merge(clean, merge)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), clean.parameters(), strict=True))


def test_missed_and_older_versions_are_refused_and_change_nothing():
    model, merge = llama(), start_of(2)
    cohort = Cohort(model, clients_of((2,)), CONFIG, TARGETS)
    with pytest.raises(RunError, match="version 0.*version 3.*missing"):
        cohort.fit(Broadcast(merge=merge, version=3, run="r"))  # a fresh model has missed 1 and 2
    cohort.fit(Broadcast(version=0, run="r"))
    cohort.fit(Broadcast(merge=merge, version=1, run="r"))
    before = weights(model)
    for version, says in ((3, "missing"), (0, "version 1.*version 0")):
        with pytest.raises(RunError, match=says):
            cohort.fit(Broadcast(merge=merge, version=version, run="r"))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    resume_at(model, "r", 2, merged=True)
    cohort.fit(Broadcast(merge=merge, version=3, run="r"))
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("training", [True, False])
def test_everything_is_put_back_also_after_an_interruption(error, training):
    model = llama().train(training)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    modules, before = list(model.modules()), weights(model)

    def stop(name, step, steps, loss):
        if (name, step) == ("c1", 2):
            raise error("now")

    cohort = Cohort(model, clients_of(), CONFIG, TARGETS)
    with pytest.raises(error, match="now"):
        cohort.fit(Broadcast(), on_step=stop)
    for _ in range(2):
        assert not lora_layers(model) and list(map(id, model.modules())) == list(map(id, modules))
        assert all(p.requires_grad == ("norm" in name) for name, p in model.named_parameters())
        assert all(module.training is training for module in modules)
        assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
        assert [u.client for u in cohort.fit(Broadcast())] == ["c0", "c1", "c2"]


def test_what_a_cohort_refuses():
    twin = clients_of((2,))[0]
    with pytest.raises(ConfigError, match="different names"):
        Cohort(llama(), [twin, twin], CONFIG)
    with pytest.raises(ConfigError, match="max_tokens_per_batch"):
        Cohort(llama(), [twin], CONFIG, max_tokens_per_batch=0)
    with pytest.raises(TargetError, match="q_proj"):
        Cohort(llama(), [twin], CONFIG, ["query"])
    with pytest.raises(ConfigError, match="one entry a client"):
        Cohort(llama(), [twin], CONFIG, TARGETS).fit(Broadcast(), frozen=[None, None])
    for wrong in ({"rank": 0}, {"rank": 1.5}, {"alpha": 0}, {"alpha": math.inf}, {"rows": []}, {"max_steps": 0},
                  {"learning_rate": 0.0}, {"learning_rate": math.nan}):
        with pytest.raises(ConfigError, match="client 'c'"):
            LocalClient(**{"name": "c", "rows": token_rows(2), **wrong})
    for name, value in (("learning_rate", 0), ("max_steps", 0), ("lora_dropout", 1.0), ("lr_scheduler_type", "step")):
        with pytest.raises(ConfigError, match=name):
            changed(**{name: value})
