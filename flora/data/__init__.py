"""Everything between a file of text and a batch of token ids, and the small model and data sets that install by name.

`load_rows` gives rows of one form, `partition` deals them to clients, `split` holds some of them out, `tokenize_rows`
makes token ids, `training_steps` makes batches. None of this imports transformers or datasets before it is used, and
torch is imported with the first of the batch functions, so the verbs that only fetch or read stay quick.
"""

from importlib import import_module

from flora.data.fetch import SOURCES, cache_folder, cached, fetch
from flora.data.formats import load_rows, normalise
from flora.data.models import load_model, load_tokenizer, resolve_model
from flora.data.partition import Partition, partition
from flora.data.splits import Splits, split
from flora.data.templates import tokenize, tokenize_rows

_BATCHES = ("batch_of", "collate", "epoch_order", "num_label_tokens", "steps_per_epoch", "training_steps")

__all__ = [
    "SOURCES", "Partition", "Splits", "cache_folder", "cached", "fetch", "load_model", "load_rows", "load_tokenizer",
    "normalise", "partition", "resolve_model", "split", "tokenize", "tokenize_rows", *_BATCHES,
]  # fmt: skip


def __getattr__(name: str) -> object:
    """Import what needs torch when it is first asked for."""
    if name not in _BATCHES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.batches"), name)
