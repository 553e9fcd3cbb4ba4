"""Tunes the kernels for this card and puts its table among the results: python -m benchmarks.tuned [--minutes 8]

The same as `flora tune`, which users have. The table that comes out is shipped by copying it to flora/kernels/triton/tuned.
"""
import argparse
import shutil
import signal
import sys

from benchmarks.measure import folder
from flora.kernels.triton.rule import own_tables
from flora.tuning import tune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float)
    minutes = parser.parse_args().minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; what was measured is kept"))
    try:
        tune(minutes=minutes)
    finally:                                                            # every shape's result is in the file at once
        folder().mkdir(parents=True, exist_ok=True)
        for table in own_tables().glob("*.json"):
            print(shutil.copy(table, folder()))


if __name__ == "__main__":
    main()
