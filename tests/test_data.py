"""Data: what is fetched is whole, what is held out was never trained on, and the loss is on completions only."""

import errno
import hashlib
import http.server
import json
import logging
import random
import shutil
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import flora.data as data
from flora.data import SOURCES, builders, download, models
from flora.errors import DataError, FetchError

PAYLOAD = random.Random(0).randbytes(300_000)


# --- fetching -------------------------------------------------------------------------------------------------------


def write_wheel(path: Path) -> None:
    """Write the smallest wheel that pip accepts, with the payload as its one file."""
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny_data/data.bin", PAYLOAD)
        wheel.writestr("tiny_data-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n")
        wheel.writestr(
            "tiny_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tiny_data-1.0.dist-info/RECORD", "")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A source "tiny" in the table, an empty cache, and the wheel in a folder of its own."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    wheel = shelf / "tiny_data-1.0-py3-none-any.whl"
    write_wheel(wheel)
    content = wheel.read_bytes()
    source = download.Source(
        package="tiny-data",
        version="1.0",
        filename=wheel.name,
        sha256=hashlib.sha256(content).hexdigest(),
        size=len(content),
        disk=len(PAYLOAD),
        licence="MIT",
        member="tiny_data/data.bin",
        files=("data.bin",),
    )
    monkeypatch.setitem(SOURCES, "tiny", source)
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path / "cache"))
    return wheel


