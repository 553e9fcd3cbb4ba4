"""What benchmarks publish, JSON beside the table, and the memory that a call takes; flora/speed.py has the clock."""
import contextlib
import ctypes
import datetime
import json
import os
from pathlib import Path

import torch
from rich.console import Console

from flora.environment import environment
from flora.speed import device_name, show

RESULTS = Path(__file__).parent / "results"


def reset_peak(device: str = "cpu") -> bool:
    """Makes this process's peak memory start from what it holds now; False where the system cannot."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        ctypes.CDLL(None).malloc_trim(0)                                # memory that was freed must not serve a call unseen
        Path("/proc/self/clear_refs").write_text("5")
        return True
    except (OSError, AttributeError):
        return False


def memory(device: str = "cpu", peak: bool = False) -> float | None:
    """Bytes that this process holds, or held at its peak, in memory or on the card; None where the system does not say.

    From /proc, not ru_maxrss, which a child process inherits from its parent and nothing resets.
    """
    if device == "cuda":
        return float(torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated())
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        field = "VmHWM:" if peak else "VmRSS:"
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024.0
    return None


def folder() -> Path:
    """Where results of this machine go: benchmarks/results/<device>, of a card in a folder of the day; or $FLORA_RESULTS."""
    if told := os.environ.get("FLORA_RESULTS"):
        return Path(told)
    own = RESULTS / device_name()
    return own / datetime.date.today().isoformat() if torch.cuda.is_available() else own


def publish(name: str, rows: list[dict]) -> None:
    """Prints a table a case and writes all rows to <name>.json in folder(), with what they depend on; no table without "ms".

    Cases that the file has and that were not measured now stay, with their commit, if all else that they depend on is the same: so
    a benchmark publishes case by case, and what it has when it is stopped is kept.
    """
    console = Console(width=132, highlight=False)
    console.print(f"{name} on {device_name()}; ms: median (quartiles); x peer: times that of the variant "
                  "marked *; x limit: times the limit")
    timed = [row for row in rows if row.get("ms") is not None]
    for case in dict.fromkeys(row["case"] for row in timed):
        show(console, case, [row for row in timed if row["case"] == case])
    path, about = folder() / f"{name}.json", environment()
    rows = [row | {"commit": about["commit"]} for row in rows]
    if path.exists() and _same((old := json.loads(path.read_text()))["about"], about):
        rows = [row for row in old["rows"] if row["case"] not in {new["case"] for new in rows}] + rows
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


def _same(one: dict, other: dict) -> bool:
    return {**one, "commit": None} == {**other, "commit": None}
