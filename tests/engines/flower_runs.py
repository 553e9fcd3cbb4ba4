"""Runs on Flower in one process (flower_grid.py), and what they left in their folders."""
from flower_grid import OneProcess
from tiny import TARGETS

import flora
from flora.engines import flower
from flora.engines.flower.records import settings

NODES = {900 + 7 * k % 5: {"partition-id": k, "num-partitions": 4} for k in (2, 0, 3, 1)}


def restart():
    flower._bases.clear()
    flower._parties.clear()


def keys(place, folder, **changes):
    """The config of an app: a run's, as TOML can hold it."""
    return {"model_name_or_path": str(place / "model"), "dataset": str(place / "rows.jsonl"), "num_clients": 4, "num_rounds": 2,
            "lora_r": "8,4,2,1", "lora_alpha": "16,4,8,1", "max_steps": 3, "learning_rate": 1e-2, "eval_rows_per_client": 3,
            "server_eval_rows": 8, "target_modules": ",".join(TARGETS), "quiet": True, "device": "cpu", "keep_rounds": 9,
            "output_dir": str(folder), "flower.wait_seconds": 0.0, **changes}


def on_flower(values, nodes=None, changed=None, states=None):
    """A run on Flower; its strategy and its grid."""
    grid = OneProcess(flower.client_app, nodes or NODES, values, changed)
    grid.states.update(states or {})
    strategy = flower.FloraStrategy(*settings(values))
    strategy.grid = grid
    strategy.run(grid)
    return strategy, grid


def locally(values, folder, **changes):
    run, _ = settings({**values, "output_dir": str(folder), **changes})
    return flora.run(run)


def said(caplog):
    return "\n".join(record.getMessage() for record in caplog.records)
