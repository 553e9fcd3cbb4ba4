"""A classifier of tweets that learns in seconds on a CPU, for comparisons of what does not depend on the model.

The mean of SmolLM2's token embeddings, four residual blocks and a head, trained on one in 64 of the tweets that no client has;
clients adapt the blocks.
"""
import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flora.data import load_model, load_rows, load_tokenizer
from flora.data.batches import Batch

BLOCKS, INNER, PUBLIC = 4, 288, 64
TARGETS = ("up", "down")
LABELS = ("negative", "neutral", "positive")


class Block(nn.Module):
    """x + down(relu(up(norm(x))))."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, INNER, bias=False), nn.Linear(INNER, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Classifier(nn.Module):
    """Of a mean of embeddings, (n, width), the logits of the labels."""

    def __init__(self, width: int):
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block(width) for _ in range(BLOCKS)]), nn.Linear(width, len(LABELS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Labels:
    """The cross-entropy of a row {"x", "y"} as a client's loss."""
    packs = False

    def sequences(self, row: Mapping) -> Sequence[Mapping]:
        return ({"input_ids": [0], "labels": [-100]},)

    def terms(self, row: Mapping) -> int:
        return 1

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        x, y = (torch.stack([row[name] for row in batch.rows]) for name in ("x", "y"))
        return F.cross_entropy(model(x), y, reduction="none")


@dataclass(frozen=True)
class Tweets:
    """x: (rows, width), scaled by the public rows; y: (rows,), labels; public: rows that no client has."""
    x: Tensor
    y: Tensor
    public: Tensor


@functools.cache
def tweets() -> Tweets:
    rows = load_rows("tweets")
    texts = [row["prompt"].partition("Tweet: ")[2] for row in rows]
    weight = load_model("smollm2-135m", torch.float32, 1).get_input_embeddings().weight.detach()
    tokens = load_tokenizer("smollm2-135m")(texts)["input_ids"]
    x = F.embedding_bag(torch.tensor([t for row in tokens for t in row]), weight,
                        torch.tensor([0, *map(len, tokens)]).cumsum(0)[:-1], mode="mean")
    known = [int(hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(), 16) % PUBLIC == 0 for text in texts]
    public = torch.tensor(known)
    return Tweets((x - x[public].mean(0)) / x[public].std(0), torch.tensor([LABELS.index(row["label"]) for row in rows]), public)


@functools.cache
def base() -> dict[str, Tensor]:
    """The classifier's weights after one epoch of the public tweets."""
    data, draw = tweets(), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net, indices = Classifier(data.x.shape[1]), data.public.nonzero()[:, 0]
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4)
    for some in indices[torch.randperm(len(indices), generator=draw)].split(32):
        optimizer.zero_grad()
        F.cross_entropy(net(data.x[some]), data.y[some]).backward()
        optimizer.step()
    return net.state_dict()


def scores(model: nn.Module, indices: Tensor) -> tuple[float, float]:
    """(mean loss, accuracy) on these rows."""
    data = tweets()
    with torch.no_grad():
        logits = model(data.x[indices])
    return float(F.cross_entropy(logits, data.y[indices])), float((logits.argmax(1) == data.y[indices]).float().mean())
