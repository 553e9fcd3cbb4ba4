"""MMLU's layout through lm-evaluation-harness: its accuracy is that of our own likelihood scoring of the same prompts."""
import math
import random
import sys

import pytest
import torch
from data_helpers import make_tokenizer
from tiny import llama

from flora import mmlu
from flora.errors import ConfigError, DataError
from flora.scoring import Choices, label_accuracy

WHY = "lm-eval is not installed, so not tested: MMLU by lm-evaluation-harness; pip install 'flora[eval]'"
SIZES = {"anatomy": 9, "high_school_physics": 14, "law": 1}


def model():
    return llama(3, vocab_size=263, max_position_embeddings=4096, tie_word_embeddings=False).train()


def rows(count, seed=0, subject="anatomy"):
    draw = random.Random(f"{subject}{seed}")
    words = [f"word{i}" for i in range(30)]
    return [{"question": f" {' '.join(draw.sample(words, 4))}?", "subject": subject, "choices": draw.sample(words, 4),
             "answer": draw.randrange(4)} for _ in range(count)]


def write(path, records):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)


@pytest.fixture
def folder(tmp_path):
    test = [row for subject, count in SIZES.items() for row in rows(count, 0, subject)]
    random.Random(0).shuffle(test)
    write(tmp_path / "test-00000-of-00002.parquet", test[:11])
    write(tmp_path / "test-00001-of-00002.parquet", test[11:])
    return tmp_path


def prompt(row, examples):
    """The prompt as MMLU's task writes it, here by hand."""
    def ask(r):
        listed = [f"{letter}. {choice}" for letter, choice in zip("ABCD", r["choices"], strict=True)]
        return "\n".join([r["question"].strip(), *listed, "Answer:"])

    shown = "".join(f"{ask(r)} {'ABCD'[r['answer']]}\n\n" for r in examples)
    about = row["subject"].replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {about}.\n\n{shown}{ask(row)}"


def ours(net, tokenizer, test, dev):
    made = []
    for row in test:
        ids = tokenizer(prompt(row, dev))["input_ids"]
        ends = [tokenizer(f" {letter}")["input_ids"] for letter in "ABCD"]
        made.append(Choices([{"input_ids": ids + end, "labels": [-100] * len(ids) + end} for end in ends], row["answer"]))
    return label_accuracy(net, made, 8)


@pytest.mark.parametrize("shots", [0, 2, None])
def test_the_accuracy_is_that_of_our_own_scoring_of_the_same_prompts(folder, shots, monkeypatch):
    HFLM, asked = pytest.importorskip("lm_eval.models.huggingface", reason=WHY).HFLM, []
    real = HFLM.loglikelihood
    monkeypatch.setattr(HFLM, "loglikelihood", lambda self, all_: asked.extend(r.args for r in all_) or real(self, all_))
    net, tokenizer = model(), make_tokenizer(None)
    dev = {subject: rows(6, 1, subject) for subject in SIZES}
    if shots != 0:
        write(folder / "dev-00000-of-00001.parquet", [row for mine in dev.values() for row in mine])
    state = torch.random.get_rng_state()
    found = mmlu.lm_eval_mmlu(net, tokenizer, folder, 4, shots)
    assert net.training and tokenizer.pad_token is None and torch.equal(state, torch.random.get_rng_state())
    taken = 5 if shots is None else shots
    assert found["questions"] == sum(SIZES.values()) and found["num_fewshot"] == taken and list(found["subjects"]) == sorted(SIZES)
    whole = [prompt(row, dev[subject][:taken]) for subject in SIZES for row in rows(SIZES[subject], 0, subject)]
    assert sorted(asked) == sorted((text, f" {letter}") for text in whole for letter in "ABCD")
    right = 0
    for subject, count in SIZES.items():
        acc = ours(net, tokenizer, rows(count, 0, subject), dev[subject][:taken])
        got = found["subjects"][subject]
        assert got["acc"] == pytest.approx(acc) and got["questions"] == count
        right += acc * count
    assert found["acc"] == pytest.approx(right / 24) and 0 < right < 24
    assert mmlu.lm_eval_mmlu(net, tokenizer, folder, 3, shots)["acc"] == pytest.approx(found["acc"])


def test_standard_errors_are_the_harness_own(folder):
    metrics = pytest.importorskip("lm_eval.api.metrics", reason=WHY)
    net, tokenizer = model(), make_tokenizer(None)
    found = mmlu.lm_eval_mmlu(net, tokenizer, folder)
    errors = []
    for subject, count in SIZES.items():
        right = round(found["subjects"][subject]["acc"] * count)
        hits = [1.0] * right + [0.0] * (count - right)
        error = found["subjects"][subject]["acc_stderr"]
        assert error is None if count == 1 else error == pytest.approx(metrics.mean_stderr(hits))
        errors.append(error or 0.0)
    assert found["acc_stderr"] == pytest.approx(float(metrics.pooled_sample_stderr(errors, list(SIZES.values()))))
    assert math.isfinite(found["acc_stderr"]) and found["acc_stderr"] > 0


def test_a_missing_harness_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(ConfigError, match=r"lm-evaluation-harness.*pip install 'flora\[eval\]'"):
        mmlu.lm_eval_mmlu(model(), make_tokenizer(None), folder)


def test_folders_and_files_of_another_form_are_refused(tmp_path):
    for where, said in [(tmp_path / "nowhere", "expected a folder"), (tmp_path, "test-.*parquet; got nothing")]:
        with pytest.raises(DataError, match=said):
            mmlu._rows(where, None)
    path, good = tmp_path / "test-0.parquet", rows(3)
    for bad, said in [([{"question": "q", "answer": 1}], "without subject, choices"), ([{**good[0], "answer": 4}], "row 0.*0 to 3"),
                      ([good[0], {**good[0], "choices": ["a"]}], "row 1.*four choices"), ([{**good[0], "answer": "A"}], "row 0"),
                      ([{**good[0], "question": " "}], "row 0"), ([{**good[0], "subject": None}], "row 0")]:
        write(path, bad)
        with pytest.raises(DataError, match=f"test-0.parquet.*{said}"):
            mmlu._rows(tmp_path, None)
    write(path, good)
    assert mmlu._rows(tmp_path, None) == ({"anatomy": good}, {}, 0)
    for shots, said in [(1, "1 examples of every subject.*got 0 of anatomy"), (-1, "num_fewshot of at least 0")]:
        with pytest.raises(DataError, match=said):
            mmlu._rows(tmp_path, shots)
    write(tmp_path / "dev-0.parquet", rows(3, 1))
    with pytest.raises(DataError, match="5 examples of every subject.*got 3"):
        mmlu._rows(tmp_path, None)
    path.write_text("nonsense")
    with pytest.raises(DataError, match="test-0.parquet: expected a parquet file"):
        mmlu._rows(tmp_path, None)


def test_a_batch_size_of_zero_is_refused(folder):
    pytest.importorskip("lm_eval", reason=WHY)
    with pytest.raises(DataError, match="batch size of at least 1; got 0"):
        mmlu.lm_eval_mmlu(model(), make_tokenizer(None), folder, 0)
