"""Formats: rows of every form become prompt and completion; files, folders and the two data sets are read."""

import json
import logging
from collections import Counter

import pytest
from data_helpers import ANSWER, ROWS, USER, check_splits

import flora.data as data
from flora.data import builders
from flora.errors import DataError


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"prompt": "q", "completion": "a"}, "q", "a"),
        ({"prompt": [USER], "completion": [ANSWER]}, [USER], "a"),
        ({"prompt": [USER], "completion": "a"}, [USER], "a"),
        ({"prompt": "q", "completion": [ANSWER]}, [USER], "a"),
        ({"messages": [USER, ANSWER, USER, ANSWER, USER]}, [USER, ANSWER, USER], "a"),
        ({"instruction": "do", "input": "this", "output": "a"}, "do\n\nthis", "a"),
        ({"instruction": "do", "input": "", "output": "a"}, "do", "a"),
        ({"instruction": "do", "output": 7}, "do", "7"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [USER], "a"),
        ({"conversations": [USER, ANSWER]}, [USER], "a"),
    ],
)
def test_every_form_becomes_prompt_and_completion(row, prompt, completion):
    [got] = data.normalise([{**row, "who": "x"}])
    assert got == {"prompt": prompt, "completion": completion, "who": "x"}


def test_a_system_turn_stays_in_the_prompt():
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    [row] = data.normalise([{"conversations": turns}])
    assert [turn["role"] for turn in row["prompt"]] == ["system", "user"]


def test_rows_without_a_completion_are_left_out_and_counted(caplog):
    rows = [{"prompt": "q", "completion": c} for c in ("a", " ", None)] + [{"messages": [USER]}, {"messages": [ANSWER]}]
    with caplog.at_level(logging.WARNING):
        assert len(data.normalise(rows)) == 1
    assert "left out 4 of 5 rows" in caplog.text
    with pytest.raises(DataError, match="none of the 1 rows"):
        data.normalise([{"prompt": "q", "completion": ""}])


def test_wrong_columns_and_malformed_rows_are_named():
    with pytest.raises(DataError, match="row 0 of x has the columns 'text', 'id'; expected .*prompt, completion"):
        data.normalise([{"text": "q", "id": 1}], "x")
    with pytest.raises(DataError, match="row 1 of x.*unknown role 'robot'"):
        data.normalise([{"messages": [USER, ANSWER]}, {"messages": [{"role": "robot", "content": "q"}]}], "x")
    with pytest.raises(DataError, match="expected messages with 'role'"):
        data.normalise([{"messages": ["q", "a"]}])
    with pytest.raises(DataError, match="expected a text, found dict"):
        data.normalise([{"prompt": "q", "completion": {"a": 1}}])


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.csv", "x.parquet", "folder"])
def test_files_and_folders_are_read(tmp_path, name):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / name
    if name == "x.json":
        path.write_text(json.dumps(ROWS))
    elif name == "x.csv":
        path.write_text("prompt,completion,who\n" + "".join(f"{','.join(row.values())}\n" for row in ROWS))
    elif name == "x.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif name == "folder":
        path.mkdir()
        for i, half in enumerate((ROWS[:2], ROWS[2:])):
            (path / f"{i}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in half))
        (path / "README.md").write_text("not data")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert data.load_rows(path) == ROWS
    assert data.load_rows(str(path), limit=3) == ROWS[:3]


def test_nested_messages_survive_a_file(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"messages": [USER, ANSWER] * n}) + "\n" for n in (1, 2)))
    assert [row["prompt"] for row in data.load_rows(path)] == [[USER], [USER, ANSWER, USER]]


