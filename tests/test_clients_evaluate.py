"""Every client's own model evaluated and asked in one batch: what each gives by itself, and nothing left attached."""
import pytest
import torch
from tiny import TARGETS, adapter, llama, token_rows

from flora import packed, packing
from flora.errors import DataError, TargetError
from flora.evaluate import evaluate, evaluate_clients, generate_clients
from flora.nn import applied, lora_layers, target_shapes

SHAPES = target_shapes(llama(), TARGETS)


def view(rank, seed, names=None):
    return {name: adapter(rank, shape, seed + i, alpha=4.0) for i, (name, shape) in enumerate(SHAPES.items())
            if names is None or name in names}


VIEWS = {"a": view(4, 1), "b": None, "c": view(9, 5), "d": view(1, 9, list(SHAPES)[:2]), "e": {}}
ROWS = {name: token_rows(3 + k, seed=k, longest=6 + 3 * k) for k, name in enumerate(VIEWS)}


@pytest.mark.parametrize("can_pack", [True, False])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_all_clients_in_one_batch_give_what_each_gives_alone(can_pack, batch_size, monkeypatch):
    model, told = llama(dtype=torch.float64).train(), []
    if not can_pack:
        monkeypatch.setitem(packing._traits, model, packing.Traits(False, False))
    found = evaluate_clients(model, VIEWS, ROWS, batch_size, on_rows=told.append)
    assert sum(told) == sum(map(len, ROWS.values())) and model.training and not lora_layers(model)
    for name, adapters in VIEWS.items():
        with applied(model, adapters or {}):
            alone = evaluate(model, ROWS[name], batch_size)
        assert found[name] == pytest.approx(alone, rel=1e-9)
    assert len({metrics["loss"] for metrics in found.values()}) == len(VIEWS)


def test_one_pass_serves_several_clients():
    model, calls = llama(), []
    evaluate_clients(model, VIEWS, ROWS)
    model.model.register_forward_pre_hook(lambda m, a, kwargs: calls.append(kwargs["input_ids"].shape), with_kwargs=True)
    evaluate_clients(model, VIEWS, ROWS, 8)
    assert len(calls) == -(-sum(map(len, ROWS.values())) // 8)


def test_more_ranks_than_a_kernel_takes_and_clients_without_rows(monkeypatch):
    monkeypatch.setattr(packed, "MOST_RANKS", 10)
    model = llama(dtype=torch.float64)
    assert list(packed.together({name: v or {} for name, v in VIEWS.items()})) == [["a", "b"], ["c", "d", "e"]]
    blank = [{"input_ids": [5, 6, 7], "labels": [-100] * 3}]
    found = evaluate_clients(model, VIEWS, {**ROWS, "b": [], "c": blank})
    assert found["b"] is None and found["c"] is None and list(found) == list(VIEWS)
    assert found["a"] == pytest.approx(evaluate_clients(model, {"a": VIEWS["a"]}, ROWS)["a"], rel=1e-9)
    assert evaluate_clients(model, {}, {}) == {}


def test_greedy_answers_of_all_clients_are_those_of_each_alone():
    """Prompts of other lengths; an end in the middle of an answer, which is cut there."""
    model = llama(dtype=torch.float64, eos_token_id=1)
    prompts = {name: [row["input_ids"] for row in rows] for name, rows in ROWS.items()} | {"b": []}
    found = generate_clients(model, VIEWS, prompts, max_new_tokens=6, eos_id=40)
    assert found["b"] == [] and not lora_layers(model) and model.training is llama().training
    answers = []
    for name, adapters in VIEWS.items():
        for prompt, got in zip(prompts[name], found[name], strict=True):
            with applied(model, adapters or {}), torch.no_grad():
                ids = list(prompt)
                for _ in range(6):
                    following = int(model.eval()(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
                    if following == 40:
                        break
                    ids.append(following)
            assert got == ids[len(prompt):]
            answers.append(got)
    assert len({tuple(a) for a in answers}) > 5
    with pytest.raises(DataError, match="empty"):
        generate_clients(model, {"a": None}, {"a": [[]]})


def test_adapters_of_another_model_are_refused_and_nothing_stays():
    model = llama()
    with pytest.raises(TargetError):
        evaluate_clients(model, {"a": {"nowhere": adapter(2, (16, 16))}}, ROWS)
    assert not lora_layers(model) and model.config._attn_implementation != packing.NAME
