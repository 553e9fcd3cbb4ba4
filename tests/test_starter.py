"""`flora init`: a config for one's own data that runs as it stands."""
import json
from pathlib import Path

import pytest
import yaml
from tiny import save_model, write_rows

import flora
from flora.cli import main
from flora.config import RunConfig, load, parse
from flora.errors import ConfigError, DataError


def test_a_config_for_ones_own_rows_runs_from_anywhere(tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path / "data")
    save_model(tmp_path / "data" / "model")
    write_rows("rows.jsonl", 80)
    assert main(["init", "../my run", "--data", "rows.jsonl", "--model", "model"]) == 0
    folder = tmp_path / "my run"
    assert capsys.readouterr().out == f"flora run '{folder / 'config.yaml'}'\n"
    assert [p.name for p in folder.iterdir()] == ["config.yaml"]
    text = (folder / "config.yaml").read_text()
    assert "#  your columns: who (4 values), mood (3 values)" in text and "@" not in text
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(folder / "config.yaml"), "--quiet", "--max_steps", "1", "--num_rounds", "1", "--device", "cpu"]) == 0
    assert json.loads((folder / "run" / "run.json").read_text()) == {"state": "finished", "rounds_done": 1}


def test_without_data_it_is_a_config_of_the_demos_data(tmp_path):
    settings = load(flora.init("config", tmp_path / "mine") / "config.yaml")
    config = parse(settings)
    assert (config.dataset, config.partition.by, config.model_name_or_path) == ("chitchat", "sender", "smollm2-135m")
    assert config.ranks() == [32, 16, 8, 4] and config.output_dir == str(tmp_path / "mine" / "run")
    assert set(settings) <= set(RunConfig.model_fields)


def test_a_name_of_the_hub_stays_a_name_and_columns_cannot_break_the_file(tmp_path):
    rows = [{"prompt": "a", "completion": "b", "x\ny: [": "1", "long": ["no", "scalar"]}] * 3
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    made = yaml.safe_load((flora.init("config", tmp_path / "c", data=tmp_path / "rows.json", model="org/name: x") / "config.yaml")
                          .read_text())
    assert made["model_name_or_path"] == "org/name: x" and made["dataset"] == str(tmp_path / "rows.json")
    assert made["partition"] == {"iid": True}


def test_nothing_is_written_where_something_is_wrong(tmp_path):
    with pytest.raises(ConfigError, match="expected flower, or a folder alone; got 'flour'"):
        flora.init("flour", tmp_path / "a")
    with pytest.raises(ConfigError, match="holds something"):
        flora.init("config", Path(__file__).parent)
    with pytest.raises(ConfigError, match="with a config alone"):
        flora.init("flower", tmp_path / "a", data="x")
    with pytest.raises(DataError, match="no file or folder"):
        flora.init("config", tmp_path / "a", data=tmp_path / "no.jsonl")
    assert list(tmp_path.iterdir()) == []
