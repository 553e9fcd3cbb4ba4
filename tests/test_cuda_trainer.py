"""Training on a GPU, tried where there is none: what mixes two devices, and what makes the host wait (fake_gpu.py).

The real card's tests are in test_cuda_rounds.py.
"""
import threading
from dataclasses import replace

import pytest
import torch
from fake_gpu import GPU, VARLEN, fake_gpu, to_gpu
from oracles import check
from tiny import TARGETS, adapter, llama, near, quantise, token_rows

import flora
from flora import STRATEGIES, Broadcast, Cohort, LocalClient, TrainConfig, attention, packing
from flora.data import batch_of
from flora.evaluate import evaluate, evaluate_clients, generate_clients, log_likelihoods_clients
from flora.group import Group, GroupCohort
from flora.loop import Loop
from flora.member import Member
from flora.nn import accumulate, add_dense, load_weights, target_shapes
from flora.packing import line, packable
from flora.server import Server, first_broadcast

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: test_cuda_rounds.py tries it itself")
CONFIG = TrainConfig(1e-2, max_steps=4, per_device_train_batch_size=2, max_grad_norm=0.1)
SHAPES = target_shapes(llama(), TARGETS)
START = {name: adapter(4, shape, i) for i, (name, shape) in enumerate(SHAPES.items())}
PRIVATE = {"example_clip": 0.5, "example_noise": 1.0, "example_key": bytes(32)}


def clients_of(ranks=(2, 5, 3)):
    return [LocalClient(f"c{k}", token_rows(4, seed=k, longest=6 + 5 * k), rank, 8) for k, rank in enumerate(ranks)]


@pytest.fixture
def gpu(monkeypatch):
    with fake_gpu(monkeypatch) as made:
        yield made
    attention.flash_on.cache_clear()


def trained(model, clients, config, broadcast, gpu=None, **options):
    """The updates of a cohort, and what the host waited for between the first step that was told of and the last."""
    told = []
    cohort = Cohort(model, clients, config, TARGETS, **options)
    updates = cohort.fit(broadcast, on_step=lambda *_: told.append(len(gpu.places) if gpu else 0))
    assert cohort.failures == {} and len(told) == sum(u.metrics["steps"] for u in updates)
    return updates, gpu.places[told[0]:told[-1]] if gpu else []


@pytest.mark.parametrize(("changes", "broadcast"), [
    ({}, {}), ({"lora_dropout": 0.2}, {"start": START}), ({"gradient_checkpointing": True, "lora_dropout": 0.1}, {}),
    ({"gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine", "warmup_steps": 1}, {}), ({"proximal_mu": 0.1}, {}),
    ({"adalora_keep": 0.5}, {}), ({"rank_decay": 0.9, "rank_penalty": 1e-3}, {}), ({}, {"train": "A", "start": START}),
    ({}, {"train": "B", "start": START}), (PRIVATE, {"train": "B", "start": START})], ids=str)
def test_a_cohort_ends_on_a_gpu_where_it_ends_on_a_cpu_and_no_step_waits(gpu, changes, broadcast):
    """Of any client's losses the host hears once the next step is under way; the adapters come back to the CPU."""
    config, sent = replace(CONFIG, **changes), Broadcast(**broadcast)
    here, _ = trained(llama(dtype=torch.float64), clients_of(), config, sent)
    there, waits = trained(to_gpu(llama(dtype=torch.float64)), clients_of(), config, sent, gpu)
    assert waits == []
    for one, other in zip(there, here, strict=True):
        assert one.metrics["steps"] == other.metrics["steps"] and near(one.adapters, other.adapters)
        assert one.metrics["loss"] == pytest.approx(other.metrics["loss"]) and one.metrics["tokens"] == other.metrics["tokens"]


@pytest.mark.parametrize("hook", [(Member, "norm", lambda n: n + 0 * n.item()), (Loop, "_pass", lambda t: t.cpu().to(GPU)),
                                  (Member, "draw", lambda rows: rows)], ids=["item", "copies", "none"])
def test_a_wait_in_the_loop_is_seen(gpu, hook, monkeypatch):
    where, name, change = hook
    real = getattr(where, name)
    monkeypatch.setattr(where, name, lambda *a, **k: change(real(*a, **k)))
    _, waits = trained(to_gpu(llama()), clients_of(), CONFIG, Broadcast(), gpu)
    assert bool(waits) == (name != "draw")


def test_what_mixes_two_devices_is_seen(gpu):
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3).to(GPU) + torch.ones(3)


def test_batches_are_pinned_beside_the_gpu_that_they_go_to(gpu, monkeypatch):
    """Which GPU is the current one is a thread's own: the one that makes batches would take the first."""
    seen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append((device, threading.current_thread().name)))
    trained(to_gpu(llama()), clients_of(), CONFIG, Broadcast(), gpu)
    assert seen == [(GPU, "flora-batches_0")]


