"""Whole runs with every way of merging: what they write, that resume goes on with the same bits, and what the config refuses."""
import pytest
import torch
from safetensors.torch import load_file
from test_engines import of, settings
from test_engines_failures import same_numbers, stop_at
from transformers import AutoModelForCausalLM

import flora
from flora import nn
from flora.engines.local import resume
from flora.errors import ConfigError
from flora.evaluate import evaluate
from flora.formats import load_peft
from flora.report import read_metrics

WAYS = {
    "residual": {"dtype": "bfloat16", "merge_residual": True}, "stochastic": {"dtype": "bfloat16", "merge_rounding": "stochastic"},
    "adapter": {"merge_into": "adapter"}, "compressed": {"merge_into": "adapter", "merge_rank": 4}}


def losses(folder):
    return [row["eval_loss"] for row in of(read_metrics(folder), "server")]


@pytest.fixture(scope="module")
def whole(place):
    """Uninterrupted runs of three rounds."""
    return {way: flora.run(settings(place, f"merge-{way}", num_rounds=3, **changes)) for way, changes in WAYS.items()}


@pytest.mark.parametrize("way", WAYS)
def test_the_loss_falls_and_the_result_is_where_it_belongs(whole, way):
    folder, fell = whole[way], losses(whole[way])
    assert fell[0] > fell[1] > fell[3] > 0
    assert (folder / "adapter").exists() == ("merge_into" in WAYS[way]) != (folder / "model").exists()
    errors = [row.get("merge_error") for row in of(read_metrics(folder), "server")]
    assert errors[0] is None and all((e is not None) == ("merge_into" in WAYS[way]) for e in errors[1:])
    if way == "adapter":
        assert errors[1:] == [0.0, 0.0, 0.0] or max(errors[1:]) < 1e-6
    if way == "compressed":
        assert 1e-3 < max(errors[1:]) < 1


def test_beside_the_base_is_as_good_as_in_it(whole, place):
    plain = flora.run(settings(place, "merge-base", num_rounds=3))
    assert losses(whole["adapter"]) == pytest.approx(losses(plain), rel=1e-4)
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    merged = AutoModelForCausalLM.from_pretrained(plain / "model")
    flora.merge(base, load_peft(whole["adapter"] / "adapter"))
    pairs = zip(base.parameters(), merged.parameters(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in pairs)
    assert {a.rank for a in load_peft(whole["compressed"] / "adapter").values()} == {4}


@pytest.mark.parametrize("way", WAYS)
def test_a_stopped_run_goes_on_with_the_same_bits(whole, place, monkeypatch, way):
    folder = place / f"stopped-merge-{way}"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 2)
        flora.run(settings(place, folder.name, num_rounds=3, **WAYS[way]))
    kept = {p.name for p in (folder / "checkpoint" / "2").iterdir()}
    assert ("residuals.safetensors" in kept) == (way == "residual")
    assert ("beside.safetensors" in kept) == ("merge_into" in WAYS[way])
    assert ("base" in kept) == ("merge_into" not in WAYS[way])
    resume(folder)
    assert same_numbers(folder, whole[way])
    result = "adapter/adapter_model.safetensors" if "merge_into" in WAYS[way] else "model/model.safetensors"
    one, other = load_file(folder / result), load_file(whole[way] / result)
    assert list(one) == list(other) and all(torch.equal(t, other[name]) for name, t in one.items())


def test_the_average_is_kept_beside_the_base_at_the_end(place):
    folder = flora.run(settings(place, "merge-fedit", "fedit", merge_into="adapter", num_rounds=1))
    assert (folder / "adapter").exists() and not (folder / "model").exists()
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    flora.merge(model, load_peft(folder / "adapter"))
    from flora.engines.prepare import prepare
    job = prepare(flora.config.parse(settings(place, "x")), lambda text: None)
    assert evaluate(model, job.server_rows, 8, 0)["loss"] == pytest.approx(losses(folder)[-1], rel=1e-4)


@pytest.mark.parametrize(("changes", "says"), [
    ({"merge_into": "adapter", "merge_residual": True}, "merge_into adapter rounds no weight"),
    ({"merge_into": "adapter", "merge_rounding": "stochastic"}, "merge_into adapter rounds no weight"),
    ({"merge_rank": 4}, "merge_rank and merge_tol compress what merge_into: adapter keeps"),
    ({"merge_tol": 0.1}, "merge_rank and merge_tol"), ({"merge_into": "disk"}, "merge_into"),
    ({"merge_rounding": "up"}, "merge_rounding"), ({"merge_into": "adapter", "merge_rank": 0}, "merge_rank"),
    ({"merge_into": "adapter", "merge_tol": 1.0}, "merge_tol")], ids=str)
def test_settings_that_mean_nothing_are_refused(place, changes, says):
    with pytest.raises(ConfigError, match=says):
        flora.run(settings(place, "refused-merge", **changes))


def test_every_merge_setting_reaches_the_merge(place):
    from flora.engines.prepare import prepare
    for changes in (*WAYS.values(), {"merge_into": "adapter", "merge_tol": 0.25}):
        job = prepare(flora.config.parse(settings(place, "x", seed=4, **changes)), lambda text: None)
        how = {f"merge_{name}": getattr(job.merge_config, name) for name in ("into", "rounding", "residual", "rank", "tol")}
        given = {name: value for name, value in changes.items() if name != "dtype"}
        assert how == {"merge_into": "base", "merge_rounding": "nearest", "merge_residual": False, "merge_rank": None,
                       "merge_tol": 0.0, **given} and job.merge_config.seed == 4
    assert not nn.accumulated(job.model)
