"""A PEFT model's forward and backward pass, by PEFT's layers and by flora's in their place (accelerate), in one process.

    python -m benchmarks.bench_peft [--tokens 2048] [--rank 16] [--dropout 0 0.1] [--bases fp32 bf16] [--allocator default]

LoRA on all linears of SmolLM2-135M, sequences of 128 tokens with labels on their last third. The two take turns on one model, whose
layers change their class in between. "bf16 factors" is PEFT with autocast_adapter_dtype=False; without it PEFT computes the LoRA
path of a bf16 base in fp32. Before a case is measured both must come to one loss.
"""
import argparse

import torch
from torch import nn

from benchmarks.clients import Case, device
from benchmarks.gate import require_green
from benchmarks.measure import publish
from flora.speed import interleaved, rows_of

PEER, OURS = "PEFT", "PEFT, accelerated"
BASES = {"fp32": ("float32", True), "bf16": ("bfloat16", True), "bf16, bf16 factors": ("bfloat16", False)}
LENGTH = 128


def peft_model(case: Case, upcast: bool, dropout: float) -> nn.Module:
    """The base with one adapter whose B is not zero, in training mode."""
    import peft
    config = peft.LoraConfig(r=case.ranks[0], lora_alpha=2 * case.ranks[0], target_modules="all-linear", task_type="CAUSAL_LM",
                             lora_dropout=dropout)
    model = peft.get_peft_model(case.base(), config, autocast_adapter_dtype=upcast).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=1e-2)
    return model


def measure(case: Case, name: str, dropout: float, repeats: int) -> list[dict]:
    """The rows of one case. Leaves with a message where the two losses differ."""
    from flora.integrations.peft import accelerate, restore
    model = peft_model(case, BASES[name][1], dropout)
    batch = {key: torch.tensor([row[key] for row in case.parties[0].rows], device=device()) for key in ("input_ids", "labels")}

    def step(switch) -> float:
        switch(model)
        torch.manual_seed(0)
        loss = model(**batch).loss
        loss.backward()
        model.zero_grad()
        return loss.detach()

    first, second = float(step(restore)), float(step(accelerate))
    if abs(first - second) > (1e-4 if case.dtype == "float32" else 1e-2) * first:
        raise SystemExit(f"PEFT's loss is {first}, accelerated it is {second}; nothing is measured")
    seconds = interleaved({PEER: lambda: step(restore), OURS: lambda: step(accelerate)}, repeats, 1)
    title = f"SmolLM2-135M, {case.tokens} tokens, rank {case.ranks[0]}, {name}, dropout {dropout:g}, forward + backward"
    return [row | case.facts() | {"dropout": dropout, "tokens_per_second": case.tokens / row["ms"] * 1e3}
            for row in rows_of(title, seconds, PEER)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.0, 0.1])
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--allocator", choices=["default", "raised"], default="raised", help="of the process, so of both alike")
    options = parser.parse_args()
    require_green("tests/test_peft_accelerate.py")
    if options.allocator == "raised" and device() == "cpu":
        from flora import _host
        _host.tune_allocator()
    for name in options.bases:
        case = Case(1, max(1, options.tokens // LENGTH), LENGTH, (options.rank,), BASES[name][0])
        for dropout in options.dropout:
            publish("peft" if options.allocator == "raised" else "peft_default_allocator",
                    measure(case, name, dropout, options.repeats))


if __name__ == "__main__":
    main()
