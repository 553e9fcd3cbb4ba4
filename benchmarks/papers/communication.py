"""The communication figure: bytes by method in the paper's own settings: python -m benchmarks.papers.communication

Counted on real messages; no model is loaded and nothing trains (flora.engines.plan). Up and down apart, without the base; and as a
share of full fine-tuning, in which the whole model goes up and down for each client in every round.
"""
import json

from rich.console import Console

from benchmarks.measure import RESULTS
from benchmarks.papers.run import HERE
from flora.config import load, parse
from flora.engines.plan import plan
from flora.tables import Page

ENTRIES = {"flora": {}, "flora, warm": {"start": "warm"}, "flora, bf16": {"adapter_dtype": "bfloat16"}, "fedit": {}, "ffa": {},
           "fedsa": {}, "fedsb": {}, "fedex": {}, "zeropad": {}, "hetlora": {}}
ONE_RANK = ("fedit", "ffa", "fedsa", "fedsb", "fedex")
PUBLISHED = RESULTS / "communication.json"
SETTINGS = ("tinyllama-dolly", "llama-7b-alpaca")


def rows_of(setting: str, ranks: list[int] | int) -> list[dict]:
    """A row a method: bytes of all ten clients and all rounds."""
    out = []
    for entry, changes in ENTRIES.items():
        strategy = entry.partition(",")[0]
        if isinstance(ranks, list) and strategy in ONE_RANK:
            continue
        config = parse({**load(HERE / "flora" / "published" / f"{setting}.yaml"), "strategy": strategy, "lora_r": ranks, **changes})
        found, rounds = plan(config, rounds=3), config.num_rounds
        up, down = sum(found.up), found.first + sum(found.down)
        whole = 2 * found.full * rounds * len(found.clients)
        out.append({"setting": setting, "ranks": "mixed" if isinstance(ranks, list) else str(ranks), "method": entry, "up": up,
                    "down": down, "share": (up + down) / whole})
    return out


def pages(rows: list[dict]) -> list[Page]:
    """A table a setting and kind of ranks."""
    out = []
    for setting, ranks in dict.fromkeys((row["setting"], row["ranks"]) for row in rows):
        cells = [[row["method"], f"{row['up'] / 1e6:,.1f}", f"{row['down'] / 1e6:,.1f}", f"{row['share']:.3%}"]
                 for row in rows if (row["setting"], row["ranks"]) == (setting, ranks)]
        out.append(Page(f"{setting}, {'ranks 64 to 4' if ranks == 'mixed' else f'rank {ranks}'}",
                        ["entry", "MB up", "MB down", "of full fine-tuning"], cells))
    return out


def main() -> None:
    rows = []
    for setting in SETTINGS:
        mixed = load(HERE / "flora" / "published" / f"{setting}.yaml")["lora_r"]
        rows += rows_of(setting, 16) + rows_of(setting, mixed)
    PUBLISHED.write_text(json.dumps(rows, indent=1) + "\n")
    for one in pages(rows):
        Console().print(one.rich())


if __name__ == "__main__":
    main()