def test_full_fine_tuning_a_quantised_base_and_states_that_are_kept(gpu):
    for config, broadcast, dtype in ((CONFIG, Broadcast(train="weight"), torch.float64), (CONFIG, Broadcast(), torch.bfloat16)):
        updates, _ = trained(to_gpu(llama(dtype=dtype)), clients_of(), config, broadcast, gpu)
        assert all(t.device.type == "cpu" for u in updates for t in (u.base or {}).values())
    assert trained(to_gpu(quantise(llama())), clients_of(), CONFIG, Broadcast(), gpu)[1] == []
    kept, model = {}, to_gpu(llama())
    for version in range(2):
        updates, waits = trained(model, clients_of(), CONFIG, Broadcast(version=version), gpu, optimizer_states=kept)
        assert waits == [] and {t.device.type for state in kept.values() for t in state.values()} == {"cpu"}


def test_a_client_that_fails_leaves_a_step_later_and_takes_nothing_from_the_others(gpu):
    model, bad = to_gpu(llama(dtype=torch.float64)), LocalClient("bad", token_rows(4, seed=9), 4, 8, learning_rate=1e200)
    cohort = Cohort(model, [clients_of()[0], bad, *clients_of()[1:]], CONFIG, TARGETS)
    updates = cohort.fit(Broadcast())
    assert [u.client for u in updates] == ["c0", "c1", "c2"] and "at step 2 of 4" in cohort.failures["bad"]
    alone, _ = trained(model, clients_of(), CONFIG, Broadcast())
    assert all(near(one.adapters, other.adapters) for one, other in zip(updates, alone, strict=True))


def test_starts_frozen_ranks_and_groups_come_from_either_device(gpu):
    there, model = {name: a.to(GPU) for name, a in START.items()}, to_gpu(llama(dtype=torch.float64))
    mixed = [replace(client, start=start) for client, start in zip(clients_of(), (START, there, None), strict=True)]
    here, other = (trained(model, mixed, CONFIG, Broadcast(start=start))[0] for start in (START, there))
    assert all(near(a.adapters, b.adapters) for a, b in zip(other, here, strict=True))
    frozen = [cohort.fit(Broadcast(), frozen=[some, None, START]) for some in (there, START)
              for cohort in [Cohort(model, clients_of(), CONFIG, TARGETS)]]
    assert all(near(a.adapters, b.adapters) for a, b in zip(*frozen, strict=True))
    members = [Group("g", clients_of()[:2], inner_rounds=2, depth=1, rank=4), clients_of()[2]]
    cohort = GroupCohort(model, members, CONFIG, TARGETS)
    assert len(cohort.fit(Broadcast())) == 2 and cohort.failures == {}


@pytest.mark.parametrize("strategy", sorted(set(STRATEGIES) - {"standalone", "full"}))
def test_every_strategy_serves_a_model_on_a_gpu_and_takes_updates_from_there(gpu, strategy):
    ends = []
    for model, moved in ((llama(), "cpu"), (to_gpu(llama()), GPU)):
        clients = clients_of((4, 4, 4))[:1 if strategy == "centralized" else 3]
        server = Server(strategy, clients, replace(first_broadcast(strategy, SHAPES, clients), run="r"), shapes=SHAPES)
        for _ in range(2):
            updates = Cohort(model, clients, replace(CONFIG, max_steps=1), TARGETS).fit(server.broadcast)
            server.close([replace(u, adapters={n: a.to(moved) for n, a in u.adapters.items()}) for u in updates])
        Cohort(model, clients, replace(CONFIG, max_steps=1), TARGETS).fit(server.broadcast)
        ends.append({name: flora.nn.weights(model, [name])[name].to("cpu") for name in SHAPES})
    assert all(float((ends[1][name] - w).norm()) <= 1e-4 * float(w.norm()) for name, w in ends[0].items())


def test_merges_read_no_number_but_whether_all_are_finite(gpu):
    for dtype, options in ((torch.float32, {}), (torch.bfloat16, {"residual": True}), (torch.bfloat16, {"rounding": "stochastic"})):
        here, there = llama(dtype=dtype), to_gpu(llama(dtype=dtype))
        parties = [START, {name: a.to(GPU) * 0.5 for name, a in START.items()}]
        flora.merge(there, parties, seed=3, **options)
        flora.merge(here, [{name: a.to("cpu") for name, a in party.items()} for party in parties], seed=3, **options)
        assert all(torch.equal(flora.nn.weights(there, [n])[n].to("cpu"), flora.nn.weights(here, [n])[n]) for n in SHAPES)
    accumulate(there, START)
    accumulate(there, parties[1], rank=5)
    whole = to_gpu(llama())
    add_dense(whole, {name: torch.ones(shape) for name, shape in SHAPES.items()})
    load_weights(whole, {name: torch.ones(shape) for name, shape in SHAPES.items()})
    attached = flora.attach(to_gpu(llama()), 3, dropout=0.1, targets=TARGETS).train()
    attached(input_ids=torch.arange(8, device=GPU)[None]).logits.sum().backward()
    flora.load_adapters(attached, START)
    assert {a.A.device for a in flora.adapters(attached).values()} == {GPU}


