"""What clients minimise: the chunked loss against the formula, and classification and preferences trained in one batch as alone."""
import math

import pytest
import torch
from tiny import TARGETS, Plain, llama, near, token_rows
from torch import nn
from torch.nn.functional import cross_entropy, logsigmoid

from flora import Broadcast, Cohort, LocalClient, TrainConfig
from flora.data import batch_of
from flora.errors import ConfigError, DataError
from flora.evaluate import sequence_log_likelihoods, with_reference
from flora.losses import CausalLM, Classification, Preference, linear_cross_entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("n", "chunk"), [(1, None), (7, 1), (13, 5), (13, 13), (13, 99), (0, None)])
@pytest.mark.parametrize("biased", [True, False])
def test_the_chunked_loss_and_its_gradient_follow_the_error_rule(dtype, n, chunk, biased):
    draw = torch.Generator().manual_seed(n)
    hidden, weight = torch.randn(n, 11, generator=draw).to(dtype), torch.randn(37, 11, generator=draw).to(dtype)
    bias = torch.randn(37, generator=draw).to(dtype) if biased else None
    labels, upstream = torch.randint(37, (n,), generator=draw), torch.rand(n, generator=draw)

    def plain(kind):
        h = hidden.to(kind).requires_grad_()
        logits = nn.functional.linear(h, weight.to(kind), None if bias is None else bias.to(kind))
        losses = cross_entropy(logits if kind == torch.float64 else logits.float(), labels, reduction="none")
        return losses.detach(), torch.autograd.grad((losses * upstream.to(losses.dtype)).sum(), h)[0]

    exact, own = plain(torch.float64), plain(dtype)
    h = hidden.clone().requires_grad_()
    losses, right = linear_cross_entropy(h, weight, labels, bias, chunk)
    got = losses.detach(), torch.autograd.grad((losses * upstream.to(losses.dtype)).sum(), h)[0]
    assert right is None and losses.dtype == torch.promote_types(dtype, torch.float32) and got[1].dtype == dtype
    for ours, theirs, true in zip(got, own, exact, strict=True):
        allowed = 2 * float((theirs.double() - true).norm())
        allowed += (1e-7 + 2 * torch.finfo(ours.dtype).eps / max(1, true.numel()) ** 0.5) * float(true.norm())
        assert float((ours.double() - true).norm()) <= allowed
    with torch.no_grad():
        logits = nn.functional.linear(hidden, weight, bias)
        assert linear_cross_entropy(hidden, weight, labels, bias, chunk)[1].tolist() == (logits.argmax(-1) == labels).tolist()


def test_no_more_logits_exist_than_a_chunk(monkeypatch):
    """128 rows of 1,000 logits, 16 at a time: nothing larger than the weight is ever made."""
    from torch.utils._python_dispatch import TorchDispatchMode
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor))
            return out

    hidden, weight = torch.randn(128, 8, requires_grad=True), torch.randn(1000, 8)
    with Watch():
        losses, _ = linear_cross_entropy(hidden, weight, torch.arange(128), chunk=16)
        losses.sum().backward()
    assert max(sizes) == 16 * 1000
    sizes.clear()
    with Watch():
        cross_entropy(hidden @ weight.T, torch.arange(128))
    assert max(sizes) == 128 * 1000


def test_a_nan_in_one_row_stays_there_and_a_huge_loss_is_right():
    hidden, weight = torch.randn(5, 8), torch.randn(30, 8)
    hidden[2], hidden[3] = math.nan, 1e6 * weight[4]
    h = hidden.clone().requires_grad_()
    losses, _ = linear_cross_entropy(h, weight, torch.tensor([0, 1, 2, 3, 4]), chunk=4)
    losses.sum().backward()
    bad = torch.tensor([False, False, True, False, False])
    assert losses.isnan().tolist() == bad.tolist() and h.grad.isnan().all(1).tolist() == bad.tolist()
    huge = cross_entropy(hidden[3:4].double() @ weight.double().T, torch.tensor([3]))
    assert losses[3].item() == pytest.approx(huge.item(), rel=1e-5)


def test_only_hidden_gets_a_gradient_once():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4)
    losses, _ = linear_cross_entropy(hidden, weight, torch.tensor([1, 2, 3]))
    gradient = torch.autograd.grad(losses.sum(), hidden, create_graph=True)[0]
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), hidden)


def classifier(dtype=torch.float64):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForSequenceClassification(LlamaConfig(
            vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            num_labels=3, pad_token_id=0, initializer_range=0.2)).to(dtype)


