"""What both processes of a torchrun do in test_sharded.py: bases cut by FSDP2 beside the same base whole, held against each other.
Writes what was found to FOLDER/sharded-NUMBER.json, by name: true, or what went wrong."""
import copy
import json
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from oracles import bound, gpt2
from tiny import adapter, dense, llama, near, token_rows
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

import flora
from flora.client import LocalClient, TrainConfig
from flora.cohort import Cohort
from flora.distributed import Team
from flora.errors import AdapterError, ConfigError, TargetError
from flora.messages import Broadcast

IDS = torch.arange(12).reshape(2, 6) + 2
TARGETS = {"llama": ("q_proj", "v_proj", "gate_proj", "down_proj"),         # gate_proj has 25 rows: parts of 13 and 12
           "gpt2": ("c_attn", "c_proj")}


def seeded(make):
    torch.manual_seed(0)
    return make()


MAKE = {"llama": lambda: llama(tie_word_embeddings=False, hidden_size=20, intermediate_size=25), "gpt2": lambda: seeded(gpt2)}


def sharded(model, mesh):
    blocks = model.model.layers if hasattr(model, "model") else model.transformer.h
    for block in blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def full(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def some(model, kind, seed=0, rank=3):
    return {n: adapter(rank, s, seed + i) for i, (n, s) in enumerate(flora.nn.target_shapes(model, TARGETS[kind]).items())}


def passes(model, dtype=None):
    """Logits, and the gradients of A and B by name."""
    for parameter in model.parameters():
        parameter.grad = None
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    grads = {f"{n}.{f}": full(getattr(m, f).grad) for n, m in flora.nn.lora_layers(model).items() for f in "AB"}
    return {"logits": out.logits.detach(), **grads}


def attach(model, kind, held):
    return flora.nn.load_adapters(flora.attach(model, 3, targets=TARGETS[kind]), held)


def trains(kind, when, mesh):
    """Forward and backward on shards by the error rule; the adapters read back to the bit."""
    plain, exact, model = MAKE[kind](), MAKE[kind]().double(), MAKE[kind]()
    held = some(plain, kind)
    attach(plain, kind, held)
    attach(exact, kind, held)
    if when == "before":
        model = sharded(attach(model, kind, held), mesh)
        assert all(isinstance(m.A, DTensor) for m in flora.nn.lora_layers(model).values())
    else:
        model = attach(sharded(model, mesh), kind, held)
    assert isinstance(next(iter(flora.nn.lora_layers(model).values())).weight, DTensor)
    found, want, reference = passes(model), passes(plain), passes(exact)
    assert set(found) == set(want) and len(found) > 5
    for name in found:
        assert float((found[name].double() - reference[name]).norm()) <= bound(want[name], reference[name], torch.float32), name
    other = some(plain, kind, 9)
    for these in (held, other):
        flora.nn.load_adapters(model, these)
        back = flora.adapters(model)
        assert all(torch.equal(back[n].A, a.A) and torch.equal(back[n].B, a.B) for n, a in these.items())
    second = passes(flora.nn.load_adapters(plain, other))
    assert float((passes(model)["logits"] - second["logits"]).norm()) <= 1e-5 * float(second["logits"].norm())


def merges(kind, mesh, residual=False, dtype=torch.float32):
    """flora.merge into shards, after a pass that leaves the outermost weights gathered: the whole weights are those of one
    process to the bit, and so is what the next pass computes."""
    plain = MAKE[kind]().to(dtype)
    model = sharded(copy.deepcopy(plain), mesh)
    held, more = some(plain, kind), some(plain, kind, 5, 2)
    for adapters in (held, [held, {n: a * 0.3 for n, a in more.items()}]):
        with torch.no_grad():
            model(input_ids=IDS)
        flora.merge(plain, adapters, residual=residual)
        flora.merge(model, adapters, residual=residual)
        for name in held:
            assert torch.equal(full(model.get_submodule(name).weight), plain.get_submodule(name).weight), name
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    assert bool(flora.nn.residuals(model)) == residual


def merges_outermost(mesh):
    """One wrap around everything, whose weights FSDP keeps gathered after a pass: what was written to those would be lost."""
    model = nn.Sequential(nn.Linear(6, 3, bias=False), nn.Linear(3, 5, bias=False))
    for p in model.parameters():
        dist.broadcast(p.data, 0)
    before = [m.weight.detach().clone() for m in model]
    fully_shard(model, mesh=mesh)
    model(torch.ones(1, 6))
    assert not isinstance(model[0].weight, DTensor)
    held = {"0": adapter(2, (3, 6)), "1": adapter(2, (5, 3))}
    flora.merge(model, held)
    model.reshard()                                                    # what was written to the gathered copies goes
    for name, w in zip("01", before, strict=True):
        assert float((full(model[int(name)].weight).double() - w.double() - dense(held[name])).norm()) < 1e-5
    small = nn.Sequential(nn.Linear(6, 1, bias=False))                 # the second process holds no row of it
    for p in small.parameters():
        dist.broadcast(p.data, 0)
    want = small[0].weight.detach().double() + dense(one := adapter(1, (1, 6)))
    flora.merge(fully_shard(small, mesh=mesh), {"0": one})
    assert float((full(small[0].weight).double() - want).norm()) < 1e-5


def refuses(mesh):
    """All or nothing in all processes; what cannot be done says so."""
    model = sharded(MAKE["llama"](), mesh)
    held, name = some(MAKE["llama"](), "llama"), "model.layers.1.mlp.down_proj"
    before = [p.to_local().clone() for p in model.parameters()]
    bad = held[name].B.clone()
    bad[0, 0] = float("nan")                                           # in the part of the first process
    for error, call in (
            (AdapterError, lambda: flora.merge(model, {**held, name: flora.Adapter(held[name].A, bad, held[name].scale)})),
            (TargetError, lambda: flora.merge(model, held, rounding="stochastic", seed=1)),
            (TargetError, lambda: flora.nn.weights(model, [name])),
            (TargetError, lambda: flora.nn.load_weights(model, {name: torch.zeros(20, 25)})),
            (ConfigError, lambda: Cohort(model, clients(), TrainConfig(), TARGETS["llama"])),
            (ConfigError, lambda: alone(model).fit(Broadcast()))):
        try:
            call()
        except error as found:
            assert "expected" in str(found)
        else:
            raise AssertionError(f"no {error.__name__}")
    assert all(torch.equal(a, p.to_local()) for a, p in zip(before, model.parameters(), strict=True))
    twice = nn.Sequential(nn.Linear(8, 8, bias=False))
    grid = torch.distributed.init_device_mesh("cpu", (1, 2))
    twice[0].weight = nn.Parameter(distribute_tensor(twice[0].weight.detach(), grid, [Replicate(), Replicate()]))
    flora.merge(twice, {"0": adapter(1, (8, 8))})


def alone(model):
    cohort = Cohort(model, clients(), TrainConfig(), TARGETS["llama"], 64)
    cohort.team = Team("cpu")
    return cohort


def clients():
    return [LocalClient(f"c{k}", token_rows(6, k), 2 + k, 4.0) for k in range(3)]


def cohort(mesh):
    """Two rounds of a cohort on a sharded base: every process trains all clients, and merges into its part."""
    bases = [MAKE["llama"](), sharded(MAKE["llama"](), mesh)]
    rounds = [Broadcast(), None]
    for version in range(2):
        made = []
        for model in bases:
            one = Cohort(model, clients(), TrainConfig(1e-2, max_steps=3), TARGETS["llama"], 64)
            made.append(one.fit(rounds[version]))
        assert [u.client for u in made[0]] == [u.client for u in made[1]] == ["c0", "c1", "c2"]
        assert all(near(b.adapters, a.adapters, 1e-3) for a, b in zip(*made, strict=True))
        rounds[1] = flora.aggregate(made[0])
    assert rounds[1].merge and not flora.nn.lora_layers(bases[1])
    name = "model.layers.0.self_attn.q_proj"
    assert torch.equal(full(bases[1].get_submodule(name).weight), bases[0].get_submodule(name).weight)


def main(folder):
    dist.init_process_group("gloo")
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    cases = {f"{kind}-{when}": lambda kind=kind, when=when: trains(kind, when, mesh)
             for kind in MAKE for when in ("before", "after")}
    cases |= {f"merge-{kind}": lambda kind=kind: merges(kind, mesh) for kind in MAKE}
    cases |= {"merge-residual": lambda: merges("llama", mesh, True, torch.bfloat16),
              "merge-outermost": lambda: merges_outermost(mesh), "refused": lambda: refuses(mesh), "cohort": lambda: cohort(mesh)}
    found = {}
    for name, case in cases.items():
        try:
            case()
            found[name] = True
        except Exception:
            found[name] = traceback.format_exc()
            return                                                     # the other process may be in another pass now
        finally:
            (folder / f"sharded-{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    import faulthandler

    faulthandler.dump_traceback_later(200, exit=True)                  # a hang says where
    main(Path(sys.argv[1]))
