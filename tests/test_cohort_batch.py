"""A cohort in one batch: every client ends where it would have ended alone, whatever its rank, data, steps, depth or company."""
import weakref

import pytest
import torch
from tiny import TARGETS, adapter, llama, near, token_rows

import flora
from flora import Broadcast, Cohort, LocalClient, TrainConfig
from flora.cohort import groups
from flora.losses import CausalLM
from flora.member import Member
from flora.nn import target_shapes
from flora.steps import Place, passes

RANKS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)
SHAPES = target_shapes(llama(), TARGETS)


def clients_of(ranks=RANKS):
    """Unequal data, lengths, numbers of steps, learning rates."""
    return [LocalClient(f"c{k}", token_rows(3 + k % 4, seed=k, longest=8 + 4 * k), rank, 2 * rank, max_steps=20 - k % 3 * 4,
                        learning_rate=1e-3 * (1 + k % 2)) for k, rank in enumerate(ranks)]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_twenty_steps_in_company_are_as_near_to_fp64_as_alone(dropout):
    """With clipping and a schedule. Both distances are of fp32 training to the same training in fp64."""
    config = TrainConfig(1e-3, max_steps=20, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_grad_norm=0.3,
                         lr_scheduler_type="cosine", warmup_steps=3, lora_dropout=dropout, weight_decay=0.01)
    clients = clients_of()
    together = Cohort(llama(), clients, config, TARGETS).fit(Broadcast())
    assert [u.metrics["steps"] for u in together] == [20, 16, 12, 20, 16, 12, 20, 16, 12, 20]
    for client, update in zip(clients, together, strict=True):
        [alone] = Cohort(llama(), [client], config, TARGETS).fit(Broadcast())
        [exact] = Cohort(llama(dtype=torch.float64), [client], config, TARGETS).fit(Broadcast())

        def distance(got, exact=exact):
            return sum(float((getattr(got.adapters[n], f) - getattr(a, f)).double().square().sum())
                       for n, a in exact.adapters.items() for f in "AB") ** 0.5

        size = sum(float(a.B.double().square().sum()) for a in exact.adapters.values()) ** 0.5
        assert 0 < distance(alone) < 0.05 * size and distance(update) <= 2 * distance(alone)


@pytest.mark.parametrize("train", ["AB", "A", "B"])
def test_different_depths_and_frozen_factors(train):
    """Clients that train all blocks, the last, the first; with a start that reaches blocks they do not train."""
    model = llama(dtype=torch.float64)
    start = {name: adapter(6, shape, 3 + i, dtype=torch.float64) for i, (name, shape) in enumerate(SHAPES.items())}
    clients = [LocalClient(f"c{k}", token_rows(4, seed=k), rank, 8, layers=layers)
               for k, (rank, layers) in enumerate([(4, None), (9, [1]), (2, [0]), (6, None)])]
    config = TrainConfig(1e-2, max_steps=3, per_device_train_batch_size=2, lora_dropout=0.1)
    for broadcast in (Broadcast(start=start, train=train), Broadcast(train=train)):
        together = Cohort(model, clients, config, TARGETS).fit(broadcast)
        for client, update in zip(clients, together, strict=True):
            [alone] = Cohort(model, [client], config, TARGETS).fit(broadcast)
            assert near(update.adapters, alone.adapters) and set(update.adapters) == {
                n for n in SHAPES if client.layers is None or f".{client.layers[0]}." in n}


def test_a_cohort_without_the_last_block_leaves_it_to_those_who_see_it():
    """Nobody trains it, one client's start is there: the others must not feel it."""
    model = llama(dtype=torch.float64)
    mine = {name: adapter(3, shape, 5, dtype=torch.float64) for name, shape in SHAPES.items()}
    clients = [LocalClient("a", token_rows(4), 4, 8, layers=[0], start=mine),
               LocalClient("b", token_rows(4, seed=1), 4, 8, layers=[0])]
    config = TrainConfig(1e-2, max_steps=2, per_device_train_batch_size=2)
    together = Cohort(model, clients, config, TARGETS).fit(Broadcast())
    for client, update in zip(clients, together, strict=True):
        assert near(update.adapters, Cohort(model, [client], config, TARGETS).fit(Broadcast())[0].adapters)


