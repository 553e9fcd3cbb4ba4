"""What surrounds the steps of a cohort: batches made ahead, a budget by the memory, seconds by phase, clipping, depth, bf16."""
import logging
import threading
import time

import pytest
import torch
from tiny import TARGETS, adapter, llama, near, token_rows

from flora import Broadcast, Cohort, LocalClient, TrainConfig, budget, ops
from flora.budget import Budget, available
from flora.errors import ConfigError
from flora.losses import CausalLM
from flora.member import Member
from flora.nn import target_shapes
from flora.steps import Loader, Place

CPU = torch.device("cpu")


def fit(clients, config, model=None, broadcast=None, **options):
    cohort = Cohort(model or llama(), clients, config, TARGETS, **options)
    return cohort, cohort.fit(broadcast or Broadcast())


def test_the_next_steps_rows_are_read_while_this_one_computes(monkeypatch):
    """In a thread of their own: when a step is reported, the rows of the one after it are being drawn, or are."""
    drawn, real = [], Member.draw

    def draw(self, k, loss):
        drawn.append(threading.current_thread().name)
        return real(self, k, loss)

    def wait(name, step, steps, loss):
        end = time.monotonic() + 10
        while len(drawn) < min(steps, step + 1) and time.monotonic() < end:
            time.sleep(0.001)
        assert len(drawn) == min(steps, step + 1)

    monkeypatch.setattr(Member, "draw", draw)
    config = TrainConfig(1e-3, max_steps=3, per_device_train_batch_size=2)
    cohort = Cohort(llama(), [LocalClient("c", token_rows(6), 2)], config, TARGETS)
    cohort.fit(Broadcast(), on_step=wait)
    assert len(drawn) == 3 and all(name.startswith("flora-batches") for name in drawn)