def test_unreadable_files_are_named(tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(ROWS[0]) + "\n" + '{"prompt": "q", "completion"\n')
    with pytest.raises(DataError, match="broken.jsonl, line 2"):
        data.load_rows(broken)
    broken.write_bytes(json.dumps(ROWS[0]).encode() + b'\n{"prompt": "\xff", "completion": "a"}\n')
    with pytest.raises(DataError, match="broken.jsonl, line 2"):
        data.load_rows(broken)
    for name in ("x.parquet", "x.json"):
        (tmp_path / name).write_text("nonsense")
        with pytest.raises(DataError, match=name):
            data.load_rows(tmp_path / name)
    for name, content in (("empty.jsonl", ""), ("empty.json", "[]"), ("empty.csv", "prompt,completion\n")):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=name):
            data.load_rows(tmp_path / name)
    with pytest.raises(DataError, match="no file or folder"):
        data.load_rows(tmp_path / "missing.jsonl")
    (tmp_path / "x.txt").write_text("q")
    with pytest.raises(DataError, match="of one kind, found x.txt"):
        data.load_rows(tmp_path / "x.txt")
    with pytest.raises(DataError, match="of one kind"):
        data.load_rows(tmp_path)
    with pytest.raises(DataError, match="is a model"):
        data.load_rows("smollm2-135m")
    with pytest.raises(DataError, match="limit"):
        data.load_rows(broken, limit=0)


def test_a_hub_that_does_not_answer_is_said(monkeypatch):
    import datasets

    def no_network(*args, **keywords):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    with pytest.raises(DataError, match="someone/some-set.*no route.*spelling"):
        data.load_rows("someone/some-set")


def test_chitchat_rows_are_seen_from_the_sender(tmp_path):
    def turn(sender, *texts):
        return [{"text": text, "timestamp": "", "sender": sender} for text in texts]

    talk = [turn("A", "1", "2"), turn("B", " ", "3"), turn("A", ""), turn("B", "4"), turn("A", "5"), turn("B", "6")]
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"c": {"messages": talk, "start": ""}, "alone": {"messages": [turn("A", "hi")]}}))
    rows = builders.chitchat(path)
    assert [(row["sender"], row["completion"], row["conversation"]) for row in rows] == [
        ("B", "3\n4", "c"),
        ("A", "5", "c"),
        ("B", "6", "c"),
    ]
    assert rows[0]["prompt"] == [{"role": "user", "content": "1\n2"}]
    assert rows[1]["prompt"] == [{"role": "user", "content": "3\n4"}]  # not the sender's own opening
    assert [(m["role"], m["content"]) for m in rows[2]["prompt"]] == [
        ("user", "1\n2"),
        ("assistant", "3\n4"),
        ("user", "5"),
    ]
    assert builders.chitchat(path, 1) == rows[:1]
    path.write_text("{")
    with pytest.raises(DataError, match="delete its folder"):
        builders.chitchat(path)


def test_tweets_that_are_not_utf8_are_read(tmp_path):
    path = tmp_path / "tweets.csv"
    head = b"sentiment,confidence,text\r\n"
    lines = [b'negative,1,"cars_\xd1_.no\r\r thank, you"\r\n', b"neutral,,so\r\n", b'positive,0.5,"  "\r\n']
    path.write_bytes(head + b"".join(lines))
    rows = {row["label"]: row for row in builders.tweets(path)}
    assert set(rows) == {"negative", "neutral"}
    assert rows["negative"]["prompt"].endswith("\n\nTweet: cars__.no thank, you")
    assert rows["negative"]["completion"] == "negative" and rows["neutral"]["confidence"] is None
    path.write_bytes(head)
    with pytest.raises(DataError, match="no tweets"):
        builders.tweets(path)


@pytest.mark.fetch
def test_the_real_tweets():
    rows = data.load_rows("tweets")
    assert Counter(row["label"] for row in rows) == {"negative": 16186, "neutral": 15018, "positive": 6954}
    assert len({row["label"] for row in data.load_rows("tweets", limit=50)}) == 3


@pytest.mark.fetch
def test_the_real_conversations_have_people_and_no_leak():
    rows = data.load_rows("chitchat")
    assert len(rows) > 100_000
    assert all(row["prompt"][0]["role"] == row["prompt"][-1]["role"] == "user" for row in rows)
    clients = data.partition(rows, 8, data.Partition(by="sender"), seed=0)
    assert min(map(len, clients.values())) > 1000
    check_splits(rows, clients, data.split(rows, clients, 0, 32, 256), "conversation")
