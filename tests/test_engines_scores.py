"""What a run evaluates beside its loss: labels and answers by themselves, files when asked."""
import json
import random

import pytest
from test_engines import of, settings
from tiny import WORDS, llama, save_model

import flora
from flora.config import parse
from flora.data import load_rows
from flora.engines.prepare import prepare
from flora.errors import ConfigError, DataError
from flora.evaluate import sequence_log_likelihoods
from flora.report import read_metrics, summary


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Rows whose label is their first word's class, and rows with an answer."""
    folder, draw = tmp_path_factory.mktemp("scores"), random.Random(0)
    save_model(folder / "model")
    with open(folder / "labels.jsonl", "w") as labels, open(folder / "answers.jsonl", "w") as answers:
        for _ in range(80):
            word = draw.randrange(9)
            text = " ".join([WORDS[word], *draw.sample(WORDS[12:30], 2)])
            labels.write(json.dumps({"prompt": text, "completion": WORDS[30 + word % 3], "label": WORDS[30 + word % 3]}) + "\n")
            answers.write(json.dumps({"prompt": text, "completion": WORDS[word], "answer": WORDS[word]}) + "\n")
    return folder


def config(place, rows, **changes):
    return {**settings(place, f"run-{rows}", "flora"), "dataset": str(place / f"{rows}.jsonl"), "max_steps": 12, "overwrite": True,
            "server_eval_rows": 12, "eval_rows_per_client": 4, **changes}


def test_labels_are_scored_where_rows_have_them(place):
    folder = flora.run(config(place, "labels"))
    rows = read_metrics(folder)
    accuracy = [row["eval_label_accuracy"] for row in of(rows, "server")]
    assert accuracy[-1] > 0.6 > accuracy[0] and accuracy[-1] > accuracy[0] + 0.2
    last = of(rows, "client")[-1]
    assert 0 <= last["eval_label_accuracy_before"] <= 1 and 0 <= last["eval_label_accuracy_after"] <= 1
    assert "labels" in [column.header for column in summary(rows)[0].columns]
    job = prepare(parse(config(place, "labels")), lambda line: None)
    model = llama()
    by_hand = []
    for choice in job.scores.choices[""]:
        scores = sequence_log_likelihoods(model, choice.rows, 8)
        by_hand.append(scores.index(max(scores)) == choice.right)
    assert accuracy[0] == pytest.approx(sum(by_hand) / len(by_hand))


def test_of_personal_models_the_mean_is_scored(place):
    folder = flora.run(config(place, "labels", strategy="fedsa", lora_r=4, lora_alpha="2r"))
    assert 0 <= of(read_metrics(folder), "server")[-1]["eval_label_accuracy"] <= 1


def test_answers_are_matched_where_rows_have_them(place):
    folder = flora.run(config(place, "answers", max_steps=60, learning_rate=2e-2, lora_r=8, lora_alpha="2r"))
    found = [row["eval_exact_match"] for row in of(read_metrics(folder), "server")]
    assert found[0] == 0.0 and found[-1] > 0.0


def test_nothing_else_is_scored_unless_it_is_asked_for(place, monkeypatch):
    from tiny import write_rows
    write_rows(place / "plain.jsonl")
    rows = read_metrics(flora.run(config(place, "plain")))
    assert not [name for name in of(rows, "server")[-1] if "label" in name or "exact" in name]
    rows = read_metrics(flora.run(config(place, "labels", evaluate=[])))
    assert "eval_label_accuracy" not in of(rows, "server")[-1]
    for wanted in ("labels", "answers"):
        with pytest.raises(DataError, match=wanted[:-1]):
            flora.run(config(place, "plain", evaluate=[wanted]))
    with pytest.raises((DataError, ConfigError)):
        flora.run(config(place, "plain", evaluate=["mt_bench:no-such-file.jsonl"]))


def test_mt_bench_answers_are_written_at_the_end(place):
    questions = place / "question.jsonl"
    questions.write_text("".join(json.dumps({"question_id": 80 + i, "category": "w", "turns": [WORDS[i], WORDS[i + 1]]}) + "\n"
                                 for i in range(3)))
    folder = flora.run(config(place, "labels", evaluate=["labels", f"mt_bench:{questions}"], num_rounds=1))
    answers = [json.loads(line) for line in (folder / "question-answers.jsonl").read_text().splitlines()]
    assert [a["question_id"] for a in answers] == [80, 81, 82] and all(len(a["choices"][0]["turns"]) == 2 for a in answers)


def test_the_tweets_are_rows_with_labels():
    from flora.data import cached
    if not cached("tweets"):
        pytest.skip("the tweets are not fetched, so not tested: that auto scores their labels")
    from flora.scoring import has_labels, label_words
    rows = load_rows("tweets", 500)
    assert has_labels(rows) and label_words(rows) == ["negative", "neutral", "positive"]
