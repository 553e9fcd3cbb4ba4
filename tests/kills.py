"""Runs that are killed, lose power or meet a disk that fails, each in its own process, forked from one that has imported torch.

As a program it is that process: it reads a request a line, forks a child that runs flora, and says how the child ended. A child
counts what it does to the run folder (opens for writing, flushes, names, removals), and can stop at the n-th:
    kill    SIGKILL                                              power   the same, and what was never flushed is lost
    EIO, ENOSPC                                                  that call fails with this error, once
"""
import errno
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from itertools import zip_longest
from pathlib import Path

from events import read
from tiny import ROOT, save_model, write_rows

WRITES = ("open", "write", "fsync", "rename", "mkdir", "link")    # a disk can fail these; removals fail without harm


class Watch:
    """Counts what this process does to a folder, and strikes at one of these calls. From now on, and for good: no hook of Python's
    audit can be taken away."""

    def __init__(self, folder, at=None, how=None):
        self.folder, self.at, self.how, self.seen = str(folder), at, how, []
        self.flushed = {self._key(path): path.stat().st_size for path in self._files()}
        fsync, import_module = os.fsync, __import__("safetensors.torch").torch
        write = import_module.serialize_file
        sys.addaudithook(self._heard)

        def flush(handle):
            self._point("fsync", os.readlink(f"/proc/self/fd/{handle}"))
            fsync(handle)
            if stat.S_ISREG((about := os.fstat(handle)).st_mode):
                self.flushed[about.st_dev, about.st_ino] = about.st_size

        def serialize(tensors, path, **more):
            self._point("write", str(path))
            return write(tensors, path, **more)

        os.fsync, import_module.serialize_file = flush, serialize

    def _files(self):
        return [p for p in Path(self.folder).rglob("*") if p.is_file()]

    @staticmethod
    def _key(path):
        return path.stat().st_dev, path.stat().st_ino

    def _heard(self, event, arguments):
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self._point("open", str(arguments[0]))
            if arguments[2] & os.O_TRUNC and str(arguments[0]).startswith(self.folder) and os.path.exists(arguments[0]):
                self.flushed[self._key(Path(arguments[0]))] = 0
        elif event in ("os.rename", "os.mkdir", "os.link"):
            self._point(event[3:], str(arguments[0]))
        elif event in ("os.remove", "os.rmdir"):
            beside = os.readlink(f"/proc/self/fd/{arguments[1]}") + "/" if arguments[1] >= 0 else ""
            self._point("remove", beside + str(arguments[0]))

    def _point(self, what, path):
        if not path.startswith(self.folder) or "/tensorboard" in path:      # whose failures end no run (test_tracking.py)
            return
        self.seen.append(what)
        if len(self.seen) - 1 != self.at:
            return
        if self.how in ("kill", "power"):
            for file in self._files() if self.how == "power" else ():
                os.truncate(file, min(self.flushed.get(self._key(file), 0), file.stat().st_size))
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(getattr(errno, self.how), os.strerror(getattr(errno, self.how)), path)


def child(request, out):
    """Runs or resumes, and writes to `out` what it did."""
    import torch

    import flora
    from flora.engines.local import resume
    from flora.errors import RunError

    torch.set_num_threads(1)                                    # torch's own pool is made anew after a fork, by one thread only
    said, watch = {"error": ""}, Watch(request["folder"], request["at"], request["how"])
    try:
        resume(request["folder"]) if request["config"] is None else flora.run(request["config"])
    except RunError as error:
        said = {"error": f"RunError: {error}"}
    except BaseException:
        said = {"error": __import__("traceback").format_exc()}
    os.write(out, json.dumps({**said, "seen": watch.seen}).encode())
    os.close(out)


def serve():
    """Forks a child a request; no thread but this one runs in between."""
    sys.path.insert(0, str(ROOT / "tests"))
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401  what a run imports when it needs it

    import flora
    from flora.engines import local  # noqa: F401

    reply = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)                # a run prints its tables
    torch.set_num_threads(1)
    flora.run(json.loads(sys.stdin.readline()))
    print(json.dumps({}), file=reply)
    for line in sys.stdin:
        request = json.loads(line)
        back, out = os.pipe()
        began = time.monotonic()
        pid = os.fork()
        if pid == 0:
            os.close(back)
            child(request, out)
            os._exit(0)
        os.close(out)
        if request["after"] is not None:
            time.sleep(request["after"])
            os.kill(pid, signal.SIGKILL)                        # a child that has ended is still ours to kill: not waited for yet
        parts = []
        while part := os.read(back, 1 << 16):
            parts.append(part)
        os.close(back)
        status = os.waitpid(pid, 0)[1]
        said = json.loads(b"".join(parts) or "{}") if not os.WIFSIGNALED(status) else {}
        print(json.dumps({"killed": os.WIFSIGNALED(status), "error": "", "seen": [], "seconds": time.monotonic() - began, **said}),
              file=reply)


