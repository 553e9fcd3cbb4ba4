"""What a device's memory lets it train: base + depth * a block's activations + bytes a number * rank * Σ (out + in).

The sum is over the layers of the `depth` blocks nearest the output. The blocks below run forward only: what they compute is dropped
as soon as the next one has read it, so they take their weights, which are in the base, and nothing more. What a step takes beside
(the loss over the vocabulary, the allocator) belongs into base_mb, measured.
"""
from collections.abc import Mapping
from dataclasses import dataclass

from flora.errors import ConfigError
from flora.fleet import Device
from flora.targets import blocks_of, layer_index

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Memory:
    """What training takes of a device, in 10^6 bytes: the frozen base, and what a trained block keeps for its backward pass.
    bytes_a_number: of A and B: 16 in fp32 (factor 4, gradient 4, AdamW's moments 8)."""
    base_mb: float
    activation_mb: float = 0.0
    bytes_a_number: float = 16

    def __post_init__(self) -> None:
        if not (self.base_mb >= 0 and self.activation_mb >= 0 and self.bytes_a_number > 0):
            raise ConfigError(f"memory: expected base_mb and activation_mb of at least 0 and a positive bytes_a_number; got {self}")


def blocks(shapes: Shapes) -> list[int]:
    """The indices of the blocks that have adapters (shapes: (out, in) by layer), from the input to the output. Raises ConfigError
    where layers have none."""
    found = blocks_of(shapes)
    if not found:
        raise ConfigError(f"depth: expected layers of numbered blocks, such as model.layers.3.q_proj; got {list(shapes)[:3]}")
    return found


def needed_mb(shapes: Shapes, rank: int, depth: int, memory: Memory) -> float:
    """Memory that training layers of these shapes takes at this rank in the `depth` blocks nearest the output; layers outside
    blocks do not train."""
    top = set(blocks(shapes)[-depth:]) if depth > 0 else set()
    numbers = rank * sum(sum(shape) for name, shape in shapes.items() if layer_index(name) in top)
    return memory.base_mb + len(top) * memory.activation_mb + memory.bytes_a_number * numbers / 1e6


def most_depth(device: Device, shapes: Shapes, rank: int, memory: Memory) -> int:
    """The most blocks of these shapes that the device can train at this rank; 0 where it cannot train one."""
    return max((depth for depth in range(1, len(blocks(shapes)) + 1)
                if needed_mb(shapes, rank, depth, memory) <= device.kind.memory_mb), default=0)


def most_rank(device: Device, shapes: Shapes, depth: int, memory: Memory, limit: int = 64) -> int:
    """The largest rank up to limit that the device can train in `depth` blocks of these shapes; 0 where it cannot train rank 1."""
    if depth < 1 or limit < 1:
        raise ConfigError(f"expected a depth and a limit of at least 1; got {depth} and {limit}")
    fixed, one = needed_mb(shapes, 0, depth, memory), needed_mb(shapes, 1, depth, memory)
    return max((rank for rank in range(1, limit + 1) if fixed + rank * (one - fixed) <= device.kind.memory_mb), default=0)


def ranks(found: Mapping[str, Device], shapes: Shapes, depth: int, memory: Memory,
          limit: int = 64) -> tuple[dict[str, int], dict[str, str]]:
    """Rank, up to limit, of every client whose device (found) can hold one for these shapes, and why the others are left out.
    Raises ConfigError where that is all."""
    fit = {name: most_rank(device, shapes, depth, memory, limit) for name, device in found.items()}
    least = needed_mb(shapes, 1, depth, memory)
    out = {name: f"{found[name].name} ({found[name].kind.name}) has {found[name].kind.memory_mb:g} MB; rank 1 in {depth} blocks "
                 f"takes {least:.1f} MB" for name, rank in fit.items() if rank == 0}
    if len(out) == len(fit):
        raise ConfigError(f"fleet: expected memory for rank 1 on some device; got none: {next(iter(out.values()), 'no devices')}. "
                          "Lower the depth, or take a smaller or a quantised base.")
    return {name: rank for name, rank in fit.items() if rank}, out