def test_clients_that_finish_leave_the_batch():
    seen, model = [], llama()
    clients = [LocalClient(f"c{k}", token_rows(4, seed=k), 2, 4, max_steps=1 + 2 * k) for k in range(3)]
    Cohort(model, clients, TrainConfig(1e-3, per_device_train_batch_size=2), TARGETS).fit(
        Broadcast(), on_step=lambda name, step, of, loss: seen.append((name, step, of)))
    assert seen == [("c0", 1, 1), ("c1", 1, 3), ("c2", 1, 5), ("c1", 2, 3), ("c2", 2, 5), ("c1", 3, 3), ("c2", 3, 5), ("c2", 4, 5),
                    ("c2", 5, 5)]


def test_one_forward_pass_serves_all():
    model, calls = llama(), []
    rows = [{"input_ids": [4, 5, 6, 7], "labels": [4, 5, 6, 7]}] * 4
    clients = [LocalClient(f"c{k}", rows, 2, 4) for k in range(5)]
    config = TrainConfig(1e-3, max_steps=3, per_device_train_batch_size=2)
    Cohort(model, clients, config, TARGETS).fit(Broadcast())                        # measures memory and traits, once a model
    model.model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape), with_kwargs=True)
    Cohort(model, clients, config, TARGETS).fit(Broadcast())
    assert calls == [(1, 40)] * 3


def member_of(rank, depth=0, steps=1, tokens=1, k=0):
    return Member(LocalClient(f"c{k}", [1], rank), dict, rank * 7, {}, iter(()), steps, 1e-3, 0, depth, tokens)


def test_clients_whose_steps_one_pass_holds_train_together():
    def ranks(members, budget=512, memory=float("inf")):
        return [[m.client.rank for m in group] for group in groups(members, budget, memory)]

    assert ranks([member_of(r) for r in (600, 500, 500, 1, 2000, 3)]) == [[600], [500, 500, 1], [2000], [3]]
    assert [len(g) for g in ranks([member_of(1)] * 600)] == [256, 256, 88]
    assert ranks([member_of(r, tokens=200) for r in range(1, 6)]) == [[1, 2], [3, 4], [5]]
    assert ranks([member_of(r, tokens=100) for r in range(1, 7)]) == [[1, 2, 3], [4, 5, 6]]       # not five and one
    assert ranks([member_of(r, tokens=900) for r in (1, 2)]) == [[1], [2]]
    assert ranks([member_of(r, depth, tokens=200) for r, depth in ((1, 3), (2, 0), (3, 3), (4, 0))]) == [[2, 4], [1, 3]]
    assert ranks([member_of(r, 0, steps, 200) for r, steps in ((1, 9), (2, 2), (3, 9), (4, 2))]) == [[2, 4], [1, 3]]
    assert ranks([member_of(4)] * 4, memory=2 * 2 * 16 * 4 * 7) == [[4, 4], [4, 4]]


def test_more_ranks_than_a_kernel_takes_train_in_groups():
    model = llama(dtype=torch.float64)
    clients = [LocalClient(f"c{k}", token_rows(3, seed=k), rank, 8) for k, rank in enumerate((700, 2, 700))]
    config = TrainConfig(1e-3, max_steps=2, per_device_train_batch_size=2)
    together = Cohort(model, clients, config, TARGETS).fit(Broadcast())
    assert [u.client for u in together] == ["c0", "c1", "c2"]
    assert near(together[2].adapters, Cohort(model, clients[2:], config, TARGETS).fit(Broadcast())[0].adapters)


