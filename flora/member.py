"""A client in a round: where it starts, its steps, its optimiser, and how far it came."""
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flora.adapter import Adapter, Adapters, fresh_adapters, stack, truncate
from flora.client import LocalClient, TrainConfig, learning_rate_factor
from flora.forms import Core, Factors, Form, Pruning, Slot, Triplets
from flora.losses import Loss, Row
from flora.messages import Broadcast
from flora.steps import Place
from flora.strategies.average import kept_rank, pruned_rank

STATE = ("step", "exp_avg", "exp_avg_sq")                      # what AdamW keeps of a tensor


@dataclass
class Member:
    """A client's part in a round. begin: makes the adapters that it starts from, when its turn has come; numbers: in them; asleep:
    ranks that it sees and does not train; steps: batches of rows of each optimiser step, without end; key: of its dropout;
    depth: the first layer that it trains, counted in the model's order; tokens_a_step: about; layers: those that it trains; kept:
    the optimiser's state of the round before, by name (None: it starts anew); place: what sets its
    noise apart from any other; drawn: steps whose rows have been asked for; taken: steps of its optimiser, of which the first
    len(losses) are known to have been good."""
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
    layers: Sequence[str] = ()
    kept: Mapping[str, Tensor] | None = None
    place: str = ""
    losses: list[float] = field(default_factory=list)
    drawn: int = 0
    taken: int = 0
    tokens: int = 0
    failed: str = ""

    def form(self, slots: Mapping[str, Slot], broadcast: Broadcast, config: TrainConfig,
             frame_of: Callable[[tuple[int, int], int, str], Tensor]) -> Form:
        """What it trains of its ranks. frame_of: as forms.Core."""
        client = self.client
        if broadcast.train == "core":
            return Core(slots, frame_of)
        if config.adalora_keep is not None:
            return Triplets(slots, client.alpha / client.rank, config.adalora_keep, self.num_steps,
                            (config.seed, client.name, broadcast.version))
        if config.rank_decay:
            return Pruning(slots, kept_rank(client.rank, config.rank_decay), config.rank_penalty)
        return Factors(slots)

    def prepare(self, parameters: Mapping[str, Tensor], config: TrainConfig) -> None:
        """Makes its optimiser of these tensors, by name, with the state that was kept of each, where the shape is the same."""
        self.names, self.parameters = list(parameters), list(parameters.values())
        self.optimizer = torch.optim.AdamW(self.parameters, self.learning_rate, weight_decay=config.weight_decay, fused=True)
        self.anchors = [p.detach().clone() for p in self.parameters] if config.proximal_mu else []
        for name, p in parameters.items() if self.kept else ():
            held = {key: self.kept.get(f"{name}/{key}") for key in STATE}
            if all(value is not None and value.shape == (() if key == "step" else p.shape) for key, value in held.items()):
                self.optimizer.state[p] = {key: value.to(p.device, torch.float32 if key == "step" else p.dtype, copy=True)
                                           for key, value in held.items()}

    def state(self) -> dict[str, Tensor]:
        """What its optimiser holds, as "<layer>/<parameter>/<step|exp_avg|exp_avg_sq>": copies on the CPU, contiguous."""
        return {f"{name}/{key}": self.optimizer.state[p][key].detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
                for name, p in zip(self.names, self.parameters, strict=True) if p in self.optimizer.state for key in STATE}

    def release(self) -> None:
        """Lets go of what only training needs: three times the size of its adapters."""
        del self.parameters, self.optimizer, self.anchors

    def pruned(self, trained: Adapters, decay: float) -> dict[str, Adapter]:
        """Its adapters cut to the rank that it goes on with. HetLoRA, arXiv 2401.06432, section 3.2."""
        rank = pruned_rank(self.begin(), trained, self.client.rank, decay)
        return {name: truncate(a, rank) for name, a in trained.items()}

    def draw(self, k: int, loss: Loss) -> list[Place]:
        """The rows of its next step that there is something to learn from. k: its number in the batch."""
        rows = [row for batch in next(self.steps) for row in batch]
        self.drawn += 1
        return [Place(k, i, row, tuple(len(part["input_ids"]) for part in loss.sequences(row)), self.depth)
                for i, row in enumerate(rows) if loss.terms(row)]

    def pull(self, mu: float) -> None:
        """Adds mu (w - w_start), the gradient of FedProx's mu/2 ‖w - w_start‖², to its gradients. arXiv 1812.06127, equation 2."""
        for p, start in zip(self.parameters, self.anchors, strict=True) if mu else ():
            if p.grad is not None:
                p.grad.add_(p.detach() - start, alpha=mu)

    def norm(self) -> Tensor:
        """The norm of its gradient, fp64, on the device."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if not gradients:
            return torch.zeros((), dtype=torch.float64, device=self.parameters[0].device)
        return torch.nn.utils.get_total_norm(gradients).double()

    def update(self, norm: Tensor, config: TrainConfig) -> None:
        """A step of AdamW on its own factors, with its own schedule, its gradient (of this norm) clipped to max_grad_norm. Waits
        for nothing: numbers that are not finite are found when they are judged."""
        factor = learning_rate_factor(self.taken, self.num_steps, config.warmup_steps, config.lr_scheduler_type)
        self.optimizer.param_groups[0]["lr"] = self.learning_rate * factor
        if config.max_grad_norm:                                # the fused step divides as it reads
            self.optimizer.grad_scale = ((norm + 1e-6) / config.max_grad_norm).clamp(min=1.0).float()
        self.optimizer.step()
        self.taken += 1

    def judge(self, loss: float, norm: float, tokens: int) -> bool:
        """Takes in the numbers of its next step. Whether they are finite; if not, it has failed, and says why."""
        if math.isfinite(loss) and math.isfinite(norm):
            self.losses.append(loss)
            self.tokens += tokens
            return True
        self.failed = (f"expected a finite loss; got {loss} (gradient norm {norm}) at step {len(self.losses) + 1} of "
                       f"{self.num_steps}. Lower its learning rate (now {self.learning_rate}) or look at its rows.")
        return False


def starting_adapters(client: LocalClient, start: Adapters | None, own: Mapping[str, tuple[int, int]], seed: int,
                      version: int) -> dict[str, Adapter]:
    """Where a client's training starts, on the CPU: the start cut to its rank, its scale kept, or filled up with fresh ranks.

    Fresh ranks (A random, B = 0, the client's own alpha / rank) are drawn from (seed, client, version, layer).
    """
    out, wanted = {}, {}
    for name, shape in own.items():
        given = (start or {}).get(name)
        if given is not None and given.rank >= client.rank:
            out[name] = truncate(given, client.rank).to("cpu")
        else:
            out[name], wanted[name] = given, shape
    for name, drawn in fresh_adapters(wanted, client.rank, client.alpha, seed, client.name, version, "fresh").items():
        given = out[name]
        out[name] = drawn if given is None else stack([given.to("cpu"), Adapter(drawn.A[given.rank:], drawn.B[:, given.rank:],
                                                                               drawn.scale[given.rank:])])
    return out
