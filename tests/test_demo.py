"""The demo, cut short: the real model, real conversations, the command line, and PEFT on what it wrote."""
from pathlib import Path

import pytest
import torch

from flora.cli import main
from flora.formats import load_peft
from flora.report import read_metrics

ROOT = Path(__file__).parent.parent
SHORT = ["--num_clients", "2", "--lora_r", "64", "4", "--num_rounds", "1", "--max_steps", "6", "--server_eval_rows", "12",
         "--eval_rows_per_client", "3", "--quiet"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "run"
    assert main(["run", str(ROOT / "flora" / "demo.yaml"), "--output_dir", str(folder), *SHORT]) == 0
    return folder


@pytest.mark.fetch
@pytest.mark.slow
def test_the_global_model_is_better_after_a_round(run_folder: Path) -> None:
    rows = read_metrics(run_folder)
    losses = [row["eval_loss"] for row in rows if row["kind"] == "server"]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    assert [row["rank"] for row in rows if row["kind"] == "client"] == [64, 4]


@pytest.mark.fetch
@pytest.mark.slow
def test_a_client_s_adapter_gives_the_same_logits_in_peft(run_folder: Path) -> None:
    from peft import PeftModel

    from flora.data import load_model, load_tokenizer
    from flora.nn import applied

    folder = sorted((run_folder / "rounds" / "0" / "clients").iterdir())[0]
    model, tokenizer = load_model("smollm2-135m", torch.float32).eval(), load_tokenizer("smollm2-135m")
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        plain = model(ids).logits
        with applied(model, load_peft(folder)):
            ours = model(ids).logits
        theirs = PeftModel.from_pretrained(model, folder)(ids).logits
    assert not torch.equal(ours, plain)
    # two orders of fp32 sums over 30 layers: far below what an adapter at a wrong scale would give
    assert (ours - theirs).abs().max() < 1e-3 * (ours - plain).abs().max()
