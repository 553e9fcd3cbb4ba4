"""`flora export RUN --out DIR`: the result of a run, and nothing else of it, with a README that says what it is and what is in it.

A run folder is the server's: clients' adapters, rows by client, checkpoints, a key. What leaves it is the model, or one adapter in
the form that PEFT, vLLM, SGLang and llama.cpp read alike, beside a model card that has counts and means but no client's name.
"""
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flora.checkpoint import state_of
from flora.config import RunConfig, load, parse
from flora.data import SOURCES
from flora.errors import RunError
from flora.files import safe_name, staged, write_text
from flora.formats import load_peft, save_portable
from flora.report import read_metrics
from flora.strategies import strategy_named

CARD = """---
library_name: {library}
base_model: {base}
license: {licence}
---

# {title}

Fine-tuned from {base} ({base_licence}) on {dataset} ({data_licence}) with flora: {strategy}, {paper}; {clients} clients of ranks
{ranks}, {rows:,} training rows in all, {rounds} rounds.

| held-out rows of the server | loss | next-token accuracy |
| --- | --- | --- |
{metrics}

{privacy}

## What this folder contains

{contents}

It contains no row of any client, no client's name, no single client's update but where the title says so, no optimiser state and no
key. A model can repeat what it was trained on; only differential privacy bounds that.
"""


def export(run: str | Path, out: str | Path, client: str | None = None) -> Path:
    """Writes the global model (or one client's last adapter) of a finished run, and its README.md, into a new folder.

    Raises RunError for a folder that is no finished run, a client whose adapter was not kept, or an out that exists.
    """
    folder, target = Path(run).expanduser(), Path(out).expanduser()
    state = state_of(folder)
    if state.get("state") != "finished":
        raise RunError(f"expected a finished run at {folder}; got {state.get('state', 'no run')}. Go on with it: flora resume "
                       f"{folder}")
    if target.exists():
        raise RunError(f"expected a new folder to export to; {target} exists. Choose another --out.")
    config = parse({**load(folder / "config.yaml"), "output_dir": str(folder)}, str(folder / "config.yaml"))
    source = result_of(folder, client)
    with staged(target) as made:
        if source.name == "model":
            shutil.copytree(source, made, dirs_exist_ok=True)
        else:
            save_portable(load_peft(source), made, config.model_name_or_path)
        write_text(made / "README.md", card(config, read_metrics(folder), state["rounds_done"], client, made))
    return target


def result_of(folder: Path, client: str | None) -> Path:
    """The folder in the run that holds what is exported."""
    if client is None:
        found = [folder / name for name in ("model", "adapter") if (folder / name).is_dir()]
        if not found:
            raise RunError(f"expected {folder}/model or /adapter; got neither: the run had save_model: false")
        return found[0]
    rounds = sorted((int(path.name) for path in (folder / "rounds").glob("*") if path.name.isdigit()), reverse=True)
    for number in rounds:
        path = folder / "rounds" / str(number) / "clients" / safe_name(client)
        if path.is_dir():
            return path
    raise RunError(f"expected an adapter of client {client!r} in {folder}/rounds; got none. keep_rounds says of how many rounds "
                   "they are kept.")


def card(config: RunConfig, rows: Sequence[Mapping[str, Any]], rounds: int, client: str | None, made: Path) -> str:
    """The README of an export. made: the folder, of which the files are listed."""
    rule = strategy_named(config.strategy)
    clients = {row["client"]: row["num_examples"] for row in rows if row["kind"] == "client"}
    measured = [row for row in rows if row["kind"] == "server" and "eval_loss" in row]
    adapter = (made / "adapter_config.json").exists()
    own = config.privacy
    spent = max((row["epsilon"] for row in rows if "epsilon" in row), default=0.0)
    privacy = ("No differential privacy." if own is None else
               f"Differential privacy of a {own.level}: ε = {spent:.2f} at δ = {own.delta:g} (flora's docs/security.md).")
    if own is not None and client is not None:
        privacy = "This is one client's own adapter: the run's differential privacy does not cover it."
    contents = "\n".join(f"* `{path.relative_to(made)}`, {path.stat().st_size:,} bytes" for path in sorted(made.rglob("*"))
                         if path.is_file())
    return CARD.format(
        library="peft" if adapter else "transformers", base=config.model_name_or_path, licence=_licence(config.model_name_or_path),
        title="One client's adapter" if client is not None else "A LoRA adapter" if adapter else "A merged model",
        base_licence=_licence(config.model_name_or_path), dataset=config.dataset,
        data_licence=_licence(config.dataset),
        strategy=rule.name, paper=rule.paper, clients=config.num_clients,
        ranks=", ".join(map(str, sorted(set(config.ranks()), reverse=True))), rows=sum(clients.values()),
        rounds=rounds, metrics="\n".join(_metrics(measured)), privacy=privacy,
        contents=contents + "\n* `README.md`, this file")


def _metrics(measured: Sequence[Mapping[str, Any]]) -> list[str]:
    """The first and the last evaluation as rows of a table."""
    shown = [measured[0], measured[-1]] if len(measured) > 1 else measured
    return [f"| {'before' if row['rounds_done'] == 0 else 'after'} | {row['eval_loss']:.4f} | {row['eval_accuracy']:.1%} |"
            for row in shown]


def _licence(name: str) -> str:
    return SOURCES[name].licence if name in SOURCES else "unknown"
