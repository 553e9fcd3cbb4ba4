"""`flora report`: the numbers on the page are those of the run folder, what is missing says why, and no text becomes markup."""
import html
import json
import math
import re
import shutil
import statistics

import pytest
import torch
from page_runs import HOSTILE, make, make_hostile, settings
from tiny import TARGETS, dense, llama, write_rows

import flora
from flora.cli import main
from flora.errors import RunError
from flora.formats import load_peft
from flora.page import facts, gather, reference, write_report
from flora.page.gather import series_of
from flora.page.sections import sections
from flora.page.units import duration, quantity
from flora.report import read_metrics
from flora.skew import label_skew


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("paged")


@pytest.fixture(scope="module")
def runs(place):
    return make(place)


def figures(page):
    """The plots in a page, as page.js reads them."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])["figures"]


def parts(*folders):
    return {part.key: part for part in sections(series_of(list(folders)))}


def cells(table):
    return [[cell.text for cell in row] for row in table.rows]


def visible(page):
    """The page without its scripts and style."""
    return re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.S)


def test_the_page_is_one_file_that_asks_for_nothing_and_has_every_part(runs, tmp_path):
    page = write_report([runs["one"]], tmp_path / "page.html").read_text(encoding="utf-8")
    keys = re.findall(r'<section id="(\w+)"', page)
    assert keys == ["setting", "reached", "clients", "labels", "traffic", "seconds", "errors", "spectrum", "kernels"]
    assert set(re.findall(r'<a href="#(\w+)"', page)) == set(keys)
    assert not re.search(r"<(link|iframe|img|script[^>]+src)|(src|href)=[\"']?(https?:)?//", visible(page))
    assert "default-src 'none'; script-src 'sha256-" in html.unescape(page[:2000]) and "unsafe-eval" not in page[:2000]
    assert set(figures(page)) == set(re.findall(r'class="plot" id="([\w-]+)"', page)) and len(figures(page)) == 14


def test_lines_are_the_rows_of_the_server(runs, tmp_path):
    drawn = figures(write_report([runs["one"], runs["two"]], tmp_path / "page.html").read_text(encoding="utf-8"))
    for line, name in zip(drawn["reached-0"]["data"], ("one", "two"), strict=True):
        rows = [row for row in read_metrics(runs[name]) if row["kind"] == "server"]
        assert line["name"] == name and line["x"] == [0, 1, 2] and line["y"] == [row["eval_loss"] for row in rows]
    boxes = drawn["reached-2"]["data"]
    after = [r["eval_loss_after"] for r in read_metrics(runs["two"]) if r["kind"] == "client" and r["round"] == 1]
    known = [loss for loss in after if loss is not None]
    ends = [min(known), statistics.median(known), max(known)]
    assert [boxes[1][key][1] for key in ("lowerfence", "median", "upperfence")] == ends
    assert len({line["line"]["color"] for line in drawn["reached-0"]["data"]}) == 2


def test_runs_that_differ_by_their_seed_are_one_line_with_a_band(runs):
    (both,) = series_of([runs["one"], runs["again"]])
    ends = [[r["eval_loss"] for r in read_metrics(runs[name]) if r["kind"] == "server"][-1] for name in ("one", "again")]
    found = facts.by_round(both, "eval_loss")[2]
    assert found == {"mean": pytest.approx(sum(ends) / 2), "sd": pytest.approx(abs(ends[0] - ends[1]) / math.sqrt(2)), "count": 2}
    part = parts(runs["one"], runs["again"])["reached"]
    band, line = part.plots[0].figure.data
    assert band.fill == "toself" and max(band.y) == pytest.approx(max(m + h for m, h in zip(line.y, line.customdata, strict=True)))
    assert "standard deviation over seeds" in part.plots[0].caption
    assert len(series_of([runs["one"], runs["two"], runs["again"]])) == 2


def test_what_differs_is_what_differs(runs):
    tables = {table.title: cells(table) for table in parts(runs["one"], runs["two"])["setting"].tables}
    assert tables["What differs between the runs"] == [["strategy", "flora", "zeropad"]]
    assert [row[:3] for row in tables["At a glance"]] == [["one", "flora", "2 of 2"], ["two", "zeropad", "2 of 2"]]
    assert ["learning_rate", "0.01"] in tables["Every key of one"]


def test_a_comparison_is_shown_with_its_seeds_and_in_its_order(place, runs, tmp_path):
    folder = flora.compare(settings(place, "compared", lora_r=4, num_rounds=1), ["flora", "fedit"], [0, 1])
    assert [(one.name, len(one.runs)) for one in series_of([folder])] == [("flora", 2), ("fedit", 2)]
    assert write_report([folder]) == folder / "report.html"
    (folder / "compare.json").unlink()
    shutil.rmtree(folder / "fedit" / "seed-1")
    (folder / "fedit" / "seed-0" / "run.json").write_text('{"state": "running", "rounds_done": 0}')
    (alone,) = series_of([folder])
    assert alone.name == "flora" and alone.left_out == [str(folder / "fedit" / "seed-0")]
    assert "seed-0" in parts(folder)["setting"].notes[0]


def test_clients_are_those_of_the_rows(runs):
    part = parts(runs["one"])["clients"]
    rows = [row for row in read_metrics(runs["one"]) if row["kind"] == "client"]
    table = {row[0]: row for row in cells(part.tables[0])}
    for name in {row["client"] for row in rows}:
        mine = [row for row in rows if row["client"] == name]
        assert table[name][1:5] == [str(mine[0]["rank"]), f"{mine[0]['alpha']:g}", str(mine[0]["num_examples"]), "2"]
        if mine[0]["eval_loss_before"] is not None:
            assert table[name][5:7] == [f"{mine[0]['eval_loss_before']:.4f}", f"{mine[-1]['eval_loss_after']:.4f}"]
        assert table[name][10] == quantity(sum(row["bytes_up"] for row in mine), "B")
    assert [row.text for row in (r[1] for r in part.tables[0].rows)] == ["8", "4", "4", "2"]


def test_labels_are_those_of_the_partition_and_rows_that_changed_are_not_believed(place, runs, tmp_path):
    run = series_of([runs["one"]])[0].first
    column, found, why = reference.label_counts(run)
    assert (column, why) == ("mood", "") and found == label_skew(reference.config_of(run)).found
    shown = parts(runs["one"], runs["two"])["labels"]
    assert len(shown.plots) == 1 and shown.plots[0].title == "mood: one, two"
    other = tmp_path / "other"
    shutil.copytree(runs["one"], other)
    text = (other / "config.yaml").read_text().replace(str(place / "rows.jsonl"), str(write_rows(tmp_path / "more.jsonl", 90)))
    (other / "config.yaml").write_text(text)
    assert "not those of the run any more" in parts(other)["labels"].notes[0]
    (tmp_path / "more.jsonl").unlink()
    assert "not on this machine" in parts(other)["labels"].notes[0] and not parts(other)["labels"].plots


def test_bytes_of_other_ways_are_counted_from_the_model(runs):
    run = series_of([runs["one"]])[0].first
    same, why = reference.equivalents(run)
    model = llama()
    shapes = [m.weight.shape for name, m in model.named_modules() if name.rpartition(".")[2] in TARGETS]
    ranks = [8, 4, 4, 2] * 2
    assert why == "" and same.parameters == sum(p.numel() for p in model.parameters())
    assert same.full == 2 * 8 * 4 * same.parameters and same.dense == 2 * 8 * 4 * sum(o * i for o, i in shapes)
    assert same.averaged == 2 * 4 * sum(r * (o + i) for r in ranks for o, i in shapes)
    table = cells(parts(runs["one"])["traffic"].tables[0])
    sent = sum(row["bytes_up"] + row["bytes_down"] for row in read_metrics(runs["one"]) if row["kind"] == "server")
    assert ["one", quantity(sent, "B"), f"{100 * sent / same.full:.3g} %"] in table
    budget = parts(runs["one"])["traffic"].plots[1].figure.layout
    assert budget.shapes[0].y0 == 0.5e6 and budget.annotations[0].text == "budget 500 kB"


def test_the_spectrum_is_that_of_the_dense_aggregate(runs):
    run = series_of([runs["one"]])[0].first
    found, why = facts.spectrum(run)
    made = load_peft(runs["one"] / "rounds" / "1" / "aggregate")
    assert why == "" and set(found) == set(made)
    for layer, sigma in found.items():
        exact = torch.linalg.svdvals(dense(made[layer]))
        assert torch.tensor(sigma).double() == pytest.approx(exact[:len(sigma)], rel=1e-4, abs=1e-6 * float(exact[0]))
    assert [facts.ranks_for([3.0, 1.0, 0.0], share) for share in (0.5, 0.9, 0.95, 1.0)] == [1, 1, 2, 2]
    assert facts.kind("model.layers.0.self_attn.q_proj") == "q_proj" and facts.kind("blocks.3") == "blocks"


def test_errors_are_those_of_verify_and_too_large_ones_are_left_to_it(runs, monkeypatch):
    part = parts(runs["one"], runs["two"])["errors"]
    made = flora.verify(runs["one"]) + flora.verify(runs["two"])
    assert [row[3] for row in cells(part.tables[0])] == [f"{row['error']:.1e}" for row in made]
    assert part.notes[0].startswith("one: exact: ") and part.notes[1].startswith("two: not exact: ")
    monkeypatch.setattr(facts, "DENSE_FLOPS", 1.0)
    part = parts(runs["one"])["errors"]
    assert not part.tables and f"flora verify {runs['one']}" in part.notes[0]


def test_what_is_missing_says_why(place, runs, tmp_path):
    folder = flora.run(settings(place, "bare", partition={"iid": True}, keep_rounds=0, eval_rows_per_client=0, num_rounds=1,
                                save_model=False, communication_budget_mb=None))
    (folder / "environment.json").unlink()
    config = (folder / "config.yaml").read_text().replace(str(place / "model"), "someone/a-model-of-a-hub")
    (folder / "config.yaml").write_text(config)
    found = parts(folder)
    said = {key: " ".join(part.notes) for key, part in found.items()}
    for key, words in {"clients": "eval_rows_per_client", "labels": "no labels", "traffic": "sizes of someone/a-model-of-a-hub",
                       "errors": "keep_rounds: 0", "spectrum": "keep_rounds: 1", "kernels": "flora doctor"}.items():
        assert words in said[key], (key, said[key])
    assert found["setting"].facts["device"] == "not recorded" and "no budget was set" in found["traffic"].plots[1].caption
    assert write_report([folder], tmp_path / "bare.html").stat().st_size > 1e6


def test_names_are_text_and_nothing_else(place, runs, tmp_path):
    page = write_report([make_hostile(place)], tmp_path / "page.html").read_text(encoding="utf-8")
    shown = visible(page)
    assert all(html.escape(name).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in shown for name in HOSTILE)
    assert "<b>run" not in page and "<img" not in shown and "onerror='" not in shown and "<a href=\"javascript" not in page
    data = re.search(r'id="data">(.*?)</script>', page, re.S)[1]
    assert "<" not in data and "a &lt;b&gt;run" in json.dumps(figures(page)) and page.count("</script>") == 3
    assert HOSTILE[1] in html.unescape(shown.split('id="failures"')[1])


def test_a_round_that_is_not_finished_is_not_counted(runs, tmp_path):
    folder = tmp_path / "running"
    shutil.copytree(runs["one"], folder)
    (folder / "run.json").write_text('{"state": "running", "rounds_done": 1}')
    run = series_of([folder])[0].first
    assert {row["round"] for row in run.clients} == {0} and [row["rounds_done"] for row in run.server] == [0, 1]
    assert parts(folder)["setting"].tiles["rounds"] == "1 of 2, running"


def test_rows_of_other_forms_are_left_out(runs, tmp_path):
    folder = tmp_path / "odd"
    shutil.copytree(runs["one"], folder)
    with (folder / "metrics.jsonl").open("a") as file:
        for row in ('[1]', '{"kind": "server", "rounds_done": "two"}', '{"kind": "client", "round": 1, "client": 7, "rank": "x"}',
                    '{"kind": "server", "rounds_done": 3, "eval_loss": NaN, "seconds": {"forward": "x"}, "bytes_up": null}', "{"):
            file.write(row + "\n")
    (folder / "environment.json").write_text('{"kernels": ["none", {"operator": "x"}], "versions": []}')
    drawn = figures(write_report([folder], tmp_path / "odd.html").read_text(encoding="utf-8"))
    assert drawn["reached-0"]["data"][0]["x"] == [0, 1, 2]


@pytest.mark.parametrize(("what", "says"), [
    ("nowhere", "expected the folder of a run at .*nowhere; there is none"), ("rows.jsonl", "there is a file"),
    ("model", "got one without run.json"), ("begun", "at least one finished round at .*begun; got one that is failed"),
    ("unsaid", "expected the server's rows")])
def test_what_is_no_run_is_refused(place, runs, what, says):
    for name, done in (("begun", 0), ("unsaid", 1)):
        (place / name).mkdir(exist_ok=True)
        (place / name / "run.json").write_text(json.dumps({"state": "failed", "rounds_done": done}))
    with pytest.raises(RunError, match=says):
        write_report([runs["one"], place / what], place / "page.html")
    assert not (place / "page.html").exists()


@pytest.mark.parametrize(("out", "says"), [("page.pdf", "ends in .html"), ("no/page.html", "a folder that exists"),
                                           ("folder.html", "got the folder"), ("mine.html", "is no report of flora")])
def test_a_wrong_out_is_refused(runs, tmp_path, out, says, capsys):
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "mine.html").write_text("<p>my own page</p>")
    assert main(["report", str(runs["one"]), "--out", str(tmp_path / out)]) == 1
    assert says in capsys.readouterr().err and (tmp_path / "mine.html").read_text() == "<p>my own page</p>"


def test_the_verb_prints_where_the_page_is_and_replaces_its_own(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["report", str(runs["one"])]) == 0
    assert capsys.readouterr().out.split() == [str(runs["one"] / "report.html")] * 2
    assert main(["report", str(runs["one"]), str(runs["two"])]) == 0 and (tmp_path / "report.html").exists()
    assert main(["report", str(runs["one"]), str(runs["one"])]) == 1 and "twice" in capsys.readouterr().err
    assert main(["report"]) == 2


@pytest.mark.parametrize(("said", "value"), [
    (quantity(0, "B"), "0 B"), (quantity(999.6, "B"), "1.00 kB"), (quantity(73648976, "B"), "73.6 MB"),
    (quantity(361e6, ""), "361 M"), (quantity(None, "B"), "–"), (duration(0.0428), "42.8 ms"), (duration(12.34), "12.3 s"),
    (duration(245), "4 min 05 s"), (duration(3599.7), "1 h 00 min"), (duration(7800), "2 h 10 min"), (duration(math.nan), "–"),
    (duration(0), "0 s")])
def test_numbers_have_units(said, value):
    assert said == value


def test_series_are_named_by_what_their_folders_share():
    assert gather._common(["flora-seed-0", "flora-seed-1"]) == "flora" and gather._common(["a", "b"]) == "a"
    assert gather._named(["x", "y", "x"]) == ["x", "y", "x (2)"]