def test_evaluation_reads_once_whatever_the_passes_and_views_come_from_either_device(gpu):
    model, rows = to_gpu(llama()), token_rows(9, seed=3)
    views = {"a": START, "b": None, "c": {name: a.to(GPU) for name, a in START.items()}}
    evaluate(model, rows, 4)
    before = len(gpu.places)
    found = evaluate(model, rows, 2)
    assert [what for what, _ in gpu.places[before:]] == ["a copy to the host"]
    assert found == pytest.approx(evaluate(llama(), rows, 2))
    each = evaluate_clients(model, views, dict.fromkeys(views, rows), 4)
    assert each["a"] == pytest.approx(each["c"]) and each["b"] == pytest.approx(found)
    assert log_likelihoods_clients(model, views, dict.fromkeys(views, rows))["b"]
    assert len(generate_clients(model, views, {name: [[3, 4, 5], [6, 7]] for name in views}, 4)["c"]) == 2


ROWS = token_rows(6, seed=2, longest=14) + token_rows(1, longest=3, prompt=1) * 3


def in_a_line(model, device):
    """Logits, and the gradient of a weight that attention is between."""
    batch, weight = batch_of(ROWS, True).map(lambda t: t.to(device)), model.model.layers[0].self_attn.q_proj.weight
    with packable(model), line(model, batch.lengths):
        logits = model(**batch.inputs()).logits
    [gradient] = torch.autograd.grad(logits.float().square().sum(), weight)
    return logits.detach().to("cpu"), gradient.to("cpu")


def mistral(dtype, **changes):
    from transformers import MistralConfig, MistralForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MistralForCausalLM(MistralConfig(**{
            "vocab_size": 48, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "initializer_range": 0.2, "sliding_window": 4, **changes})).to(dtype)


@pytest.mark.parametrize("window", [None, 4])
def test_sequences_of_many_lengths_are_one_flash_call_a_layer_in_16_bits(gpu, window):
    """With fewer heads of keys, and windows that end within sequences; in fp32 none, where flash attention does not compute."""
    compared = [in_a_line(mistral(dtype, sliding_window=window), "cpu") for dtype in (torch.bfloat16, torch.float64)]
    attention.flash_on(GPU)
    before = gpu.calls["torch_attn::_varlen_attn"]
    actual = in_a_line(to_gpu(mistral(torch.bfloat16, sliding_window=window)), GPU)
    assert gpu.calls["torch_attn::_varlen_attn"] == before + 2
    for a, p, e in zip(actual, *compared, strict=True):
        check(a, p, e, torch.bfloat16)
    single = in_a_line(to_gpu(mistral(torch.float32, sliding_window=window)), GPU)
    assert gpu.calls["torch_attn::_varlen_attn"] == before + 2
    assert all(float((s - e).norm()) <= 1e-4 * float(e.norm()) for s, e in zip(single, compared[1], strict=True))


@pytest.mark.parametrize("broken", [lambda real: lambda *a: 1 / 0, lambda real: lambda q, *a: real(q * 1.1, *a)],
                         ids=["none", "wrong"])
def test_flash_attention_that_is_not_there_or_not_right_is_not_used(gpu, broken, monkeypatch, caplog):
    name = "torch_attn::_varlen_attn"
    monkeypatch.setitem(VARLEN, name, broken(VARLEN[name]))
    got, expected = in_a_line(to_gpu(mistral(torch.bfloat16)), GPU), in_a_line(mistral(torch.bfloat16), "cpu")
    assert "a call for every length" in caplog.text and attention.flash_on(GPU) is None
    assert all(float((a - b).norm()) <= 0.05 * float(b.norm()) for a, b in zip(got, expected, strict=True))


def test_lengths_that_are_alike_are_one_batch_for_sdpa(monkeypatch):
    from transformers.integrations import sdpa_attention

    seen, real, model = [], sdpa_attention.sdpa_attention_forward, llama()
    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward",
                        lambda m, q, *a, **k: (seen.append(len(q)), real(m, q, *a, **k))[1])
    batch = batch_of(token_rows(5, longest=4), True)
    with packable(model), line(model, batch.lengths):
        model(**batch.inputs())
    assert seen == [5, 5] and packing._lines == {}
