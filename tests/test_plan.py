"""A dry run: what it says of clients and bytes is what the run then does."""
import pytest
from test_engines import of, settings
from tiny import ROOT

import flora
from flora.cli import main
from flora.config import load, parse
from flora.data.known import ARCHITECTURES, ROWS
from flora.engines.plan import plan
from flora.errors import ConfigError, DataError, StrategyError
from flora.report import read_metrics
from flora.strategies import STRATEGIES


@pytest.mark.parametrize("strategy", [*STRATEGIES, "warm", "auto"])
def test_a_plan_counts_the_bytes_of_the_run(place, strategy):
    changes = {"warm": {"start": "warm"}, "auto": {"downlink": "auto"}}.get(strategy, {})
    config = {**settings(place, f"plan-{strategy}", "flora"), "strategy": strategy if strategy in STRATEGIES else "flora",
              "lora_r": 4, "lora_alpha": "2r", "max_steps": 1, **changes}
    found, rows = plan(parse(config)), of(read_metrics(flora.run(config)), "server")
    messages = 4 * 3                                            # clients, parts; a header each, and one a layer in the plan
    for row, up, down in zip(rows[1:], found.up, found.down, strict=True):
        assert abs(row["bytes_up"] - up) <= messages * 6_000 and abs(row["bytes_down"] - down) <= messages * 6_000
        assert (up > 0) == (row["bytes_up"] > 0)
    assert abs(rows[0]["bytes_down"] - found.first) <= messages * 6_000


@pytest.mark.parametrize(("strategy", "up", "down"), [
    ("flora", 1.0, 10.0), ("fedit", 1.0, 1.0), ("ffa", "B", "B"), ("fedsa", "A", "A"), ("fedsb", "core", "core"),
    ("fedex", 1.0, 12.0), ("zeropad", 1.0, 1.0), ("bf16", 0.5, 5.0)])
def test_the_communication_figure(strategy, up, down):
    """Numbers of all ten clients, as shares of their adapters': every message of real layers is nearly all tensors."""
    path = "benchmarks/papers/flora/published/llama-7b-alpaca.yaml"
    changes = {"adapter_dtype": "bfloat16"} if strategy == "bf16" else {}
    config = parse({**load(ROOT / path), "strategy": "flora" if strategy == "bf16" else strategy, "lora_r": 16,
                    "target_modules": ["q_proj", "gate_proj"], "num_hidden_layers": 1, **changes})
    found = plan(config, rounds=1)
    sides = {"A": sum(i for _, i in found.shapes.values()), "B": sum(o for o, _ in found.shapes.values())}
    whole = 4 * 10 * 16 * (sides["A"] + sides["B"])
    shares = {**{side: 4 * 10 * 16 * n / whole for side, n in sides.items()}, "core": 4 * 10 * 256 * len(found.shapes) / whole}
    for have, want in ((found.up[0], up), (found.down[0], down)):
        assert have / whole == pytest.approx(shares.get(want, want), rel=0.02, abs=0.002)


def test_a_plan_has_the_clients_of_the_run(place):
    config = settings(place, "plan-clients", "zeropad", max_steps=None, num_train_epochs=2)
    found, rows = plan(parse(config)), of(read_metrics(flora.run(config)), "client")
    for client, row in zip(found.clients, rows, strict=False):
        assert (client["client"], client["rank"], client["alpha"]) == (row["client"], row["rank"], row["alpha"])
        assert abs(client["rows"] - row["num_examples"]) <= 3          # the server's held-out rows come off some of them
    [one] = plan(parse(settings(place, "plan-pooled", "centralized"))).clients
    assert one["rank"] == 8 and one["rows"] == sum(client["rows"] for client in found.clients)


def test_the_published_settings_resolve_without_weights_and_without_a_hub(capsys):
    for path in sorted((ROOT / "benchmarks" / "papers" / "flora" / "published").glob("*.yaml")):
        config = parse(load(path))
        found = plan(config)
        millions = {"TinyLlama": 1_100, "huggyllam": 6_738, "meta-llam": 6_738}[config.model_name_or_path[:9]]
        assert round(found.parameters / 1e6) == millions and len(found.clients) == 10
        held = 10 * config.eval_rows_per_client + config.server_eval_rows
        assert abs(sum(c["rows"] for c in found.clients) + held - ROWS[config.dataset]) <= 10
        ranks, width = 160, sum(out + inn for out, inn in found.shapes.values())
        assert found.up[0] == pytest.approx(4 * ranks * width, rel=0.01)
        assert found.down[0] == pytest.approx(10 * 4 * ranks * width, rel=0.01)
    assert main(["run", str(path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "1,100 million parameters" in out and "client-9" in out and "MB up" in out


def test_a_plan_refuses_what_the_run_would(place):
    config = settings(place, "plan-bad", "fedit")
    for changes, error in (({"lora_r": [4, 4, 4, 2]}, StrategyError), ({"start": "warm"}, ConfigError),
                           ({"model_name_or_path": "nobody/knows-this"}, DataError), ({"dataset": "./no.jsonl"}, DataError)):
        with pytest.raises(error):
            plan(parse({**config, **changes}))
    assert set(ARCHITECTURES)


def test_a_budget_that_is_too_small_is_said(place, capsys):
    from flora.engines.plan import show
    config = parse(settings(place, "plan-budget", "flora", communication_budget_mb=0.01))
    show(config, plan(config))
    assert "it would stop early" in capsys.readouterr().out
