"""What secure aggregation costs: seconds and bytes of a client and of the server, against the plain factors that it hides.

    python -m benchmarks.bench_secure [--blocks 2] [--widths 160 80] [--repeats 3] [--accuracy]

Ten clients of FLoRA's ranks (160 in all), the seven linears of SmolLM2-135M in so many of its 30 blocks: few by default, as a
client makes 14 MB a block at width 160, and ten times as much of masks. One client is lost after it shared its keys. Plain:
`flora.messages.encode` at a client, `decode` and stacking at the server. Errors are against the dense sum. x peer of a client's
row: times encode; of the server's: times decode and stack. --accuracy: the error over width and fractional bits on one block, for
updates of three sizes, too.
"""
import argparse
import statistics
import time

import torch

import flora
from benchmarks.gate import require_green
from benchmarks.measure import publish
from benchmarks.shapes import RANKS, SMOLLM2_135M
from flora.adapter import Adapter
from flora.messages import Update, decode, encode
from flora.secure import SecureConfig, SecureSum, secure_round
from flora.speed import rows_of

LOST = {"c4": "masked"}
OF_CLIENT = ("keys", "shares", "sketch", "mask", "reveal")
OF_SERVER = ("add", "unmask", "recover")


def shapes_of(blocks: int) -> dict[str, tuple[int, int]]:
    return {f"layers.{i}.{name}": (out, inn) for i in range(blocks) for name, out, inn in SMOLLM2_135M}


def updates_of(shapes: dict[str, tuple[int, int]], size: float) -> list[Update]:
    """Ten clients; B is `size` times normal numbers, falling to a hundredth over the ranks."""
    draw, out = torch.Generator().manual_seed(0), []
    for k, rank in enumerate(RANKS):
        adapters = {}
        for layer, (rows, columns) in shapes.items():
            A = (torch.rand(rank, columns, generator=draw) * 2 - 1) / columns**0.5
            B = size * torch.randn(rows, rank, generator=draw) * torch.logspace(0, -2, rank)
            adapters[layer] = Adapter(A, B, 2.0)
        out.append(Update(adapters, 50 + 30 * k, {}, 0, f"c{k}"))
    return out


def true_error(found: SecureSum, updates: list[Update]) -> float:
    """The largest over layers of ‖ΔW_found - ΔW‖ / ‖ΔW‖ in the Frobenius norm, dense, in fp64."""
    stayed = [u for u in updates if u.client in found.counted]
    total = sum(u.num_examples for u in stayed)
    errors = []
    for layer, a in found.adapters.items():
        exact = sum(u.num_examples / total * u.adapters[layer].delta() for u in stayed)
        errors.append(float((a.delta() - exact).norm() / exact.norm()))
    return max(errors)


def plain(updates: list[Update], seconds: dict[str, list[float]]) -> int:
    """Bytes of the clients' plain messages; their times are added to seconds."""
    began = time.perf_counter()
    messages = [encode(u) for u in updates]
    middle = time.perf_counter()
    flora.aggregate([decode(message) for message in messages])
    seconds.setdefault("encode", []).append((middle - began) / len(updates))
    seconds.setdefault("decode, stack", []).append(time.perf_counter() - middle)
    return sum(map(len, messages))


def measure(blocks: int, width: int, repeats: int) -> list[dict]:
    """The rows of one width."""
    shapes = shapes_of(blocks)
    updates = updates_of(shapes, 1e-2)
    times: dict[str, list[float]] = {}
    for number in range(repeats):
        sent = plain(updates, times)
        found = secure_round(updates, shapes, SecureConfig(width=width, tolerance=None), "bench", number, LOST)
        for phase in (*OF_CLIENT, *OF_SERVER):
            took = len(updates) if phase in ("keys", "shares") else len(found.counted) if phase in OF_CLIENT else 1
            times.setdefault(phase, []).append(found.seconds[phase] / took)
    facts = {"blocks": blocks, "width": width, "clients": len(updates), "ranks": RANKS, "bits": 30,
             "error": true_error(found, updates), "reported": found.error,
             "condition": max(q.condition for q in found.layers.values()),
             "bytes_up": statistics.median(found.bytes_up.values()), "bytes_down": statistics.median(found.bytes_down.values()),
             "plain_bytes_up": sent / len(updates), "plain_bytes_largest": len(encode(updates[0])),
             "plain_bytes_smallest": len(encode(updates[-1]))}
    case = f"width {width}, {blocks} blocks, 10 clients"
    whole = {"encode": times["encode"], **{phase: times[phase] for phase in OF_CLIENT},
             "a client, whole": [sum(each) for each in zip(*(times[phase] for phase in OF_CLIENT), strict=True)]}
    server = {"decode, stack": times["decode, stack"], **{phase: times[phase] for phase in OF_SERVER},
              "the server, whole": [sum(each) for each in zip(*(times[phase] for phase in OF_SERVER), strict=True)]}
    rows = rows_of(f"a client, {case}", whole, "encode") + rows_of(f"the server, {case}", server, "decode, stack")
    return [{**row, **facts} for row in rows]


def accuracy(widths: list[int]) -> list[dict]:
    """Error, true and reported, over width, fractional bits and the size of B."""
    shapes, out = shapes_of(1), []
    for size in (1e-4, 1e-2, 1.0):
        updates = updates_of(shapes, size)
        rms = max(float(u.adapters[layer].delta().square().mean().sqrt()) for u in updates[:1] for layer in shapes)
        for width, bits in [(widths[0], bits) for bits in (16, 20, 24, 30, 40)] + [(width, 30) for width in widths[1:]]:
            config = SecureConfig(width, bits=bits, tolerance=None)
            found = secure_round(updates, shapes, config, "accuracy", 0, LOST)
            out.append({"case": "accuracy", "B": size, "delta_rms": rms, "width": width, "bits": bits,
                        "error": true_error(found, updates), "reported": found.error,
                        "rounding": max(q.rounding for q in found.layers.values()),
                        "condition": max(q.condition for q in found.layers.values()),
                        "bytes_up": statistics.median(found.bytes_up.values())})
            print({key: value if isinstance(value, (int, str)) else float(f"{value:.3g}") for key, value in out[-1].items()})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--widths", type=int, nargs="+", default=[160, 80])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--accuracy", action="store_true")
    options = parser.parse_args()
    require_green("tests/test_sketch.py", "tests/test_ring.py", "tests/test_masking.py", "tests/test_secure.py")
    rows = [row for width in options.widths for row in measure(options.blocks, width, options.repeats)]
    publish("secure", rows + (accuracy([160, 120, 80, 40]) if options.accuracy else []))


if __name__ == "__main__":
    main()
