"""Sequences in one line without padding: the same numbers as alone, no leak, and models that cannot are found out, not trusted."""
import logging
import math

import pytest
import torch
from tiny import TARGETS, Plain, llama, near, token_rows
from torch import nn

from flora import Broadcast, Cohort, LocalClient, TrainConfig, packing
from flora.data import batch_of
from flora.packing import NAME, line, packable, traits_of

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
         "vocab_size": 48, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}


def made(kind, **changes):
    """A small model of an architecture of transformers, from random numbers large enough that a leak shows."""
    import transformers

    config = getattr(transformers, f"{kind}TextConfig", None) or getattr(transformers, f"{kind}Config")
    config = config(**{**SMALL, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.3)
    return model


def in_a_line(model, rows):
    batch = batch_of(rows, True)
    with packable(model), line(model, batch.lengths):
        return model(**batch.inputs()).logits[0].split(list(batch.lengths))


@pytest.mark.parametrize(("kind", "changes"), [
    ("Llama", {}), ("Qwen3", {"head_dim": 8}), ("Mistral", {"sliding_window": 3}),
    ("OPT", {"ffn_dim": 24, "word_embed_proj_dim": 16}),
    ("Gemma3", {"head_dim": 8, "sliding_window": 4, "num_hidden_layers": 7}), ("GPTNeoX", {})],
    ids=lambda value: value if isinstance(value, str) else "")
def test_each_sequence_of_a_line_gets_what_it_gets_alone(kind, changes):
    """Also with a window shorter than the sequences; the gradient as well."""
    model = made(kind, **changes)
    assert traits_of(model).packs
    rows = token_rows(6, seed=2, longest=14) + token_rows(1, longest=3, prompt=1) * 3
    got = in_a_line(model, rows)
    for row, logits in zip(rows, got, strict=True):
        alone = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        assert float((logits - alone).detach().norm()) <= 1e-5 * float(alone.detach().norm())
    weight = next(p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n)
    packed = torch.autograd.grad(sum(part.square().sum() for part in got), weight)[0]
    alone = [model(input_ids=torch.tensor([row["input_ids"]])).logits for row in rows]
    plain = torch.autograd.grad(sum(logits.square().sum() for logits in alone), weight)[0]
    assert float((packed - plain).norm()) <= 1e-5 * float(plain.norm())


def test_a_nan_reaches_no_other_sequence():
    model = llama()
    rows = token_rows(3, longest=8)
    before = in_a_line(model, rows)
    with torch.no_grad():
        model.model.embed_tokens.weight[rows[1]["input_ids"][0]] = math.nan
    clean = [i for i in (0, 2) if rows[1]["input_ids"][0] not in rows[i]["input_ids"]]
    after = in_a_line(model, rows)
    assert clean and all(torch.equal(after[i][:, 2:40], before[i][:, 2:40]) or not after[i].isnan().all() for i in clean)
    hidden = model.model
    batch = batch_of(rows, True)
    with packable(model), line(model, batch.lengths):
        states = hidden(**batch.inputs())[0][0].split(list(batch.lengths))
    assert states[1].isnan().all() and not any(states[i].isnan().any() for i in clean)


@pytest.mark.parametrize(("kind", "changes", "says"), [
    ("Bloom", {"n_layer": 2, "n_head": 2}, "do not give what they give alone"),
    ("Gemma2", {"head_dim": 8}, "softcap"),
    ("Mamba", {"state_size": 4}, "linear_attention"),
    ("Falcon", {}, "does not take its attention")])
def test_a_model_that_cannot_is_found_out_and_padded_said_once(kind, changes, says, caplog):
    model = made(kind, **changes)
    with caplog.at_level(logging.INFO, "flora.packing"):
        assert not traits_of(model).packs and says in traits_of(model).why
    assert len([r for r in caplog.records if "padded, not packed" in r.message]) == 1
    assert getattr(model.config, "_attn_implementation", None) != NAME


def test_a_head_that_is_not_the_whole_of_the_logits_is_found_out():
    assert traits_of(llama()).head and not traits_of(made("Granite", logits_scaling=3.0)).head
    assert traits_of(made("Granite", logits_scaling=1.0)).head

    assert traits_of(Plain(llama())) == packing.Traits(False, False, "Plain is not a model of transformers")


@pytest.mark.parametrize(("kind", "changes"), [("Llama", {}), ("Granite", {"logits_scaling": 3.0}), ("Gemma2", {"head_dim": 8})])
def test_training_is_the_same_packed_padded_and_past_the_head(kind, changes, monkeypatch):
    model = made(kind, **changes).double()
    clients = [LocalClient(f"c{k}", token_rows(4, seed=k, longest=6 + 5 * k), 4, 8) for k in range(3)]
    config = TrainConfig(1e-2, max_steps=3, per_device_train_batch_size=2, lora_dropout=0.2)
    found = Cohort(model, clients, config, TARGETS).fit(Broadcast())
    monkeypatch.setitem(packing._traits, model, packing.Traits(False, False))
    plain = Cohort(model, clients, config, TARGETS).fit(Broadcast())
    assert all(near(a.adapters, b.adapters) for a, b in zip(found, plain, strict=True))


def test_the_models_own_attention_comes_back_after_an_error():
    model = llama()
    before = model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), packable(model), line(model, [3]):
        assert model.config._attn_implementation == NAME
        raise ZeroDivisionError
    assert model.config._attn_implementation == before and not packing._lines
    Cohort(model, [LocalClient("c", token_rows(3), 2)], TrainConfig(1e-3, max_steps=1), TARGETS).fit(Broadcast())
    assert model.config._attn_implementation == before and not packing._lines


def test_checkpointing_computes_the_same_and_keeps_less(monkeypatch):
    from flora import budget

    model = llama(dtype=torch.float64, num_hidden_layers=6)
    clients = [LocalClient(f"c{k}", token_rows(4, seed=k, longest=20), 4, 8) for k in range(3)]
    plain, less = (TrainConfig(1e-2, max_steps=3, per_device_train_batch_size=2, lora_dropout=0.2, gradient_checkpointing=flag)
                   for flag in (False, True))
    found = [Cohort(model, clients, config, TARGETS).fit(Broadcast()) for config in (plain, less)]
    assert all(near(a.adapters, b.adapters) for a, b in zip(*found, strict=True))
    assert budget._per_token[model][True] < 0.5 * budget._per_token[model][False]
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
