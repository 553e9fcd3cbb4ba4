"""AdaLoRA on clients: triplets train as autograd trains them, compete as in the paper, and leave with their scale counted once."""
from dataclasses import replace

import pytest
import torch
from oracles import relative
from plain_training import beside, off, train
from tiny import TARGETS, adapter, dense, llama, near, token_rows

import flora
from flora import Broadcast, Cohort, LocalClient, TrainConfig
from flora.adaptive import Importance, Schedule, best, target_budget
from flora.forms import Slot, Triplets
from flora.nn import applied, lora_layers, target_shapes

SHAPES = target_shapes(llama(), TARGETS)
RANK, ALPHA = 5, 10.0
CONFIG = TrainConfig(2e-2, max_steps=12, per_device_train_batch_size=2, max_grad_norm=0.5, lr_scheduler_type="linear",
                     weight_decay=0.05, shuffle=False, adalora_keep=0.5)
START = {name: adapter(RANK, shape, i, 3.0, torch.float64) for i, (name, shape) in enumerate(SHAPES.items())}


def client_of(k=0, rank=RANK, **own):
    return LocalClient(f"c{k}", token_rows(6, seed=k), rank, 2.0 * rank, **own)


def fit(clients, config=CONFIG, broadcast=None, model=None, on_step=None):
    return Cohort(model or llama(dtype=torch.float64), clients, config, TARGETS).fit(broadcast or Broadcast(), on_step=on_step)


class Paper:
    """The paper's algorithm 1 with a start, one number at a time where that is readable: P (out, r), Λ (r,), Q (r, in)."""

    def __init__(self, start, scale, steps, keep):
        self.scale, self.steps, self.kept, self.seen = scale, steps, {}, []
        self.total = sum(a.rank for a in start.values())
        self.target = round(keep * self.total)
        self.P, self.Q, self.L = {}, {}, {}
        for name, a in start.items():
            norms = a.B.norm(dim=0), a.A.norm(dim=1)
            self.P[name], self.Q[name] = a.B / norms[0], a.A / norms[1][:, None]
            self.L[name] = norms[0] * norms[1] * a.scale.double() / scale
        self.mean = {}

    def parameters(self):
        return [part[name] for name in self.P for part in (self.P, self.Q, self.L)]

    def delta(self, name):
        return self.P[name] @ torch.diag(self.L[name] * self.scale) @ self.Q[name]

    def regulariser(self):
        eye = torch.eye(RANK, dtype=torch.float64)
        return 0.1 * sum((self.P[n].T @ self.P[n] - eye).square().sum() + (self.Q[n] @ self.Q[n].T - eye).square().sum()
                         for n in self.P)

    def score(self, key, w):
        now = (w * w.grad).abs().detach()
        old_mean, old_doubt = self.mean.get(key, (0.0, 0.0))
        mean = 0.85 * old_mean + 0.15 * now
        doubt = 0.85 * old_doubt + 0.15 * (now - mean).abs()
        self.mean[key] = mean, doubt
        return mean * doubt

    def budget(self, t):
        """Of 12 steps one is full, five fall by the cube, six rest."""
        return [30, *(self.target + round((30 - self.target) * (1 - i / 5) ** 3) for i in range(1, 6)), *[self.target] * 6][t]

    def after(self, t):
        """Before the step: the triplets that are left; what is given back masks Λ, after the step."""
        scores = {}
        for name in self.P:
            L, P, Q = (self.score((name, part), getattr(self, part)[name]) for part in ("L", "P", "Q"))
            for i in range(RANK):
                scores[name, i] = float(L[i]) + float(P[:, i].sum()) / len(P) + float(Q[i].sum()) / Q.shape[1]
        if t < 6:
            first = [max(((name, i) for i in range(RANK)), key=scores.get) for name in self.P]
            rest = sorted((key for key in scores if key not in first), key=scores.get, reverse=True)
            self.kept = set(first + rest[:self.budget(t) - len(first)])
        self.seen.append(self.kept)

        def mask():
            with torch.no_grad():
                for name, value in self.L.items():
                    for i in range(RANK):
                        value[i] *= (name, i) in self.kept

        return mask


