"""The clients that bench_cohort and bench_round train, and everybody's way to train them: flora's and its peers'.

A way is made once from a case (the base is loaded there) and then called as `call(number of clients, steps, fixed)`: it trains
these clients and returns their Ticks. What a user pays every round is inside the call: adapters are made, trained and taken off.
fixed: the first row of each client, and given adapters (B not zero) to start from, so that the losses of two ways can be compared.
"""
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

import flora
from benchmarks.shapes import RANDOM
from flora.adapter import fresh_adapters
from flora.data import load_model
from flora.nn import target_shapes
from flora.seeds import derive

LEARNING_RATE = 1e-4
RATE = 250                                                              # tokens/s of a CPU, to say how long it will take
ROWS = {"cpu": 2048, "cuda": 16384}                                     # tokens of a bare product


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def random_model(name: str, dtype: str) -> nn.Module:
    """A Llama of one of shapes.RANDOM, with the same random weights every time."""
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    with torch.device(device()):
        return LlamaForCausalLM(LlamaConfig(**RANDOM[name])).to(getattr(torch, dtype))


@dataclass(frozen=True)
class Case:
    """So many clients of so many sequences each. ranks: taken in turn; tokens_per_pass: of flora's (None: its own)."""
    clients: int
    sequences: int
    length: int = 128
    ranks: tuple[int, ...] = (16,)
    dtype: str = "float32"
    model: str = "smollm2-135m"
    tokens_per_pass: int | None = None

    def __str__(self) -> str:
        of = f"rank {self.ranks[0]}" if len(self.ranks) == 1 else f"ranks {max(self.ranks)} to {min(self.ranks)}"
        passes = f", passes of {self.tokens_per_pass}" if self.tokens_per_pass else ""
        return f"{self.clients} clients of {self.sequences} x {self.length} tokens, {of}, {self.dtype}{passes}"

    @property
    def tokens(self) -> int:
        """Of one step of every client."""
        return self.clients * self.sequences * self.length

    @property
    def labelled(self) -> int:
        """Of a sequence: its last third."""
        return self.length // 3

    @cached_property
    def parties(self) -> list[flora.LocalClient]:
        return [flora.LocalClient(f"c{k}", self._rows(k), rank, 2 * rank)
                for k in range(self.clients) for rank in [self.ranks[k % len(self.ranks)]]]

    def _rows(self, seed: int) -> list[dict]:
        draw = torch.Generator().manual_seed(seed)
        tokens = torch.randint(1000, 30_000, (self.sequences, self.length), generator=draw).tolist()
        prompt = self.length - self.labelled
        return [{"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]} for ids in tokens]

    def config(self, steps: int) -> flora.TrainConfig:
        return flora.TrainConfig(LEARNING_RATE, max_steps=steps, per_device_train_batch_size=self.sequences, max_grad_norm=1.0)

    def facts(self) -> dict[str, object]:
        """What a row of results says of it."""
        return {"model": self.model, "clients": self.clients, "sequences": self.sequences, "length": self.length,
                "ranks": self.ranks, "dtype": self.dtype, "tokens_per_pass": self.tokens_per_pass}

    def base(self, dtype: str | None = None) -> nn.Module:
        """The model, read once: its file is mapped, and would else come into memory during the first call."""
        made = random_model if self.model in RANDOM else load_model
        model = made(self.model, dtype or self.dtype).to(device())
        for tensor in model.parameters():
            tensor.detach().sum()
        return model


@dataclass
class Ticks:
    """When each client's steps ended, and their losses. steady: seconds of a step of all clients, where it is known otherwise."""
    steady: float | None = None
    ended: dict[str, list[float]] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)

    def __call__(self, client: str, step: int, steps: int, loss: float | None = None) -> None:
        self.ended.setdefault(client, []).append(time.perf_counter())
        if loss is not None:
            self.losses.setdefault(client, []).append(loss)

    def step_seconds(self) -> float | None:
        """Seconds of a step of every client, without set-up: without each client's first, if nothing else is known; None of single
        steps."""
        spans = [(times[-1] - times[0]) / (len(times) - 1) for times in self.ended.values() if len(times) > 1]
        return self.steady or (sum(spans) if spans else None)

    def mean_losses(self) -> dict[str, float]:
        return {client: sum(losses) / len(losses) for client, losses in self.losses.items()}


Call = Callable[[int, int, bool], Ticks]


def started(case: Case, shapes: dict[str, tuple[int, int]]) -> list[flora.LocalClient]:
    """The clients with one row each, and adapters of their own to start from: A as in a fresh one, B small and not zero."""
    out = []
    for client in case.parties:
        start = fresh_adapters(shapes, client.rank, client.alpha, 0, client.name)
        for name, adapter in start.items():
            draw = torch.Generator().manual_seed(derive(client.name, name, "B"))
            adapter.B.copy_(torch.randn(adapter.B.shape, generator=draw) * 1e-2)
        out.append(replace(client, rows=client.rows[:1], start=start))
    return out


class Parties:
    """The clients of a case, fresh or with a fixed start: `parties(count, fixed)`."""

    def __init__(self, case: Case, base: nn.Module):
        self.case, self.shapes = case, target_shapes(base, "all-linear")

    def __call__(self, count: int, fixed: bool) -> list[flora.LocalClient]:
        return (started(self.case, self.shapes) if fixed else self.case.parties)[:count]


def flora_together(case: Case, tokens_per_pass: int | None = None) -> Call:
    """flora's cohort: all clients in one batch, cut into passes."""
    base = case.base()
    parties, budget = Parties(case, base), tokens_per_pass or case.tokens_per_pass or "auto"

    def call(count: int, steps: int, fixed: bool) -> Ticks:
        ticks = Ticks()
        cohort = flora.Cohort(base, parties(count, fixed), case.config(steps), max_tokens_per_batch=budget)
        cohort.fit(flora.Broadcast(), on_step=ticks)
        ticks.steady = sum(cohort.seconds[phase] for phase in ("data", "forward", "backward", "optimizer")) / steps
        return ticks
    return call


def flora_small_passes(case: Case) -> Call:
    """The same with no more tokens in flight than a loop has: one client's."""
    return flora_together(case, case.sequences * case.length)


def flora_one_by_one(case: Case) -> Call:
    base = case.base()
    parties = Parties(case, base)

    def call(count: int, steps: int, fixed: bool) -> Ticks:
        ticks = Ticks()
        for client in parties(count, fixed):
            cohort = flora.Cohort(base, [client], case.config(steps), max_tokens_per_batch=case.tokens_per_pass or "auto")
            cohort.fit(flora.Broadcast(), on_step=ticks)
        return ticks
    return call


def with_peft(base: nn.Module, client: flora.LocalClient, upcast: bool = True) -> nn.Module:
    """The base with this client's adapter as PEFT makes it; its start, if it has one. upcast: 16-bit adapters to fp32."""
    import peft
    model = peft.get_peft_model(base, peft.LoraConfig(r=client.rank, lora_alpha=client.alpha, target_modules="all-linear",
                                                      task_type="CAUSAL_LM"), autocast_adapter_dtype=upcast)
    for name, adapter in (client.start or {}).items():
        layer = base.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(adapter.A)
        layer.lora_B["default"].weight.data.copy_(adapter.B)
    return model


def taken_off(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors by PEFT's names, copied; the base is as it was."""
    import peft
    state = {name: tensor.to("cpu", copy=True) for name, tensor in peft.get_peft_model_state_dict(model).items()}
    model.unload()
    return state


def peft_trained(base: nn.Module, clients: list[flora.LocalClient], config: flora.TrainConfig,
                 ticks: Ticks, upcast: bool = True) -> Iterator[dict[str, Tensor]]:
    """A plain loop, client after client: transformers' own loss, AdamW, clipping. Gives each client's state dict."""
    for client in clients:
        model = with_peft(base, client, upcast)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, config.learning_rate, weight_decay=config.weight_decay)
        batch = {name: torch.tensor([row[name] for row in client.rows], device=device()) for name in ("input_ids", "labels")}
        model.train()
        for step in range(config.max_steps):
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            ticks(client.name, step + 1, config.max_steps, loss.item())
        yield taken_off(model)


def peft_loop(case: Case, dtype: str | None = None, upcast: bool = True) -> Call:
    """The loop in PEFT's default dtype: fp32 adapters, whatever the base's."""
    import peft  # noqa: F401  where it is missing, the benchmark says so and leaves this out
    base = case.base(dtype)
    parties = Parties(case, base)

    def call(count: int, steps: int, fixed: bool) -> Ticks:
        ticks = Ticks()
        list(peft_trained(base, parties(count, fixed), case.config(steps), ticks, upcast))
        return ticks
    return call


def peft_loop_bf16(case: Case) -> Call:
    """The same on a bf16 base."""
    return peft_loop(case, "bfloat16")


def peft_loop_all_bf16(case: Case) -> Call:
    """The same on a bf16 base, with bf16 adapters: what PEFT is fastest with."""
    return peft_loop(case, "bfloat16", upcast=False)


def hf_trainer(case: Case) -> Call:
    """PEFT under transformers' Trainer, client after client; it logs, saves and shows nothing."""
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
    base, folder = case.base(), tempfile.TemporaryDirectory()
    parties = Parties(case, base)

    class Ticking(TrainerCallback):
        def __init__(self, ticks: Ticks, client: str):
            self.ticks, self.client = ticks, client

        def on_step_end(self, args, state, control, **_):
            self.ticks(self.client, state.global_step, state.max_steps)

    def call(count: int, steps: int, fixed: bool) -> Ticks:
        ticks = Ticks()
        for client in parties(count, fixed):
            model = with_peft(base, client)
            arguments = TrainingArguments(
                folder.name, max_steps=steps, per_device_train_batch_size=case.sequences, learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, logging_strategy="no", save_strategy="no",
                report_to="none", disable_tqdm=True)
            trainer = Trainer(model, arguments, train_dataset=client.rows, callbacks=[Ticking(ticks, client.name)])
            trainer.remove_callback(PrinterCallback)
            ticks.losses[client.name] = [trainer.train().training_loss]
            taken_off(model)
        return ticks
    return call


def products(case: Case) -> Call:
    """The limit: y and dx of every linear, and of the head where there are labels, into memory that is there already."""
    base = case.base()
    head = base.get_output_embeddings()
    inner = [m.weight.detach() for m in base.modules() if isinstance(m, nn.Linear) and m is not head]
    kinds = ((inner, case.length), ([head.weight.detach()], case.labelled))
    size = max(1, ROWS[device()] // case.length)                        # sequences of a pass
    made: dict[tuple[str, int, int], Tensor] = {}

    def buffer(what: str, rows: int, width: int) -> Tensor:
        if (what, rows, width) not in made:
            made[what, rows, width] = torch.randn(rows, width, device=device()).to(head.weight.dtype)
        return made[what, rows, width]

    def call(count: int, steps: int, fixed: bool) -> Ticks:
        ticks, sequences = Ticks(), count * case.sequences
        for step in range(steps):
            for part in (min(size, sequences - first) for first in range(0, sequences, size)):
                for weight, rows in ((w, part * rows) for weights, rows in kinds for w in weights):
                    n_out, n_in = weight.shape
                    x, y, dx = buffer("x", rows, n_in), buffer("y", rows, n_out), buffer("dx", rows, n_in)
                    torch.mm(x, weight.T, out=y)
                    torch.mm(y, weight, out=dx)
            ticks("all", step + 1, steps)
        return ticks
    return call
