"""The version of a model's base: a broadcast changes it once per run and version, however often and to whomever it is applied.

The version is kept on the model object, so cohorts that share a model share it too; a naive merge in a cached base would run
once for every virtual client that lives in the process.
"""
from dataclasses import dataclass
from typing import Literal

from torch import nn

from flora.adapter import Adapters
from flora.errors import ConfigError, RunError
from flora.messages import Broadcast
from flora.nn import accumulate, load_weights, merge
from flora.ops import Rounding
from flora.seeds import derive


@dataclass(frozen=True)
class MergeConfig:
    """How a broadcast's `merge` reaches the base.

    into: "base" writes into the weights; "adapter" keeps the sum of all updates as one adapter beside weights that are left alone
    (4-bit, 8-bit, shared), compressed to `rank` ranks (None: min(out, in)) or to a relative error of `tol`.
    rounding, residual: as flora.merge; seed: of the stochastic rounding, with version and layer. Raises ConfigError.
    """
    into: Literal["base", "adapter"] = "base"
    rounding: Rounding = "nearest"
    residual: bool = False
    seed: int = 0
    rank: int | None = None
    tol: float = 0.0

    def __post_init__(self) -> None:
        if self.into not in ("base", "adapter") or self.rounding not in ("nearest", "stochastic"):
            raise ConfigError('expected into "base" or "adapter", rounding "nearest" or "stochastic"; got '
                              f"{self.into!r}, {self.rounding!r}")
        if (self.rank is not None and self.rank < 1) or not 0.0 <= self.tol < 1.0:
            raise ConfigError(f"expected rank of at least 1 (or None), tol in [0, 1); got {self.rank}, {self.tol}")
        if self.into == "adapter" and (self.residual or self.rounding != "nearest"):
            raise ConfigError('expected neither residual nor stochastic rounding with into "adapter", which rounds no weight; got '
                              f"residual={self.residual}, rounding={self.rounding!r}. Leave them out.")

    def seed_of(self, version: int) -> int | None:
        """What the merge that leads to this version is rounded with; None: to nearest."""
        return derive(self.seed, version, "merge") if self.rounding == "stochastic" else None


def version_of(model: nn.Module, run: str = "") -> int:
    """The version of a model's base in a run; 0 where the run has not touched it."""
    return model.__dict__.get("_flora_versions", {}).get(run, (0, False))[0]


def bring_to(model: nn.Module, broadcast: Broadcast, how: MergeConfig | None = None) -> bool:
    """Brings the model's base to the broadcast's version: once per run and version. Returns whether anything was written.

    A broadcast with `base` replaces weights, whatever version they had; one with `merge` adds to those of version `since`.
    Raises RunError where versions between were missed, or the base is already past this one.
    """
    how = how or MergeConfig()
    versions: dict[str, tuple[int, bool]] = model.__dict__.setdefault("_flora_versions", {})
    have, changed = versions.get(broadcast.run, (0, False))
    news = broadcast.merge is not None or broadcast.base is not None
    if both := set(broadcast.merge or ()) & set(broadcast.base or ()):
        raise RunError(f"expected every layer in merge or in base, which holds what was merged; got {sorted(both)[0]} in both")
    if broadcast.version < have and (broadcast.run or news):
        raise RunError(f"the base of this model is at version {have} of run {broadcast.run!r}; got a broadcast of version "
                       f"{broadcast.version}. Give another run its own name (Broadcast.run), or a model of its own.")
    if not news and changed and broadcast.version > have + 1:
        raise RunError(f"the base of this model is at version {have} of run {broadcast.run!r}, which merges; got a broadcast of "
                       f"version {broadcast.version} without one. The merges between are missing: ask the server for them "
                       f"(Server.catch_up({have})).")
    if not news:
        versions[broadcast.run] = (max(have, broadcast.version), changed and broadcast.version <= have)
        return False
    if broadcast.version == have and changed:
        return False
    if broadcast.merge is not None:
        _merge(model, broadcast, have, how)
    if broadcast.base is not None:
        load_weights(model, broadcast.base)
        model._flora_merged = True
    versions[broadcast.run] = (broadcast.version, True)
    return True


def _merge(model: nn.Module, broadcast: Broadcast, have: int, how: MergeConfig) -> None:
    since = broadcast.version - 1 if broadcast.since is None else broadcast.since
    if have != since and not (broadcast.version == have == since + 1):
        remedy = (f"The merges between are missing: ask the server for them (Server.catch_up({have}))." if have < since
                  else "It holds merges that this base has already.")
        raise RunError(f"the base of this model is at version {have} of run {broadcast.run!r}; got a broadcast of version "
                       f"{broadcast.version}, which adds to version {since}. {remedy}")
    write_into(model, broadcast.merge, how, how.seed_of(broadcast.version))


def write_into(model: nn.Module, adapters: Adapters, how: MergeConfig, seed: int | None = None) -> None:
    """Adds adapters to the base as `how` says, whatever its version: into the weights, or beside them."""
    if how.into == "adapter":
        model._flora_merge_errors = accumulate(model, adapters, how.rank, how.tol)
    else:
        merge(model, adapters, rounding=how.rounding, residual=how.residual, seed=seed)
        model._flora_merged = True


def merge_errors(model: nn.Module) -> dict[str, float] | None:
    """Relative errors by layer of the last sum that was kept beside the base; None where nothing is."""
    return model.__dict__.get("_flora_merge_errors")


def resume_at(model: nn.Module, run: str, version: int, merged: bool, errors: dict[str, float] | None = None) -> None:
    """Says of a model that was loaded from a checkpoint which version of a run it is, and whether merges changed its base.
    errors: as merge_errors."""
    model.__dict__.setdefault("_flora_versions", {})[run] = (version, True)
    model._flora_merged = merged or model.__dict__.get("_flora_merged", False)
    model._flora_merge_errors = errors
