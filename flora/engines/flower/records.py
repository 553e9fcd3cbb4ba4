"""What Flower's records hold of a run: its settings, and flora's bytes as one Array."""
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

import yaml

from flora.config import RunConfig, parse
from flora.engines.remote import Came
from flora.errors import ConfigError, MessageError, needs

with needs("flwr", "flower"):
    from flwr.app import Array, ArrayRecord, Message, RecordDict

PREFIX = "flower."                                              # keys of an app that are no keys of a run


@dataclass(frozen=True)
class FlowerConfig:
    """What Flower adds to a run; keys of [tool.flwr.app.config.flower]."""
    resume: bool = False
    """Go on after the last whole round of the run in output_dir."""
    server_model: bool = False
    """The server has data and model: it evaluates the global model and writes the merged one."""
    round_timeout: float = 3600.0
    """Seconds after which a round goes on without who has not answered."""
    wait_seconds: float = 120.0
    """Seconds that the server waits for num_clients nodes before the first round."""


def settings(values: Mapping[str, Any]) -> tuple[RunConfig, FlowerConfig]:
    """A run config of Flower, which knows neither lists nor None, as flora's: "64,16,4" is a list where a key takes one, and
    partition.by a key in a section. Raises ConfigError."""
    hints, own = get_type_hints(RunConfig), get_type_hints(FlowerConfig)
    run: dict[str, Any] = {}
    flower: dict[str, Any] = {}
    for key, value in values.items():
        if key.startswith(PREFIX):
            name = key.removeprefix(PREFIX)
            if name not in own or not isinstance(value, (bool,) if own[name] is bool else (int, float)):
                raise ConfigError(f"{key}: expected one of {', '.join(PREFIX + n for n in own)}, true or false or a number of "
                                  f"seconds; got {value!r}")
            flower[name] = own[name](value)
            continue
        section, _, name = key.rpartition(".")
        if isinstance(value, str) and "list" in str(hints.get(key)) and "," in value:
            value = yaml.safe_load(f"[{value}]")
        (run.setdefault(section, {}) if section else run)[name] = value
    return parse(run, "the app's config"), FlowerConfig(**flower)


def to_arrays(data: bytes) -> ArrayRecord:
    """A message of flora as one Array."""
    return ArrayRecord({"flora": Array("uint8", (len(data),), "safetensors", data)})


def from_arrays(content: RecordDict) -> bytes:
    """The bytes of a message of flora. Raises MessageError for whatever else came."""
    arrays = content.array_records.get("arrays")
    array = arrays.get("flora") if arrays is not None else None
    if array is None or len(arrays) != 1 or (array.dtype, array.stype) != ("uint8", "safetensors"):
        got = "none" if arrays is None else ", ".join(f"{name} of {a.dtype}, {a.stype}" for name, a in arrays.items())
        raise MessageError(f"expected one array flora of uint8, safetensors; got {got[:200] or 'none'}. The message is refused.")
    if tuple(array.shape) != (len(array.data),):
        raise MessageError(f"expected an array of {len(array.data)} bytes; got the shape {array.shape}. The message is refused.")
    return array.data


def came_of(reply: Message) -> Came:
    """What a reply says. Raises MessageError."""
    if reply.has_error():
        raise MessageError(f"its node failed: {reply.error.reason}")
    told = reply.content.config_records.get("flora", {})
    if "error" in told:
        raise MessageError(str(told["error"])[:1000])
    have = told.get("have")
    if type(have) is not int:
        raise MessageError(f"expected the version of its base; got {str(have)[:200]}. The message is refused.")
    numbers = {name: float(value) for name, value in reply.content.metric_records.get("metrics", {}).items()
               if isinstance(value, (int, float))}
    return Came(have, None if told.get("behind") is True else from_arrays(reply.content), numbers)
