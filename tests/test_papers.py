"""The papers' experiments: every config is one that runs, and the toy goes through every method."""
import math

import pytest
import torch

from benchmarks.papers import classifier, communication, hierarchy, tables, toy
from benchmarks.papers.run import HERE, experiments, read
from flora.comparison import planned
from flora.config import load, parse
from flora.engines.prepare import check

_draw = torch.Generator().manual_seed(0)
NOISE = classifier.Tweets(torch.randn(6400, 8, generator=_draw), torch.randint(3, (6400,), generator=_draw),
                          torch.arange(6400) % 8 == 1)


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
@pytest.mark.parametrize(("paper", "name"), [(paper, name) for paper in ("flora", "hierfedlora") for name in experiments(paper)])
def test_every_experiment_is_one_that_runs(paper, name, scale):
    own, settings = read(paper, name, scale)
    plan = planned(parse(settings, name), own["compare"]["strategies"], own["compare"].get("learning_rates", ()))
    assert len(plan) >= 2 and len(own["compare"]["seeds"]) >= 2 and own["title"]
    for one in plan:
        check(one.config)
        assert one.config.num_hidden_layers == (2 if scale == "cpu" else None)


def test_the_published_settings_are_the_papers():
    for path in (HERE / "flora" / "published").glob("*.yaml"):
        config = parse(load(path))
        check(config)
        assert config.ranks() == [64, 32, 16, 16, 8, 8, 4, 4, 4, 4] and config.alphas() == [2 * r for r in config.ranks()]
        assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 128 and config.max_length == 512
        assert config.learning_rate == 3e-4 and config.num_rounds == 3 and config.target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize("entry", list(toy.ENTRIES))
def test_the_toy_goes_through_every_method_and_learns(entry, monkeypatch):
    monkeypatch.setattr(toy, "MARKS", (1, 3))
    found = toy.rounds(entry, 5e-3, 0, 3)
    assert set(found) == {1, 3} and all(map(math.isfinite, found.values())) and found[3] < 1.0


def test_its_tables_name_the_best_rate_and_the_edge():
    rows = [{"entry": entry, "rate": rate, "seed": seed, "errors": {"10": 1.0, "50": loss + seed / 100}}
            for entry, losses in (("flora", (0.5, 0.3, 0.4)), ("fedit", (0.9, 0.8, 0.2)))
            for rate, loss in zip((0.1, 0.2, 0.3), losses, strict=True) for seed in (0, 1)]
    best, starts = toy.pages(rows)
    assert [row[:2] for row in best.rows] == [["fedit", "0.3 (edge)"], ["flora", "0.2"]]
    assert best.rows[0][-1] == "lower" and len(starts.rows) == 6


def test_the_communication_table_says_whose_bytes():
    rows = [{"setting": "a", "ranks": "16", "method": "flora", "up": 2e6, "down": 3e6, "share": 0.01}]
    [page] = communication.pages(rows)
    assert page.rows == [["flora", "2.0", "3.0", "1.000%"]] and "rank 16" in tables.below(page)


def test_the_fleets_runs_end_with_their_time(monkeypatch):
    """Groups, chooser and clock on a classifier of noise in the place of the tweets."""
    for module in (classifier, hierarchy):
        monkeypatch.setattr(module, "tweets", lambda: NOISE)
    net = classifier.Classifier(8)
    monkeypatch.setattr(hierarchy, "base", net.state_dict)
    found = {entry: hierarchy.run(entry, 1.0, 0, 13.0, 1e-3) for entry in ("flora", "HierFedLoRA", "averages inside")}
    for entry, points in found.items():
        assert len(points) > 1 and all(math.isfinite(p["loss"]) for p in points) and points[-1]["seconds"] <= 13, entry
        assert bool(points[-1]["chosen"]) == (entry in ("HierFedLoRA", "averages inside"))
    assert max(inner for inner, _ in found["HierFedLoRA"][-1]["chosen"].values()) > 1
    rows = [{"entry": entry, "skew": 1.0, "seed": 0, "rate": 1e-3, "points": points} for entry, points in found.items()]
    [first, *_] = hierarchy.entries_of(rows, 1.0)
    assert first["name"] == "flora, 0.001" and first["clock"]["times"]["eval_loss"]["mean"] == 1
