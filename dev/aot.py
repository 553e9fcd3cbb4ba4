"""Compiles every Triton kernel and shipped configuration for sm_80 and sm_90, without a GPU: a table, and aot.json. For sm_86 and
sm_89, which give a block less shared memory, what they get instead of the blocks that are too large for them.

Fails on spilled registers, on shared memory over what a configuration says or a card gives, and on a 16-bit matrix kernel with a
row tile of 64 or more that has no wgmma on sm_90.
"""
import json
import os
import sys
from pathlib import Path

from rich.console import Console

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "aot.json"
COLUMNS = ("kernel", "arch", "registers", "spilled_bytes", "shared_bytes", "wgmma", "config")


def main() -> int:
    os.environ.pop("TRITON_INTERPRET", None)                    # interpreted kernels cannot be compiled
    try:
        from flora.kernels.triton import aot
    except ImportError as error:
        sys.exit(f"expected Triton, to compile its kernels; got: {error}. Install it: pip install 'triton>=3.6'")
    console = Console(width=132, highlight=False)
    total, results, failed = len(list(aot.cases())), [], 0
    console.print(f"{'kernel':13}{'arch':7}{'registers':>10}{'spilled':>9}{'shared':>9}{'wgmma':>7}  config")
    for case, result in aot.compile_all():
        results.append(result)
        wrong = aot.faults(case, result)
        failed += bool(wrong)
        name, arch, registers, spilled, shared, wgmma, config = (result[column] for column in COLUMNS)
        console.print(f"{name:13}{arch:7}{registers:10}{spilled:9}{shared:9}{wgmma:7}  {config}"
                      + (f"  FAULT: {'; '.join(wrong)}" if wrong else ""))
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text("[\n" + ",\n".join(json.dumps(result) for result in results) + "\n]\n")
    console.print(f"{len(results)} of {total} compiled, {failed} with a fault; written to {RESULTS}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