class Runs:
    """The program above, and a tiny model and rows in a folder. A context manager."""

    def __init__(self, place):
        self.place = Path(place)
        save_model(self.place / "model")
        write_rows(self.place / "rows.jsonl")

    def __enter__(self):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "",
               "TOKENIZERS_PARALLELISM": "false"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, __file__], **pipes, text=True, env=env)
        self._ask(self.settings("warm"))
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()

    def _ask(self, what):
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def settings(self, name, **changes):
        """Three rounds of three clients."""
        return {"model_name_or_path": str(self.place / "model"), "dataset": str(self.place / "rows.jsonl"), "num_clients": 3,
                "num_rounds": 3, "lora_r": 4, "max_steps": 2, "learning_rate": 1e-2, "eval_rows_per_client": 2,
                "server_eval_rows": 4, "target_modules": ["q_proj", "down_proj"], "quiet": True, "device": "cpu", "keep_rounds": 3,
                "output_dir": str(self.place / name), **changes}

    def run(self, config, at=None, how=None, after=None):
        """Runs a config; {"killed", "error", "seen", "seconds"}."""
        return self._ask({"folder": config["output_dir"], "config": config, "at": at, "how": how, "after": after})

    def go_on(self, config, at=None, how=None, after=None):
        """What a person does then: resumes what can be resumed, runs again what had not begun."""
        folder = Path(config["output_dir"])
        begun = (folder / "run.json").exists() and (folder / "config.yaml").exists()
        request = {"folder": config["output_dir"], "at": at, "how": how, "after": after}
        return self._ask(request | {"config": None if begun else config})


CASES = {
    "flora": {"lora_r": [4, 2, 1], "lora_alpha": [8, 2, 1], "fraction_train": 0.67},
    "fedit": {"strategy": "fedit", "optimizer_state": "keep", "lora_dropout": 0.1},
    "fedsa": {"strategy": "fedsa", "keep_rounds": 1, "fraction_train": 0.67},
    "residual": {"lora_r": [4, 2, 1], "dtype": "bfloat16", "merge_residual": True, "merge_rounding": "stochastic"},
    "beside": {"merge_into": "adapter", "merge_rank": 6, "checkpoint_every": 2},
    "groups": {"groups": {"count": 2, "inner_rounds": 2}, "optimizer_state": "keep", "downlink": "compressed"},
    "hetlora": {"strategy": "hetlora", "rank_decay": 0.5, "rank_penalty": 5.0, "lora_r": [3, 4, 2], "max_steps": 4, "num_rounds": 4,
                "fleet": [{"name": "phone", "count": 3, "seconds_per_layer_step": 0.01, "memory_mb": 4000, "up_mbps": 1,
                           "down_mbps": 4}]}}


def ended(folder):
    """Everything that a finished run leaves, but for its clocks: files by name, what TensorBoard shows, rows of metrics.jsonl;
    hidden files too."""
    folder, clocks = Path(folder), ("seconds", "tokens_per_second")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
             and path.name not in ("metrics.jsonl", "config.yaml") and path.parent.name != "tensorboard"}
    files["tensorboard"] = {tag: points for tag, points in read(folder).items() if not tag.startswith(("seconds/", "speed/"))}
    return files, [{key: value for key, value in row.items() if key not in clocks} for row in rows]


def finished(folder):
    path = Path(folder) / "run.json"
    return path.exists() and json.loads(path.read_text())["state"] == "finished"


def to_the_end(runs, config, whole, most=3):
    """Goes on until the run is finished; it is then as `whole`, bit by bit, with no more and no less in its folder."""
    for _ in range(most):
        if not finished(config["output_dir"]):
            said = runs.go_on(config)
            assert not said["error"], said["error"]
    if any(path.name == "checkpoint" or path.name[0] == "." for path in Path(config["output_dir"]).iterdir()):
        assert "is finished" in runs.go_on(config)["error"]     # killed in its last act: asked to go on, it tidies up and says no
    files, rows = ended(config["output_dir"])
    differ = [name for name in sorted({*files, *whole[0]}) if files.get(name) != whole[0].get(name)]
    differ += [(mine, its) for mine, its in zip_longest(rows, whole[1]) if mine != its]
    assert not differ, f"{len(differ)} differ: {differ[:4]}"


def half(runs, case, undisturbed):
    """A folder of a run that was killed in the middle, and what a resume of it does to it."""
    said, _ = undisturbed
    config = runs.settings(f"half-{case}", **CASES[case])
    kept = Path(config["output_dir"] + "-kept")
    assert runs.run(config, at=len(said["seen"]) // 2, how="power")["killed"]
    shutil.copytree(config["output_dir"], kept)
    seen = runs.go_on(config)["seen"]
    return config, kept, seen


def strike_resume(runs, halved, undisturbed, at):
    """Power is lost at this point of the resume, and it is resumed again."""
    config, kept, _ = halved
    shutil.rmtree(config["output_dir"])
    shutil.copytree(kept, config["output_dir"])
    assert runs.go_on(config, at=at, how="power")["killed"]
    to_the_end(runs, config, undisturbed[1])


def strike(runs, case, undisturbed, at, how):
    """Strikes once, and goes on. An error of the disk is a RunError that says so. undisturbed: what that run said, and left."""
    config, (said, whole) = runs.settings(f"struck-{case}", **CASES[case]), undisturbed
    shutil.rmtree(config["output_dir"], ignore_errors=True)
    what, struck = said["seen"][at], runs.run(config, at=at, how=how)
    where = f"{how} at {at}: {what}"
    assert struck["killed"] == (how in ("kill", "power")), where
    assert not struck["error"] or struck["error"].startswith("RunError: cannot write to"), f"{where}: {struck['error']}"
    told = {"ENOSPC": "the disk is full", "EIO": os.strerror(errno.EIO)}.get(how, "")
    goes = what == "fsync" and said["seen"][at + 1:at + 2] == ["remove"]        # what is needed no more may stay for now
    assert goes or what in ("link", "remove", "rename", "mkdir") or told in struck["error"], f"{where}: {struck['error']}"
    to_the_end(runs, config, whole)


def spread(count, among, seed=0):
    """So many of the numbers below `among`, one out of each equal part, drawn."""
    draw = random.Random(seed)
    return sorted({min(among - 1, int((i + draw.random()) * among / count)) for i in range(count)})


if __name__ == "__main__":
    serve()
