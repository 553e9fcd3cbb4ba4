"""A round taken in as its updates arrive, in the memory of one dense sum a layer, however many clients answer.

    sum += n_k B_k diag(s_k) A_k  for each update;   at the close  W += sum / Σ n_k

Weights are not normalised before the close, when Σ n is known. Updates wait until their ranks fill a chunk, so that one pass over
the sums serves many of them. The base is written at the close alone: a round that fails is discarded, and leaves it as it was.
A fixed order of updates gives the same bits; another order differs by the rounding of fp32 sums.
"""
from collections.abc import Mapping

import torch
from torch import nn

from flora import ops
from flora.adapter import Adapter, of_dense
from flora.errors import StrategyError
from flora.messages import Broadcast, Update
from flora.nn import add_dense, weights
from flora.strategies import check_update
from flora.versions import MergeConfig, bring_to, resume_at, version_of


class Stream:
    """FLoRA's aggregation of one round after another on a server that holds the model: add each update, then close.

    model: the server's base, at the version that the clients train on; shapes: (out, in) of the layers that are updated.
    weighting: "examples" or "uniform"; absent: what a client without a layer counts as, "zero" or "renormalise". max_ranks:
    ranks that wait in a layer before they are summed. rank, tol: send the round as adapters, compressed to these (the base then
    takes the same adapters, so that it stays what the clients have); neither: send the new weights. merge_config: rounding;
    run: the run that broadcasts name.
    """

    def __init__(self, model: nn.Module, shapes: Mapping[str, tuple[int, int]], *, run: str = "", weighting: str = "examples",
                 absent: str = "zero", max_ranks: int = 256, rank: int | None = None, tol: float | None = None,
                 merge_config: MergeConfig | None = None):
        if weighting not in ("examples", "uniform") or absent not in ("zero", "renormalise"):
            raise StrategyError('expected weighting "examples" or "uniform", absent "zero" or "renormalise"; got '
                                f"{weighting!r}, {absent!r}")
        if merge_config is not None and merge_config.into != "base":
            raise StrategyError("expected a merge_config that writes into the base, as a stream does at its close; got into "
                                f"{merge_config.into!r}")
        self.model, self.shapes, self.run, self.weighting, self.absent = model, dict(shapes), run, weighting, absent
        self.max_ranks, self.rank, self.tol, self.merge_config = max_ranks, rank, tol, merge_config or MergeConfig()
        self.errors: dict[str, float] = {}
        own = weights(model, list(self.shapes))
        for layer, shape in self.shapes.items():
            if tuple(own[layer].shape) != tuple(shape):
                raise StrategyError(f"{layer}: expected the shape of the model's weight, {tuple(own[layer].shape)}; got "
                                    f"{tuple(shape)}")
        self._sums = {layer: torch.zeros(w.shape, dtype=torch.float32, device=w.device) for layer, w in own.items()}
        self.discard()

    @property
    def version(self) -> int:
        """Of the base: what updates must have been trained on."""
        return version_of(self.model, self.run)

    def discard(self) -> None:
        """Forgets the round so far."""
        self._began = -1
        self._waiting: list[tuple[dict[str, Adapter], float]] = []
        self._total, self._totals, self.clients = 0.0, dict.fromkeys(self.shapes, 0.0), set()
        for total in self._sums.values():
            total.zero_()

    def add(self, update: Update) -> None:
        """Takes in one update; it may be dropped by the caller afterwards.

        Raises StrategyError, and takes in nothing of it, for another base version, a second update of a client, layers or shapes
        that are not the model's, or numbers that are not finite.
        """
        who = update.client or f"number {len(self.clients)}"
        if update.base_version != self.version:
            raise StrategyError(f"client {who}: expected an update trained on version {self.version} of the base; got version "
                                f"{update.base_version}. Leave it out of the round.")
        if who in self.clients:
            raise StrategyError(f"client {who}: expected one update a round; got a second")
        check_update(update, who, self.shapes)
        n = float(update.num_examples) if self.weighting == "examples" else 1.0
        self._began = self.version
        self._waiting.append((dict(update.adapters), n))
        self.clients.add(who)
        self._total += n
        for layer in update.adapters:
            self._totals[layer] += n
        if sum(max((a.rank for a in adapters.values()), default=0) for adapters, _ in self._waiting) >= self.max_ranks:
            self._flush()

    def _flush(self) -> None:
        """Adds what waits to the sums, every layer and client in one call."""
        layers = [layer for layer in self.shapes if any(layer in adapters for adapters, _ in self._waiting)]
        parts = [[(adapters[layer] * n).to(self._sums[layer].device) for adapters, n in self._waiting if layer in adapters]
                 for layer in layers]
        ops.merge_many_([self._sums[layer] for layer in layers],
                        *([[getattr(a, factor) for a in part] for part in parts] for factor in ("A", "B", "scale")))
        self._waiting = []

    def close(self) -> Broadcast:
        """Divides by Σ n, writes the base once, and returns what clients must follow with. The next round may begin.

        A dense broadcast holds every layer, in the base's own memory: encode it before the next close. Raises StrategyError for a
        round without updates, or a base that changed meanwhile; an error leaves the base as it was and discards the round.
        """
        if not self.clients:
            raise StrategyError("expected at least one update to aggregate; got none. Did every client of the round fail?")
        try:
            if self.version != self._began:
                raise StrategyError(f"expected the base at version {self._began}, on which the updates were trained; it is at "
                                    f"version {self.version} now: something else merged into it. The round is discarded.")
            return self._close()
        finally:
            self.discard()

    def _close(self) -> Broadcast:
        self._flush()
        layers = [layer for layer, total in self._totals.items() if total]
        for layer in layers:
            self._sums[layer] /= self._total if self.absent == "zero" else self._totals[layer]
        version = self.version + 1
        if self.rank is not None or self.tol is not None:
            merge = {}
            for layer in layers:
                merge[layer], self.errors[layer] = of_dense(self._sums[layer], self.rank, self.tol)
            broadcast = Broadcast(merge=merge, version=version, run=self.run)
            bring_to(self.model, broadcast, self.merge_config)
        else:
            how = self.merge_config
            add_dense(self.model, {layer: self._sums[layer] for layer in layers}, rounding=how.rounding, residual=how.residual,
                      seed=how.seed_of(version))
            resume_at(self.model, self.run, version, merged=True)
            broadcast = Broadcast(base=weights(self.model, list(self.shapes)), version=version, run=self.run)
        return broadcast