@pytest.fixture
def server(tiny, monkeypatch):
    """Serve the wheel on this machine; `cut` closes the connection early, `ranges` says whether parts are served."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers.get("Range")
            state.asked.append(wanted)
            first = int(wanted[6:-1]) if wanted and state.ranges else 0
            content = tiny.read_bytes()
            self.send_response(206 if first else 200)
            if first:
                self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - first))
            self.end_headers()
            self.wfile.write(content[first : state.cut])

        def log_message(self, *_):
            pass

    class State(http.server.ThreadingHTTPServer):
        asked: list
        ranges = True
        cut = None

    state = State(("127.0.0.1", 0), Handler)
    state.asked = []
    threading.Thread(target=state.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    url = f"http://127.0.0.1:{state.server_address[1]}/{tiny.name}"
    monkeypatch.setattr(download, "_ask_pip", lambda source: url)

    def no_pip(source, part):
        raise AssertionError("the direct way works: pip should not be needed")

    monkeypatch.setattr(download, "_pip_download", no_pip)
    yield state
    state.shutdown()
    state.server_close()


def leftovers() -> list[str]:
    """Name what is in the cache besides the finished folders, locks and kept downloads."""
    return [path.name for path in data.cache_folder().iterdir() if path.name.startswith(".tiny-")]


def test_fetch_gives_a_whole_folder_once(server, capsys):
    assert not data.cached("tiny")
    folder = data.fetch("tiny")
    assert (folder / "data.bin").read_bytes() == PAYLOAD and data.cached("tiny")
    assert "0.3 MB" in capsys.readouterr().err  # how large it is, before it starts
    assert data.fetch("tiny", quiet=True) == folder and len(server.asked) == 1
    assert capsys.readouterr().err == ""
    assert not list((data.cache_folder() / "downloads").iterdir()) and not leftovers()


def test_an_interrupted_download_continues_where_it_stopped(server):
    server.cut = 100_000
    with pytest.raises(FetchError, match="run the same command again: it continues"):
        data.fetch("tiny", quiet=True)
    assert not data.cached("tiny")
    server.cut = None
    folder = data.fetch("tiny", quiet=True)
    assert server.asked == [None, "bytes=100000-"]
    assert (folder / "data.bin").read_bytes() == PAYLOAD


def test_a_server_without_ranges_is_read_from_the_start(server):
    server.cut, server.ranges = 100_000, False
    with pytest.raises(FetchError):
        data.fetch("tiny", quiet=True)
    server.cut = None
    assert (data.fetch("tiny", quiet=True) / "data.bin").read_bytes() == PAYLOAD
    assert len(server.asked) == 2


@pytest.mark.parametrize("size", [1000, None])
def test_a_corrupt_part_is_deleted_and_the_next_run_is_right(server, size):
    part = data.cache_folder() / "downloads" / f"{SOURCES['tiny'].filename}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * (size or SOURCES["tiny"].size))
    with pytest.raises(FetchError, match="deleted: run again"):
        data.fetch("tiny", quiet=True)
    assert not part.exists() and not data.cached("tiny")
    assert (data.fetch("tiny", quiet=True) / "data.bin").read_bytes() == PAYLOAD


def test_another_file_under_the_name_is_refused(server, monkeypatch):
    monkeypatch.setitem(SOURCES, "tiny", replace(SOURCES["tiny"], sha256="0" * 64))
    with pytest.raises(FetchError, match="0000.*came"):
        data.fetch("tiny", quiet=True)
    assert not data.cached("tiny")


def test_a_full_disk_is_seen_before_the_first_byte(server, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(FetchError, match="FLORA_CACHE"):
        data.fetch("tiny", quiet=True)
    assert server.asked == []


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_half_an_unpacked_file_is_never_taken_for_whole(server, monkeypatch, failure):
    def copy(packed, out, size):
        out.write(packed.read(1000))
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", copy)
        with pytest.raises(FetchError, match="again"):
            data.fetch("tiny", quiet=True)
    assert not data.cached("tiny") and not leftovers()
    assert (data.fetch("tiny", quiet=True) / "data.bin").read_bytes() == PAYLOAD
    assert len(server.asked) == 1  # the download was kept


def test_a_killed_process_leaves_nothing_that_counts(server):
    target = data.cache_folder() / "tiny-1.0"
    target.mkdir(parents=True)
    stale = data.cache_folder() / ".tiny-1.0-killed"
    stale.mkdir()
    assert not data.cached("tiny")
    assert (data.fetch("tiny", quiet=True) / "data.bin").read_bytes() == PAYLOAD
    assert not stale.exists()


def test_pips_own_configuration_finds_the_wheel(tiny, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tiny.parent))
    assert (data.fetch("tiny", quiet=True) / "data.bin").read_bytes() == PAYLOAD


def test_pip_downloads_when_the_direct_way_is_shut(tiny, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tiny.parent))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "_ask_pip", lambda source: f"http://127.0.0.1:9/{source.filename}")
    assert (data.fetch("tiny", quiet=True) / "data.bin").read_bytes() == PAYLOAD


def test_no_way_to_the_file_says_what_to_do_and_a_wheel_put_there_is_used(tiny, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(FetchError, match="put tiny_data-1.0-py3-none-any.whl"):
        data.fetch("tiny", quiet=True)
    shutil.copy(tiny, data.cache_folder() / "downloads")
    assert (data.fetch("tiny", quiet=True) / "data.bin").read_bytes() == PAYLOAD


def test_an_unknown_name_lists_the_known():
    with pytest.raises(FetchError, match="smollm2-135m, chitchat, tweets"):
        data.fetch("smolm")


def test_fetching_and_reading_rows_do_not_load_torch():
    code = (
        "import sys, flora.data.fetch, flora.data.formats; print({'torch', 'transformers', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout.strip() == "set()", done.stderr


# --- models ---------------------------------------------------------------------------------------------------------


TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(template: str | None = TEMPLATE, bos: bool = False):
    """Build a byte-level tokenizer in which "ab" is one token, so that a border can fall inside a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*letters, "ab"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<eos>", "<bos>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    tokenizer.add_special_tokens(special)
    if bos:
        first = [("<bos>", tokenizer.token_to_id("<bos>"))]
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=first)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>")
    fast.chat_template = template
    return fast


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved model of random weights with its tokenizer, which has no padding token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **shape)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_a_local_folder_loads(saved):
    assert data.resolve_model(saved) == str(saved)
    assert data.load_model(saved, "bfloat16").dtype == torch.bfloat16
    tokenizer = data.load_tokenizer(saved)
    assert tokenizer.pad_token == tokenizer.eos_token == "<eos>"


