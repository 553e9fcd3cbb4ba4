"""Held-out loss, perplexity, next-token accuracy and likelihood of completions, and greedy answers: of one model, or of every
client's own.

In eval mode and without randomness. Personal models are the base with each client's adapters on that client's rows, routed as in
training: one pass serves several clients, and no adapter is attached and detached in turn.

batch_size: sequences a pass; pad_id: the token id that fills batches; views: the adapters of each client by name (None: the base);
max_new_tokens: the longest answer.
"""
import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from flora.adapter import Adapters
from flora.data.batches import Batch, batch_of, num_label_tokens
from flora.errors import DataError
from flora.losses import sequence_sums, token_losses
from flora.nn import applied
from flora.packed import Packed, joined, together
from flora.packing import device_of, line, packable, traits_of
from flora.segments import sent_to

Row = Mapping[str, Any]
Route = Callable[[Sequence[int]], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Decoding:
    """How an answer is written. eos_id: what ends it, one token or several (None: the model's own); temperature: 0 takes the
    likeliest token each time, above that tokens are drawn, from torch's generator."""
    max_new_tokens: int = 64
    pad_id: int = 0
    eos_id: int | Sequence[int] | None = None
    temperature: float = 0.0


def evaluate(model: nn.Module, rows: Sequence[Row], batch_size: int = 8, pad_id: int = 0) -> dict[str, float]:
    """{"loss", "perplexity", "accuracy", "tokens"} of a model on rows: means over labelled tokens, nats, greedy next token.

    The model's mode is put back afterwards. Raises DataError where no row has a label.
    """
    [found] = _measure(model, [rows], batch_size, pad_id, None)
    if found is None:
        raise DataError(f"expected rows with labelled tokens to evaluate on; got {len(rows)} rows without one")
    return found


def evaluate_clients(model: nn.Module, views: Mapping[str, Adapters | None], rows: Mapping[str, Sequence[Row]],
                     batch_size: int = 8, pad_id: int = 0,
                     on_rows: Callable[[int], None] | None = None) -> dict[str, dict[str, float] | None]:
    """What `evaluate` gives for every client's own model, by name: the base with its adapters (None: the base) on its rows.

    All clients together: batch_size sequences a pass, whosever they are. None for a client without a labelled token. on_rows is
    told how many rows each pass had. Raises TargetError where adapters do not fit the model, or some are attached.
    """
    def measure(names: list[str], route: Route) -> list[dict[str, float] | None]:
        return _measure(model, [rows[name] for name in names], batch_size, pad_id, route, on_rows)

    return _for_clients(model, views, measure)


def generate(model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int = 64, pad_id: int = 0,
             eos_id: int | Sequence[int] | None = None, batch_size: int = 8) -> list[list[int]]:
    """What a model as it is, adapters that are attached included, answers greedily, as `generate_clients` gives it.

    batch_size prompts a call of the model's `generate`, those of like length together. Raises DataError for an empty prompt.
    """
    return answers(model, prompts, Decoding(max_new_tokens, pad_id, eos_id), batch_size)


def answers(model: nn.Module, prompts: Sequence[Sequence[int]], how: Decoding, batch_size: int = 8) -> list[list[int]]:
    """What `generate` gives, decoded as `how` says."""
    _check_size(batch_size)
    out: list[list[int]] = [[]] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), batch_size):
        indices = order[start:start + batch_size]
        found = _generate(model, [list(prompts[i]) for i in indices], [len(indices)], lambda rows: None, how)
        for i, answer in zip(indices, found, strict=True):
            out[i] = answer
    return out


def generate_clients(model: nn.Module, views: Mapping[str, Adapters | None], prompts: Mapping[str, Sequence[Sequence[int]]],
                     max_new_tokens: int = 64, pad_id: int = 0,
                     eos_id: int | Sequence[int] | None = None) -> dict[str, list[list[int]]]:
    """Every client's own model answers its prompts greedily: token ids without the prompt and without what follows the end.

    One call of the model's `generate` for all clients; prompts are padded on the left. eos_id: what ends an answer, one token or
    several; None: the model's own. Raises DataError for an empty prompt.
    """
    def answer(names: list[str], route: Route) -> list[list[list[int]]]:
        mine = [prompts[name] for name in names]
        flat = [list(prompt) for some in mine for prompt in some]
        answers = iter(_generate(model, flat, [len(some) for some in mine], route, Decoding(max_new_tokens, pad_id, eos_id)))
        return [[next(answers) for _ in some] for some in mine]

    return _for_clients(model, views, answer)