def test_passes_hold_every_row_once_within_the_budget_and_little_padding():
    places = [Place(k % 7, k, {}, (1 + (k * 37) % 200,), k % 7 // 5) for k in range(300)]
    for budget in (1, 300, 2048):
        for packed in (True, False):
            cut = list(passes(places, budget, packed))
            assert sorted(p.sequence for part in cut for p in part) == list(range(300))
            for part in cut:
                assert [p.client for p in part] == sorted(p.client for p in part) and len({p.depth for p in part}) == 1
                used = sum(p.tokens for p in part)
                padded = used if packed else len(part) * max(p.tokens for p in part)
                assert len(part) == 1 or padded <= budget
                assert used >= 0.7 * padded or padded <= 512
            if packed and budget > 200:
                for depth in (0, 1):
                    sizes = [sum(p.tokens for p in part) for part in cut if part[0].depth == depth]
                    assert max(sizes) - min(sizes[:-1]) <= 200 and len(sizes) <= 1.5 * sum(sizes) / budget + 2       # of like size
                assert sum(len({p.client for p in part}) for part in cut) <= 7 + len(cut)     # a client in as few as can be


def test_a_nan_in_one_client_stays_there(monkeypatch):
    """Its loss is not finite from the second step on: the others' numbers are those of a cohort without it."""
    model = llama(dtype=torch.float64)
    good = [LocalClient(f"c{k}", token_rows(4, seed=k), 4, 8) for k in range(3)]
    bad = LocalClient("bad", token_rows(4, seed=9), 4, 8, learning_rate=1e200)
    config = TrainConfig(1e-2, max_steps=4, per_device_train_batch_size=2)
    cohort = Cohort(model, [good[0], bad, *good[1:]], config, TARGETS)
    together = cohort.fit(Broadcast())
    assert [u.client for u in together] == ["c0", "c1", "c2"] and "finite loss" in cohort.failures["bad"]
    for update, alone in zip(together, Cohort(model, good, config, TARGETS).fit(Broadcast()), strict=True):
        assert near(update.adapters, alone.adapters)
    assert flora.nn.lora_layers(model) == {}


def test_out_of_memory_halves_the_pass_and_takes_the_step_again(monkeypatch, caplog):
    model, real, seen = llama(dtype=torch.float64), CausalLM.__call__, []
    clients = [LocalClient(f"c{k}", token_rows(4, seed=k), 4, 8) for k in range(4)]
    config = TrainConfig(1e-2, max_steps=3, per_device_train_batch_size=3)
    expected = Cohort(model, clients, config, TARGETS).fit(Broadcast())

    def small(self, model, batch):
        seen.append(batch.input_ids.numel())
        if batch.input_ids.numel() > 60:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return real(self, model, batch)

    monkeypatch.setattr(CausalLM, "__call__", small)
    got = Cohort(model, clients, config, TARGETS).fit(Broadcast())
    assert max(seen) > 60 and sum(n > 60 for n in seen) < 8 and "from now on" in caplog.text
    assert all(near(a.adapters, b.adapters) for a, b in zip(got, expected, strict=True))
    monkeypatch.setattr(CausalLM, "__call__", lambda self, model, batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Cohort(model, clients, config, TARGETS).fit(Broadcast())

    def never(self, model, batch):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    monkeypatch.setattr(CausalLM, "__call__", never)
    with pytest.raises(RuntimeError, match="can't allocate"):
        Cohort(model, clients, config, TARGETS).fit(Broadcast())
    assert flora.nn.lora_layers(model) == {}


def test_what_a_pass_without_memory_held_is_gone_before_it_is_tried_again(monkeypatch):
    """An error holds the frames it came through, and with them the activations: half the pass would not fit beside them."""
    real, held, alive = CausalLM.__call__, [], []

    def small(self, model, batch):
        alive.extend(t() is not None for t in held)
        if batch.input_ids.numel() > 30:
            activations = model(**batch.inputs()).logits
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return real(self, model, batch)

    monkeypatch.setattr(CausalLM, "__call__", small)
    clients = [LocalClient(f"c{k}", token_rows(4, seed=k), 4, 8) for k in range(4)]
    Cohort(llama(), clients, TrainConfig(1e-2, max_steps=2, per_device_train_batch_size=3), TARGETS, 100).fit(Broadcast())
    assert held and alive and not any(alive)
