"""`flora partition`: the rows that a run would train on, as tables and as bars."""
import json
import sys
import xml.etree.ElementTree as ET

import pytest
from tiny import save_model, write_rows

from flora.cli import main
from flora.config import parse
from flora.skew import label_skew


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    write_rows(tmp_path / "rows.jsonl", 120)
    (tmp_path / "c.yaml").write_text("dataset: rows.jsonl\nmodel_name_or_path: model\nnum_clients: 6\neval_rows_per_client: 2\n"
                                     "server_eval_rows: 6\npartition: {dirichlet_alpha: 0.5, label: mood}\n")
    return tmp_path


def test_tables_and_bars_of_clients_and_groups(place, capsys):
    assert main(["partition", "c.yaml", "--groups", "2", "--plot", "bars.svg"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("clients: mood", "client-5", "group-1", "near-IID", "similar together", "m0 "))
    drawn = ET.parse("bars.svg").getroot()
    texts = [node.text for node in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"m0", "m1", "m2", "client-0", "all", "near-IID groups"} <= set(texts)
    first = (place / "bars.svg").read_bytes()
    assert main(["partition", "c.yaml", "--groups", "2", "--plot", "bars.svg"]) == 0
    assert (place / "bars.svg").read_bytes() == first and not list(place.glob(".bars*"))


def test_the_rows_are_those_that_the_run_trains_on(place):
    """Counted against the job of a run with the same config."""
    from flora.engines.prepare import prepare

    save_model(place / "model")
    lines = {json.loads(line)["completion"]: line for line in (place / "rows.jsonl").read_text().splitlines(True)}
    (place / "rows.jsonl").write_text("".join(lines.values()))  # no text twice: a text tells its mood
    moods = {text: json.loads(line)["mood"] for text, line in lines.items()}
    config = parse({"dataset": "rows.jsonl", "model_name_or_path": "model", "num_clients": 4, "max_examples_per_client": 15,
                    "server_eval_rows": 6, "device": "cpu", "partition": {"dirichlet_alpha": 2.0, "label": "mood"}})
    seen, job = label_skew(config), prepare(config, lambda _: None)
    assert seen.rows == {client.name: len(client.rows) for client in job.clients} and seen.groups == []
    words = job.tokenizer.decode
    for client in job.clients:
        texts = [" ".join(words([t for t in row["labels"] if t >= 0]).replace("<eos>", "").split()) for row in client.rows]
        assert seen.found[client.name] == {m: float(n) for m in ("m0", "m1", "m2") if (n := [moods[t] for t in texts].count(m))}


def test_rows_without_labels_are_shown_by_their_tokens(place, capsys):
    save_model(place / "model")
    assert main(["partition", "c.yaml", "--partition.dirichlet_alpha", "None", "--partition.label", "None", "--partition.iid"]) == 0
    said = capsys.readouterr().out
    assert "hashed bins of tokens (no labels)" in said and "near-IID" not in said
    assert main(["partition", "c.yaml", "--label", "who"]) == 0 and "clients: who" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "says"), [
    (["--groups", "7"], "num_groups: expected 1 to 6"), (["--label", "sort"], "rows with a 'sort' of every client"),
    (["--plot", "nowhere/bars.svg"], "--plot: expected a file that can be written"),
    (["--num_clients", "500"], "lower num_clients")],
    ids=str)
def test_refusals_are_one_paragraph(place, arguments, says, capsys):
    assert main(["partition", "c.yaml", *arguments]) == 1
    said = capsys.readouterr()
    assert says in said.err and said.err.count("\n") == 1 and said.out == ""


def test_without_matplotlib_it_says_what_to_install(place, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["partition", "c.yaml", "--plot", "bars.svg"]) == 1 and "flora[plot]" in capsys.readouterr().err
    assert main(["partition", "c.yaml"]) == 0
