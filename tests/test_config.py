"""The settings: what is refused, and that the message names the key, what came and the nearest key that exists."""
import pytest
import yaml

from flora.config import PartitionConfig, RunConfig, load, parse
from flora.errors import ConfigError


def refused(settings, match):
    with pytest.raises(ConfigError, match=match):
        parse(settings)


def test_the_defaults_stand_and_survive_a_round_trip(tmp_path):
    config = parse({})
    assert config == RunConfig() and (config.strategy, config.dtype, config.weighting) == ("flora", "auto", "examples")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump()))
    assert parse(load(path), str(path)) == config


@pytest.mark.parametrize(("settings", "says"), [
    ({"learning_rat": 1}, "learning_rat: no such key; did you mean learning_rate"),
    ({"num_client": 1}, "did you mean num_clients"), ({"lora_rank": 8}, "lora_rank: no such key"),
    ({"partition": {"idd": True}}, "partition.idd: no such key; did you mean partition.iid"),
    ({"partition": {"dirichlet": 1.0}}, "partition.dirichlet: no such key; did you mean partition.dirichlet_alpha"),
    ({"shards": 2}, "shards: no such key; did you mean partition.shards"),
    ({"iid": True}, "iid: no such key; did you mean partition.iid"),
    ({"partition": {"sed": 1}}, r"partition.sed: no such key\.$"),          # seed is a key of another level
    ({"qqqq": 1}, r"qqqq: no such key\.$")], ids=str)
def test_an_unknown_key_is_refused_with_the_nearest_one(settings, says):
    refused(settings, says)


def test_every_wrong_key_is_named_at_once():
    refused({"overwrit": True, "num_rounds": 0, "dtype": "int8", "nonsens": 1},
            "num_rounds: .*greater than 0; got 0; dtype: .*got 'int8'; overwrit: no such key; did you mean overwrite.*nonsens")


@pytest.mark.parametrize(("key", "value"), [
    ("num_clients", 0), ("num_rounds", -1), ("fraction_train", 0), ("fraction_train", 1.01), ("lora_r", 0), ("lora_r", -4),
    ("lora_r", 2.5), ("lora_r", [8, 0]), ("lora_r", "many"), ("lora_alpha", 0), ("lora_alpha", -1.0), ("lora_alpha", "3r"),
    ("lora_dropout", 1.0), ("lora_dropout", -0.1), ("learning_rate", 0), ("learning_rate", "fast"), ("warmup_steps", -1),
    ("weight_decay", -1), ("max_grad_norm", -1), ("max_steps", 0), ("num_train_epochs", 0), ("max_length", 1),
    ("per_device_train_batch_size", 0), ("gradient_accumulation_steps", 0), ("server_eval_rows", 0), ("keep_rounds", -1),
    ("dtype", "int8"), ("lr_scheduler_type", "step"), ("weighting", "size"), ("seed", "x"), ("partition", "iid"), ("strategy", 7)])
def test_values_out_of_range_are_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=f"the settings: {key}: ") as caught:
        parse({key: value, "num_clients": 2} if key != "num_clients" else {key: value})
    text = str(caught.value)
    assert "constrained" not in text and "[" not in text.split(";")[0].split(":")[1] and "got" in text and "\n" not in text


def test_a_rank_of_0_is_told_in_one_sentence():
    refused({"lora_r": 0}, r"^the settings: lora_r: Input should be greater than 0; got 0\.$")


def test_rules_that_exclude_each_other():
    refused({"partition": {"by": "who", "iid": True}}, "partition: expected .*one of by, iid, dirichlet_alpha, shards; got by, iid")
    refused({"partition": {"shards": 2, "dirichlet_alpha": 1, "label": "x"}}, "got dirichlet_alpha, shards")
    refused({"partition": {"equal_sizes": True}}, "partition.equal_sizes: expected dirichlet_alpha with it")
    assert parse({"partition": {"dirichlet_alpha": 0.1, "label": "label", "equal_sizes": True}}).partition.equal_sizes
    refused({"max_steps": 3, "num_train_epochs": 1}, "max_steps or num_train_epochs; got both")
    assert parse({"partition": {"by": "who", "iid": False}}).partition == PartitionConfig(by="who")
    assert parse({"max_steps": 3, "num_train_epochs": None}).max_steps == 3


def test_lists_have_one_number_a_client():
    assert parse({"lora_r": [8, 4], "num_clients": 2}).ranks() == [8, 4]
    assert parse({"lora_r": [8], "num_clients": 3}).ranks() == [8, 8, 8]
    for key in ("lora_r", "lora_alpha"):
        for value in ([8, 4, 2], []):
            refused({key: value, "num_clients": 2}, f"{key}: expected one number, or one a client \\(2\\); got {len(value)}")


@pytest.mark.parametrize(("alpha", "expected"), [
    ("2r", [16.0, 8.0]), ("r", [8.0, 4.0]), (32, [32, 32]), (0.5, [0.5, 0.5]), ([3, 1.5], [3, 1.5]), ([7], [7, 7])], ids=str)
def test_the_forms_of_alpha(alpha, expected):
    assert parse({"lora_alpha": alpha, "lora_r": [8, 4], "num_clients": 2}).alphas() == expected


def test_yaml_numbers_with_an_exponent_are_numbers(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("learning_rate: 3e-4\n")                    # YAML 1.1 reads this as a text
    assert parse(load(path)).learning_rate == 3e-4


@pytest.mark.parametrize(("content", "says"), [
    (b"lora_r: [8, 4\n", "is not YAML"), (b"\xff\xfe\x00", "is not YAML"), (b"- a\n- b\n", "keys and values; got list"),
    (b"just text\n", "keys and values; got str"), (b"a: &x [*x]\n", "no such key"), (b"1: 2\n", "Keys should be strings")], ids=str)
def test_files_that_are_no_settings_are_refused(tmp_path, content, says):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=says) as caught:
        parse(load(path), str(path))
    assert "c.yaml" in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml; got No such file"):
        load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load(tmp_path)
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert load(tmp_path / "empty.yaml") == {}
    with pytest.raises(ConfigError, match="keys and values; got list"):
        parse([1])


def test_settings_cannot_be_changed_after_they_were_checked():
    with pytest.raises(ValueError, match="frozen"):
        parse({}).lora_r = 0
