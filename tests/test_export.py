"""`flora export`: the result and nothing else; and no row of a client anywhere in a run's folder or in what it says."""
import json

import pytest
import torch
from test_engines import settings
from test_engines_guards import CLIENT
from transformers import AutoModelForCausalLM

import flora
from flora.cli import main
from flora.errors import RunError
from flora.exporting import export
from flora.formats import load_peft
from flora.report import read_metrics

MARKER = "Xq7-only-in-the-rows"


@pytest.fixture(scope="module")
def run(place):
    return flora.run(settings(place, "run"))


def test_the_model_is_exported_with_its_card(place, run, capsys):
    out = place / "exported"
    assert main(["export", str(run), "--out", str(out)]) == 0 and str(out) in capsys.readouterr().out
    one, other = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (out, run / "model"))
    assert all(torch.equal(one[name], other[name]) for name in other)
    card = (out / "README.md").read_text()
    listed = {line.split("`")[1] for line in card.splitlines() if line.startswith("* `")}
    assert listed == {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert "client-0" not in card and {path.name for path in out.iterdir()} >= {"model.safetensors", "tokenizer.json", "README.md"}


def test_an_adapter_is_exported_for_all_servers(place, run):
    folder = export(run, place / "one", client="client-1")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4 and not config.get("rank_pattern")
    want, have = load_peft(run / "rounds" / "1" / "clients" / "client-1"), load_peft(folder)
    for layer, a in want.items():
        assert float((have[layer].delta() - a.delta()).norm()) <= 1e-6 * float(a.delta().norm())
    card = (folder / "README.md").read_text()
    assert "# One client's adapter" in card and "library_name: peft" in card and "client-1" not in card
    beside = flora.run(settings(place, "beside", merge_into="adapter"))
    assert "# A LoRA adapter" in (export(beside, place / "beside-out") / "README.md").read_text()


def test_the_card_says_what_privacy_there_was(place):
    private = flora.run(settings(place, "private", **CLIENT))
    spent, card = read_metrics(private)[-1]["epsilon"], (export(private, place / "p") / "README.md").read_text()
    assert f"Differential privacy of a client: ε = {spent:.2f} at δ = 1e-05" in card
    assert not (place / "p" / "privacy.key").exists()
    own = (export(private, place / "p1", "client-0") / "README.md").read_text()
    assert "does not cover it" in own and "ε" not in own


def test_what_cannot_be_exported_is_refused(place, run, tmp_path):
    with pytest.raises(RunError, match="a finished run at .*; got no run"):
        export(tmp_path, tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(RunError, match="exists"):
        export(run, tmp_path / "out")
    with pytest.raises(RunError, match="an adapter of client 'nobody'"):
        export(run, tmp_path / "x", "nobody")
    bare = flora.run(settings(place, "bare", save_model=False))
    with pytest.raises(RunError, match="save_model: false"):
        export(bare, tmp_path / "y")
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "z")]) == 1


@pytest.mark.parametrize("changes", [{}, {"partition": {"dirichlet_alpha": 1.0, "label": "mood"}, "groups": {"count": 2}},
                                     {"learning_rate": 1e39}], ids=["plain", "groups", "all fail"])
def test_no_text_of_a_client_is_in_the_run_folder_or_in_what_is_said(place, capsys, caplog, changes):
    """Rows hold a marker that no tokenizer of these tests knows; it may be nowhere, nor may a label's name."""
    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    (place / "marked.jsonl").write_text("".join(
        json.dumps({**row, "prompt": f"{row['prompt']} {MARKER}", "completion": f"{row['completion']} {MARKER}"}) + "\n"
        for row in rows))
    folder = flora.run(settings(place, "marked", dataset=str(place / "marked.jsonl"), overwrite=True, quiet=False, **changes))
    held = b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())
    said = "".join(capsys.readouterr()) + caplog.text
    assert len(held) > 10_000 and len(said) > 500
    assert MARKER.encode() not in held and MARKER not in said
