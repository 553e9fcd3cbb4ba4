"""Rounds without a model: training is noise on what the broadcast says trains, beside a dense base in fp64."""
import torch
from oracles import bound
from tiny import adapter, dense

from flora.adapter import Adapter
from flora.client import LocalClient
from flora.cohort import starting_adapters
from flora.frames import frame
from flora.messages import Update
from flora.server import Server
from flora.strategies import strategy_named

ROWS = [{"input_ids": [1, 2], "labels": [1, 2]}]
LAYERS = {"blocks.0.q": (13, 7), "blocks.0.v": (5, 11)}           # odd, wide and tall
PAPER = [64, 32, 16, 16, 8, 8, 4, 4, 4, 4]


def updates_of(ranks, alphas=None, shapes=LAYERS, examples=None, version=0, dtype=torch.float32, shared=""):
    """One update a client, random on both sides but for the factor that is shared, as after training."""
    alphas = alphas or [2.0 * rank for rank in ranks]
    examples = examples or [3 * k + 1 for k in range(len(ranks))]
    out = []
    for k, (rank, alpha, count) in enumerate(zip(ranks, alphas, examples, strict=True)):
        adapters = {}
        for i, (name, shape) in enumerate(shapes.items()):
            a, common = adapter(rank, shape, 31 * k + i, alpha, dtype), adapter(rank, shape, 7 + i, alpha, dtype)
            adapters[name] = Adapter(common.A if "A" in shared else a.A, common.B if "B" in shared else a.B, a.scale)
        out.append(Update(adapters, count, {"tokens": 100.0 * (k + 1)}, version, f"c{k}"))
    return out


def shares(updates):
    return [u.num_examples / sum(v.num_examples for v in updates) for u in updates]


def wanted(updates, layer, p=None):
    """Σ p_k s_k B_k A_k in fp64."""
    return sum(pk * dense(u.adapters[layer]) for u, pk in zip(updates, p or shares(updates), strict=True) if layer in u.adapters)


def plain(updates, layer, p=None):
    """The same as one writes it in plain PyTorch, in the factors' dtype."""
    return sum(pk * float(a.scale[0]) * (a.B @ a.A) for u, pk in zip(updates, p or shares(updates), strict=True)
               if (a := u.adapters.get(layer)) is not None)


def within(actual, compared, exact):
    """The error rule of the design, for a dense fp64 actual."""
    return float((actual - exact).norm()) <= bound(compared, exact, compared.dtype)


def error(actual, exact):
    return float((actual.double() - exact.double()).norm() / exact.double().norm())


class Rounds:
    """A run of one strategy: `round()` trains everybody (or these), closes the round, and returns what was sent up."""

    def __init__(self, name, ranks, alphas=None, shapes=LAYERS, options=None, seed=3, absent=()):
        strategy, scale = strategy_named(name), 2.0
        self.shapes, self.seed, self.absent = shapes, seed, set(absent)
        alphas = alphas or [scale * rank for rank in ranks]
        clients = [LocalClient(f"c{k}", ROWS * (k + 1), rank, alpha)
                   for k, (rank, alpha) in enumerate(zip(ranks, alphas, strict=True))]
        self.server = Server(name, clients, strategy.begin(shapes, ranks, seed, scale), seed=seed, options=options)
        self.base = {layer: torch.zeros(shape, dtype=torch.float64) for layer, shape in shapes.items()}
        self.draw = torch.Generator().manual_seed(seed)

    def model(self):
        """The global model: base and start, dense, by layer."""
        start = self.server.broadcast.start or {}
        return {layer: w + dense(start[layer]) if layer in start else w for layer, w in self.base.items()}

    def trained(self, a, layer):
        """The adapter after some noise, as large as what is there, on what trains."""
        train = self.server.broadcast.train
        A = 0.5 * torch.randn(a.A.shape, generator=self.draw) / a.A.shape[1] ** 0.5 * ("A" in train)
        B = 0.5 * torch.randn(a.B.shape, generator=self.draw) * ("B" in train)
        if train == "core":
            A = torch.randn(a.rank, a.rank, generator=self.draw) @ frame(a.shape, a.rank, self.seed, layer)[0]
        return Adapter(a.A + A, a.B + B, a.scale)

    def round(self, only=None):
        sent, server = self.server.broadcast, self.server
        updates = []
        for client in (c for k, c in enumerate(server.clients) if only is None or k in only):
            own = {layer: shape for layer, shape in self.shapes.items() if (client.name, layer) not in self.absent}
            start = starting_adapters(client, sent.start, own, self.seed, sent.version)
            adapters = {layer: self.trained(a, layer) for layer, a in start.items()}
            updates.append(Update(adapters, len(client.rows), {}, sent.version, client.name))
        following = server.close(updates)
        for layer, a in (following.merge or {}).items():
            self.base[layer] = self.base[layer] + dense(a)
        return updates