@pytest.mark.parametrize(("k", "learning_rate", "returns"), [(0, 2e-2, False), (7, 1e-1, True)])
def test_a_client_trains_as_the_papers_algorithm_by_autograd(k, learning_rate, returns):
    """Gradients with the regulariser, clipping, importance, budget, masks: twelve steps in fp64 from a start that is not zero.
    In the second case some triplets that were pruned come back."""
    client, config = client_of(k), replace(CONFIG, learning_rate=learning_rate)
    [update] = fit([client], config, Broadcast(start=START))
    paper = Paper(START, ALPHA / RANK, 12, 0.5)
    begun = {name: paper.delta(name).clone() for name in SHAPES}
    assert all(relative(delta, dense(START[name])) < 1e-6 for name, delta in begun.items())
    model = beside(llama(dtype=torch.float64), {name: lambda name=name: paper.delta(name) for name in SHAPES})
    losses = train(model.requires_grad_(False), paper.parameters(), client, config, paper.regulariser, paper.after)
    for name, a in update.adapters.items():
        kept = [i for i in range(RANK) if (name, i) in paper.kept]
        assert a.rank == len(kept)
        P, Q, L = paper.P[name].detach(), paper.Q[name].detach(), paper.L[name].detach()
        for got, exact, start in ((a.A, Q[kept], START[name].A[kept] / START[name].A[kept].norm(dim=1)[:, None]),
                                  (a.B, P[:, kept], START[name].B[:, kept] / START[name].B[:, kept].norm(dim=0)),
                                  (a.scale, L[kept] * ALPHA / RANK, torch.zeros(len(kept)))):
            assert off(got, exact, start) < 1e-5
        assert off(dense(a), paper.delta(name), begun[name]) < 1e-5
    assert update.metrics["loss"] == pytest.approx(sum(losses) / 12, rel=1e-6)
    gone = [before - now for before, now in zip(paper.seen, paper.seen[1:], strict=False)]
    assert any(key in later for i, lost in enumerate(gone) for key in lost for later in paper.seen[i + 2:]) is returns


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 40])
def test_the_budget_falls_to_the_target_within_a_round(steps):
    plan = Schedule(steps, 60, 17)
    budgets = [plan.budget(t) for t in range(steps)]
    assert budgets == sorted(budgets, reverse=True) and budgets[-1] == 17
    assert budgets[:steps // 10] == [60] * (steps // 10) and budgets[steps - steps // 2 - 1:] == [17] * (steps // 2 + 1)
    assert [plan.settled(t) for t in range(steps)] == [t >= steps - steps // 2 for t in range(steps)]
    if steps == 40:
        assert budgets[4:20] == [17 + round(43 * (1 - i / 16) ** 3) for i in range(1, 17)] and budgets[4] < 60


def test_the_best_triplets_of_all_layers_are_kept_and_one_of_each():
    scores = {"a": torch.tensor([1.0, 9.0, 8.0]), "b": torch.tensor([0.1, 0.2]), "c": torch.tensor([5.0])}
    assert {n: m.tolist() for n, m in best(scores, 4).items()} == {"a": [False, True, True], "b": [False, True], "c": [True]}
    assert all(bool(m.all()) for m in best(scores, 6).values()) and sum(int(m.sum()) for m in best(scores, 3).values()) == 3
    assert not any(torch.isinf(s).any() for s in scores.values())
    same = best({"a": torch.zeros(4), "b": torch.zeros(2)}, 4)
    assert same["a"].tolist() == [True, True, True, False] and same["b"].tolist() == [True, False]
    assert target_budget([4, 4, 4], 0.5) == 6 and target_budget([4, 4, 4], 0.1) == 3 and target_budget([7], 1.0) == 7


def test_importance_is_smoothed_sensitivity_times_uncertainty():
    w = {f"l/{part}": torch.tensor(v, dtype=torch.float64) for part, v in (
        ("lambda", [2.0, -1.0]), ("P", [[1.0, 0.0, 3.0], [1.0, 1.0, 1.0]]), ("Q", [[2.0], [4.0]]))}
    importance, mean, doubt = Importance(), 0.0, 0.0
    for gradient in (0.5, -2.0, 0.0):
        for p in w.values():
            p.grad = torch.full_like(p, gradient)
        importance.observe(w)
        mean = 0.85 * mean + 0.15 * abs(gradient)                           # I is linear in |w|, so s goes by its square
        doubt = 0.85 * doubt + 0.15 * abs(abs(gradient) - mean)
    expected = [mean * doubt * (4 + 10 / 3 + 4), mean * doubt * (1 + 1 + 16)]
    assert importance.of("l", w["l/lambda"]).tolist() == pytest.approx(expected)
    assert importance.of("elsewhere", torch.ones(3)).tolist() == [0.0] * 3


def test_fresh_triplets_change_nothing_and_are_unit_vectors():
    model, fresh = llama(), {name: adapter(4, shape, i) for i, (name, shape) in enumerate(SHAPES.items())}
    fresh = {name: flora.Adapter(a.A, a.B * torch.tensor([1.0, 0.0, 1.0, 0.0]), a.scale) for name, a in fresh.items()}
    drawn = []
    for key in ((0, "c", 1), (0, "c", 1), (0, "c", 2)):
        with applied(model, fresh) as layers:
            for layer in layers.values():
                layer.B = torch.nn.Parameter(layer.B.detach().T.contiguous().T)
            form = Triplets({name: Slot(layer, 0, 4) for name, layer in layers.items()}, 0.5, 0.5, 4, key)
            for name, layer in layers.items():
                Q, P, value = (form.parameters[f"{name}/{part}"] for part in ("Q", "P", "lambda"))
                assert torch.allclose(Q.norm(dim=1), torch.ones(4)) and torch.allclose(P.norm(dim=1), torch.ones(4))
                assert value[1] == value[3] == 0 and bool(value[0] > 0) and layer.scale.tolist() == [0.5] * 4
                assert relative(layer.adapter.delta(), dense(fresh[name])) < 1e-6
                assert torch.allclose(Q, fresh[name].A / fresh[name].A.norm(dim=1)[:, None])
            drawn.append(torch.cat([form.parameters[f"{name}/P"][1] for name in SHAPES]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert len({float(x) for x in drawn[0]}) == len(drawn[0])


@pytest.mark.parametrize("steps", [1, 2, 5, 12])
def test_what_leaves_is_what_the_model_held_at_half_the_ranks(steps):
    """ΔW of the update is the model's after the last step: the scale is counted once. Ranks differ by layer; their sum is set."""
    model, held = llama(), {}
    client = client_of(rank=6, max_steps=steps)

    def look(name, step, of, loss):
        if step == of:
            held.update({name: layer.adapter.delta() for name, layer in lora_layers(model).items()})

    [update] = fit([client], replace(CONFIG, lr_scheduler_type="constant"), model=model, on_step=look)
    ranks = [a.rank for a in update.adapters.values()]
    assert sum(ranks) == 18 and min(ranks) >= 1 and list(update.adapters) == list(SHAPES)
    assert len(set(ranks)) > 1 or steps < 5
    for name, a in update.adapters.items():
        assert float(held[name].norm()) > 0 and relative(dense(a), held[name]) < 1e-6
        assert a.A.is_contiguous() and a.B.is_contiguous() and a.A.dtype == torch.float32


def test_a_client_is_the_same_in_company():
    model = llama(dtype=torch.float64)
    clients = [client_of(0, 6), client_of(1, 3, layers=[1]), client_of(2, 1), client_of(3, 4, max_steps=3)]
    together = fit(clients, model=model)
    for client, update in zip(clients, together, strict=True):
        assert near(update.adapters, fit([client], model=model)[0].adapters)
    assert [sum(a.rank for a in u.adapters.values()) for u in together] == [18, 4, 6, 12]


def test_a_client_keeps_all_ranks_with_a_share_of_one():
    [update] = fit([client_of()], replace(CONFIG, adalora_keep=1.0))
    assert all(a.rank == RANK for a in update.adapters.values())


@pytest.mark.parametrize("strategy", ["flora", "zeropad", "hetlora", "flexlora", "florist", "raflora"])
def test_ranks_that_differ_by_layer_go_through_every_rule_of_mixed_ranks(strategy):
    """Two rounds: what the first gives is what the second starts from."""
    clients, rule, model = [client_of(0, 6), client_of(1, 4)], flora.STRATEGIES[strategy], llama()
    config = replace(CONFIG, max_steps=6, adapter_dtype="bfloat16" if strategy == "flora" else None)
    broadcast, losses = rule.begin(SHAPES, [6, 4], 0), []
    for version in range(3):
        updates = fit(clients, config, replace(broadcast, version=version, run="r"), model)
        losses.append(sum(u.metrics["loss"] for u in updates))
        assert [sum(a.rank for a in u.adapters.values()) for u in updates] == [18, 12]
        broadcast = flora.aggregate(updates, strategy)
        for name in SHAPES:
            exact = sum(u.num_examples * dense(u.adapters[name]) for u in updates) / sum(u.num_examples for u in updates)
            if strategy == "flora":
                assert relative(dense(broadcast.merge[name]), exact) < 1e-5
            elif strategy == "flexlora":
                found = broadcast.start[name]
                U, sigma, Vh = torch.linalg.svd(exact)
                best_part = (U[:, :found.rank] * sigma[:found.rank]) @ Vh[:found.rank]
                assert relative(dense(found), best_part) < 1e-5
    assert losses[2] < losses[0]
