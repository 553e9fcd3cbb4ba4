"""Writes docs/results.md from the published results: python -m benchmarks.papers.tables

Of every experiment the tables that `flora compare` makes, beside what its paper reports; then what a person says of them, in
benchmarks/papers/<paper>/notes.md.
"""
import json
import shutil
from typing import Any

from benchmarks.measure import RESULTS
from benchmarks.papers import hierarchy, toy
from benchmarks.papers.communication import PUBLISHED, pages
from benchmarks.papers.run import HERE
from flora import tables
from flora.spread import LOSS

OUT = HERE.parents[1] / "docs" / "results.md"
HEAD = """# Results

The experiments of `benchmarks/papers`, re-run on a model and data that anybody can fetch: `python -m benchmarks.papers.run`
with `--scale cpu` takes the first two blocks of SmolLM2-135M and labelled tweets, with adapters on all linears of a block (the
paper's are on q_proj and v_proj); with `--scale gpu` the whole model, q_proj and v_proj. Two blocks of
thirty are no language model: what can be read off is how the methods differ, not how good a model gets. Losses and accuracies are
of rows that nobody trained on; ± is the standard deviation over the seeds, and a difference counts where it is beyond what paired
seeds scatter (95 %).
"""


def section(record: dict[str, Any], image: str) -> str:
    """One experiment as Markdown."""
    compared, config = record["compare"], record["config"]
    entries = compared["entries"]
    own = [tables.final(entries), *([tables.against(entries)] if len(entries) > 1 else [])]
    own += [tables.grid(compared["learning_rates"])] if compared["learning_rates"] else []
    seeds = ", ".join(map(str, entries[0]["seeds"]))
    rank = config["lora_r"]
    settings = (f"{config['num_clients']} clients, {config['num_rounds']} rounds of {config['max_steps']} steps of "
                f"{config['per_device_train_batch_size']} rows, rank {rank}, seeds {seeds}, scale {record['scale']}"
                + ("" if compared["learning_rates"] else f", learning rate {config['learning_rate']:g}"))
    said = f"Published: {record['published'].strip()}\n" if record["published"] else ""
    shown = [f"![Loss and accuracy by round]({image})\n"] if image else []
    return "\n".join([f"## {record['title']}\n", settings + ".\n", said, *map(below, own), *shown])


COMMUNICATION = """## Communication in the paper's settings

Three rounds of ten clients, adapters on q_proj and v_proj, fp32 unless bf16 is said, all clients together, without the base model.

Published, as shares of full fine-tuning over three rounds: FedIT 0.177, FLoRA 0.215, of which one download of the base is 1/6; the
adapters alone about 0.010 and 0.048, a ratio of 4.8. What full fine-tuning is taken to send differs, so ratios can be compared, not
shares.
"""


def communication() -> str:
    """The bytes of the paper's settings as Markdown."""
    return "\n".join([COMMUNICATION, *map(below, pages(json.loads(PUBLISHED.read_text())))])


TOY = """## Many short rounds, and every method at its own best learning rate

A regression in the place of a language model (benchmarks/papers/toy.py): a network of two layers whose weights are to change by
15 %; twenty clients of rank 4 with 64 rows each, two a round, 200 rounds of 20 AdamW steps, seeds 0, 1, 2. Error on fresh inputs as
a share of the error at the start. Where the best rate is an edge of what was tried, a better one may lie beyond.

Published: after 200 rounds of 20 steps, FedIT 75.1, FFA-LoRA 72.3, FLoRA 60.6 (20 clients, 2 a round; reported by users of the
reference code).
"""


def many_rounds() -> str:
    """The toy's tables as Markdown."""
    rows = [row for path in sorted(RESULTS.glob("*/papers/toy.json")) for row in json.loads(path.read_text())]
    return "\n".join([TOY, *map(below, toy.pages(rows))])


HIERARCHY = """## HierFedLoRA: groups on eighty devices

Tweets, labels skewed over eighty clients of equal size (each draws its own shares), three classes of devices, simulated time; a
classifier on SmolLM2's embeddings in the place of a language model (benchmarks/papers/hierarchy.py says why and with what numbers),
rank 4, 5 steps of 4 rows. Every method at its own best learning rate of 3e-4, 1e-3, 3e-3, 1e-2 (beside its name; found on seed 0 in
half of the time; the parts of HierFedLoRA take its own). The plots are in [Groups of clients](hierarchical.md).

Published: 1.6 to 4.2 points more and at least 2.1 times faster, on 80 devices (arXiv 2503.21213). Three seeds.
"""


def eighty_devices() -> str:
    """The tables of groups as Markdown."""
    rows = hierarchy.published()
    return "\n".join([HIERARCHY, *map(below, hierarchy.pages(rows))]) if rows else ""


def below(page: tables.Page) -> str:
    """A table under a section's heading."""
    return page.markdown().replace("## ", "### ", 1)


def main() -> None:
    parts = [HEAD]
    for path in sorted(RESULTS.glob("**/papers/*-*.json")):
        record = json.loads(path.read_text())
        times = {number for entry in record["compare"]["entries"] for number in entry["by_round"][LOSS]}
        image = f"results-{record['experiment']}-{record['scale']}.svg" if len(times) > 2 else ""     # else there is no line to see
        if image:
            shutil.copyfile(path.with_suffix(".svg"), OUT.parent / image)
        parts.append(section(record, image))
    parts.append(many_rounds())
    parts.append(communication())
    parts.append(eighty_devices())
    parts += [path.read_text() for path in sorted(HERE.glob("*/notes.md"))]
    OUT.write_text("\n".join(parts))
    print(f"wrote {OUT}")


if __name__ == "__main__":
    main()
