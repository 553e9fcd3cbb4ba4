"""transformers' Trainer and TRL's SFTTrainer, with flora's operator and without: the same losses, the same file to the byte."""
import copy
import json

import pytest
import torch
from oracles import check
from peft_models import LAYERS, in_double, model_of
from safetensors import safe_open
from test_peft_training import adapter_of, moved, rows
from tiny import tokenizer

from flora.integrations.peft import accelerate

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 4
SETTINGS = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "optim": "sgd", "save_strategy": "no",
            "lr_scheduler_type": "constant", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": 3, "bf16": False,
            "logging_steps": 1}


def with_trainer(model, folder, **options):
    from transformers import Trainer, TrainingArguments

    return Trainer(model, TrainingArguments(str(folder), **{**SETTINGS, **options}), train_dataset=rows())


def with_sft(model, folder, **options):
    trl = pytest.importorskip("trl", reason="trl is not installed: training under its SFTTrainer was not tested")
    from datasets import Dataset

    settings = trl.SFTConfig(str(folder), **{**SETTINGS, **options})
    return trl.SFTTrainer(model, settings, train_dataset=Dataset.from_list(rows()), processing_class=tokenizer())


@pytest.mark.parametrize("make", [with_trainer, with_sft], ids=["Trainer", "SFTTrainer"])
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointed"])
def test_losses_are_pefts_by_the_error_rule_and_so_is_what_is_saved(make, options, tmp_path, calls):
    model = model_of()
    before, found = adapter_of(model), []
    names = {}
    for how, one in (("flora", accelerate(copy.deepcopy(model))), ("peft", model), ("exact", in_double(model))):
        calls.clear()
        made = make(one, tmp_path / how, **options)
        assert made.model is one                                       # no trainer wrapped it anew
        made.train()
        losses = torch.tensor([entry["loss"] for entry in made.state.log_history if "loss" in entry], dtype=torch.float64)
        found.append((losses, moved(adapter_of(one), before)))
        assert bool(calls) == (how == "flora") and len(calls) % (LAYERS["llama"] * STEPS) == 0
        made.save_model(str(tmp_path / how))
        with safe_open(tmp_path / how / "adapter_model.safetensors", "pt") as file:
            names[how] = {name: file.get_tensor(name) for name in file.keys()}              # noqa: SIM118
        state = {name.replace(".default", ""): p for name, p in one.state_dict().items() if "lora_" in name}
        assert all(torch.equal(names[how][name], p) for name, p in state.items()) and set(state) == set(names[how])
    (loss, change), (plain_loss, plain_change), (exact_loss, exact_change) = found
    assert len(loss) == STEPS and float(exact_change.norm()) > 0.01 and len(set(exact_loss.tolist())) == STEPS
    check(loss, plain_loss, exact_loss, torch.float32, "losses")
    check(change, plain_change, exact_change, torch.float32, "adapters")
    shapes = [{name: (t.shape, t.dtype) for name, t in names[how].items()} for how in ("flora", "peft")]
    assert list(names["flora"]) == list(names["peft"]) and shapes[0] == shapes[1]
    assert (tmp_path / "flora" / "README.md").read_bytes() == (tmp_path / "peft" / "README.md").read_bytes()
    configs = [json.loads((tmp_path / how / "adapter_config.json").read_text()) for how in ("flora", "peft")]
    for config in configs:
        config["target_modules"].sort()                                # PEFT writes a set, in the order that this process hashes to
    assert configs[0] == configs[1]


@pytest.mark.parametrize("make", [with_trainer, with_sft], ids=["Trainer", "SFTTrainer"])
def test_what_a_trainer_saves_untrained_is_pefts_to_the_byte(make, tmp_path):
    for how, prepare in (("flora", accelerate), ("peft", lambda model: model)):
        make(prepare(model_of()), tmp_path / how).save_model(str(tmp_path / how))
    one, other = ((tmp_path / how / "adapter_model.safetensors").read_bytes() for how in ("flora", "peft"))
    assert one == other and len(one) > 1000
