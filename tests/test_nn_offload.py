"""Bases that accelerate keeps on the CPU or the disk (device_map): adapters lie where the layer computes; merges are refused, as
what is written to a weight that is not in memory is lost."""
import pytest
import torch
from oracles import relative
from tiny import TARGETS, adapter, llama, near, token_rows

import flora
from flora.client import LocalClient, TrainConfig
from flora.cohort import Cohort
from flora.errors import TargetError
from flora.messages import Broadcast
from flora.versions import MergeConfig

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed: offloaded bases were not tested")
IDS = torch.arange(12).reshape(2, 6)
PLACES = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
          "model.rotary_emb": "cpu", "lm_head": "cpu"}


def whole():
    return llama(tie_word_embeddings=False)


@pytest.fixture(params=["device_map", "cpu", "disk"])
def away(request, tmp_path):
    """The same model with some or all of its weights elsewhere: on meta, until a layer runs."""
    if request.param == "device_map":
        model = accelerate.dispatch_model(whole(), PLACES, main_device="cpu", offload_dir=str(tmp_path))
    elif request.param == "cpu":
        model = accelerate.cpu_offload(whole(), torch.device("cpu"))
    else:
        model = accelerate.disk_offload(whole(), str(tmp_path), torch.device("cpu"))
    assert any(p.is_meta for p in model.parameters())
    return model


def some(model):
    return {name: adapter(3, shape, i) for i, (name, shape) in enumerate(flora.nn.target_shapes(model, TARGETS).items())}


def test_adapters_train_as_on_a_base_in_memory(away):
    found = []
    for model in (away, whole()):
        flora.nn.load_adapters(flora.attach(model, 3, targets=TARGETS), some(model))
        out = model(input_ids=IDS, labels=IDS)
        out.loss.backward()
        grads = [f.grad for layer in flora.nn.lora_layers(model).values() for f in (layer.A, layer.B)]
        found.append([out.logits, *grads])
        flora.detach(model)
    assert max(relative(one, other) for one, other in zip(*found, strict=True)) < 2e-6 and not any(t.is_meta for t in found[0])


def test_a_merge_that_would_be_lost_is_refused_and_kept_beside_instead(away):
    with pytest.raises(TargetError, match="offloaded"):
        flora.merge(away, some(away))
    plain = flora.merge(whole(), some(away))
    flora.nn.accumulate(away, some(away))
    assert relative(away(IDS).logits, plain(IDS).logits) < 2e-6
    flora.attach(away, 2, targets=TARGETS)                             # beside what is beside: still where the layer computes
    assert relative(away(IDS).logits, plain(IDS).logits) < 2e-6


def test_a_cohort_trains_and_goes_on_beside_the_base(away):
    clients = [LocalClient(f"c{k}", token_rows(6, k), 2 + k, 4.0) for k in range(2)]
    found = []
    for model in (away, whole()):
        following, own = Broadcast(), []
        for _ in range(2):
            cohort = Cohort(model, clients, TrainConfig(1e-2, max_steps=2), TARGETS, 64, MergeConfig(into="adapter"))
            own.append(cohort.fit(following))
            following = flora.aggregate(own[-1])
        found.append(own)
    for one, other in zip(*found, strict=True):
        assert all(near(a.adapters, b.adapters, 1e-3) for a, b in zip(one, other, strict=True)) and len(one) == 2