def test_what_is_no_model_says_what_to_do(tmp_path, saved):
    (tmp_path / "config.json").write_text("{broken")
    for load in (data.load_model, data.load_tokenizer):
        with pytest.raises(DataError, match="could not be loaded.*smollm2-135m"):
            load(tmp_path)
    with pytest.raises(DataError, match="no model at"):
        data.resolve_model(tmp_path / "missing.gguf")
    with pytest.raises(DataError, match="0 .gguf files"):
        (tmp_path / "empty").mkdir()
        data.resolve_model(tmp_path / "empty")
    with pytest.raises(DataError, match="is a data set"):
        data.resolve_model("tweets")
    with pytest.raises(DataError, match="torch dtype"):
        data.load_model(saved, "float33")
    assert data.resolve_model("someone/a-model") == "someone/a-model"


def test_a_gguf_file_is_dequantised_once_per_content(tmp_path, monkeypatch):
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path / "cache"))
    made = []

    def dequantise(gguf, folder):
        made.append(gguf)
        (folder / "config.json").write_text(gguf.read_text())

    monkeypatch.setattr(models, "dequantise", dequantise)
    file = tmp_path / "shelf" / "a.gguf"
    file.parent.mkdir()
    file.write_text("one")
    folder = data.resolve_model(file)
    assert data.resolve_model(file.parent) == folder and len(made) == 1
    file.write_text("three")
    assert (Path(data.resolve_model(file)) / "config.json").read_text() == "three" and len(made) == 2


def test_a_broken_gguf_file_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("FLORA_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(DataError, match="a.gguf"):
        data.load_model(file)
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_dir()] == ["gguf"]


# --- formats --------------------------------------------------------------------------------------------------------

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


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


ROWS = [{"prompt": f"q{i}", "completion": f"a{i}", "who": f"p{i % 2}"} for i in range(4)]


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


# --- the two data sets ----------------------------------------------------------------------------------------------


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


@pytest.mark.fetch
def test_the_real_model_answers():
    tokenizer, model = data.load_tokenizer("smollm2-135m"), data.load_model("smollm2-135m")
    row = {"prompt": "What is the capital of France?", "completion": "The capital of France is Paris."}
    tokens = data.tokenize(tokenizer, row, 64)
    start = [i for i, label in zip(tokens["input_ids"], tokens["labels"], strict=True) if label == -100]
    with torch.no_grad():
        said = model.generate(torch.tensor([start]), max_new_tokens=12, do_sample=False)[0, len(start) :]
    assert "Paris" in tokenizer.decode(said)
    assert model.dtype == torch.float32 and tokenizer.pad_token is not None


# --- partitions -----------------------------------------------------------------------------------------------------


def labelled(*counts: int) -> list[dict]:
    """Make rows with labels 0, 1, ... of these counts, sorted by label."""
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    return [{"prompt": f"q{i}", "completion": f"a{i}", "label": label} for i, label in enumerate(labels)]


def test_by_column_takes_those_with_the_most_rows():
    rows = [{"who": who} for who in "aabbbcdddd"] + [{"who": None}]
    assert data.partition(rows, 3, data.Partition(by="who"), 0) == {"d": [6, 7, 8, 9], "b": [2, 3, 4], "a": [0, 1]}
    with pytest.raises(DataError, match="5 clients.*4 distinct"):
        data.partition(rows, 5, data.Partition(by="who"), 0)
    with pytest.raises(DataError, match="no column 'sender'; they have who"):
        data.partition(rows, 2, data.Partition(by="sender"), 0)


@pytest.mark.parametrize(
    "rule", [{"iid": True}, {"dirichlet_alpha": 0.5, "label": "label"}, {"shards": 2, "label": "label"}]
)
def test_dealt_rules_cover_every_row_once_and_follow_the_seed(rule):
    rows = labelled(40, 30, 31)
    spec = data.Partition(**rule)
    clients = data.partition(rows, 5, spec, 3)
    assert sorted(i for indices in clients.values() for i in indices) == list(range(101))
    assert list(clients) == [f"client-{k}" for k in range(5)]
    assert data.partition(rows, 5, spec, 3) == clients != data.partition(rows, 5, spec, 4)
    with pytest.raises(DataError, match="lower (num_clients|shards)"):
        data.partition(rows, 102, spec, 0)


