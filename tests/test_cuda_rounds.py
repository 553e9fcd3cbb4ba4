"""Training on a real GPU: the numbers against the CPU's and fp64, no wait in a step, the same bits again, nothing left behind."""
import gc
import json
from dataclasses import replace

import pytest
import torch
from oracles import check, check_adapters, tokens
from oracles import llama as small
from tiny import TARGETS, adapter, llama, quantise, token_rows

import flora
from flora import Broadcast, Cohort, LocalClient, TrainConfig, attention
from flora.data import batch_of
from flora.evaluate import evaluate, generate
from flora.nn import target_shapes
from flora.packing import line, packable, traits_of
from flora.report import Report
from flora.server import Server, first_broadcast

pytestmark = pytest.mark.gpu
RANKS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)
SHAPES = target_shapes(llama(), TARGETS)
START = {name: adapter(64, shape, i) * 0.1 for i, (name, shape) in enumerate(SHAPES.items())}
CONFIG = TrainConfig(1e-3, max_steps=2, per_device_train_batch_size=2, max_grad_norm=0.5)
CUDA = torch.device("cuda")


def clients_of(ranks=RANKS):
    return [LocalClient(f"c{k}", token_rows(4, seed=k, longest=8 + 4 * k), rank, 8) for k, rank in enumerate(ranks)]


def fit(model, config=CONFIG, clients=None, broadcast=None, **options):
    cohort = Cohort(model, clients or clients_of(), config, TARGETS, **options)
    updates = cohort.fit(broadcast or Broadcast(start=START))
    assert cohort.failures == {} and len(updates) == len(cohort.clients)
    return updates


def same(some, others):
    return all(torch.equal(getattr(a.adapters[n], f), getattr(b.adapters[n], f))
               for a, b in zip(some, others, strict=True) for n in a.adapters for f in ("A", "B", "scale"))


@pytest.mark.parametrize("changes", [{}, {"lora_dropout": 0.2}, {"gradient_checkpointing": True}, {"adapter_dtype": "bfloat16"}],
                         ids=str)
def test_ten_clients_of_mixed_ranks_end_where_they_end_on_a_cpu(changes):
    """Cohort.fit in fp32 against the CPU, both against fp64, by the error rule."""
    config = replace(CONFIG, **changes)
    actual, plain = fit(llama().to(CUDA), config), fit(llama(), config)
    exact = fit(llama(dtype=torch.float64), replace(config, adapter_dtype=None))
    for a, p, e in zip(actual, plain, exact, strict=True):
        assert all(t.A.device.type == "cpu" for t in a.adapters.values())
        check_adapters(a.adapters, p.adapters, e.adapters, a.client)


def test_bf16_is_finite_and_as_near_to_fp64_as_on_a_cpu():
    """The base in bf16: a step's length is given, its direction is not, so the distances of two trainings are compared."""
    exact = fit(llama(dtype=torch.float64))

    def distance(updates):
        pairs = [(u.adapters[n], e.adapters[n]) for u, e in zip(updates, exact, strict=True) for n in u.adapters]
        assert all(bool(torch.isfinite(a.A).all() and torch.isfinite(a.B).all()) for a, _ in pairs)
        return sum(float((a.delta() - e.delta()).square().sum()) for a, e in pairs) ** 0.5

    assert 0 < distance(fit(llama(dtype=torch.bfloat16).to(CUDA))) <= 2 * distance(fit(llama(dtype=torch.bfloat16)))


