"""The clients of a round and the model they share: `fit` trains them all and gives back one Update each.

A client's training is a pure function of (base, start, its rows, its settings, seed, version): its order of rows, its fresh
ranks and its dropout masks are keyed by its name, never drawn from a shared stream. So a client trains to the same adapter
alone or in company, in whatever order the clients come, and a client that fails takes nothing from the others.

The step is AdamW (betas 0.9, 0.999, eps 1e-8) on the mean loss over the labelled tokens of the whole optimiser step,
accumulation included; gradients are clipped by the client's own norm; the schedule restarts every round.
"""
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Literal

import torch
from torch import Tensor, nn

from flora import ops
from flora.adapter import Adapter, Adapters, all_layers, fresh_adapters, stack, truncate
from flora.client import LocalClient, TrainConfig, learning_rate_factor
from flora.data.batches import collate, num_label_tokens, steps_per_epoch, training_steps
from flora.errors import ConfigError, DataError, TrainingError
from flora.evaluate import completion_loss, device_of
from flora.layer import LoRALinear
from flora.messages import Broadcast, Update
from flora.nn import applied, target_shapes
from flora.seeds import derive
from flora.versions import MergeConfig, bring_to

log = logging.getLogger(__name__)

Rows = Sequence[Mapping[str, Sequence[int]]]
OnStep = Callable[[str, int, int, float], None]


class Cohort:
    """Clients that share one frozen base.

    model: a causal LM (input_ids, attention_mask -> .logits); targets: which modules carry adapters, as in flora.attach;
    max_tokens_per_batch: tokens that one pass may hold ("auto": a client's own batch). merge_config: how a broadcast's merge
    reaches the base. Clients need names of their own.
    After fit, failures says which clients gave no update, and why. Raises ConfigError, TargetError.
    """

    def __init__(self, model: nn.Module, clients: Sequence[LocalClient], train_config: TrainConfig,
                 targets: str | Sequence[str] = "all-linear", max_tokens_per_batch: int | Literal["auto"] = "auto",
                 merge_config: MergeConfig | None = None):
        names = [client.name for client in clients]
        if len(set(names)) != len(names):
            raise ConfigError(f"expected clients with different names; got {names}")
        if max_tokens_per_batch != "auto" and max_tokens_per_batch < 1:
            raise ConfigError(f'max_tokens_per_batch: expected "auto" or at least 1; got {max_tokens_per_batch}')
        self.model, self.clients, self.train_config, self.targets = model, list(clients), train_config, targets
        self.max_tokens_per_batch, self.merge_config = max_tokens_per_batch, merge_config
        self.shapes = target_shapes(model, targets)
        self.failures: dict[str, str] = {}

    def fit(self, broadcast: Broadcast, frozen: Adapters | Sequence[Adapters | None] | None = None,
            on_step: OnStep | None = None) -> list[Update]:
        """Brings the base to the broadcast's version, trains every client from its start, and returns their updates.

        frozen: ranks that each client sees and does not train: for all, or one (or None) a client. on_step(client, step, steps,
        loss) is called after each step. Order of clients kept; a client whose loss is not finite, or that has no labelled token,
        is left out and named in failures. No adapter stays attached. Raises RunError for a base of another version.
        """
        bring_to(self.model, broadcast, self.merge_config)
        per_client = [frozen] * len(self.clients) if frozen is None or isinstance(frozen, Mapping) else list(frozen)
        if len(per_client) != len(self.clients):
            raise ConfigError(f"frozen: expected one entry a client ({len(self.clients)}); got {len(per_client)}")
        updates, self.failures = [], {}
        was_training = self.model.training
        for client, ranks in zip(self.clients, per_client, strict=True):
            try:
                updates.append(self._fit_one(client, broadcast, ranks, on_step))
            except (TrainingError, DataError) as error:
                self.failures[client.name] = str(error)
                log.warning("client %s is left out of this round: %s", client.name, error)
            finally:
                self.model.train(was_training)
        return updates

    def _fit_one(self, client: LocalClient, broadcast: Broadcast, frozen: Adapters | None, on_step: OnStep | None) -> Update:
        """Trains one client alone on the shared base."""
        config = self.train_config
        own = self.shapes if client.layers is None else target_shapes(self.model, self.targets, client.layers)
        held = client.start if client.start is not None else broadcast.start
        start = starting_adapters(client, held, own, config.seed, broadcast.version)
        seen = [adapters for adapters in (held, frozen) if adapters]
        asleep = {name: stack([adapters[name].to("cpu") for adapters in seen if name in adapters])
                  for name in all_layers(seen) if name not in own}
        began = time.perf_counter()
        devices = [device_of(self.model)] if device_of(self.model).type == "cuda" else []
        with torch.random.fork_rng(devices), applied(self.model, {**start, **asleep}, config.lora_dropout) as layers:
            torch.manual_seed(derive(config.seed, client.name, broadcast.version, "torch"))
            _freeze(layers, own, broadcast.train, frozen)
            metrics = self._train(layers, client, broadcast.version, on_step)
            adapters = {name: layers[name].adapter.to("cpu") for name in own}
        if not all(bool(torch.isfinite(factor).all()) for a in adapters.values() for factor in (a.A, a.B)):
            raise TrainingError("expected finite factors after the last step; got NaN or infinity. Lower its learning rate.")
        seconds = time.perf_counter() - began
        metrics |= {"seconds": seconds, "tokens_per_second": metrics["tokens"] / seconds}
        return Update(adapters, len(client.rows), metrics, broadcast.version, client.name)

    def _train(self, layers: Mapping[str, LoRALinear], client: LocalClient, version: int,
               on_step: OnStep | None) -> dict[str, float]:
        """The training loop of one client; returns loss (mean over steps), last_loss, steps and tokens (of input)."""
        config, model = self.train_config, self.model
        parameters = [p for layer in layers.values() for p in (layer.A, layer.B) if p.requires_grad]
        learning_rate = client.learning_rate or config.learning_rate
        optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=config.weight_decay, fused=True)
        batch_size, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
        epoch = steps_per_epoch(len(client.rows), batch_size, accumulation)
        num_steps = client.max_steps or config.max_steps or math.ceil(config.num_train_epochs * epoch)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, num_steps, config.warmup_steps, config.lr_scheduler_type))
        steps = training_steps(client.rows, batch_size, accumulation, config.shuffle, config.seed, (client.name, version))
        key = derive(config.seed, client.name, version, "dropout")
        model.train()
        losses, tokens = [], 0
        for step, batches in enumerate(islice(steps, num_steps)):
            loss, count = self._accumulate(layers, batches, ops.row_keys(key, step))
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)
            if not (math.isfinite(loss) and math.isfinite(float(norm))):
                raise TrainingError(f"expected a finite loss; got {loss} (gradient norm {float(norm)}) at step {step + 1} of "
                                    f"{num_steps}. Lower its learning rate (now {learning_rate}) or look at its rows.")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            losses.append(loss)
            tokens += count
            if on_step is not None:
                on_step(client.name, step + 1, num_steps, loss)
        return {"loss": sum(losses) / len(losses), "last_loss": losses[-1], "steps": len(losses), "tokens": tokens}

    def _accumulate(self, layers: Mapping[str, LoRALinear], batches: Sequence[Rows], key: Tensor) -> tuple[float, int]:
        """Gradients of the mean loss over the labelled tokens of all micro-batches; (that loss, tokens of input).

        Every pass divides by the labelled tokens of the whole step, so cutting a step differently changes nothing.
        """
        config, device = self.train_config, device_of(self.model)
        labelled = sum(num_label_tokens(rows) for rows in batches)
        routing = next(iter(layers.values())).routing
        total, tokens, sequence = 0.0, 0, 0
        for rows in (part for batch in batches for part in _fitting(batch, self.max_tokens_per_batch)):
            first, sequence = sequence, sequence + len(rows)       # counted before any is passed over: masks are keyed by it
            if num_label_tokens(rows) == 0:
                continue
            batch = {name: t.to(device) for name, t in collate(rows, config.pad_token_id).items()}
            if config.lora_dropout:
                length = batch["input_ids"].shape[1]
                place = torch.arange(first, sequence)[:, None], torch.arange(length)
                routing.row_keys = ops.row_keys(key, *place).flatten().to(device)
            loss = completion_loss(self.model, batch)[0] / labelled
            loss.backward()
            total += float(loss.detach())
            tokens += int(batch["attention_mask"].sum())
        return total, tokens


