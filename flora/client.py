"""Two records: who trains (LocalClient) and how (TrainConfig). Neither holds a model."""
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from flora.adapter import Adapters
from flora.errors import ConfigError
from flora.keystream import KEY_BYTES
from flora.losses import Loss


@dataclass(frozen=True)
class LocalClient:
    """A party: its name, its rows, the adapter it can afford, and what it sets for itself.

    rows: a sequence of {"input_ids": list[int], "labels": list[int]}, -100 where there is no label. learning_rate, max_steps:
    None takes TrainConfig's; layers: block indices that it trains (None: all). start: adapters that stayed at home, for
    strategies that leave some there; they take the place of the broadcast's start.
    Raises ConfigError for a rank under 1, an alpha that is not positive, or no rows.
    """
    name: str
    rows: Sequence[Mapping[str, Sequence[int]]]
    rank: int = 16
    alpha: float = 32
    learning_rate: float | None = None
    max_steps: int | None = None
    layers: Sequence[int] | None = None
    start: Adapters | None = None

    def __post_init__(self) -> None:
        if int(self.rank) != self.rank or self.rank < 1:
            raise ConfigError(f"client {self.name!r}: expected a rank of at least 1; got {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"client {self.name!r}: expected a positive alpha; got {self.alpha}")
        if len(self.rows) == 0:
            raise ConfigError(f"client {self.name!r}: expected at least one training row; got none. Leave the client out, or "
                              "partition the data over fewer clients.")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"client {self.name!r}: expected a positive learning_rate; got {self.learning_rate}")
        if self.max_steps is not None and self.max_steps < 1:
            raise ConfigError(f"client {self.name!r}: expected max_steps of at least 1; got {self.max_steps}")


@dataclass(frozen=True)
class TrainConfig:
    """How a client trains in one round; the names are those of transformers.TrainingArguments.

    max_steps: optimiser steps of a round (None: num_train_epochs passes over the client's rows).
    per_device_train_batch_size: sequences a micro-batch; gradient_accumulation_steps: micro-batches a step.
    lr_scheduler_type: "constant", "linear" or "cosine", after warmup_steps of linear warm-up; it restarts every round.
    max_grad_norm: clips each client's gradient by its own norm (0: no clipping). seed: with the client's name and the round
    it decides order, fresh adapters and dropout. gradient_checkpointing: compute each block again in the backward pass instead of
    keeping what it computed. adapter_dtype: of A and B while they train, and of the updates ("bfloat16"; None: float32).
    loss: what is minimised (losses.py; None: CausalLM). proximal_mu: FedProx's weight of half the squared distance of what trains
    from its start (arXiv 1812.06127). rank_decay, rank_penalty: HetLoRA's self-pruning (0: none; arXiv 2401.06432). adalora_keep:
    the share of its ranks that a client keeps, by AdaLoRA (None: all, no AdaLoRA; arXiv 2303.10512); not both.
    example_clip, example_noise: C and z of differential privacy for each example (per_example.py; 0: none), for broadcasts that
    train B alone; example_key: 32 secret bytes of this run alone, which give the noise (None: drawn anew, and not repeated).
    """
    learning_rate: float = 3e-4
    max_steps: int | None = None
    per_device_train_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    warmup_steps: int = 0
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    lora_dropout: float = 0.0
    shuffle: bool = True
    seed: int = 0
    num_train_epochs: float = 1.0
    pad_token_id: int = 0
    gradient_checkpointing: bool = False
    adapter_dtype: Literal["float32", "bfloat16"] | None = None
    loss: Loss | None = None
    proximal_mu: float = 0.0
    rank_decay: float = 0.0
    rank_penalty: float = 0.0
    adalora_keep: float | None = None
    example_clip: float = 0.0
    example_noise: float = 0.0
    example_key: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        def need(name: str, good: bool, expected: str) -> None:
            if not good:
                raise ConfigError(f"{name}: expected {expected}; got {getattr(self, name)!r}")

        need("learning_rate", 0 < self.learning_rate < math.inf, "a positive number")
        need("max_steps", self.max_steps is None or self.max_steps >= 1, "at least 1, or None for num_train_epochs")
        need("per_device_train_batch_size", self.per_device_train_batch_size >= 1, "at least 1")
        need("gradient_accumulation_steps", self.gradient_accumulation_steps >= 1, "at least 1")
        need("max_grad_norm", self.max_grad_norm >= 0, "a number >= 0 (0 turns clipping off)")
        need("weight_decay", self.weight_decay >= 0, "a number >= 0")
        need("warmup_steps", self.warmup_steps >= 0, "a number >= 0")
        need("lr_scheduler_type", self.lr_scheduler_type in ("constant", "linear", "cosine"), '"constant", "linear" or "cosine"')
        need("lora_dropout", 0 <= self.lora_dropout < 1, "a probability in [0, 1)")
        need("num_train_epochs", self.num_train_epochs > 0, "a positive number")
        need("adapter_dtype", self.adapter_dtype in ("float32", "bfloat16", None), '"float32", "bfloat16" or None')
        need("proximal_mu", 0 <= self.proximal_mu < math.inf, "a number >= 0")
        need("rank_decay", 0 <= self.rank_decay < 1, "a share in [0, 1) (0 turns pruning off)")
        need("rank_penalty", 0 <= self.rank_penalty < math.inf, "a number >= 0")
        need("adalora_keep", self.adalora_keep is None or 0 < self.adalora_keep <= 1, "a share in (0, 1], or None")
        need("rank_decay", not (self.rank_decay and self.adalora_keep is not None), "0 with adalora_keep, which prunes ranks too")
        need("example_clip", 0 <= self.example_clip < math.inf, "a finite norm >= 0 (0: no differential privacy)")
        need("example_noise", 0 <= self.example_noise < math.inf, "a finite number >= 0")
        need("example_noise", self.example_clip > 0 or not self.example_noise, "0 without example_clip, in whose units it is")
        for name in ("adalora_keep", "rank_decay") if self.example_clip else ():
            need(name, not getattr(self, name), "none with example_clip: which ranks are pruned depends on gradients without noise")
        if self.example_key is not None and len(self.example_key) != KEY_BYTES:
            raise ConfigError(f"example_key: expected {KEY_BYTES} bytes; got {len(self.example_key)}. Make them with "
                              f"secrets.token_bytes({KEY_BYTES}).")


def learning_rate_factor(step: int, num_steps: int, warmup_steps: int, kind: str) -> float:
    """What the learning rate is multiplied by at a step (from 0): linear warm-up from 0, then constant, linear or half a cosine
    down to 0 at num_steps. The values of transformers.get_scheduler ("constant" here warms up too)."""
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    done = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return {"constant": 1.0, "linear": max(0.0, 1.0 - done), "cosine": max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))}[kind]
