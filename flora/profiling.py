"""A trace of some passes of a round (the key `profile`): trace.json.gz for chrome://tracing or perfetto, and top.txt."""
import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from flora.files import staged

if TYPE_CHECKING:
    from torch import nn

PASSES = 4                                                      # 13 MB of JSON each, for a model of 30 layers
ROWS = 25                                                       # of top.txt


@contextlib.contextmanager
def traced(wanted: bool, model: "nn.Module", folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Traces the first PASSES forward passes of what the block does, and what goes with them (backward, optimizer, data); not
    more, as a trace grows with every call. It changes no number. say: told where the disk takes no profile."""
    if not wanted:
        yield
        return
    import torch
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "6")              # it writes into the display else
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    tracer, seen = profile(activities=activities), []

    def count(*_: object) -> None:
        seen.append(1)
        if len(seen) == PASSES + 1:
            tracer.stop()

    hook = getattr(model, "base_model", model).register_forward_pre_hook(count)         # losses may pass the head by
    tracer.start()
    try:
        yield
    finally:
        hook.remove()
        if len(seen) <= PASSES:
            tracer.stop()
    first = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    try:
        with staged(folder) as stage:
            tracer.export_chrome_trace(str(stage / "trace.json.gz"))
            (stage / "top.txt").write_text(tracer.key_averages().table(sort_by=first, row_limit=ROWS) + "\n", encoding="utf-8")
    except OSError as error:
        say(f"no profile in {folder}: {error}")
