"""A whole federated round of FLoRA: the clients' adapters are stacked and merged into the base, then all clients train on it.

    python -m benchmarks.bench_round [--clients 10] [--sequences 1] [--steps 3] [--rank 16 | mixed] [--allocator as-run]

flora: flora.aggregate, the merge of a new base version, Cohort.fit. PEFT: state dicts stacked by torch.cat, W += B @ A for every
weight, then the plain loop of bench_cohort: as the code of the FLoRA paper (arXiv 2409.05976) does it, without its files on disk
and its copies of the base. Rounds follow each other: what one trains the next merges. The first, not measured, merges the same
adapters in both and trains from the same ones; the losses must agree.
"""
import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

import flora
from benchmarks.clients import RATE, Case, Parties, Ticks, device, peft_trained
from benchmarks.gate import require_green
from benchmarks.measure import publish
from benchmarks.shapes import RANKS
from benchmarks.workers import WorkerError, agree, take_turns, workers
from flora.speed import rows_of
from flora.versions import bring_to

PHASES = ("aggregate", "merge", "train")


@dataclass
class Round:
    """Seconds of each phase of a round, in order, and the clients' mean losses."""
    seconds: dict[str, float] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)

    def ends(self, phase: str) -> None:
        if device() == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase], self.began = now - self.began, now


def flora_round(case: Case) -> Callable[[int, bool], Round]:
    base = case.base()
    parties = Parties(case, base)
    updates = [flora.Update(client.start, len(client.rows), client=client.name) for client in parties(case.clients, True)]

    def call(steps: int, fixed: bool) -> Round:
        nonlocal updates
        clients, timed, ticks = parties(case.clients, fixed), Round(), Ticks()
        broadcast = replace(flora.aggregate(updates), run="bench")
        timed.ends("aggregate")
        bring_to(base, broadcast)
        timed.ends("merge")
        cohort = flora.Cohort(base, clients, case.config(steps), max_tokens_per_batch=case.tokens_per_pass or "auto")
        updates = cohort.fit(broadcast, on_step=ticks)
        timed.ends("train")
        timed.losses = ticks.mean_losses()
        return timed
    return call


State = dict[str, Tensor]


def stacked(states: Sequence[State], clients: Sequence[flora.LocalClient]) -> State:
    """The clients' state dicts as one: A's under each other, weighted by examples and alpha / r, B's side by side."""
    total = sum(len(client.rows) for client in clients)
    factors = [len(client.rows) / total * client.alpha / client.rank for client in clients]
    return {name: torch.cat([state[name] * factor for state, factor in zip(states, factors, strict=True)]) if ".lora_A." in name
            else torch.cat([state[name] for state in states], dim=1) for name in states[0]}


def merge_densely(base: nn.Module, state: State) -> None:
    """W += B A, with ΔW formed whole."""
    for name, A in state.items():
        if ".lora_A." in name:
            weight = base.get_submodule(name.removeprefix("base_model.model.").partition(".lora_A.")[0]).weight
            B = state[name.replace(".lora_A.", ".lora_B.")]
            weight.data += (B.to(weight.device) @ A.to(weight.device)).to(weight.dtype)


def peft_round(case: Case, upcast: bool = True) -> Callable[[int, bool], Round]:
    import peft  # noqa: F401  where it is missing, the benchmark says so and leaves this out
    base = case.base()
    parties = Parties(case, base)
    states = [{f"base_model.model.{name}.lora_{factor}.weight": getattr(adapter, factor) for name, adapter in client.start.items()
               for factor in "AB"} for client in parties(case.clients, True)]

    def call(steps: int, fixed: bool) -> Round:
        nonlocal states
        clients, timed, ticks = parties(case.clients, fixed), Round(), Ticks()
        stack = stacked(states, clients)
        timed.ends("aggregate")
        merge_densely(base, stack)
        timed.ends("merge")
        states = list(peft_trained(base, clients, case.config(steps), ticks, upcast))
        timed.ends("train")
        timed.losses = ticks.mean_losses()
        return timed
    return call


def peft_round_all_bf16(case: Case) -> Callable[[int, bool], Round]:
    return peft_round(case, upcast=False)


VARIANTS = {"PEFT loop": peft_round, "PEFT loop, all bf16": peft_round_all_bf16, "flora": flora_round}


def variants_of(case: Case) -> dict[str, Callable]:
    """Adapters of a 16-bit base are fp32 by PEFT's default, and bf16 where one says so."""
    return {name: way for name, way in VARIANTS.items() if case.dtype == "bfloat16" or way is not peft_round_all_bf16}


def measure(case: Case, steps: int, repeats: int, allocator: str) -> list[dict]:
    """The rows of a case, in times of a whole round and of its phases. Raises WorkerError where a variant fails on the way."""
    def raised(name: str) -> bool:
        return allocator == "raised" or (allocator == "as-run" and VARIANTS[name] is flora_round)

    with workers(variants_of(case), case, raised) as found:
        agree({name: worker(1, True).losses for name, worker in found.items()}, case)
        for worker in found.values():
            worker.reset_peak()
        seconds = take_turns(found, repeats, steps, False)
        title = f"a round of {case}, {steps} step{'s' * (steps > 1)}, allocator {allocator}"
        rows = rows_of(title, seconds, next(iter(seconds)))
        for row in rows:
            worker = found[row["variant"]]
            phases = {p: statistics.median(timed.seconds[p] for timed in worker.answers[-repeats:]) for p in PHASES}
            row |= case.facts()
            row |= {"steps": steps, "allocator": "raised" if raised(row["variant"]) else "default",
                    "tokens_per_second": case.tokens * steps / row["ms"] * 1e3}
            row |= {f"{phase}_ms": value * 1e3 for phase, value in phases.items()}
            row |= zip(("peak_mb", "extra_mb"), worker.close() or (None, None), strict=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", nargs="+", type=int, default=[10])
    parser.add_argument("--sequences", nargs="+", type=int, default=[1], help="of each client, in its batch")
    parser.add_argument("--allocator", nargs="+", choices=["raised", "default", "as-run"], default=["raised"])
    parser.add_argument("--rank", default="16", help='a number, or "mixed": the ranks of the FLoRA paper in turn')
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=3, help="of each client, in a round")
    parser.add_argument("--repeats", type=int, default=3, help="rounds that are measured")
    parser.add_argument("--tokens-per-pass", type=int, help="of flora's (default: its own choice)")
    options = parser.parse_args()
    require_green("tests/test_cohort_batch.py", "tests/test_merge_many.py", "tests/test_versions.py")
    ranks = tuple(RANKS) if options.rank == "mixed" else (int(options.rank),)
    blank = Case(1, 1, options.length, ranks, options.dtype, options.model, options.tokens_per_pass)
    tokens = sum(options.sequences) * sum(options.clients) * options.length
    tokens *= len(variants_of(blank)) * len(options.allocator) * (1 + options.steps * options.repeats)
    if device() == "cpu":
        print(f"{tokens} tokens: about {tokens / RATE / 60:.0f} minutes at {RATE} tokens/s", flush=True)
    for allocator in options.allocator:
        for sequences in options.sequences:
            for count in options.clients:
                case = replace(blank, clients=count, sequences=sequences)
                try:
                    publish("round", measure(case, options.steps, options.repeats, allocator))
                except WorkerError as error:
                    print(f"{case} is left out: {error}", flush=True)


if __name__ == "__main__":
    main()