def sorted_rows(count, seed):
    """The class is the third of the vocabulary that the last token is from."""
    rows = [row["input_ids"] for row in token_rows(count, seed)]
    return [{"input_ids": ids, "label": ids[-1] // 16} for ids in rows]


def test_classification_trains_in_company_as_alone_and_learns():
    """Clients of different ranks; the head is a target, its rank its number of classes at least."""
    model = classifier()
    config = TrainConfig(2e-2, max_steps=20, per_device_train_batch_size=8, loss=Classification())
    clients = [LocalClient(f"c{k}", sorted_rows(32, k), rank, 2 * rank) for k, rank in enumerate((8, 3, 5))]
    targets = (*TARGETS, "score")
    together = Cohort(model, clients, config, targets).fit(Broadcast())
    for client, update in zip(clients, together, strict=True):
        [alone] = Cohort(model, [client], config, targets).fit(Broadcast())
        assert near(update.adapters, alone.adapters) and "score" in update.adapters
        assert update.metrics["last_loss"] < 0.7 * math.log(3)
    by_hand = cross_entropy(model(**batch_of([{**row, "labels": row["input_ids"]} for row in clients[0].rows[:2]], False).inputs()
                                  ).logits, torch.tensor([row["label"] for row in clients[0].rows[:2]]), reduction="none")
    batch = batch_of(clients[0].rows[:2], False, sequences=Classification().sequences)
    assert torch.allclose(Classification()(model, batch), by_hand)
    with pytest.raises(DataError, match="one row a sequence"):
        Cohort(llama(), clients[:1], config, TARGETS).fit(Broadcast())


def pairs(count, seed):
    """The answer that repeats the prompt's first token is preferred."""
    out = []
    for row in token_rows(count, seed, longest=6):
        prompt = row["input_ids"]
        good, bad = [prompt[0]] * 3, [(prompt[0] + 7) % 40 + 2] * 2
        out.append({side: {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
                    for side, answer in (("chosen", good), ("rejected", bad))})
    return out


def test_preferences_train_in_company_as_alone_and_learn():
    model = llama(dtype=torch.float64)
    rows = [with_reference(model, pairs(12, k)) for k in range(3)]
    clients = [LocalClient(f"c{k}", rows[k], rank, 2 * rank) for k, rank in enumerate((8, 2, 4))]
    config = TrainConfig(1e-2, max_steps=12, per_device_train_batch_size=4, loss=Preference(0.5))
    together = Cohort(model, clients, config, TARGETS).fit(Broadcast())
    for client, update in zip(clients, together, strict=True):
        [alone] = Cohort(model, [client], config, TARGETS).fit(Broadcast())
        assert near(update.adapters, alone.adapters) and update.metrics["last_loss"] < 0.7 * math.log(2)


def test_a_preference_loss_is_the_papers():
    """At the base it is log 2; with other references the formula, written out from transformers' logits."""
    model, loss = llama(dtype=torch.float64), Preference(0.3)
    rows = with_reference(model, pairs(3, 0))
    batch = batch_of(rows, False, sequences=loss.sequences)
    assert torch.allclose(loss(model, batch), torch.full((3,), math.log(2), dtype=torch.float64))

    def log_p(row):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
        each = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        return sum(float(each[i, label]) for i, label in enumerate(labels.tolist()) if label != -100)

    moved = [{**row, "reference": (row["reference"][0] - 1 - i, row["reference"][1] + 2)} for i, row in enumerate(rows)]
    gains = [[log_p(r[side]) - r["reference"][i] for i, side in enumerate(("chosen", "rejected"))] for r in moved]
    expected = [-logsigmoid(torch.tensor(0.3 * (good - bad), dtype=torch.float64)) for good, bad in gains]
    got = loss(model, batch_of(moved, False, sequences=loss.sequences))
    assert torch.allclose(got, torch.stack(expected))
    assert sequence_log_likelihoods(model, [r["chosen"] for r in rows]) == pytest.approx([log_p(r["chosen"]) for r in rows])
    with pytest.raises(DataError, match="with_reference"):
        loss(model, batch_of(pairs(1, 0), False, sequences=loss.sequences))


def test_rows_with_nothing_to_learn_are_passed_over():
    mute = {"chosen": {"input_ids": [3, 4], "labels": [-100, -100]}, "rejected": {"input_ids": [3, 4], "labels": [-100, 4]}}
    assert Preference().terms(mute) == 0 and Preference().terms(pairs(1, 0)[0]) == 1
    cohort = Cohort(llama(), [LocalClient("c", [mute], 2)], TrainConfig(loss=Preference()), TARGETS)
    assert cohort.fit(Broadcast()) == [] and "nothing to learn" in cohort.failures["c"]
    assert CausalLM().terms({"labels": [5, -100, 7]}) == 1


def test_checkpointing_of_a_model_that_cannot_is_refused():
    config = TrainConfig(gradient_checkpointing=True)
    with pytest.raises(ConfigError, match="gradient_checkpointing.*Plain"):
        Cohort(Plain(llama()), [LocalClient("c", token_rows(3), 2)], config, TARGETS).fit(Broadcast())