def test_an_error_in_the_thread_is_raised_where_it_is_waited_for():
    with Loader(CausalLM(), True, 0, CPU) as loader:
        loader.prefetch(lambda: 1 // 0, 8)
        with pytest.raises(ZeroDivisionError):
            loader.take()

    class Broken(list):
        def __getitem__(self, i):
            if isinstance(i, int) and i == 3:
                raise OSError("the disk is gone")
            return list.__getitem__(self, i)

    model = llama()
    with pytest.raises(OSError, match="disk"):
        fit([LocalClient("c", Broken(token_rows(4)), 2)], TrainConfig(1e-3, max_steps=4, per_device_train_batch_size=1), model)
    assert not any("lora" in type(m).__name__.lower() for m in model.modules())


def test_auto_holds_what_the_free_memory_holds(monkeypatch, caplog):
    """Bytes a token are counted on one forward pass, once a model; half the memory gives half the tokens."""
    model, config = llama(), TrainConfig(1e-3, max_steps=1, per_device_train_batch_size=4)
    clients = [LocalClient(f"c{k}", token_rows(4, seed=k), 4) for k in range(3)]
    cohort, _ = fit(clients, config, model)
    assert cohort._budget.tokens == budget.FASTEST["cpu"]
    each = budget.BESIDE * budget._per_token[model][False]
    # 2 blocks of 16 wide: states, q, k, v, attention, MLP, h of each layer, some hundred numbers of 4 bytes a token
    assert 1000 < each < 20_000
    for free in (200, 100):
        monkeypatch.setattr(budget, "available", lambda device, free=free: free * each / budget.SHARE)
        with caplog.at_level(logging.INFO, "flora.budget"):
            cohort, updates = fit(clients, config, model)
        assert cohort._budget.tokens == pytest.approx(free, abs=1) and len(updates) == 3
        assert f"at most {cohort._budget.tokens} tokens" in caplog.text
    monkeypatch.setattr(budget, "available", lambda device: 0)
    cohort, updates = fit(clients, config, model)               # a row at a time then; it may fail, but it is tried
    assert cohort._budget.tokens == 1 and len(updates) == 3
    assert 0 < available(CPU) < 1 << 50


def test_frozen_ranks_are_no_part_of_what_a_token_keeps():
    """They are there however long the pass is, and may be larger than all that it keeps."""
    kept = []
    for frozen in (None, {name: adapter(400, shape) for name, shape in target_shapes(llama(), TARGETS).items()}):
        model = llama()
        Cohort(model, [LocalClient("c", token_rows(4), 4)], TrainConfig(1e-3, max_steps=1), TARGETS).fit(Broadcast(), frozen)
        kept.append(budget._per_token[model][False])
    assert kept[1] < 1.2 * kept[0]


def test_a_number_is_taken_as_it_is_and_an_error_of_another_kind_is_raised():
    fixed = Budget(llama(), 100)
    fixed.measure(lambda: 1 // 0, 10, False)
    assert fixed.tokens == 100
    fixed.halve(60, RuntimeError("CUDA out of memory"))
    assert fixed.tokens == 60
    for error in (RuntimeError("CUDA out of memory"), RuntimeError("shape mismatch")):
        with pytest.raises(RuntimeError, match=str(error)):
            fixed.halve(60, error)


def test_seconds_by_phase_add_up_and_tokens_are_counted():
    clients = [LocalClient(f"c{k}", token_rows(4, seed=k), 4, max_steps=1 + k) for k in range(3)]
    began = time.perf_counter()
    cohort, updates = fit(clients, TrainConfig(1e-3, per_device_train_batch_size=2))
    whole = time.perf_counter() - began
    assert set(cohort.seconds) == {"merge", "setup", "data", "forward", "backward", "optimizer"}
    assert sum(cohort.seconds.values()) <= whole and all(seconds >= 0 for seconds in cohort.seconds.values())
    tokens = sum(update.metrics["tokens"] for update in updates)
    assert cohort.rate == pytest.approx(tokens / sum(update.metrics["seconds"] for update in updates), rel=0.01)
    rows = {c.name: c.rows for c in clients}
    assert all(u.metrics["tokens"] <= sum(len(r["input_ids"]) for r in rows[u.client]) * u.metrics["steps"] for u in updates)


def test_a_gradient_is_clipped_to_its_own_clients_norm():
    """One step of AdamW after clipping to 1e-8 and below eps: the step shows the clipped gradient, g / (|g| + eps)."""
    clients = [LocalClient(f"c{k}", token_rows(4, seed=k), 4, 8) for k in range(2)]
    shapes = target_shapes(llama(), TARGETS)
    start = {name: adapter(4, shape, i, dtype=torch.float64) for i, (name, shape) in enumerate(shapes.items())}
    config = {"learning_rate": 1.0, "max_steps": 1, "per_device_train_batch_size": 4}
    model = llama(dtype=torch.float64)
    _, clipped = fit(clients, TrainConfig(**config, max_grad_norm=1e-8), model, Broadcast(start=start))
    for update in clipped:
        moved = torch.cat([(getattr(update.adapters[n], f) - getattr(start[n], f)).flatten() for n in start for f in "AB"]).abs()
        gradient = 1e-8 * moved / (1 - moved)                   # |step| = |g| / (|g| + 1e-8)
        assert float(gradient.norm()) == pytest.approx(1e-8, rel=1e-3)


def test_adapters_train_in_bf16_when_asked():
    clients = [LocalClient(f"c{k}", token_rows(4, seed=k), 4, 8) for k in range(2)]
    config = {"learning_rate": 1e-2, "max_steps": 3, "per_device_train_batch_size": 2}
    _, wide = fit(clients, TrainConfig(**config))
    _, narrow = fit(clients, TrainConfig(**config, adapter_dtype="bfloat16"))
    for one, other in zip(wide, narrow, strict=True):
        assert all(a.A.dtype == a.B.dtype == torch.bfloat16 and a.scale.dtype == torch.float32 for a in other.adapters.values())
        rounded = {n: type(a)(a.A.float(), a.B.float(), a.scale) for n, a in other.adapters.items()}
        assert near(rounded, one.adapters, 0.3) and not near(rounded, one.adapters, 1e-4)
    with pytest.raises(ConfigError, match="adapter_dtype"):
        TrainConfig(adapter_dtype="int8")


def test_rows_of_shallower_clients_leave_the_backward_pass_at_their_depth():
    """Counted at every linear that carries ranks: the rows that its backward pass is called with."""
    model = llama(num_hidden_layers=3)
    clients = [LocalClient(f"c{k}", [{"input_ids": [4] * 8, "labels": [4] * 8}] * 2, 2, layers=layers)
               for k, layers in enumerate((None, [2], [1, 2], [2]))]
    calls, real = [], ops._gradients

    def counted(ctx, dys):
        calls.append((dys[0].shape[0], len(dys)))
        return real(ctx, dys)

    ops._gradients = counted
    try:
        _, updates = fit(clients, TrainConfig(1e-3, max_steps=1, per_device_train_batch_size=2), model)
    finally:
        ops._gradients = real
    rows = {16: 0, 32: 0}
    for count, layers in calls:
        rows[count] += layers
    # q, v and down of each block: all three blocks for c0, two for c2, and one for c1 and c3, which share a pass of 32 rows
    assert rows == {16: 9 + 6, 32: 3} and [len(u.adapters) for u in updates] == [9, 3, 6, 3]


@pytest.mark.parametrize("packed", [True, False])
def test_dropout_does_not_depend_on_what_else_is_in_a_pass(packed, monkeypatch):
    from flora import packing

    model = llama(dtype=torch.float64)
    monkeypatch.setitem(packing._traits, model, packing.Traits(packed, True))
    clients = [LocalClient(f"c{k}", token_rows(5, seed=k), 4, 8) for k in range(3)]
    config = TrainConfig(1e-2, max_steps=2, per_device_train_batch_size=3, lora_dropout=0.4)
    _, whole = fit(clients, config, model)
    _, single = fit(clients, config, model, max_tokens_per_batch=1)
    assert all(near(a.adapters, b.adapters) for a, b in zip(whole, single, strict=True))


def test_a_place_counts_all_its_sequences():
    assert Place(0, 0, {}, (3, 4)).tokens == 7
