"""The model card of an export: what the model is, what it was trained on and with, how well it does, how to load it, its limits.

Its front matter is what the Hugging Face Hub reads, made by huggingface_hub. A card goes where the run's folder does not: it has
counts and means, no client's name, and of paths the last part alone.
"""
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flora import __version__
from flora.config import RunConfig
from flora.data import SOURCES
from flora.strategies import strategy_named

HUB = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}       # names of `flora fetch` that are models of the Hub
CARD = """# {title}

`{base}`, fine-tuned by {clients} clients that kept their data. Each trained a [LoRA](https://arxiv.org/abs/2106.09685) adapter; a
server combined them, with flora {version}.

## Training

| | |
| --- | --- |
| base model | `{base}`, licence: {base_licence} |
| data | `{dataset}`, licence: {data_licence} |
| clients | {clients}, {rows:,} training rows in all |
| held out | at most {server_rows} rows for the server, {client_rows} of each client; none of them trained on |
| method | {strategy}: {summary} ({paper}) |
| ranks | {ranks} |
| alpha | {alpha} |
| target modules | {targets} |
| rounds | {rounds}, of at most {steps} optimiser steps a client |
| learning rate | {rate:g} |

## Evaluation

{metrics}

## How to load it

```python
{load}
```

## Intended use and limits

It is made for text like that of `{dataset}`, and was evaluated on held-out rows of it and on nothing else: not for facts, bias or
safety. What limits `{base}` limits it too, and both licences above apply to its use.

{privacy}

{secure}

A model can repeat what it was trained on; only differential privacy bounds that.

## What this folder contains

{contents}

It contains no row of any client, no client's name, no single client's update but where the title says so, no optimiser state and no
key.

## Citation

The method is {paper}. The software:

```bibtex
@software{{flora,
  title = {{flora: federated LoRA fine-tuning with mixed ranks, aggregated exactly by stacking}},
  author = {{{{The flora authors}}}},
  version = {{{version}}}
}}
```
"""
LOAD_MODEL = """from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."                                    # where this file lies
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)"""
LOAD_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, folder = "{base}", "."                    # where this file lies
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
tokenizer = AutoTokenizer.from_pretrained(base)"""


@dataclass(frozen=True)
class Exported:
    """What a card is about. rows: of metrics.jsonl; rounds: done; client: whose adapter it is (None: the global result); made: the
    folder, of which the files are listed."""
    rows: Sequence[Mapping[str, Any]]
    rounds: int
    client: str | None
    made: Path

    @property
    def adapter(self) -> bool:
        return (self.made / "adapter_config.json").exists()


def public_name(name: str) -> str:
    """A model or data set as strangers can name it: its name on the Hub, or the last part of a path."""
    return HUB.get(name) or (name if on_hub(name) else Path(name).name)


def on_hub(name: str) -> bool:
    """Whether a name is one of the Hub, owner/name, and no path of this machine."""
    return name in HUB or (re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None and not Path(name).exists()
                           and not name.endswith((".json", ".jsonl", ".csv", ".parquet")))


def card(config: RunConfig, what: Exported) -> str:
    """The README.md of an export."""
    rule, base, data = strategy_named(config.strategy), config.model_name_or_path, config.dataset
    one, found = what.client is not None, _measured(what)
    title = "One client's adapter" if one else "A LoRA adapter" if what.adapter else "A merged model"
    text = CARD.format(
        title=title, base=public_name(base), base_licence=_licence(base), dataset=public_name(data),
        data_licence=_licence(data), version=__version__, clients=config.num_clients, rounds=what.rounds,
        rows=sum({row["client"]: row["num_examples"] for row in what.rows if row["kind"] == "client"}.values()),
        server_rows=config.server_eval_rows, client_rows=config.eval_rows_per_client, strategy=rule.name, summary=rule.summary,
        paper=rule.paper, ranks=_several(config.ranks()), targets=_targets(config), steps=config.max_steps or "an epoch's",
        alpha={"r": "the rank", "2r": "twice the rank"}.get(str(config.lora_alpha)) or _several(config.alphas()),
        rate=config.learning_rate, metrics=_table(found, one), privacy=_privacy(config, what), secure=_secure(config),
        load=LOAD_ADAPTER.format(base=public_name(base)) if what.adapter else LOAD_MODEL,
        contents="\n".join([*(f"* `{path.relative_to(what.made)}`, {path.stat().st_size:,} bytes"
                              for path in sorted(what.made.rglob("*")) if path.is_file()), "* `README.md`, this file"]))
    return f"---\n{_front(config, what, title, found)}\n---\n\n{text}"


def _front(config: RunConfig, what: Exported, title: str, found: Sequence[Mapping[str, float]]) -> str:
    """The YAML that the Hub reads."""
    from huggingface_hub import EvalResult, ModelCardData

    base, data = config.model_name_or_path, config.dataset
    last = found[-1] if found else {}
    results = [EvalResult("text-generation", public_name(data), f"held-out rows of {public_name(data)}", kind, round(last[kind], 6),
                          metric_name=name) for kind, name in (("loss", "held-out loss"), ("accuracy", "next-token accuracy"))
               if kind in last]
    return ModelCardData(
        library_name="peft" if what.adapter else "transformers", base_model=public_name(base) if on_hub(base) else None,
        license=_licence(base).lower(), tags=["federated-learning", "lora", "flora", config.strategy],
        pipeline_tag="text-generation", datasets=[data] if on_hub(data) else None, model_name=title,
        eval_results=results or None).to_yaml()


def _several(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:g}" for number in sorted(set(numbers), reverse=True))


def _targets(config: RunConfig) -> str:
    return config.target_modules if isinstance(config.target_modules, str) else ", ".join(config.target_modules)


def _measured(what: Exported) -> list[dict[str, float]]:
    """Loss and accuracy before and after: of the server's rows, or of the client's own where one client's adapter is exported."""
    if what.client is None:
        rows = [row for row in what.rows if row["kind"] == "server" and "eval_loss" in row]
        return [{"rounds": row["rounds_done"], "loss": row["eval_loss"], "accuracy": row["eval_accuracy"]}
                for row in (rows[:1] + rows[-1:] if len(rows) > 1 else rows)]
    own = [row for row in what.rows if row["kind"] == "client" and row["client"] == what.client and "eval_loss_after" in row]
    return [{"rounds": row["round"] + (when == "after"), "loss": row[f"eval_loss_{when}"], "accuracy": row[f"eval_accuracy_{when}"]}
            for row, when in ((own[0], "before"), (own[-1], "after"))] if own else []


def _table(found: Sequence[Mapping[str, float]], own: bool) -> str:
    if not found:
        return "It was not evaluated."
    lines = [f"| {'after' if row['rounds'] else 'before'} | {row['loss']:.4f} | {row['accuracy']:.1%} |" for row in found]
    head = f"| held-out rows of the {'client' if own else 'server'} | loss | next-token accuracy |"
    return "\n".join([head, "| --- | --- | --- |", *lines])


def _privacy(config: RunConfig, what: Exported) -> str:
    own = config.privacy
    if own is None:
        return "No differential privacy."
    if what.client is not None:
        return "This is one client's own adapter: the run's differential privacy does not cover it."
    spent = max((row["epsilon"] for row in what.rows if "epsilon" in row), default=0.0)
    return f"Differential privacy of a {own.level}: ε = {spent:.2f} at δ = {own.delta:g} (flora's docs/security.md)."


def _secure(config: RunConfig) -> str:
    return ("No secure aggregation: the server saw each client's update." if config.secure_aggregation is None else
            "Secure aggregation: the server saw sums of the clients' updates, and no client's own.")


def _licence(name: str) -> str:
    return SOURCES[name].licence if name in SOURCES else "unknown"
