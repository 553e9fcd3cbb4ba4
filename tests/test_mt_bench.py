"""MT-bench's answers: both turns as a model that is asked by hand writes them, in FastChat's file; bad files are named."""
import json

import pytest
from test_scoring import talker, write_out
from tiny import llama, tokenizer

from flora import mt_bench
from flora.errors import ConfigError, DataError

TURNS = [("w1 w2", "w3"), ("w4", "w5 w6 w7 w8"), ("w9 w10 w11 w12", "w13 w14")]
QUESTIONS = [{"question_id": 81 + i, "category": "writing", "turns": list(turns), "reference": []} for i, turns in enumerate(TURNS)]


def write(path, records=QUESTIONS):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_both_turns_are_answered_and_the_second_sees_the_first(tmp_path, batch_size):
    model = talker().train()
    questions = mt_bench.read_questions(write(tmp_path / "question.jsonl"))
    records = mt_bench.answer_questions(model, tokenizer(), questions, "tiny", 6, batch_size)
    assert model.training
    model.eval()
    for record, question, (first, second) in zip(records, QUESTIONS, TURNS, strict=True):
        encode = tokenizer().convert_tokens_to_ids
        one = write_out(model, encode(f"<user> {first} <eos> <assistant>".split()), 6)
        talk = f"<user> {first} <eos> <assistant> {one} <eos> <user> {second} <eos> <assistant>"
        two = write_out(model, encode(talk.split()), 6)
        assert one and two
        assert record == {"question_id": question["question_id"], "answer_id": record["answer_id"], "model_id": "tiny",
                          "choices": [{"index": 0, "turns": [one, two]}], "tstamp": 0.0}
    assert len({record["answer_id"] for record in records}) == 3
    mt_bench.write_answers(tmp_path / "tiny.jsonl", records)
    written = (tmp_path / "tiny.jsonl").read_text()
    assert [json.loads(line) for line in written.splitlines()] == records and written.endswith("}\n")
    again = mt_bench.answer_questions(model, tokenizer(), questions, "tiny", 6, 2)
    assert again == records
    other = mt_bench.answer_questions(model, tokenizer(), questions, "other", 6, 2)
    assert {r["answer_id"] for r in other}.isdisjoint(r["answer_id"] for r in records)


def test_a_talk_that_is_too_long_loses_its_start_and_no_room_is_said():
    model = llama(max_position_embeddings=12)
    question = mt_bench.MTQuestion(1, "x", (" ".join(["w1"] * 30), "w2"))
    [record] = mt_bench.answer_questions(model, tokenizer(), [question], "m", 4)
    assert len(record["choices"][0]["turns"]) == 2
    with pytest.raises(ConfigError, match="12 positions.*got 12"):
        mt_bench.answer_questions(model, tokenizer(), [question], "m", 12)
    with pytest.raises(DataError, match="batch size"):
        mt_bench.answer_questions(model, tokenizer(), [question], "m", 4, 0)


@pytest.mark.parametrize(("line", "said"), [
    ("{", "no JSON"), ("[1]", "got"), ('{"question_id": 1, "category": "x", "turns": ["a"]}', "expected .*turns"),
    ('{"question_id": 1, "category": "x", "turns": ["a", 2]}', "expected"), ('{"category": "x", "turns": ["a", "b"]}', "expected"),
    ('{"question_id": 1, "category": "x", "turns": ["a", " "]}', "expected"),
    ('{"question_id": 1, "turns": ["a", "b"]}', "expected"),
    (json.dumps(QUESTIONS[0]), "81 again"), ("\udcff", "UTF-8")])
def test_a_bad_line_is_named_with_its_file(tmp_path, line, said):
    path = write(tmp_path / "question.jsonl", QUESTIONS[:2])
    path.write_bytes(path.read_bytes() + b"\n" + line.encode("utf-8", "surrogateescape") + b"\n")
    with pytest.raises(DataError, match=f"question.jsonl, line 4.*{said}"):
        mt_bench.read_questions(path)


def test_missing_and_empty_files_are_named(tmp_path):
    with pytest.raises(DataError, match="nowhere.jsonl.*question.jsonl"):
        mt_bench.read_questions(tmp_path / "nowhere.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="empty.jsonl.*got an empty file"):
        mt_bench.read_questions(tmp_path / "empty.jsonl")
