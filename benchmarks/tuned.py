"""Tunes the kernels for this card and puts its table among the results: python -m benchmarks.tuned [--minutes 8]

The same as `flora tune`, which users have. The table that comes out is shipped by copying it to flora/kernels/triton/tuned.
"""
import argparse
import shutil

from benchmarks.measure import folder
from flora.tuning import tune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float)
    written = tune(minutes=parser.parse_args().minutes)
    folder().mkdir(parents=True, exist_ok=True)
    print(shutil.copy(written, folder()))


if __name__ == "__main__":
    main()
