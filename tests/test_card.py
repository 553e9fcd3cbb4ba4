"""The card of an export: what the Hub reads of it, what it says of the run, that its code loads what lies beside it."""
import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from test_engines import settings
from tiny import llama
from transformers import AutoModelForCausalLM

import flora
from flora.card import Exported, card, on_hub, public_name
from flora.config import load, parse
from flora.exporting import export
from flora.report import read_metrics


@pytest.fixture(scope="module")
def run(place):
    return flora.run(settings(place, "run"))


@pytest.fixture(scope="module")
def exported(place, run):
    return export(run, place / "exported")


@pytest.fixture(scope="module")
def adapter(place):
    return export(flora.run(settings(place, "beside", merge_into="adapter")), place / "adapter")


def read(folder):
    """(the front matter as the Hub's library reads it, the text)."""
    found = ModelCard.load(folder / "README.md")
    return found.data, found.text


def rewritten(run, folder, **changes):
    """The card of the run if its settings had been others."""
    config = parse(load(run / "config.yaml"), "test")
    return card(config.model_copy(update=changes), Exported(read_metrics(run), 2, None, folder))


def test_the_front_matter_is_what_the_hub_reads(exported, run):
    data, _ = read(exported)
    assert data.library_name == "transformers" and data.license == "unknown" and data.pipeline_tag == "text-generation"
    assert {"federated-learning", "lora", "flora"} <= set(data.tags)
    assert data.base_model is None and data.datasets is None                 # folders of this machine are no names of the Hub
    last = [row for row in read_metrics(run) if row["kind"] == "server"][-1]
    values = {result.metric_type: result.metric_value for result in data.eval_results}
    assert values == {"loss": round(last["eval_loss"], 6), "accuracy": round(last["eval_accuracy"], 6)}
    plain = yaml.safe_load((exported / "README.md").read_text().split("---")[1])
    assert {"model-index", "license", "library_name", "tags"} <= plain.keys()


def test_names_of_the_hub_are_in_the_front_matter(run, exported):
    data = ModelCard(rewritten(run, exported, model_name_or_path="smollm2-135m", dataset="tatsu-lab/alpaca")).data
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct" and data.license == "apache-2.0"
    assert data.datasets == ["tatsu-lab/alpaca"] and data.eval_results[0].dataset_type == "tatsu-lab/alpaca"
    text = rewritten(run, exported, dataset="chitchat")
    assert "| data | `chitchat`, licence: MIT |" in text and ModelCard(text).data.datasets is None


def test_it_says_what_the_run_was(exported):
    _, text = read(exported)
    for said in ("| clients | 4, 40 training rows in all |", "| held out | at most 8 rows for the server, 3 of each client;",
                 "| ranks | 8, 4, 2, 1 |", "| alpha | 16, 8, 4, 1 |", "| rounds | 2, of at most 8 optimiser steps a client |",
                 "| learning rate | 0.01 |", "| target modules | q_proj, v_proj, down_proj |",
                 "| base model | `model`, licence: unknown |", "| data | `rows.jsonl`, licence: unknown |", "| method | flora: ",
                 "arXiv 2409.05976", "No differential privacy.", f"version = {{{flora.__version__}}}",
                 "No secure aggregation: the server saw each client's update."):
        assert said in text, said
    assert re.search(r"\| before \| 4\.\d{4} \| .*\n\| after \| [0-3]\.\d{4} \| ", text)


def test_neither_a_client_nor_a_folder_of_this_machine_is_named(exported, adapter, place):
    for folder in (exported, adapter):
        for path in folder.rglob("*"):
            if path.suffix in (".md", ".json"):
                text = path.read_text()
                assert str(place) not in text and "client-0" not in text, path


def test_protection_is_said(run, exported):
    config = parse(load(run / "config.yaml"), "test")
    own = type(config).model_fields["secure_aggregation"].annotation.__args__[0]()
    assert "Secure aggregation: the server saw sums" in rewritten(run, exported, secure_aggregation=own)


def test_a_run_without_evaluation_says_so(run, exported):
    config = parse(load(run / "config.yaml"), "test")
    text = card(config, Exported([row for row in read_metrics(run) if row["kind"] == "client"], 2, None, exported))
    assert "It was not evaluated." in text and ModelCard(text).data.eval_results is None


def test_a_client_s_card_has_the_client_s_numbers(place, run):
    rows = [row for row in read_metrics(run) if row["kind"] == "client" and row["client"] == "client-1"]
    data, text = read(export(run, place / "one", client="client-1"))
    assert f"| before | {rows[0]['eval_loss_before']:.4f} |" in text and f"| after | {rows[-1]['eval_loss_after']:.4f} |" in text
    assert "held-out rows of the client" in text and data.eval_results[0].metric_value == round(rows[-1]["eval_loss_after"], 6)


@pytest.mark.parametrize("kind", ["exported", "adapter"])
def test_the_code_in_it_loads_what_lies_beside_it(kind, request, place, run, monkeypatch):
    folder = request.getfixturevalue(kind)
    code, = re.findall(r"```python\n(.*?)```", read(folder)[1], re.S)
    if kind == "adapter":
        pytest.importorskip("peft", reason="peft is not installed: loading an exported adapter was not tested")
        assert 'base, folder = "model", "."' in code
        code = code.replace('"."', f'"{folder}"')
        monkeypatch.chdir(place)                                             # "model": the folder that the run named
    else:
        monkeypatch.chdir(folder)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    ids = torch.arange(4, 16)[None]
    with torch.no_grad():
        found, plain = names["model"].eval()(ids).logits, llama().eval()(ids).logits
        if kind == "exported":
            assert torch.equal(found, AutoModelForCausalLM.from_pretrained(run / "model").eval()(ids).logits)
    assert float((found - plain).norm()) > 0.01 * float(plain.norm()) and len(names["tokenizer"]("w1 w2").input_ids) == 2


@pytest.mark.parametrize(("name", "hub", "public"), [
    ("owner/name", True, "owner/name"), ("smollm2-135m", True, "HuggingFaceTB/SmolLM2-135M-Instruct"),
    ("chitchat", False, "chitchat"), ("/home/me/secret/model", False, "model"), ("data/rows.jsonl", False, "rows.jsonl"),
    ("../a", False, "a"), ("./a/b", False, "b")])
def test_a_path_is_not_a_name_of_the_hub(name, hub, public):
    assert on_hub(name) == hub and public_name(name) == public