def test_iid_is_even_and_shards_are_pure():
    rows = labelled(50, 50, 50, 50)
    assert set(map(len, data.partition(rows, 8, data.Partition(iid=True), 0).values())) == {25}
    clients = data.partition(rows, 10, data.Partition(shards=2, label="label"), 0)
    kinds = [len({rows[i]["label"] for i in indices}) for indices in clients.values()]
    assert max(kinds) == 2 and all(len(indices) == 20 for indices in clients.values())
    # Which rows of a label make a shard is random: cut in the file's order, two shards would have one gap at most.
    for mine in clients.values():
        assert sum(after - before != 1 for before, after in zip(mine, mine[1:], strict=False)) > 1


def test_dirichlet_skew_grows_as_alpha_falls():
    rows = labelled(1000, 1000, 1000)

    def skew(alpha):
        clients = data.partition(rows, 4, data.Partition(dirichlet_alpha=alpha, label="label"), 0)
        counts = [Counter(rows[i]["label"] for i in indices) for indices in clients.values()]
        return sum(max(count.values()) / sum(count.values()) for count in counts) / 4

    assert skew(0.1) > 0.6 and abs(skew(1000) - 1 / 3) < 0.05


def test_an_empty_partition_is_refused():
    with pytest.raises(DataError, match="without a row at dirichlet_alpha=1e-05.*raise dirichlet_alpha"):
        data.partition(labelled(20, 20), 5, data.Partition(dirichlet_alpha=1e-5, label="label"), 0)
    with pytest.raises(DataError, match="row 1 has no 'label'"):
        data.partition([{"label": 1}, {"label": None}], 2, data.Partition(shards=1, label="label"), 0)
    with pytest.raises(DataError, match="no rows"):
        data.partition([], 1, data.Partition(iid=True), 0)
    with pytest.raises(DataError, match="num_clients"):
        data.partition(ROWS, 0, data.Partition(iid=True), 0)


@pytest.mark.parametrize(
    "rule",
    [{}, {"by": "a", "iid": True}, {"shards": 2}, {"dirichlet_alpha": 1.0}, {"shards": 0, "label": "a"},
     {"dirichlet_alpha": 0.0, "label": "a"}, {"dirichlet_alpha": float("nan"), "label": "a"}],
)  # fmt: skip
def test_a_partition_has_exactly_one_sound_rule(rule):
    with pytest.raises(DataError):
        data.Partition(**rule)


# --- splits ---------------------------------------------------------------------------------------------------------


def check_splits(rows, clients, splits, group):
    """Check that nothing held out, nor its group, nor its text, is trained on by anybody, and the sizes."""
    owner = {i: name for name, indices in clients.items() for i in indices}
    train = [i for indices in splits.train.values() for i in indices]
    held = splits.server + [i for indices in splits.eval.values() for i in indices]
    assert len(set(train + held)) == len(train + held)
    for part in (splits.train, splits.eval):
        assert list(part) == list(clients)
        assert all(owner[i] == name for name, indices in part.items() for i in indices)

    def texts(indices):
        return {json.dumps([rows[i]["prompt"], rows[i]["completion"]]) for i in indices}

    assert not texts(train) & texts(held)
    assert not {rows[i][group] for i in train} & {rows[i][group] for i in held}
    assert not {rows[i][group] for i in splits.server} & {rows[i][group] for i in held[len(splits.server) :]}
    assert len(splits.server) <= len(owner) / 5
    assert all(len(splits.eval[name]) <= len(clients[name]) / 5 for name in clients)
    assert all(splits.train.values())


def conversations(seed: int) -> tuple[list[dict], dict[str, list[int]]]:
    """Make conversations between pairs of people, with openings that many conversations share."""
    draw = random.Random(seed)
    rows = []
    for talk in range(60):
        pair = draw.sample("abcdefg", 2)
        for turn in range(draw.randint(2, 9)):
            answer = "hello" if turn == 0 and draw.random() < 0.5 else f"{talk} {turn}"
            rows.append({"prompt": "hi", "completion": answer, "who": pair[turn % 2], "conversation": f"c{talk}"})
    return rows, data.partition(rows, 7, data.Partition(by="who"), 0)


