"""Five hundred rounds on Flower in one process, one answer in ten lost and one in twenty garbage: nothing is held or lost."""
import logging
import random
import sys
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="flwr is not installed, so not tested: the Flower engine. `make test-engines` tests it")

sys.path.insert(0, str(Path(__file__).parents[1] / "soak"))

from flower_runs import NODES, keys, on_flower, restart
from rounds import DIES, GARBAGE, held, spoilt
from runs import failures

from flora.engines.flower.records import from_arrays, to_arrays
from flora.report import read_metrics

ROUNDS = 500


def soak(place, folder, faults):
    """Losses before and after, what was held by round, and how many answers were spoilt."""
    draw, seen, spoiled = random.Random(0), {}, {"lost": 0, "garbage": 0}

    def changed(node, message, reply):
        number = message.content["flora"]["round"] if "flora" in message.content.config_records else None
        if message.metadata.message_type != "train" or number is None:
            return reply
        if number % 10 == 0 and number not in seen:
            seen[number] = held()
        luck = draw.random() if faults else 1.0
        if luck < DIES:
            spoiled["lost"] += 1
            return None
        if luck < DIES + GARBAGE and reply.has_content():
            spoiled["garbage"] += 1
            reply.content["arrays"] = to_arrays(spoilt(from_arrays(reply.content), draw))
        return reply

    restart()
    on_flower(keys(place, folder, **{"num_rounds": ROUNDS, "eval_every": ROUNDS, "max_steps": 1, "learning_rate": 1e-3,
                                     "keep_rounds": 1, "flower.server_model": True}), changed=changed)
    losses = [row["eval_loss"] for row in read_metrics(folder) if row["kind"] == "server" and "eval_loss" in row]
    return losses, seen, spoiled


@pytest.mark.soak
def test_five_hundred_rounds_on_flower_hold_nothing(place, tmp_path):
    logging.disable(logging.INFO)                               # pytest keeps every record
    try:
        steady, _, _ = soak(place, tmp_path / "steady", faults=False)
        losses, seen, spoiled = soak(place, tmp_path / "faults", faults=True)
    finally:
        logging.disable(logging.NOTSET)
    early, late = seen[50], seen[ROUNDS - 10]
    print(f"\nround 50: {early}, round {ROUNDS - 10}: {late}; {spoiled}; losses {losses}, without faults {steady}")
    count = ROUNDS * len(NODES)
    assert 0.07 * count < spoiled["lost"] < 0.13 * count and 0.03 * count < spoiled["garbage"] < 0.07 * count
    assert len(failures(tmp_path / "faults")) >= sum(spoiled.values()) - 5
    assert late["rss"] <= 1.05 * early["rss"] and late["files"] == early["files"] and late["threads"] <= early["threads"]
    assert late["children"] == 0
    assert losses[-1] < losses[0] and abs(losses[-1] - steady[-1]) < 0.25 * (steady[0] - steady[-1])
