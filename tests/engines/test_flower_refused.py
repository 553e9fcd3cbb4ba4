"""What one client of a run on Flower sends wrong costs that client its round, and nobody else."""
import re
from dataclasses import replace

import pytest

pytest.importorskip("flwr", reason="flwr is not installed, so not tested: the Flower engine. `make test-engines` tests it")

from flower_runs import NODES, keys, on_flower
from flwr.app import Array, ArrayRecord
from forge import NOT_FINITE, join, split
from runs import adapters, failures

import flora
from flora.engines.flower.records import from_arrays, to_arrays
from flora.engines.party import Party
from flora.errors import ConfigError, StrategyError, TrainingError
from flora.messages import decode, encode
from flora.report import read_metrics


def reply_with(message, data, **config):
    """A reply of a node with these bytes in the place of its update."""
    message.content["arrays"] = to_arrays(data)
    for name, value in config.items():
        message.content["flora"][name] = value
    return message


def hostile(case, update, given):
    """What a client sends in the place of an honest update."""
    layer = next(iter(update.adapters))
    a = update.adapters[layer]
    whole = encode(update)
    header, fields, body = split(whole)
    cases = {
        "key": lambda: encode(replace(update, adapters={"lm_head.q_proj": a})),
        "shape": lambda: encode(replace(update, adapters={**update.adapters, layer: flora.Adapter(a.A[:, 1:], a.B, a.scale)})),
        "dtype": lambda: whole.replace(b'"F32"', b'"I32"'),
        "version": lambda: encode(replace(update, base_version=update.base_version + 1)),
        "rank": lambda: encode(replace(update, adapters={**update.adapters, layer: flora.pad(a, 9)})),
        "nan": lambda: join(header, fields, bytes.fromhex(NOT_FINITE["F32"][2]) + body[4:]),      # encode refuses to
        "other": lambda: encode(replace(update, client="client-1")),
        "oversized": lambda: whole + b"\0" * (20 << 20),
        "truncated": lambda: whole[:-100], "empty": lambda: b"", "text": lambda: b"hello, world"}
    return cases[case]()


SAYS = {"key": "layers of this model", "shape": "shape|A is|expected", "dtype": "digest|floating|spelling|header|dtype",
        "version": "trained on version 0", "rank": "rank", "nan": "finite", "other": "who sent it", "oversized": "bytes",
        "truncated": "digest|bytes|read", "empty": "bytes", "text": "header|read|bytes"}


@pytest.mark.parametrize("case", SAYS)
def test_what_one_client_sends_wrong_is_refused_and_the_others_go_on(place, tmp_path, case):
    def lie(node, message, reply):
        if message.metadata.message_type != "train" or NODES[node]["partition-id"] != 2 or message.content["flora"]["round"]:
            return reply
        given = decode(from_arrays(message.content))
        return reply_with(reply, hostile(case, decode(from_arrays(reply.content), given=given), given))

    on_flower(keys(place, tmp_path / "flower"), changed=lie)
    found = failures(tmp_path / "flower")
    assert list(found) == [(0, "client-2")]
    assert re.search(SAYS[case], found[0, "client-2"]), found
    parts = {k: adapters(tmp_path / "flower", 0, f"clients/client-{k}") for k in (0, 1, 3)}
    rows = {row["client"]: row["num_examples"] for row in read_metrics(tmp_path / "flower")
            if row["kind"] == "client" and not row["round"]}
    for layer, a in adapters(tmp_path / "flower", 0).items():
        exact = sum(rows[f"client-{k}"] / sum(rows.values()) * parts[k][layer].delta() for k in parts)
        assert a.rank == 13 and float((a.delta() - exact).norm()) < 1e-6 * float(exact.norm())


def raw(reply):
    reply.content["arrays"] = ArrayRecord({"flora": Array("float32", (1,), "numpy.ndarray", b"\0\0\0\0")})
    return reply


@pytest.mark.parametrize(("bad", "says"), [
    (lambda reply: raw(reply), "one array flora of uint8"), (lambda reply: (reply.content.pop("arrays"), reply)[1], "got none"),
    (lambda reply: (reply.content.pop("flora"), reply)[1], "version of its base"), (lambda reply: None, "not answered"),
    (lambda reply: reply_with(reply, b"", have=7, behind=True), "got 7, which this server never sent")],
    ids=["array", "no-array", "no-config", "dies", "ahead"])
def test_a_reply_that_is_no_answer_is_left_out(place, tmp_path, bad, says):
    def spoil(node, message, reply):
        first = message.metadata.message_type == "train" and not message.content["flora"]["round"]
        return bad(reply) if first and NODES[node]["partition-id"] == 1 else reply

    on_flower(keys(place, tmp_path / "flower"), changed=spoil)
    found = failures(tmp_path / "flower")
    assert list(found) == [(0, "client-1")] and says in found[0, "client-1"]


def test_a_client_that_cannot_train_says_why(place, tmp_path, monkeypatch):
    train = Party.answer

    def fails(self, *told):
        if self.client.name == "client-0":
            raise TrainingError("expected a finite loss; got NaN")
        if self.client.name == "client-3":
            raise ZeroDivisionError("a bug of its own")
        return train(self, *told)

    monkeypatch.setattr(Party, "answer", fails)
    on_flower(keys(place, tmp_path / "flower", num_rounds=1))
    found = failures(tmp_path / "flower")
    assert "expected a finite loss" in found[0, "client-0"] and "a bug of its own" in found[0, "client-3"] and len(found) == 2


@pytest.mark.parametrize(("changes", "error", "says"), [
    ({"strategy": "centralized"}, ConfigError, "centralized.*flora run"), ({"strategy": "fedsa"}, ConfigError, "fedsa"),
    ({"optimizer_state": "keep"}, ConfigError, "optimizer_state"), ({"checkpoint_every": 2}, ConfigError, "checkpoint_every"),
    ({"strategy": "fedit"}, StrategyError, "flora")])
def test_what_a_run_of_processes_cannot_have_is_refused(place, tmp_path, changes, error, says):
    with pytest.raises(error, match=says):
        on_flower(keys(place, tmp_path / "refused", **changes))
