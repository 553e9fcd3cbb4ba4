"""A client in a round: where it starts, its steps, its optimiser, and how far it came."""
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flora.adapter import Adapter, Adapters, fresh_adapters, stack, truncate
from flora.client import LocalClient, TrainConfig, learning_rate_factor
from flora.losses import Loss, Row
from flora.steps import Place


@dataclass
class Member:
    """A client's part in a round. begin: makes the adapters that it starts from, when its turn has come; numbers: in them; asleep:
    ranks that it sees and does not train; steps: batches of rows of each optimiser step, without end; key: of its dropout;
    depth: the first layer that it trains, counted in the model's order; tokens_a_step: about."""
    client: LocalClient
    begin: Callable[[], dict[str, Adapter]]
    numbers: int
    asleep: Adapters
    steps: Iterator[Sequence[Sequence[Row]]]
    num_steps: int
    learning_rate: float
    key: int
    depth: int = 0
    tokens_a_step: int = 0
    losses: list[float] = field(default_factory=list)
    drawn: int = 0
    tokens: int = 0
    failed: str = ""

    def prepare(self, parameters: Sequence[Tensor], config: TrainConfig) -> None:
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(parameters, self.learning_rate, weight_decay=config.weight_decay, fused=True)

    def release(self) -> None:
        """Lets go of what only training needs: three times the size of its adapters."""
        del self.parameters, self.optimizer

    def draw(self, k: int, loss: Loss) -> list[Place]:
        """The rows of its next step that there is something to learn from. k: its number in the batch."""
        rows = [row for batch in next(self.steps) for row in batch]
        self.drawn += 1
        return [Place(k, i, row, tuple(len(part["input_ids"]) for part in loss.sequences(row)), self.depth)
                for i, row in enumerate(rows) if loss.terms(row)]

    def norm(self) -> Tensor:
        """The norm of its gradient, on the device."""
        return torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    def update(self, loss: float, norm: float, tokens: int, config: TrainConfig) -> None:
        """A step of AdamW on its own factors, with its own schedule, its gradient clipped to max_grad_norm."""
        factor = learning_rate_factor(len(self.losses), self.num_steps, config.warmup_steps, config.lr_scheduler_type)
        self.optimizer.param_groups[0]["lr"] = self.learning_rate * factor
        too_long = (norm + 1e-6) / config.max_grad_norm if config.max_grad_norm else 0.0
        if too_long > 1:                                        # the fused step divides as it reads
            self.optimizer.grad_scale = torch.tensor(too_long, device=self.parameters[0].device)
        else:
            self.optimizer.grad_scale = None
        self.optimizer.step()
        self.losses.append(loss)
        self.tokens += tokens

    def judge(self, loss: float, norm: float) -> bool:
        """Whether its numbers are finite; if not, it has failed, and says why."""
        if math.isfinite(loss) and math.isfinite(norm):
            return True
        self.failed = (f"expected a finite loss; got {loss} (gradient norm {norm}) at step {len(self.losses) + 1} of "
                       f"{self.num_steps}. Lower its learning rate (now {self.learning_rate}) or look at its rows.")
        return False


def starting_adapters(client: LocalClient, start: Adapters | None, own: Mapping[str, tuple[int, int]], seed: int,
                      version: int) -> dict[str, Adapter]:
    """Where a client's training starts: the start cut to its rank, its scale kept, or filled up with fresh ranks.

    Fresh ranks (A random, B = 0, the client's own alpha / rank) are drawn from (seed, client, version, layer).
    """
    out, wanted = {}, {}
    for name, shape in own.items():
        given = (start or {}).get(name)
        if given is not None and given.rank >= client.rank:
            out[name] = truncate(given, client.rank)
        else:
            out[name], wanted[name] = given, shape
    for name, drawn in fresh_adapters(wanted, client.rank, client.alpha, seed, client.name, version, "fresh").items():
        given = out[name]
        out[name] = drawn if given is None else stack([given.to("cpu"), Adapter(drawn.A[given.rank:], drawn.B[:, given.rank:],
                                                                               drawn.scale[given.rank:])])
    return out
