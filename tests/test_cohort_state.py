"""The optimiser's state kept from round to round: two rounds are one run of AdamW, and a client's state is its own."""
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from tiny import TARGETS, adapter, llama, near, same, token_rows

from flora import Broadcast, Cohort, LocalClient, TrainConfig
from flora.nn import target_shapes
from flora.strategies import STRATEGIES

SHAPES = target_shapes(llama(), TARGETS)
CONFIG = TrainConfig(1e-2, max_steps=3, per_device_train_batch_size=2, shuffle=False, weight_decay=0.1)
START = {name: adapter(4, shape, i, dtype=torch.float64) for i, (name, shape) in enumerate(SHAPES.items())}
LAYER = "model.layers.0.self_attn.q_proj"


def client_of(name="c", seed=0, rank=4, **own):
    return LocalClient(name, token_rows(6, seed=seed), rank, 2.0 * rank, **own)


def fit(clients, start=START, states=None, config=CONFIG, **options):
    return Cohort(llama(dtype=torch.float64), clients, config, TARGETS, optimizer_states=states).fit(
        Broadcast(start=start, **options))


def test_two_rounds_with_a_kept_state_are_one_run():
    """Three steps an epoch, rows in their order: round two goes on where round one stopped."""
    clients = [client_of("a"), client_of("b", 1)]
    whole = fit(clients, config=replace(CONFIG, max_steps=6))
    states = {}
    first = fit(clients, states=states)
    for update, client, one in zip(first, clients, whole, strict=True):
        kept, reset = (fit([client], update.adapters, held)[0] for held in (states, None))
        assert near(kept.adapters, one.adapters, 1e-6) and not near(reset.adapters, one.adapters, 1e-2)
    assert set(states) == {"a", "b"} and float(states["a"][f"{LAYER}/A/step"]) == 6


def test_a_state_is_saved_and_read_as_safetensors(tmp_path):
    states = {}
    [first] = fit([client_of()], states=states)
    assert set(states["c"]) == {f"{name}/{f}/{key}" for name in SHAPES for f in "AB" for key in ("step", "exp_avg", "exp_avg_sq")}
    assert states["c"][f"{LAYER}/B/exp_avg"].shape == (SHAPES[LAYER][0], 4)[::-1]       # ranks outermost, as B is stored
    assert all(t.device.type == "cpu" and t.is_contiguous() for t in states["c"].values())
    safetensors.torch.save_file(states["c"], tmp_path / "state.safetensors")
    read = {"c": safetensors.torch.load_file(tmp_path / "state.safetensors")}
    assert same(fit([client_of()], first.adapters, read)[0].adapters, fit([client_of()], first.adapters, states)[0].adapters)


def test_a_tensor_of_another_shape_starts_anew():
    states = {}
    fit([client_of()], states=states)
    smaller = {name: adapter(2, shape, 9, dtype=torch.float64) for name, shape in SHAPES.items()}
    [update] = fit([client_of(rank=2)], smaller, states)
    assert same(update.adapters, fit([client_of(rank=2)], smaller)[0].adapters)
    assert float(states["c"][f"{LAYER}/A/step"]) == 3 and states["c"][f"{LAYER}/A/exp_avg"].shape[0] == 2


def test_what_did_not_train_keeps_its_state():
    states = {}
    fit([client_of()], states=states, train="B")
    held = {key: value.clone() for key, value in states["c"].items()}
    fit([client_of()], states=states, train="A")
    assert all(torch.equal(states["c"][key], value) for key, value in held.items()) and len(states["c"]) == 2 * len(held)


def test_a_client_that_failed_keeps_the_state_it_had():
    states = {}
    fit([client_of()], states=states)
    held = {key: value.clone() for key, value in states["c"].items()}
    assert fit([client_of(learning_rate=1e200)], states=states) == []
    assert states["c"].keys() == held.keys() and all(torch.equal(states["c"][key], value) for key, value in held.items())


@pytest.mark.parametrize("what", ["core", "weight", "adalora"])
def test_every_form_has_a_state(what):
    config = replace(CONFIG, adalora_keep=0.5 if what == "adalora" else None)
    broadcast = STRATEGIES["fedsb"].begin(SHAPES, [4], 0) if what == "core" else Broadcast(
        train="weight" if what == "weight" else "AB")
    parts = {"core": ["core"], "weight": ["weight"], "adalora": ["P", "Q", "lambda"]}[what]
    states = {}
    for steps in (3, 6):
        Cohort(llama(), [client_of()], config, TARGETS, optimizer_states=states).fit(broadcast)
        assert {key.rsplit("/", 1)[0] for key in states["c"]} == {f"{name}/{part}" for name in SHAPES for part in parts}
        assert all(float(value) == steps for key, value in states["c"].items() if key.endswith("/step"))