@pytest.mark.parametrize("changes", [{}, {"lora_dropout": 0.1}, {"gradient_accumulation_steps": 2}, {"adalora_keep": 0.5}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_step_but_the_first_waits_for_the_gpu(changes, dtype):
    """torch's own watch over synchronising calls, from the first step that is told of to the last."""
    model, clients, told = llama(dtype=dtype).to(CUDA), clients_of((8, 4, 2)), []
    config = replace(CONFIG, max_steps=6, **changes)
    cohort = Cohort(model, clients, config, TARGETS, max_tokens_per_batch=4096)
    cohort.fit(Broadcast())                                     # kernels are compiled, traits tried

    def on_step(*step):
        told.append(step)
        torch.cuda.set_sync_debug_mode("default" if len(told) == 6 * len(clients) else "error")

    try:
        cohort.fit(Broadcast(), on_step=on_step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(told) == 18 and cohort.failures == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_again_and_on_a_side_stream(dtype):
    """Training twice, and beside the default stream; phases are timed where the work is."""
    model = llama(dtype=dtype).to(CUDA)
    config, stream = replace(CONFIG, lora_dropout=0.1, max_steps=4), torch.cuda.Stream()
    first = fit(model, config)
    cohort = Cohort(model, clients_of(), config, TARGETS)
    assert same(first, cohort.fit(Broadcast(start=START))) and cohort.seconds["forward"] > 0 and cohort.seconds["backward"] > 0
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert same(first, fit(model, config))


def test_states_that_are_kept_go_on_where_they_were():
    """Two rounds with the optimiser's states on the CPU between them, against the CPU's, by the error rule."""
    ends = []
    for model in (llama().to(CUDA), llama(), llama(dtype=torch.float64)):
        states = {}
        fit(model, optimizer_states=states)
        ends.append(fit(model, optimizer_states=states, broadcast=Broadcast(start=START, version=1)))
    for actual, plain, exact in zip(*ends, strict=True):
        check_adapters(actual.adapters, plain.adapters, exact.adapters, actual.client)


def test_nothing_stays_on_the_gpu():
    """Memory after a round is what it was before."""
    model = llama(dtype=torch.bfloat16).to(CUDA)
    fit(model)
    gc.collect()
    before = torch.cuda.memory_allocated()
    fit(model)
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + 4096


@pytest.mark.parametrize("strategy", ["flora", "fedit", "ffa", "flexlora", "fedsb", "full"])
def test_two_rounds_of_a_server_leave_the_base_where_the_cpu_leaves_it(strategy):
    """Training, aggregation and merge, by the error rule of the weights."""
    ends, config = [], replace(CONFIG, max_steps=1)
    for device in (CUDA, torch.device("cpu")):
        model, clients = llama().to(device), clients_of((4, 4, 4))
        server = Server(strategy, clients, replace(first_broadcast(strategy, SHAPES, clients), run="r"), shapes=SHAPES)
        for _ in range(2):
            server.close(Cohort(model, clients, config, TARGETS).fit(server.broadcast))
        Cohort(model, clients, config, TARGETS).fit(server.broadcast)
        ends.append([flora.nn.weights(model, [name])[name].cpu() for name in SHAPES])
    assert all(float((a - b).norm()) <= 1e-5 * float(b.norm()) for a, b in zip(*ends, strict=True))


def test_a_base_that_multiplies_by_itself_trains_as_on_a_cpu():
    """lora_add_ on an int8 linear, in a cohort."""
    actual, plain = fit(quantise(llama()).to(CUDA)), fit(quantise(llama()))
    exact = fit(quantise(llama(dtype=torch.float64)))
    for a, p, e in zip(actual, plain, exact, strict=True):
        check_adapters(a.adapters, p.adapters, e.adapters, a.client)


def test_evaluation_and_answers_are_the_cpus():
    model, rows = llama().to(CUDA), token_rows(20, seed=3)
    assert evaluate(model, rows, 4)["loss"] == pytest.approx(evaluate(llama(), rows, 4)["loss"], rel=1e-5)
    assert generate(model, [[3, 4, 5], [6, 7]], 8) == generate(llama(), [[3, 4, 5], [6, 7]], 8)


@pytest.mark.parametrize("window", [None, 4, 40])
@pytest.mark.parametrize("size", [16, 64, 128])
def test_a_line_of_many_lengths_is_one_flash_call_and_right(window, size):
    """Packed sequences in bf16 against one by one, forward and backward, with fewer heads of keys and windows."""
    from transformers import MistralConfig, MistralForCausalLM

    rows = token_rows(12, seed=2, longest=60) + token_rows(1, longest=3, prompt=1) * 3
    settings = {"vocab_size": 48, "hidden_size": 4 * size, "intermediate_size": 24, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": size, "initializer_range": 0.1,
                "sliding_window": window}
    found = []
    for dtype, device, packed in ((torch.bfloat16, CUDA, True), (torch.bfloat16, CUDA, False), (torch.float64, "cpu", False)):
        torch.manual_seed(0)
        model = MistralForCausalLM(MistralConfig(**settings)).to(device, dtype)
        weight = model.model.layers[0].self_attn.q_proj.weight
        if packed:
            assert traits_of(model).packs and attention.flash_on(weight.device) is not None
            batch = batch_of(rows, True).map(lambda t, to=device: t.to(to))
            with packable(model), line(model, batch.lengths):
                logits = model(**batch.inputs()).logits[0]
        else:
            logits = torch.cat([model(input_ids=torch.tensor([row["input_ids"]], device=device)).logits[0] for row in rows])
        [gradient] = torch.autograd.grad(logits.double().square().sum(), weight)
        found.append((logits.detach().cpu(), gradient.cpu()))
    for actual, plain, exact in zip(*found, strict=True):
        check(actual, plain, exact, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pefts_layers_computed_by_flora(dtype):
    """accelerate on the GPU: logits and gradients by the error rule."""
    peft = pytest.importorskip("peft", reason="peft is not installed: its layers on a GPU were not tested")
    from flora.integrations.peft import accelerate, fallbacks

    torch.manual_seed(0)
    model = peft.get_peft_model(small(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"],
                                                         init_lora_weights=False))
    base, found = {name: p.detach().clone() for name, p in model.state_dict().items()}, []

    def passes(kind, device, fast):
        model.load_state_dict(base)
        model.to(device, kind)
        for p in model.parameters():
            p.grad = None
        logits = (accelerate(model) if fast else model)(input_ids=tokens().to(device)).logits
        logits.double().square().sum().backward()
        return logits.detach().cpu(), torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None])

    found = [passes(torch.float64, "cpu", False), passes(dtype, CUDA, False), passes(dtype, CUDA, True)]
    assert fallbacks(model) == {}
    for exact, plain, actual in zip(*found, strict=True):
        check(actual, plain, exact, dtype)


@pytest.mark.parametrize("strategy", ["flora", "fedit"])
def test_a_run_a_run_again_and_a_run_that_goes_on_are_the_same_bits(place, strategy, monkeypatch):
    """flora.run with device: cuda, again, and stopped after a round and resumed."""
    settings = {"model_name_or_path": str(place / "model"), "dataset": str(place / "rows.jsonl"), "strategy": strategy,
                "num_clients": 4, "num_rounds": 3, "lora_r": [8, 4, 2, 1] if strategy == "flora" else 4, "lora_alpha": "2r",
                "max_steps": 4, "learning_rate": 1e-2, "lora_dropout": 0.1, "eval_rows_per_client": 3, "server_eval_rows": 8,
                "target_modules": list(TARGETS), "quiet": True, "device": "cuda", "keep_rounds": 3, "merge_residual": True}

    def bits(name):
        return {str(f.relative_to(place / name)): f.read_bytes() for f in sorted((place / name / "rounds").rglob("*.safetensors"))}

    for name in ("one", "two"):
        flora.run({**settings, "output_dir": str(place / f"{strategy}-{name}")})
    folder, real = place / f"{strategy}-three", Report.on_step

    def stop(self, client, *step):
        if json.loads((folder / "run.json").read_text())["rounds_done"]:
            raise KeyboardInterrupt
        real(self, client, *step)

    monkeypatch.setattr(Report, "on_step", stop)
    with pytest.raises(KeyboardInterrupt):
        flora.run({**settings, "output_dir": str(folder)})
    monkeypatch.undo()
    flora.resume(folder)
    assert len(bits(f"{strategy}-one")) >= 12
    assert bits(f"{strategy}-two") == bits(f"{strategy}-one") == bits(f"{strategy}-three")
