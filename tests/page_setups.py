"""What stands around the pages' code: a folder with the files that they name, and for some pages the variables that they assume.

smollm2-135m and chitchat are tiny stand-ins under the names of the fetched ones, so that code reads as a user types it.
"""
import json
import secrets
from pathlib import Path

import torch
import yaml
from oracles import adapter
from rounds import updates_of
from tiny import ROOT, TARGETS, WORDS, llama, save_model, token_rows, write_rows

import flora
from flora.data.fetch import SOURCES
from flora.formats import save_peft

SHAPES = {"blocks.0.q": (13, 7), "blocks.0.v": (5, 11)}
SETTINGS = {"model_name_or_path": "smollm2-135m", "dataset": "mine.jsonl", "num_clients": 2, "num_rounds": 1, "lora_r": 4,
            "max_steps": 2, "eval_rows_per_client": 2, "server_eval_rows": 4, "target_modules": list(TARGETS), "device": "cpu",
            "quiet": True, "output_dir": "runs/flora"}


def fetched(cache: Path) -> None:
    """The folders of smollm2-135m and chitchat as `flora fetch` leaves them, with a tiny model and a few conversations."""
    for name in ("smollm2-135m", "chitchat"):
        folder = cache / f"{name}-{SOURCES[name].version}"
        folder.mkdir(parents=True)
        if name == "chitchat":
            talks = {f"t{i}": {"messages": [[{"text": f"{WORDS[i % 9]} {WORDS[t]}", "sender": f"s{(i + t) % 8}"}]
                                            for t in range(6)]} for i in range(40)}
            (folder / "dataset.json").write_text(json.dumps(talks), encoding="utf-8")
        else:
            save_model(folder)
            for file in SOURCES[name].files:
                (folder / file).touch()


def prepare(place: Path) -> None:
    """The files of a reader: a cache, rows, a config, a finished run, two adapters that PEFT wrote."""
    fetched(place / "cache")
    write_rows(place / "mine.jsonl")
    (place / "config.yaml").write_text(yaml.safe_dump(SETTINGS), encoding="utf-8")
    for name, rank in (("alice", 4), ("bob", 2)):
        save_peft({f"model.layers.{block}.self_attn.q_proj": adapter(16, 16, rank) for block in (0, 1)}, place / name,
                  base_model="smollm2-135m")


def people(*names: str) -> dict[str, flora.LocalClient]:
    return {name: flora.LocalClient(name, token_rows(8, seed=i), rank=2 + i) for i, name in enumerate(names)}


def cohort(place: Path) -> dict:
    """The page names two checkpoints: a causal model and a classifier."""
    from transformers import LlamaForSequenceClassification

    LlamaForSequenceClassification(llama(num_labels=3).config).save_pretrained(place / "classifier")
    return {"model": llama(), "ann_rows": token_rows(9), "bob_rows": token_rows(9, 1),
            "held_out": {"ann": token_rows(4, 2), "bob": token_rows(4, 3)},
            "prompts": {"ann": [[5, 6]], "bob": [[7]]}}


def operators(place: Path) -> dict:
    q = adapter(48, 64, 68)
    W = torch.randn(48, 64)
    return {"x": torch.randn(1638, 64), "weight": W, "A": q.A, "B": q.B, "scale": q.scale, "s": q.scale,
            "quantised_linear": lambda x: x @ W.T, **{f"W{n}": W for n in "qkv"}, **{f"A{n}": q.A for n in "qkv"},
            **{f"B{n}": q.B for n in "qkv"}}


def merges(place: Path) -> dict:
    parts = [[adapter(16, 16, rank) for rank in (4, 2)] for _ in range(2)]
    model, layer = llama(), "model.layers.0.self_attn.q_proj"
    alice, bob = (flora.Update({layer: adapter(16, 16, r)}, 9).adapters for r in (4, 2))
    first = parts[0][0]
    return {"weight": torch.randn(16, 16), "A": first.A, "B": first.B, "scale": first.scale,
            "weights": [torch.randn(16, 16) for _ in range(2)], "model": model, "adapters": alice, "alice": alice, "bob": bob,
            "shapes": {layer: (16, 16)},
            "replies": [flora.Update(a, 5, client=name) for name, a in (("alice", alice), ("bob", bob))],
            **{f: [[getattr(a, f.rstrip("s")) for a in ps] for ps in parts] for f in ("As", "Bs", "scales")}}


def hierarchical(place: Path) -> dict:
    config = flora.TrainConfig(learning_rate=1e-3, max_steps=1, per_device_train_batch_size=2)
    return {**people("ann", "bob", "cem", "dia", "eve", "fay"), "model": llama(num_hidden_layers=5), "train_config": config,
            "broadcast": flora.Broadcast()}


def devices(place: Path) -> dict:
    rows = {f"c{i}": [{"topic": f"t{(i + j) % 3}"} for j in range(6 + i)] for i in range(16)}
    return {"rows_by_client": rows, "client_names": [f"c{i}" for i in range(80)], "steps_per_second": dict.fromkeys(rows, 1.0)}


def peft(place: Path) -> dict:
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    configs = [LoraConfig(r=r, lora_alpha=2 * r, target_modules=["q_proj"]) for r in (4, 2)]
    states = [get_peft_model_state_dict(get_peft_model(llama(), config)) for config in configs]
    save_peft(updates_of([4])[0].adapters, place / "adapter")
    return {"base": llama(), "state_dicts": states, "weights": [3, 1], "configs": configs}


def private(place: Path) -> dict:
    from flora.strategies import strategy_named

    clients = list(people(*"abcdefghij").values())
    for client in clients:
        object.__setattr__(client, "rank", 4)
    sent = strategy_named("ffa").begin(SHAPES, [4] * 10, 0)
    updates = [flora.Update({n: flora.Adapter(a.A, torch.randn_like(a.B) * 0.01, a.scale) for n, a in sent.start.items()}, 5,
                            {}, 0, client.name) for client in clients[:2]]
    return {"shapes": SHAPES, "clients": clients, "key": secrets.token_bytes(32), "number": 0, "updates": updates, "sent": sent,
            "num_rounds": 3, "client": clients[0]}


def finished(place: Path) -> dict:
    """The run folder that the page reads."""
    flora.run(SETTINGS)
    return {}


def demo(place: Path) -> dict:
    """The demo's folder, of fewer steps and blocks, and what `flora export` makes of it."""
    from flora.config import load
    from flora.exporting import export

    changes = {"max_steps": 1, "max_length": 24, "server_eval_rows": 8, "eval_rows_per_client": 2, "quiet": True, "device": "cpu"}
    export(flora.run({**load(ROOT / "flora" / "demo.yaml"), **changes}), "demo-model")
    return {}


def own_loop(place: Path) -> dict:
    return {"model": llama(), "ann_rows": token_rows(9), "bob_rows": token_rows(9, 1)}


def secure(place: Path) -> dict:
    return {"updates": updates_of([4, 2, 2, 1, 3, 2]), "shapes": SHAPES}


SETUPS = {"cohort": cohort, "compare": finished, "own-loop": own_loop, "tutorial-demo": demo, "kernels": operators,
          "merge": merges, "hierarchical": hierarchical, "fleet": devices, "peft": peft,
          "security-privacy": private, "security-sketch": secure}
