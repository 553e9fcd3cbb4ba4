"""Clients of a round, with the same base, data, seeds and steps: by PEFT one by one, and by flora one by one and in one batch.

    python -m benchmarks.bench_cohort [--full] [--clients 10] [--sequences 1] [--rank 16 | mixed] [--allocator as-run]

Rows have labels on their last third; LoRA is on all linears, the step is AdamW with clipping at 1.0. A call is a round of some
steps of every client, adapters made and read included; "steady" is the rate without each client's first step. Every variant lives
in a process of its own and they take turns; peak MB is that process's, extra MB what it grew by after the base was loaded. The
limit: the bare matrix products of the same tokens. Before a case is measured all must come to one loss from the same adapters.
--allocator: raised or default for all; as-run: flora's as `flora run` sets it, the peers' as they find it.
"""
import argparse
import statistics
from dataclasses import replace

from benchmarks import clients as ways
from benchmarks.clients import RATE, Case, device
from benchmarks.gate import require_green
from benchmarks.measure import publish
from benchmarks.shapes import RANKS
from benchmarks.workers import WorkerError, agree, take_turns, workers
from flora.speed import rows_of

LIMIT = "bare products"
PEERS = {"PEFT loop": ways.peft_loop, "PEFT loop, bf16 base": ways.peft_loop_bf16, "PEFT loop, all bf16": ways.peft_loop_all_bf16,
         "PEFT, HF Trainer": ways.hf_trainer}
OURS = {"flora, one by one": ways.flora_one_by_one, "flora, one batch": ways.flora_together,
        "flora, one batch, PEFT's passes": ways.flora_small_passes}
VARIANTS = {**PEERS, **OURS, LIMIT: ways.products}
EXTRA = ("PEFT loop, bf16 base", "PEFT loop, all bf16", "flora, one batch, PEFT's passes")


def variants_of(options: argparse.Namespace, case: Case) -> list[str]:
    """What to measure of a case. The quick run leaves out the bf16 base and the small passes."""
    names = options.variants or [name for name in VARIANTS if options.full or name not in EXTRA]
    if case.dtype != "float32":
        names = [name for name in names if VARIANTS[name] is not ways.peft_loop_bf16]
    return names


def plan(options: argparse.Namespace, case: Case) -> tuple[int, int]:
    """(steps, repeats) of a case: fewer where a call would train more tokens than the cap."""
    steps = max(1, min(options.steps, options.cap // case.tokens))
    return steps, options.repeats if case.tokens * steps <= options.cap else min(options.repeats, 2)


def measure(case: Case, names: list[str], steps: int, repeats: int, allocator: str) -> list[dict]:
    """The rows of a case. Raises WorkerError where a variant fails on the way."""
    def raised(name: str) -> bool:
        return allocator == "raised" or (allocator == "as-run" and name not in PEERS)

    with workers({name: VARIANTS[name] for name in names}, case, raised) as found:
        agree({name: worker(min(2, case.clients), 2, True).mean_losses() for name, worker in found.items()}, case)
        for worker in found.values():
            worker.reset_peak()
        seconds = take_turns(found, repeats, case.clients, steps, False)
        limit = statistics.median(seconds[LIMIT]) if LIMIT in seconds else None
        rows = rows_of(f"{case}, {steps} step{'s' * (steps > 1)}, allocator {allocator}", seconds, next(iter(seconds)), limit)
        for row in rows:
            worker = found[row["variant"]]
            rates = [ticks.step_seconds() for ticks in worker.answers[-repeats:]]
            row |= case.facts()
            row |= {"steps": steps, "allocator": "raised" if raised(row["variant"]) else "default",
                    "tokens_per_second": case.tokens * steps / row["ms"] * 1e3,
                    "steady_tokens_per_second": None if None in rates else case.tokens / statistics.median(rates)}
            row |= zip(("peak_mb", "extra_mb"), worker.close() or (None, None), strict=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="1, 2, 5, 10, 20 clients x 1, 4, 16 sequences, and every variant")
    parser.add_argument("--clients", nargs="+", type=int)
    parser.add_argument("--sequences", nargs="+", type=int, help="of each client, in its batch")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS)
    parser.add_argument("--allocator", choices=["raised", "default", "as-run"], default="raised")
    parser.add_argument("--rank", default="16", help='a number, or "mixed": the ranks of the FLoRA paper in turn')
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=3, help="of each client, in a call")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cap", type=int, default=8192, help="tokens of a call: above, fewer steps, then fewer repeats")
    parser.add_argument("--tokens-per-pass", type=int, help="of flora's variants (default: its own choice)")
    options = parser.parse_args()
    require_green("tests/test_cohort_batch.py")
    ranks = tuple(RANKS) if options.rank == "mixed" else (int(options.rank),)
    blank = Case(1, 1, options.length, ranks, options.dtype, options.model, options.tokens_per_pass)
    cases = [replace(blank, clients=count, sequences=sequences)
             for sequences in options.sequences or ([1, 4, 16] if options.full else [1])
             for count in options.clients or ([1, 2, 5, 10, 20] if options.full else [10])]
    tokens = sum(case.tokens * steps * repeats * len(variants_of(options, case))
                 for case in cases for steps, repeats in [plan(options, case)])
    if device() == "cpu":
        print(f"{len(cases)} cases, {tokens} tokens: about {tokens / RATE / 60:.0f} minutes at {RATE} tokens/s", flush=True)
    name = {"raised": "cohort", "default": "cohort_default_allocator", "as-run": "cohort_as_run"}[options.allocator]
    for case in cases:
        try:
            rows = measure(case, variants_of(options, case), *plan(options, case), options.allocator)
        except WorkerError as error:
            print(f"{case} is left out: {error}", flush=True)
            continue
        publish(name, rows)


if __name__ == "__main__":
    main()
