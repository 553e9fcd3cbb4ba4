"""What a run says before its first round and after its last one."""
from collections.abc import Sequence
from pathlib import Path

from flora.client import LocalClient
from flora.config import RunConfig
from flora.engines.plan import Shapes, bytes_of_a_round
from flora.group import Group, leaves

MOST_NUMBERS = 3e7                                              # of adapters that may be made to count their bytes: half a second
AT_HOME = "the clients' models stay theirs (rounds/); the untouched base"


def opening(config: RunConfig, shapes: Shapes, parties: Sequence[LocalClient | Group], where: str) -> str:
    """What is about to run, in one line. where: the device."""
    clients = leaves(parties)
    ranks = sorted((client.rank for client in clients), reverse=True)
    rank = f"rank {ranks[0]}" if ranks[0] == ranks[-1] else f"ranks {ranks[0]} to {ranks[-1]}"
    words = [f"{config.model_name_or_path} on {where}", f"{len(clients)} client{'s' * (len(clients) != 1)} of {rank}",
             f"strategy {config.strategy}", f"{config.num_rounds} round{'s' * (config.num_rounds != 1)}"]
    if sum(ranks) * sum(map(sum, set(shapes.values()))) <= MOST_NUMBERS:
        words.append(f"about {bytes_of_a_round(config, shapes, parties) / 1e6:,.1f} MB up and down in the first")
    return ", ".join(words)


def closing(folder: Path, saved: Path | None, home: bool) -> list[str]:
    """Where everything is, and what may come next. saved: the model or adapter that was written; home: the strategy's clients
    keep models of their own."""
    if saved is None:
        what = "no model was saved (save_model)"
    else:
        result = "the merged model" if saved.name == "model" else "the sum of all updates, an adapter for the untouched base,"
        what = f"{AT_HOME if home else result} is in {saved}"
    lines = [f"{what}, every row in {folder / 'metrics.jsonl'}"]
    if (folder / "tensorboard").exists():
        lines.append(f"curves: tensorboard --logdir {folder / 'tensorboard'}")
    if (folder / "profile" / "trace.json.gz").exists():
        lines.append(f"profile: {folder / 'profile' / 'trace.json.gz'} (chrome://tracing or perfetto), its operators in "
                     f"{folder / 'profile' / 'top.txt'}")
    verbs = [f"flora {verb} {folder}" for verb in ("report", "verify")]
    if saved is not None:
        verbs = [f"flora chat {folder}", *verbs, f"flora export {folder} --out DIR"]
    return [*lines, "next: " + "   ".join(verbs)]
