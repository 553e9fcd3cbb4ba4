"""What a job of NVFlare holds of a run: its settings, and flora's bytes as one array of a model."""
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from flora.config import RunConfig, load, parse
from flora.engines.remote import Came
from flora.errors import ConfigError, MessageError, needs

with needs("nvflare", "nvflare"):
    from nvflare.app_common.abstract.fl_model import FLModel

KEY = "flora"                                                   # of the array in a model's params, and of what its meta says
SECTION = "nvflare"


@dataclass(frozen=True)
class NVFlareConfig:
    """What NVFlare adds to a run: keys of the section `nvflare` of its config."""
    sites: tuple[str, ...] = ()
    """The site of each client, in the run's order; site-1, site-2, ... where left out."""
    min_sites: int = 0
    """Sites that must be connected before the job begins; 0: all."""
    resume: bool = False
    """Go on after the last whole round of the run in output_dir."""
    server_model: bool = False
    """The server has data and model: it evaluates the global model and writes the merged one."""
    round_timeout: int = 3600
    """Seconds after which a round goes on without who has not answered; 0: it waits for all."""


def settings(job: str | Path | Mapping[str, Any]) -> tuple[RunConfig, NVFlareConfig]:
    """The run of a job, and what NVFlare adds. job: keys and values of a run, with a section `nvflare`, or a YAML file of them.

    Raises ConfigError for what is unknown, or does not go together.
    """
    where = "the job" if isinstance(job, Mapping) else str(job)
    values = dict(job) if isinstance(job, Mapping) else load(job)
    given = values.pop(SECTION, None) or {}
    kinds: dict[str, Any] = {"sites": (list, tuple), "min_sites": int, "resume": bool, "server_model": bool, "round_timeout": int}
    for name, value in given.items() if isinstance(given, Mapping) else [(SECTION, given)]:
        number = kinds.get(name) is int                         # of which a bool is one
        if not isinstance(value, kinds.get(name, ())) or (number and (isinstance(value, bool) or value < 0)):
            raise ConfigError(f"{where}: {SECTION}.{name}: expected one of {', '.join(kinds)}: names, whole numbers, or true "
                              f"or false; got {value!r}")
    config = parse(values, where)
    sites = tuple(given.get("sites") or (f"site-{k + 1}" for k in range(config.num_clients)))
    if len(sites) != config.num_clients or len(set(sites)) != len(sites) or not all(isinstance(s, str) and s for s in sites):
        raise ConfigError(f"{where}: {SECTION}.sites: expected {config.num_clients} names, one a client, none twice; got "
                          f"{', '.join(map(str, sites))}. Leave it out, or change num_clients.")
    return config, NVFlareConfig(**{**given, "sites": sites})


def as_job(config: RunConfig, own: NVFlareConfig) -> dict[str, Any]:
    """The keys and values that `settings` makes these of: plain JSON."""
    return {**config.model_dump(mode="json", exclude_defaults=True),
            SECTION: {f.name: getattr(own, f.name) for f in fields(own)} | {"sites": list(own.sites)}}


def to_model(data: bytes, told: Mapping[str, Any]) -> FLModel:
    """A message of flora as a model of NVFlare. told: what the meta says of it."""
    return FLModel(params={KEY: np.frombuffer(data, np.uint8)}, meta={KEY: dict(told)})


def told_of(model: FLModel) -> Mapping[str, Any]:
    """What the meta of a model says of its message."""
    told = (model.meta or {}).get(KEY)
    return told if isinstance(told, Mapping) else {}


def from_model(model: FLModel) -> bytes:
    """The bytes of a message of flora. Raises MessageError for whatever else came."""
    params = model.params
    array = params.get(KEY) if isinstance(params, Mapping) and len(params) == 1 else None
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.ndim != 1:
        names = f"{len(params)} arrays" if isinstance(params, Mapping) and len(params) != 1 else type(array).__name__
        got = f"one of {array.dtype}, shape {array.shape}" if isinstance(array, np.ndarray) else names
        raise MessageError(f"expected one array {KEY} of uint8 with one dimension; got {got}. The message is refused.")
    return array.tobytes()


def came_of(model: FLModel) -> Came:
    """What an answer says. Raises MessageError."""
    told = told_of(model)
    if "error" in told:
        raise MessageError(str(told["error"])[:1000])
    have, metrics = told.get("have"), told.get("metrics")
    if type(have) is not int:
        raise MessageError(f"expected the version of its base; got {str(have)[:200]}. The message is refused.")
    numbers = {str(name): float(value) for name, value in (metrics if isinstance(metrics, Mapping) else {}).items()
               if isinstance(value, (int, float))}
    return Came(have, None if told.get("behind") is True else from_model(model), numbers)
