"""What a group's depth saves: seconds of the backward pass when only the blocks nearest the output train.

    python -m benchmarks.bench_depth [--depths 30 20 10 5 1] [--clients 10] [--length 128]

Groups of one inner round, one step of all clients in a pass, SmolLM2-135M, rank 16; depths take turns. x limit: times the share of
the blocks that train. The loss and its gradient on the head are of the forward pass (losses.py), at every depth.
"""
import argparse
import statistics

import flora
from benchmarks.clients import Case
from benchmarks.gate import require_green
from benchmarks.measure import publish
from flora.speed import rows_of
from flora.targets import blocks_of


def measure(case: Case, depths: list[int], repeats: int) -> list[dict]:
    """The rows of one case; the first depth is what the others are compared with."""
    model, seconds = case.base(), {}
    for number in range(repeats + 1):                           # the first warms up
        for depth in depths:
            group = flora.Group("all", case.parties, depth=depth)
            cohort = flora.GroupCohort(model, [group], case.config(1), max_tokens_per_batch=case.tokens)
            cohort.fit(flora.Broadcast())
            if number:
                seconds.setdefault(f"depth {depth}", []).append(cohort.seconds["backward"])
    every = len(blocks_of(cohort.shapes))
    rows = rows_of(f"backward, {case}", seconds, f"depth {depths[0]}")
    for row, depth in zip(rows, depths, strict=True):
        whole = statistics.median(seconds[f"depth {depths[0]}"]) * every / depths[0]
        row.update(case.facts(), depth=depth, blocks=every, times_limit=row["ms"] / 1e3 / (whole * depth / every))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[30, 20, 10, 5, 1])
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    require_green("tests/test_group.py")
    publish("depth", measure(Case(options.clients, 1, options.length), options.depths, options.repeats))


if __name__ == "__main__":
    main()
