"""What benchmarks publish, JSON beside the table, and the memory that a call takes; flora/speed.py has the clock."""
import contextlib
import ctypes
import json
import platform
from pathlib import Path

import torch
from rich.console import Console

from flora import kernels
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


def publish(name: str, rows: list[dict], others: list[dict] | None = None, keep: bool = False) -> None:
    """Prints a table a case and writes benchmarks/results/<device>/<name>.json with the versions that it depends on, and `others`,
    rows that are not times. keep: cases that the file has and that were not measured now stay, if the versions are the same."""
    console = Console(width=132, highlight=False)
    console.print(f"{name} on {device_name()}; ms: median (quartiles); x peer: times that of the variant "
                  "marked *; x limit: times the limit")
    for case in dict.fromkeys(row["case"] for row in rows):
        show(console, case, [row for row in rows if row["case"] == case])
    folder = RESULTS / device_name()
    folder.mkdir(parents=True, exist_ok=True)
    about = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads(),
             "kernels": [choice._asdict() for choice in kernels.table()]}
    rows = rows + (others or [])
    path = folder / f"{name}.json"
    if keep and path.exists() and (old := json.loads(path.read_text()))["about"] == about:
        rows = [row for row in old["rows"] if row["case"] not in {new["case"] for new in rows}] + rows
    path.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
