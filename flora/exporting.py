"""`flora export RUN --out DIR`: the result of a run, and nothing else of it, with a README that says what it is and what is in it.

A run folder is the server's: clients' adapters, rows by client, checkpoints, a key. What leaves it is the model, or one adapter in
the form that PEFT, vLLM, SGLang and llama.cpp read alike, beside a model card that has counts and means but no client's name.
"""
import shutil
from pathlib import Path

from flora.card import Exported, card, public_name
from flora.checkpoint import state_of
from flora.config import load, parse
from flora.errors import RunError
from flora.files import safe_name, staged, write_text
from flora.formats import load_peft, save_portable
from flora.report import client_named, read_metrics


def export(run: str | Path, out: str | Path, client: str | None = None) -> Path:
    """Writes the global model (or one client's last adapter) of a finished run, and its README.md, into a new folder.

    client: its name, or the beginning of it. Raises RunError for a folder that is no finished run, a client whose adapter was not
    kept, or an out that exists.
    """
    folder, target = Path(run).expanduser(), Path(out).expanduser()
    state = state_of(folder)
    if state.get("state") != "finished":
        raise RunError(f"expected a finished run at {folder}; got {state.get('state', 'no run')}. Go on with it: flora resume "
                       f"{folder}")
    if target.exists():
        raise RunError(f"expected a new folder to export to; {target} exists. Choose another --out.")
    config = parse({**load(folder / "config.yaml"), "output_dir": str(folder)}, str(folder / "config.yaml"))
    client = client_named(folder, client) if client is not None else None
    source = result_of(folder, client)
    with staged(target) as made:
        if source.name == "model":
            shutil.copytree(source, made, dirs_exist_ok=True)
        else:
            save_portable(load_peft(source), made, public_name(config.model_name_or_path))
        write_text(made / "README.md", card(config, Exported(read_metrics(folder), state["rounds_done"], client, made)))
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