def _generate(model: nn.Module, prompts: Sequence[Sequence[int]], counts: Sequence[int], route: Route,
              how: Decoding) -> list[list[int]]:
    if not prompts:
        return []
    if not all(prompts):
        raise DataError("expected prompts of at least one token; got an empty one. Start it with the model's first token.")
    if how.max_new_tokens < 1 or how.temperature < 0:
        raise DataError(f"expected max_new_tokens of at least 1 and a temperature of at least 0; got {how.max_new_tokens} and "
                        f"{how.temperature:g}. Give answers room for a token.")
    pad_id, width, device = how.pad_id, max(map(len, prompts)), device_of(model)
    ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)

    def before(module: nn.Module, args: tuple, kwargs: Mapping[str, Tensor]) -> None:
        route([count * kwargs["input_ids"].shape[1] for count in counts])

    ends = how.eos_id if how.eos_id is not None else model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, Sequence) else {ends}
    hook = model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        with eval_mode(model):
            draws = {"temperature": how.temperature, "top_k": 0, "top_p": 1.0} if how.temperature else {}
            lines = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=how.max_new_tokens, num_beams=1,
                                   do_sample=bool(draws), pad_token_id=pad_id, **draws,
                                   **({} if how.eos_id is None else {"eos_token_id": sorted(ends)}))
    finally:
        hook.remove()
    answers = lines[:, width:].tolist()
    return [answer[:next((i for i, token in enumerate(answer) if token in ends), len(answer))] for answer in answers]


def sequence_log_likelihoods(model: nn.Module, rows: Sequence[Row], batch_size: int = 8, pad_id: int = 0) -> list[float]:
    """log p of each row's labelled tokens given those before them, summed: what choices are scored by."""
    return _log_likelihoods(model, [rows], batch_size, pad_id, None)[0]


def log_likelihoods_clients(model: nn.Module, views: Mapping[str, Adapters | None], rows: Mapping[str, Sequence[Row]],
                            batch_size: int = 8, pad_id: int = 0) -> dict[str, list[float]]:
    """`sequence_log_likelihoods` of every client's own model on its rows, by name, all clients together."""
    def measure(names: list[str], route: Route) -> list[list[float]]:
        return _log_likelihoods(model, [rows[name] for name in names], batch_size, pad_id, route)

    return _for_clients(model, views, measure)


def with_reference(model: nn.Module, rows: Sequence[Row], batch_size: int = 8, pad_id: int = 0) -> list[dict[str, Any]]:
    """Rows of losses.Preference with "reference" added: log p of both answers under the model as it is, in eval mode."""
    pairs = [row[side] for row in rows for side in ("chosen", "rejected")]
    log_p = sequence_log_likelihoods(model, pairs, batch_size, pad_id)
    return [{**row, "reference": (log_p[2 * i], log_p[2 * i + 1])} for i, row in enumerate(rows)]


def _for_clients(model: nn.Module, views: Mapping[str, Adapters | None],
                 work: Callable[[list[str], Route], Sequence[T]]) -> dict[str, T]:
    """Every client's part of work(names, route), called for as many clients as one kernel takes, their adapters attached."""
    own, out = {name: view or {} for name, view in views.items()}, {}
    for names in together(own):
        with _routed(model, [own[name] for name in names]) as route:
            out.update(zip(names, work(names, route), strict=True))
    return out


