"""Every published method in a whole run, and what stays at home in FedSA."""
import json

import pytest
import torch
from test_engines import settings

import flora
from flora.engines import local
from flora.strategies import STRATEGIES

ONE_RANK = ("ffa", "rolora", "fedex", "fedsa", "fedsvd", "fedsb")
MIXED = ("hetlora", "flexlora", "florist", "raflora", "full")


@pytest.mark.parametrize("strategy", [*ONE_RANK, *MIXED])
def test_a_run_of_each_method_learns(place, strategy):
    folder = flora.run({**settings(place, f"m-{strategy}", "zeropad"), "strategy": strategy,
                        "lora_r": [4] * 4 if strategy in ONE_RANK else [8, 4, 2, 1], "num_rounds": 3})
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["eval_loss"] for row in rows if row["kind"] == "server"]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert not [row for row in rows if row["kind"] == "failure"]


def test_in_fedsa_every_client_goes_on_with_the_common_A_and_its_own_B(place, monkeypatch):
    """The start of each client in the second round; and no B in what the server was given."""
    fits, closed = [], []
    real_fit, real_close = local.Cohort.fit, local.Server.close

    def fit(self, sent, **options):
        fits.append((self.clients, sent, real_fit(self, sent, **options)))
        return fits[-1][2]

    def close(self, updates, weights=None):
        closed.append(updates)
        return real_close(self, updates, weights)

    monkeypatch.setattr(local.Cohort, "fit", fit)
    monkeypatch.setattr(local.Server, "close", close)
    flora.run({**settings(place, "fedsa", "fedit"), "strategy": "fedsa", "num_rounds": 2})
    (_, _, first), (clients, sent, _) = fits
    assert all(not bool(a.B.any()) for updates in closed for u in updates for a in u.adapters.values())
    for client, update in zip(clients, first, strict=True):
        for name, a in client.start.items():
            assert torch.equal(a.B, update.adapters[name].B) and bool(a.B.any())
            assert torch.equal(a.A, sent.start[name].A) and not torch.equal(a.A, update.adapters[name].A)


def test_every_method_is_tried_here_or_in_test_engines():
    from test_engines import STRATEGIES as RUN
    assert set(STRATEGIES) == {*ONE_RANK, *MIXED, *RUN}