def starting_adapters(client: LocalClient, start: Adapters | None, own: Mapping[str, tuple[int, int]], seed: int,
                      version: int) -> dict[str, Adapter]:
    """Where a client's training starts: the start cut to its rank, its scale kept, or filled up with fresh ranks.

    Fresh ranks (A random, B = 0, the client's own alpha / rank) are drawn from (seed, client, version, layer).
    """
    fresh = fresh_adapters(own, client.rank, client.alpha, seed, client.name, version, "fresh")
    out = {}
    for name, drawn in fresh.items():
        given = (start or {}).get(name)
        if given is None:
            out[name] = drawn
        elif given.rank >= client.rank:
            out[name] = truncate(given, client.rank)
        else:
            out[name] = stack([given.to("cpu"), Adapter(drawn.A[given.rank:], drawn.B[:, given.rank:], drawn.scale[given.rank:])])
    return out


def _freeze(layers: Mapping[str, LoRALinear], own: Mapping[str, object], train: str, frozen: Adapters | None) -> None:
    """Lets the client's own layers train, A, B or both, beside their frozen ranks; the others act as frozen ranks do."""
    for name, layer in layers.items():
        layer.A.requires_grad_(name in own and "A" in train)
        layer.B.requires_grad_(name in own and "B" in train)
        layer.dropout = layer.dropout if name in own else 0.0
        ranks = (frozen or {}).get(name)
        if ranks is not None and name in own:
            layer.frozen = ops.Frozen(ranks.A.to(layer.A.device), ranks.B.to(layer.A.device), ranks.scale.to(layer.A.device))


def _fitting(rows: Rows, max_tokens: int | str) -> Iterator[Rows]:
    """Cuts a micro-batch into passes of at most max_tokens padded tokens, of at least one sequence each."""
    if max_tokens == "auto":
        yield rows
        return
    first = longest = 0
    for last, row in enumerate(rows):
        longest = max(longest, len(row["input_ids"]))
        if last > first and longest * (last + 1 - first) > max_tokens:
            yield rows[first:last]
            first, longest = last, len(row["input_ids"])
    yield rows[first:]