@contextlib.contextmanager
def _routed(model: nn.Module, views: Sequence[Adapters]) -> Iterator[Route]:
    """The model with every client's adapters attached; gives the function that says how many rows of a pass are whose."""
    traits_of(model)                                            # tried before adapters are there, which need a route
    with applied(model, joined(views, [])) as layers:
        packed = Packed(layers, views, [{}] * len(views), "")
        yield lambda rows: packed.route(rows, None)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients while the block runs; the model's mode is put back."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _passes(model: nn.Module, rows: Sequence[Row], batch_size: int, pad_id: int, route: Callable[[Sequence[int], Batch], None],
            ) -> Iterator[tuple[list[int], Batch, Tensor, Tensor]]:
    """(indices of the rows of a pass, its batch, the losses and hits of its labelled tokens), pass by pass, rows of like length
    together. route(indices, batch) is called before each."""
    packs, device = traits_of(model).packs, device_of(model)
    _check_size(batch_size)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    with eval_mode(model), packable(model) if packs else contextlib.nullcontext():
        for start in range(0, len(order), batch_size):
            indices = sorted(order[start:start + batch_size])
            batch = batch_of([rows[i] for i in indices], packs, pad_id).map(lambda t: sent_to(device, t))
            if len(batch.labels):
                route(indices, batch)
                with line(model, batch.lengths) if packs else contextlib.nullcontext():
                    yield indices, batch, *token_losses(model, batch)


def _measure(model: nn.Module, rows: Sequence[Sequence[Row]], batch_size: int, pad_id: int, route: Route | None,
             on_rows: Callable[[int], None] | None = None) -> list[dict[str, float] | None]:
    """Loss and accuracy of every client's rows; None for one without a labelled token."""
    whose, flat = _flat(rows)
    total, right, tokens = ([0.0] * len(rows) for _ in range(3))
    order: list[int] = []
    found = []
    for indices, batch, losses, hits in _passes(model, flat, batch_size, pad_id, _sender(whose, len(rows), route)):
        found.append(torch.stack([sequence_sums(t.double(), batch) for t in (losses, hits)]))
        order += indices
        if on_rows is not None:
            on_rows(len(indices))
    for i, loss, good in zip(order, *_read(found, 2), strict=True):
        total[whose[i]] += loss
        right[whose[i]] += good
        tokens[whose[i]] += num_label_tokens([flat[i]])
    return [_summary(loss, good, count) if count else None for loss, good, count in zip(total, right, tokens, strict=True)]


def _log_likelihoods(model: nn.Module, rows: Sequence[Sequence[Row]], batch_size: int, pad_id: int, route: Route | None,
                     ) -> list[list[float]]:
    """log p of the labels of every client's rows."""
    whose, flat = _flat(rows)
    order: list[int] = []
    sums = []
    for indices, batch, losses, _ in _passes(model, flat, batch_size, pad_id, _sender(whose, len(rows), route)):
        sums.append(sequence_sums(losses, batch)[None])
        order += indices
    found = [0.0] * len(flat)
    for i, loss in zip(order, *_read(sums, 1), strict=True):
        found[i] = -loss
    each = iter(found)
    return [[next(each) for _ in mine] for mine in rows]


def _read(found: Sequence[Tensor], lines: int) -> list[list[float]]:
    """Numbers (lines, rows) of all passes, side by side: read once, so that a GPU never waits for the host."""
    return torch.cat(list(found), 1).tolist() if found else [[]] * lines


def _flat(rows: Sequence[Sequence[Row]]) -> tuple[list[int], list[Row]]:
    """(whose each row is, the rows of all)."""
    return [k for k, mine in enumerate(rows) for _ in mine], [row for mine in rows for row in mine]


def _sender(whose: Sequence[int], count: int, route: Route | None) -> Callable[[Sequence[int], Batch], None]:
    """Tells route, before a pass, how many of its places are whose."""
    def send(indices: Sequence[int], batch: Batch) -> None:
        spans = [0] * count
        for i, span in zip(indices, batch.spans, strict=True):
            spans[whose[i]] += span
        if route is not None:
            route(spans)

    return send


def _check_size(batch_size: int) -> None:
    if batch_size < 1:
        raise DataError(f"expected a batch size of at least 1; got {batch_size}. Set it to the sequences that one pass may hold.")


def _summary(total: float, right: float, tokens: float) -> dict[str, float]:
    loss = total / tokens
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "accuracy": right / tokens, "tokens": int(tokens)}
