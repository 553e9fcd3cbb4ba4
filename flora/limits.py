"""What a receiver accepts of a message. Everything is counted before anything of that size is allocated or computed."""
from dataclasses import dataclass
from typing import Literal

Dtype = Literal["F64", "F32", "BF16", "F16", "F8_E4M3", "F8_E5M2"]
DTYPES: tuple[Dtype, ...] = ("F64", "F32", "BF16", "F16", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class Limits:
    """max_bytes, max_header_bytes: of the message and its header; max_decoded_bytes: of all its tensors as they would be if each
    were held by itself, zeros, factors that did not travel and frames included.

    max_layers: of a part, of the dense weights; max_rank, max_total_rank: of an adapter, of a part; max_examples: the cap of
    num_examples; max_metrics: how many; max_name: characters of a name, of a layer, client, run or metric; plain_names: no control
    characters, no half characters, none that reverse the order of a line.
    max_frame_bytes, max_frame_work: bytes and multiply-adds of the fixed factors that the receiver makes for cores; max_change: the
    largest number that any entry of ΔW, or of a dense weight, may come to; dtypes: names of those that factors may have.
    """
    max_bytes: int = 16_000_000_000
    max_header_bytes: int = 16_000_000
    max_decoded_bytes: int = 16_000_000_000
    max_layers: int = 1 << 16
    max_rank: int = 1 << 20
    max_total_rank: int = 1 << 28
    max_examples: int = 1_000_000_000
    max_metrics: int = 1000
    max_name: int = 1000
    plain_names: bool = True
    max_frame_bytes: int = 1_000_000_000
    max_frame_work: int = 100_000_000_000
    max_change: float = 3e38
    dtypes: tuple[Dtype, ...] = DTYPES


ANY = 1 << 62
UNLIMITED = Limits(ANY, ANY, ANY, ANY, ANY, ANY, ANY, ANY, ANY, False, ANY, ANY, float("inf"))
