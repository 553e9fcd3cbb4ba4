"""Clients of a round: trained in one batch by flora, one by one by flora, and one by one in a plain loop around PEFT.

    python -m benchmarks.bench_cohort [--clients 1 2 5 10 20] [--sequences 1 4 16] [--steps 3] [--allocator raised]

The same base (SmolLM2-135M, loaded once), rows of 128 tokens with labels on the last third, rank 16 on all linears, AdamW, fp32. A
call trains every client for some steps. PEFT's adapters are made beforehand; flora's calls make theirs. The limit: the bare matrix
products of the same tokens, forward and for dx, without anything else.
"""
import argparse
import random
from collections.abc import Callable

import torch
from torch import nn

import flora
from benchmarks.gate import require_green
from benchmarks.measure import interleaved, publish, rows_of
from flora.data import load_model

LENGTH, RANK = 128, 16


def rows(count: int, seed: int) -> list[dict]:
    """Rows of random tokens, a third of them labelled."""
    draw = random.Random(seed)
    out = []
    for _ in range(count):
        ids = [draw.randrange(1000, 40_000) for _ in range(LENGTH)]
        prompt = LENGTH - LENGTH // 3
        out.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return out


def flora_calls(model: nn.Module, clients: list[flora.LocalClient], config: flora.TrainConfig) -> dict[str, Callable[[], object]]:
    def together() -> None:
        flora.Cohort(model, clients, config).fit(flora.Broadcast())

    def one_by_one() -> None:
        for client in clients:
            flora.Cohort(model, [client], config).fit(flora.Broadcast())

    return {"flora, one batch": together, "flora, one by one": one_by_one}


def peft_loop(base: nn.Module, clients: list[flora.LocalClient], config: flora.TrainConfig) -> Callable[[], object] | None:
    """A plain loop: every client's adapter in turn on the shared base, transformers' own loss."""
    try:
        import peft
    except ImportError:
        return None
    model = None
    for client in clients:
        options = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        if model is None:
            model = peft.get_peft_model(base, options, client.name)
        else:
            model.add_adapter(client.name, options)

    def call() -> None:
        for client in clients:
            model.set_adapter(client.name)
            parameters = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(parameters, config.learning_rate, weight_decay=config.weight_decay)
            batch = {name: torch.tensor([row[name] for row in client.rows]) for name in ("input_ids", "labels")}
            model.train()
            for _ in range(config.max_steps):
                model(**batch).loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
    return call


def products(model: nn.Module, tokens: int, labelled: int) -> Callable[[], object]:
    """The matrix products that no training can do without: y and dx of every linear, and of the head where there are labels."""
    head = model.get_output_embeddings()
    weights = [(m.weight.detach(), tokens) for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    weights.append((head.weight.detach(), labelled))
    inputs = {(n, w.shape[1]): torch.randn(n, w.shape[1]) for w, n in weights}

    def call() -> None:
        for weight, n in weights:
            y = inputs[n, weight.shape[1]] @ weight.T
            y @ weight
    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 2, 5, 10, 20])
    parser.add_argument("--sequences", nargs="+", type=int, default=[1, 4], help="of each client, in its batch")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--allocator", choices=["default", "raised"], default="raised")
    options = parser.parse_args()
    require_green("tests/test_cohort_batch.py")
    if options.allocator == "raised" and not torch.cuda.is_available():
        from flora import _host
        _host.tune_allocator()
    out = []
    for sequences in options.sequences:
        for count in options.clients:
            clients = [flora.LocalClient(f"c{k}", rows(sequences, k), RANK, 2 * RANK) for k in range(count)]
            config = flora.TrainConfig(1e-4, max_steps=options.steps, per_device_train_batch_size=sequences)
            calls = flora_calls(load_model("smollm2-135m", "float32"), clients, config)
            if (loop := peft_loop(load_model("smollm2-135m", "float32"), clients, config)) is not None:
                calls["PEFT loop"] = loop
            tokens = count * sequences * LENGTH
            bare = products(load_model("smollm2-135m", "float32"), tokens, tokens // 3)
            calls["bare products"] = lambda bare=bare: [bare() for _ in range(options.steps)]
            seconds = interleaved(calls, options.repeats, 1)
            found = rows_of(f"{count} clients of {sequences} x {LENGTH} tokens, {options.steps} steps, rank {RANK}, fp32", seconds,
                            "PEFT loop" if loop else "flora, one by one")
            out += [row | {"tokens_per_second": tokens * options.steps / row["ms"] * 1e3} for row in found]
            for row in out[-len(found):]:
                print(f"{row['case']}: {row['variant']}: {row['tokens_per_second']:.0f} tokens/s", flush=True)
    publish("cohort" if options.allocator == "raised" else "cohort_default_allocator", out)


if __name__ == "__main__":
    main()
