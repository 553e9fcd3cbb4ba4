"""What other ways to train would send, and how labels lie over the clients: what a run's own rows do not say."""
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flora.config import RunConfig, parse
from flora.data import SOURCES, cached
from flora.data.known import ARCHITECTURES
from flora.errors import FloraError
from flora.grouping import Histograms
from flora.page.gather import Run, number

ADAPTER_BYTES = {"float32": 4, "bfloat16": 2}
BASE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Equivalents:
    """Bytes up and down of the same rounds and clients, without the first copy of the base. full: every parameter of the model;
    dense: the adapted layers at full rank; averaged: adapters of the same ranks, as many bytes down as up."""
    parameters: int
    full: float
    dense: float
    averaged: float


def config_of(run: Run) -> RunConfig:
    """The run's config, checked. Raises ConfigError."""
    return parse({**run.config, "output_dir": str(run.folder)}, str(run.folder / "config.yaml"))


def _here(config: RunConfig, folder: Path) -> RunConfig | None:
    """The config with a model that this machine can read without the network; None where there is none."""
    if (folder / "model" / "config.json").exists():
        return config.model_copy(update={"model_name_or_path": str(folder / "model"), "num_hidden_layers": None})
    name = config.model_name_or_path
    local = (name in SOURCES and cached(name)) or (Path(name).expanduser() / "config.json").exists()
    return config if local or name in ARCHITECTURES else None


def equivalents(run: Run) -> tuple[Equivalents | None, str]:
    """(the bytes, "") or (None, why they are not known)."""
    from flora.engines.plan import outline
    from flora.nn import target_shapes

    try:
        config = config_of(run)
        here = _here(config, run.folder)
        if here is None:
            return None, (f"the sizes of {config.model_name_or_path} are not known here, so what full fine-tuning would send is "
                          f"left "
                          "out; report where the model is, or keep it in the run folder (save_model)")
        model = outline(here)
        shapes = target_shapes(model, config.target_modules)
    except FloraError as error:
        return None, str(error)
    own = BASE_BYTES[config.dtype] if config.dtype != "auto" else 2 if run.environment.get("gpu") else 4
    trips = 2 * len(run.clients)                                # a client's row is one trip up and one down
    parameters = sum(p.numel() for p in model.parameters())
    ranks = sum(number(row.get("rank")) or 0.0 for row in run.clients)
    return Equivalents(parameters, float(trips * own * parameters), float(trips * own * sum(o * i for o, i in shapes.values())),
                       2.0 * ADAPTER_BYTES[config.adapter_dtype] * ranks * sum(o + i for o, i in shapes.values())), ""


def label_counts(run: Run) -> tuple[str, Histograms, str]:
    """(the labels' column, rows of every label by client, "") or ("", {}, why they are not known).

    The rows are dealt once more as the run dealt them (flora partition), from files that are on this machine, and are believed
    where every client that reported has as many as it did.
    """
    from flora.skew import label_skew

    try:
        config = config_of(run)
        if not (cached(config.dataset) if config.dataset in SOURCES else Path(config.dataset).expanduser().exists()):
            return "", {}, (f"the rows of {config.dataset} are not on this machine; bring them (flora fetch, or the file), and "
                            "report again")
        label = config.partition.label or _label_column(config)
        if label is None:
            return "", {}, "the rows have no labels: neither partition.label nor a column named label"
        found = label_skew(config, label=label)
    except FloraError as error:
        return "", {}, str(error)
    trained = {str(row.get("client")): number(row.get("num_examples")) for row in run.clients}
    moved = [name for name, count in trained.items() if name in found.rows and found.rows[name] != count]
    if moved:
        return "", {}, f"the rows of {config.dataset} are not those of the run any more: clients have other numbers of them"
    return label, found.found, ""


def _label_column(config: RunConfig) -> str | None:
    """The column label, where rows have one."""
    from flora.data import load_rows

    return "label" if any(row.get("label") is not None for row in load_rows(config.dataset, 50)) else None


def differing(configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The keys whose values are not the same in all of these flat configs."""
    keys = list(dict.fromkeys(key for config in configs.values() for key in config))
    return [key for key in keys if any(config.get(key) != next(iter(configs.values())).get(key) for config in configs.values())]
