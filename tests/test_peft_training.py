"""Accelerated PEFT models train as PEFT's do: under the Trainer, in accelerate's loop, with checkpointed activations, resumed."""
import copy

import pytest
import torch
from oracles import check, relative
from peft_models import LAYERS, fill, in_double, model_of, passes, trained
from tiny import token_rows

from flora.integrations.peft import accelerate, restore

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`", "ignore:None of the inputs", "ignore:.*use_reentrant")
STEPS = 3


def rows():
    """Of one length, so that no padding is needed."""
    return [{"input_ids": (row["input_ids"] * 3)[:10], "labels": (row["labels"] * 3)[:10]} for row in token_rows(12)]


def trainer(model, folder, steps=STEPS, **options):
    from transformers import PrinterCallback, Trainer, TrainingArguments

    settings = {"max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "optim": "sgd", "save_strategy": "no",
                "lr_scheduler_type": "constant", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": 3, **options}
    made = Trainer(model, TrainingArguments(str(folder), **settings), train_dataset=rows())
    made.remove_callback(PrinterCallback)
    return made


def adapter_of(model):
    return {name: p.detach().clone() for name, p in trained(model).items()}


def moved(after, before):
    """What training changed, as one vector: the error rule is about that, not about where it began."""
    return torch.cat([(after[name].double() - before[name].double()).flatten() for name in before])


def test_the_trainer_gives_pefts_adapters(tmp_path, calls):
    model = model_of()
    before, found = adapter_of(model), []
    for one in (accelerate(copy.deepcopy(model)), model, in_double(model)):
        calls.clear()
        trainer(one, tmp_path).train()
        found.append(moved(adapter_of(one), before))
        assert len(calls) == (LAYERS["llama"] * STEPS if one is not model and one.dtype == torch.float32 else 0)
    check(*found, torch.float32, "adapters after three steps")
    assert float(found[2].norm()) > 0.01


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_activations_give_the_same_gradients(calls, reentrant, dropout):
    model = model_of(dtype=torch.float64, lora_dropout=dropout).train()
    plain = passes(model)
    accelerate(model).gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    actual = passes(model)
    assert len(calls) == 2 * LAYERS["llama"]                           # forward, and once more for the backward
    assert max(relative(actual[name], plain[name]) for name in plain) < 1e-6


def test_the_trainer_checkpoints_and_resumes(tmp_path, calls):
    options = {"save_strategy": "steps", "save_steps": 2, "gradient_checkpointing": True, "optim": "adamw_torch"}
    whole = accelerate(model_of(lora_dropout=0.2))
    trainer(whole, tmp_path / "whole", 4, **options).train()
    again = accelerate(fill(model_of(lora_dropout=0.2), seed=9))
    calls.clear()
    trainer(again, tmp_path / "whole", 4, **options).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert calls == ["lora_add_"] * 2 * 2 * LAYERS["llama"]
    first, second = adapter_of(whole), adapter_of(again)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_accelerates_loop_in_bf16(calls):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    results = []
    AcceleratorState._reset_state(True)
    for prepare in (accelerate, restore):
        model = model_of().train()
        accelerator = Accelerator(mixed_precision="bf16", cpu=True)
        before, optimizer = adapter_of(model), torch.optim.SGD(trained(model).values(), 1e-2)
        prepared, optimizer = accelerator.prepare(prepare(model), optimizer)
        for row in rows()[:3]:
            batch = {name: torch.tensor([values]) for name, values in row.items()}
            accelerator.backward(prepared(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        results.append(moved(adapter_of(accelerator.unwrap_model(prepared)), before))
    AcceleratorState._reset_state(True)
    assert calls == ["lora_linear"] * 3 * LAYERS["llama"] and relative(*results) < 0.05 and float(results[0].norm()) > 0.05


def test_an_optimizer_made_before_goes_on(calls):
    model = model_of(dtype=torch.float64)
    twin = copy.deepcopy(model)
    for one, switch in ((model, True), (twin, False)):
        optimizer = torch.optim.AdamW(trained(one).values(), 1e-2)
        for step in range(STEPS):
            if switch:
                accelerate(one) if step == 1 else restore(one)
            passes(one)
            optimizer.step()
    assert len(calls) == LAYERS["llama"]                               # the second step alone
    first, second = adapter_of(model), adapter_of(twin)
    assert max(relative(first[name], second[name]) for name in first) < 1e-5
