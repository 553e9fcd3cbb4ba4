"""What came of a run, or any model or PEFT folder, as one model in memory and views on it.

A view is a set of adapters through which the model is seen. Of a finished run the weights in memory are the trained ones, so
"global" is the model as it is, and a client's own model, which was made on the weights of its last round, is the client's adapters
less what the server has added since. The base that training began with differs from the trained weights by more ranks than are
worth keeping: its weights are mapped from its files and written over the others while it is asked.
"""
import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from flora.adapter import Adapters
from flora.checkpoint import state_of
from flora.config import RunConfig, load, parse
from flora.data import SOURCES, load_model, load_tokenizer
from flora.engines.prepare import device_and_dtype
from flora.errors import ConfigError, RunError
from flora.evaluate import eval_mode
from flora.exporting import result_of
from flora.formats import load_peft
from flora.group import concatenated
from flora.nn import applied, load_weights, target_shapes
from flora.report import client_named
from flora.shards import mapped_weights
from flora.strategies import strategy_named

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BASE, GLOBAL, ADAPTER, MODEL = "base", "global", "adapter", "model"


@dataclass
class Outcome:
    """views: by name, the adapters to see the model through (None: as it is); run: its folder, where it is one; before, now: the
    weights that training began with and those it made, mapped, where the two differ."""
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    config: RunConfig
    views: dict[str, Adapters | None]
    run: Path | None = None
    before: Mapping[str, Tensor] | None = None
    now: Mapping[str, Tensor] | None = None

    @contextlib.contextmanager
    def seen(self, name: str) -> Iterator["PreTrainedModel"]:
        """The model through this view while the block runs."""
        if name == BASE and self.before is not None:
            load_weights(self.model, self.before)
            try:
                yield self.model
            finally:
                load_weights(self.model, self.now or {})
        else:
            view = self.views[name]
            with applied(self.model, view) if view else contextlib.nullcontext(), eval_mode(self.model):
                yield self.model


def open_outcome(target: str | Path, clients: Sequence[str] = (), with_base: bool = False,
                 settings: Mapping[str, Any] | None = None) -> Outcome:
    """Loads a target once. Views, in order: "base" (if wanted, of a run or adapter), "global", "adapter" or "model", the clients.

    target: a finished run's folder; a PEFT folder, on the base that it names or model_name_or_path; a model's folder or a fetched
    name. settings: keys of a config over the run's own (device, dtype, model_name_or_path of an adapter's base). Raises RunError,
    ConfigError, DataError, AdapterError.
    """
    path, settings = Path(target).expanduser(), dict(settings or {})
    if state_of(path):
        return _of_run(path, clients, with_base, settings)
    if clients:
        raise RunError(f"expected the folder of a run, which has clients; got {target}. Leave the client out.")
    if (path / "adapter_config.json").is_file():
        return _of_adapter(path, with_base, settings)
    if not path.exists() and str(target) not in SOURCES:
        raise RunError(f"expected the folder of a run, a model or a PEFT adapter, or a fetched model's name; got {target}, which "
                       "is none. Give the output_dir of a run.")
    return Outcome(*_loaded(parse({**settings, "model_name_or_path": str(target)}), None), {MODEL: None})


def _loaded(config: RunConfig, folder: Path | None) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase", RunConfig]:
    """The model, of a folder in the place of the config's own weights, its tokenizer, and the config."""
    device, dtype = device_and_dtype(config)
    blocks = None if folder else config.num_hidden_layers
    model = load_model(folder or config.model_name_or_path, dtype, blocks).to(device).eval()
    return model, load_tokenizer(folder or config.model_name_or_path), config


def _of_adapter(path: Path, with_base: bool, settings: dict[str, Any]) -> Outcome:
    adapters = load_peft(path)
    named = json.loads((path / "adapter_config.json").read_text()).get("base_model_name_or_path")
    if not settings.setdefault("model_name_or_path", named):
        raise ConfigError(f"expected the base of the adapter in {path}, whose configuration names none. Say which: --base NAME.")
    return Outcome(*_loaded(parse(settings), None), {**({BASE: None} if with_base else {}), ADAPTER: adapters})


def _of_run(folder: Path, clients: Sequence[str], with_base: bool, settings: Mapping[str, Any]) -> Outcome:
    state = state_of(folder)
    if state["state"] != "finished":
        raise RunError(f"expected a finished run at {folder}; got {state['state']}, {state['rounds_done']} rounds. Go on with it: "
                       f"flora resume {folder}")
    if "model_name_or_path" in settings:
        raise ConfigError("expected --base with a PEFT folder alone: a run says what its base is. Leave it out.")
    kept = load(folder / "config.yaml")
    config = parse({**kept, **settings, "output_dir": str(folder)}, str(folder / "config.yaml"))
    source, at_home = result_of(folder, None), strategy_named(config.strategy).home
    if at_home and not clients:
        raise RunError(f"expected a client: with {config.strategy} every client has a model of its own, and there is no global "
                       "one. Say whose: --client NAME.")
    merged = source.name == "model"
    outcome = Outcome(*_loaded(config, source if merged else None), {}, folder)
    beside: Adapters = {} if merged else load_peft(source)
    if with_base:
        outcome.views[BASE] = None
    if with_base and merged:
        layers = list(target_shapes(outcome.model, config.target_modules))
        outcome.before = mapped_weights(config.model_name_or_path, outcome.model, layers)
        outcome.now = mapped_weights(source, outcome.model, layers)
    if not at_home:
        outcome.views[GLOBAL] = beside or None
    for name in [client_named(folder, word) for word in clients]:
        own, number = result_of(folder, name), int(result_of(folder, name).parents[1].name)
        outcome.views[name] = concatenated([part for part in (beside, load_peft(own), *_since(folder / "rounds", number)) if part])
    return outcome


def _since(rounds: Path, number: int) -> list[dict[str, Any]]:
    """What takes away from the result what the server has added since the clients of this round trained: the aggregates of this and
    later rounds, less the starts in those before the last, which the next start has replaced."""
    out = []
    later = sorted(int(path.name) for path in rounds.iterdir() if path.name.isdigit() and int(path.name) >= number)
    for n in later:
        if (rounds / str(n) / "dense.json").exists():
            raise RunError(f"cannot take round {n} back, as a client's own model needs: layers travelled as new weights "
                           "(downlink). Run with downlink: stack.")
        for what, sign in (("aggregate", -1.0), *((("start", 1.0),) if n != later[-1] else ())):
            folder = rounds / str(n) / what
            if folder.is_dir():
                out.append({layer: a * sign for layer, a in load_peft(folder).items()})
    return out
