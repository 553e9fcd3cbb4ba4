"""Hundreds of rounds in one process, some of whose clients die or send garbage; says a line of JSON every ten rounds.

    python rounds.py FOLDER ROUNDS SEED FAULTS        FAULTS: 1 or 0
"""
import gc
import json
import os
import random
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tiny import TARGETS, llama

from flora import Broadcast, Cohort, LocalClient, TrainConfig
from flora.checkpoint import RunFolder
from flora.evaluate import evaluate
from flora.messages import encode
from flora.nn import target_shapes
from flora.report import Report
from flora.server import Server
from flora.snapshot import Carried
from flora.versions import bring_to

CLIENTS, DIES, GARBAGE = 8, 0.10, 0.05


def rows(count, seed):
    """Five tokens of twelve, counted down in a circle but for one in ten: that can be learnt, up to a loss."""
    draw, found = random.Random(seed), []
    for _ in range(count):
        ids = [2 + draw.randrange(12)]
        while len(ids) < 6:
            ids.append(2 + (draw.randrange(12) if draw.random() < 0.1 else (ids[-1] - 1) % 12))
        found.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
    return found


def spoilt(data, draw):
    """An encoding that is cut, has a bit turned over, or was never one."""
    how = draw.randrange(3)
    if how == 0:
        return data[:draw.randrange(len(data))]
    if how == 1:
        at = draw.randrange(8 * len(data))
        return data[:at // 8] + bytes([data[at // 8] ^ 1 << at % 8]) + data[at // 8 + 1:]
    return draw.randbytes(draw.randrange(2 * len(data)))


def held():
    """What this process holds: resident KiB, open files, threads, children."""
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"rss": int(status["VmRSS"].split()[0]), "files": len(os.listdir("/proc/self/fd")), "threads": int(status["Threads"]),
            "children": sum(len(p.read_text().split()) for p in Path("/proc/self/task").glob("*/children"))}


def main(place, count, seed, faults):
    torch.set_num_threads(1)
    model = llama(seed, vocab_size=16, intermediate_size=16, num_hidden_layers=1)
    clients = [LocalClient(f"c{k}", rows(12, 100 * seed + k), 1 + k % 3, 2 * (1 + k % 3)) for k in range(CLIENTS)]
    config = TrainConfig(2e-2, max_steps=2, per_device_train_batch_size=4, seed=seed)
    draw, test, gone = random.Random(seed), rows(64, 10_000), 0
    server = Server("flora", clients, Broadcast(run="soak"), shapes=target_shapes(model, TARGETS))
    with RunFolder(place) as folder:
        folder.begin("{}", {})
        with Report(folder.path) as report:
            for number in range(count):
                sent, fate = server.broadcast, {c.name: draw.random() if faults else 1.0 for c in clients}
                alive = [c for c in clients if fate[c.name] >= DIES]
                updates = Cohort(model, alive, config, TARGETS).fit(sent)
                arrived = {u.client: encode(u, sent) for u in updates}
                bad = {name for name in arrived if fate[name] < DIES + GARBAGE}
                arrived = {name: spoilt(data, draw) if name in bad else data for name, data in arrived.items()}
                refused = server.take(arrived)
                assert set(refused) == bad, (bad, refused)
                for name, reason in refused.items():
                    report.add({"kind": "failure", "round": number, "client": name, "reason": reason})
                following = server.close()
                good = [c for c in alive if c.name not in bad]
                assert following is sent if not good else all(
                    a.rank == sum(c.rank for c in good) for a in following.merge.values())
                folder.save_round(number, [replace(u) for u in updates if u.client not in bad], following, 1, "tiny")
                report.add({"kind": "server", "rounds_done": number + 1})
                gone += CLIENTS - len(alive)
                if number % 10 == 9:
                    folder.save_checkpoint(model, number + 1, server, Carried())
                    print(json.dumps({"round": number + 1, **held()}), flush=True)
            bring_to(model, server.broadcast)
            failures = [row for row in report.rows if row["kind"] == "failure"]
            print(json.dumps({"loss": evaluate(model, test, 16, 0)["loss"], "died": gone, "refused": len(failures)}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