@pytest.mark.parametrize("seed", range(6))
def test_nothing_held_out_is_trained_on(seed):
    rows, clients = conversations(seed)
    splits = data.split(rows, clients, seed, 5, 30)
    check_splits(rows, clients, splits, "conversation")
    assert splits == data.split(rows, clients, seed, 5, 30)
    assert splits != data.split(rows, clients, seed + 1, 5, 30)
    assert all(splits.eval.values()) and len(splits.server) > 15


def test_duplicates_stay_on_one_side_without_a_group():
    rows = [{"prompt": "q", "completion": f"a{i % 40}", "copy": f"a{i % 40}"} for i in range(100)]
    clients = data.partition(rows, 4, data.Partition(iid=True), 0)
    splits = data.split(rows, clients, 0, 5, 20)
    check_splits(rows, clients, splits, "copy")
    assert splits.server and all(splits.eval.values())


def test_a_duplicate_in_another_group_leaves_the_training_set():
    rows = [{"prompt": "q", "completion": "same" if i % 3 == 0 else f"a{i}", "talk": i // 3} for i in range(30)]
    for seed in range(5):
        splits = data.split(rows, {"x": list(range(30))}, seed, 3, 0, "talk")
        assert len(splits.eval["x"]) == 3
        assert not any(rows[i]["completion"] == "same" for i in splits.train["x"])


def test_one_row_clients_keep_their_row_and_small_ones_hold_out_one():
    rows = [{"prompt": f"q{i}", "completion": "a"} for i in range(12)]
    clients = {"one": [0], "five": [1, 2, 3, 4, 5], "six": [6, 7, 8, 9, 10, 11]}
    for seed in range(20):
        splits = data.split(rows, clients, seed, 10, 2)
        assert splits.train["one"] == [0] and splits.eval["one"] == []
        assert len(splits.eval["five"]) == len(splits.eval["six"]) == 1 and len(splits.server) == 2


def test_a_large_group_is_held_out_only_if_something_is_left():
    rows = [{"prompt": f"q{i}", "completion": "a", "talk": "x" if i < 6 else "y"} for i in range(10)]
    splits = data.split(rows, {"k": list(range(10))}, 0, 5, 0, "talk")
    assert splits.train["k"] == list(range(6)) and len(splits.eval["k"]) == 2  # y has 4 rows, a fifth of ten is 2
    splits = data.split(rows[:6], {"k": list(range(6))}, 0, 5, 5, "talk")
    assert splits.train["k"] == list(range(6)) and not splits.eval["k"] and not splits.server


def test_a_split_that_cannot_be_is_refused():
    with pytest.raises(DataError, match="'empty' has no row"):
        data.split(ROWS, {"x": [0], "empty": []}, 0, 1, 1)
    with pytest.raises(DataError, match="row 0 belongs to 'x' and to 'y'"):
        data.split(ROWS, {"x": [0], "y": [0]}, 0, 1, 1)
    with pytest.raises(DataError, match="no column 'talk'.*who"):
        data.split(ROWS, {"x": [0]}, 0, 1, 1, "talk")
    with pytest.raises(DataError, match="counted from 0"):
        data.split(ROWS, {"x": [0]}, 0, -1, 1)


# --- token ids ------------------------------------------------------------------------------------------------------


def learnt(tokenizer, tokens) -> str:
    """Decode what the loss is on."""
    assert len(tokens["input_ids"]) == len(tokens["labels"])
    assert all(label in (-100, i) for i, label in zip(tokens["input_ids"], tokens["labels"], strict=True))
    return tokenizer.decode([label for label in tokens["labels"] if label != -100])


def test_the_loss_is_on_the_completion_and_the_end_of_its_turn():
    tokenizer = make_tokenizer()
    row = {"prompt": [{"role": "system", "content": "s"}, USER], "completion": "ab cab"}
    tokens = data.tokenize(tokenizer, row, 100)
    assert learnt(tokenizer, tokens) == "ab cab<|end|>\n"
    messages = [*row["prompt"], {"role": "assistant", "content": "ab cab"}]
    assert tokens["input_ids"] == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    as_turn = {"prompt": [{"role": "user", "content": "q"}], "completion": "a"}
    assert data.tokenize(tokenizer, {"prompt": "q", "completion": "a"}, 100) == data.tokenize(tokenizer, as_turn, 100)


def test_without_a_template_the_text_is_joined_and_closed():
    tokenizer = make_tokenizer(template=None)
    for row, whole, loss in (
        ({"prompt": "q", "completion": "a"}, "q\na<eos>", "a<eos>"),
        ({"prompt": "q ", "completion": "a"}, "q a<eos>", "a<eos>"),
        ({"prompt": "", "completion": "a"}, "a<eos>", "a<eos>"),
        (
            {"prompt": [USER, ANSWER, USER], "completion": "a"},
            "user: q\nassistant: a\nuser: q\nassistant: a<eos>",
            " a<eos>",
        ),
    ):
        tokens = data.tokenize(tokenizer, row, 100)
        assert tokenizer.decode(tokens["input_ids"]) == whole and learnt(tokenizer, tokens) == loss
    chatty = make_tokenizer()
    row = {"prompt": "q", "completion": "a"}
    assert learnt(chatty, data.tokenize(chatty, row, 100, chat_template=False)) == "a<eos>"


def test_a_tokenizer_that_starts_texts_with_a_token_keeps_it():
    tokenizer = make_tokenizer(template=None, bos=True)
    tokens = data.tokenize(tokenizer, {"prompt": "q", "completion": "a"}, 100)
    assert tokenizer.decode(tokens["input_ids"]) == "<bos>q\na<eos>"
    templated = make_tokenizer(template="<bos>" + TEMPLATE, bos=True)
    tokens = data.tokenize(templated, {"prompt": "q", "completion": "a"}, 100)
    assert tokens["input_ids"].count(templated.bos_token_id) == 1


def test_a_template_that_rewrites_the_prompt_falls_back_to_two_texts():
    rewriting = TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|>think{% endif %}")
    tokenizer = make_tokenizer(rewriting)
    tokens = data.tokenize(tokenizer, {"prompt": "q", "completion": "a"}, 100)
    assert tokenizer.decode(tokens["input_ids"]) == "<|user|>q<|end|>\n<|assistant|>thinka<eos>"
    assert learnt(tokenizer, tokens) == "a<eos>"


def test_a_token_across_the_border_falls_back_to_two_texts():
    tokenizer = make_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    tokens = data.tokenize(tokenizer, {"prompt": "a", "completion": "bc"}, 100)
    assert tokenizer.convert_ids_to_tokens(tokens["input_ids"]) == ["a", "b", "c", "<eos>"]
    assert learnt(tokenizer, tokens) == "bc<eos>"


def test_too_long_rows_lose_the_start_of_the_prompt_then_the_end_of_the_completion():
    tokenizer = make_tokenizer(template=None)
    row = {"prompt": "0123456789\n", "completion": "xyz"}
    for length, whole, loss in ((15, "0123456789\nxyz<eos>",) * 1 + ("xyz<eos>",), (6, "9\nxyz<eos>", "xyz<eos>"),
                                (5, "\nxyz<eos>", "xyz<eos>"), (3, "\nxy", "xy"), (2, "\nx", "x")):  # fmt: skip
        tokens = data.tokenize(tokenizer, row, length)
        assert tokenizer.decode(tokens["input_ids"]) == whole and learnt(tokenizer, tokens) == loss
    with pytest.raises(DataError, match="max_length"):
        data.tokenize(tokenizer, row, 1)


def test_many_rows_are_tokenised_as_one_is():
    tokenizer = make_tokenizer()
    draw = random.Random(0)
    rows = [
        {"prompt": "".join(draw.choices("ab c", k=draw.randint(0, 30))), "completion": "".join(draw.choices("ab", k=5))}
        for _ in range(50)
    ]
    assert data.tokenize_rows(tokenizer, rows, 24) == [data.tokenize(tokenizer, row, 24) for row in rows]
    assert data.tokenize_rows(tokenizer, [], 24) == []


def test_rows_that_cannot_be_written_out_are_named():
    strict = make_tokenizer("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}x")
    row = {"prompt": [{"role": "system", "content": "s"}], "completion": "a"}
    with pytest.raises(DataError, match="refuses row 1 with the roles system.*no system"):
        data.tokenize_rows(strict, [{"prompt": "q", "completion": "a"}, row], 10)
    with pytest.raises(DataError, match="row 0 should have a prompt.*load_rows"):
        data.tokenize(strict, {"text": "q"}, 10)


# --- batches --------------------------------------------------------------------------------------------------------


def token_rows(*lengths: int, unlabelled: tuple[int, ...] = ()) -> list[dict]:
    """Make rows of these lengths, named by their first token, the last token labelled."""
    rows = []
    for i, length in enumerate(lengths):
        ids = [i] + [7] * (length - 1)
        rows.append({"input_ids": ids, "labels": [-100] * (length - 1) + [-100 if i in unlabelled else 7]})
    return rows


def names(step) -> list[list[int]]:
    """Name the rows of a step."""
    return [[row["input_ids"][0] for row in batch] for batch in step]


def test_collate_pads_on_the_right():
    batch = data.collate(
        [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [0], "labels": [-100]}], pad_id=9
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3], [0, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100, -100, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    for rows in ([], [{"input_ids": [], "labels": []}], [{"input_ids": [1], "labels": []}]):
        with pytest.raises(DataError):
            data.collate(rows)


def test_the_order_is_a_permutation_that_seed_and_key_give():
    orders = [data.epoch_order(50, *key) for key in ((0,), (1,), (0, "a"), (0, "b"), (0, "a", 1), (0, "a", 2))]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(map(tuple, orders))) == len(orders)
    state = torch.random.get_rng_state()
    assert data.epoch_order(50, 0, "a") == orders[2]
    assert torch.equal(state, torch.random.get_rng_state())
    code = "from flora.data.batches import epoch_order; print(epoch_order(50, 0, 'a'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert json.loads(done.stdout) == orders[2]  # in another process, whose str hashes differ


def test_steps_keep_the_short_batch_and_the_short_step():
    steps = data.training_steps(token_rows(*[2] * 7), 2, 3, shuffle=False, seed=0)
    assert [names(next(steps)) for _ in range(3)] == [[[0, 1], [2, 3], [4, 5]], [[6]], [[0, 1], [2, 3], [4, 5]]]
    assert data.steps_per_epoch(7, 2, 3) == 2
    assert [data.steps_per_epoch(n, 2, 3) for n in (1, 6, 7, 12, 13)] == [1, 1, 2, 2, 3]


def test_shuffled_steps_see_every_row_once_an_epoch():
    rows = token_rows(*[2] * 11)
    steps = data.training_steps(rows, 2, 2, shuffle=True, seed=0, key=("a", 3))
    epochs = [[i for _ in range(3) for batch in names(next(steps)) for i in batch] for _ in range(2)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs) and epochs[0] != epochs[1]
    again = data.training_steps(rows, 2, 2, shuffle=True, seed=0, key=("a", 3))
    other = data.training_steps(rows, 2, 2, shuffle=True, seed=0, key=("a", 4))
    first = epochs[0][:4]
    assert sum(names(next(again)), []) == first != sum(names(next(other)), [])


def test_batches_without_labels_are_left_out():
    # The only label of row 6 is on its first token, which nothing predicts.
    rows = token_rows(2, 2, 2, 2, 2, 2, 1, unlabelled=(0, 2, 4, 5))
    steps = data.training_steps(rows, 1, 2, shuffle=False, seed=0)
    assert [names(next(steps)) for _ in range(3)] == [[[1]], [[3]], [[1]]]
    assert data.num_label_tokens(rows) == 2
    for rows in (token_rows(2, 1, unlabelled=(0,)), []):
        with pytest.raises(DataError, match="nothing to learn"):
            data.training_steps(rows, 1, 1, shuffle=True, seed=0)
    with pytest.raises(DataError, match="at least 1"):
        data.training_steps(token_rows(2), 0, 1, shuffle=True, seed=0)


def test_evaluation_batches_go_by_length():
    rows = token_rows(3, 5, 3, 9, 5)
    assert names(data.length_batches(rows, 2)) == [[3, 1], [4, 0], [2]]
    assert data.length_batches([], 2) == []
    with pytest.raises(DataError):
        data.length_batches(rows, 0)
