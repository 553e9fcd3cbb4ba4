"""`make gpu`: builds the extension for this card, proves the kernels, measures; every part by name, each with a limit of its own.

    python -m benchmarks.gpu [PART ...] [--minutes 8] [--small]

What comes out lies in benchmarks/results/<card>/<date> ($FLORA_RESULTS: elsewhere): a JSON file a benchmark, written case by case,
so that a part that runs out of time keeps what it has; the log of every part; parts.json, how each ended; summary.md, the targets
and the tables. --small: everything with tiny shapes, on a CPU too, to see that it runs; its numbers mean nothing.
"""
import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import summary
from benchmarks.measure import folder
from flora.environment import environment

ROOT = Path(__file__).resolve().parents[1]
PYTHON = (sys.executable, "-m")
SANITIZER = "compute-sanitizer"


class Part(NamedTuple):
    """What a part proves or measures, its commands, and the same with --small."""
    about: str
    commands: Sequence[Sequence[str]]
    small: Sequence[Sequence[str]] = ()
    needs: Sequence[str] = ()                                           # packages that not every machine has
    tool: str = sys.executable                                          # a program that not every machine has


def bench(name: str, full: Sequence[str], small: str) -> tuple[list[list[str]], list[list[str]]]:
    """The commands of a benchmark, one for each string of options."""
    def command(options: str) -> list[str]:
        return [*PYTHON, f"benchmarks.{name}", *options.split()]

    return [command(options) for options in full], [command(small)]


def gpu_tests() -> list[str]:
    """The files with a test marked gpu: others may need packages that a machine with a GPU lacks."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in path.read_text())


TINYLLAMA = "--model tinyllama-1.1b --dtype bfloat16 --length 512 --cap 1000000000"
TINY = "--model tiny-llama --length 32 --clients 3 --steps 2 --repeats 1"
TESTS = [*PYTHON, "pytest", "-q", "-m", "gpu", *gpu_tests()]
SANITIZED = [["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", SANITIZER, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m",
              "benchmarks.sanitized"] for tool in ("memcheck", "racecheck", "synccheck")]
RUN = ["pydantic", "yaml", "datasets", "matplotlib"]                     # of `flora compare`
BUILD = [sys.executable, "setup.py", "build_ext", "--inplace"]
PARTS = {
    "build": Part("the extension, for this card", [BUILD], [BUILD]),
    "tests": Part("every test that needs a GPU", [TESTS], [TESTS]),
    "sanitize": Part("every operator once, under compute-sanitizer", SANITIZED, [[*PYTHON, "benchmarks.sanitized"]],
                     tool=SANITIZER),
    "tune": Part("which form and blocks are fastest for each shape", [[*PYTHON, "benchmarks.tuned", "--minutes", "7"]]),
    "lora_linear": Part("the seven linears of a decoder layer, against their peers and the limit", *bench(
        "bench_lora_linear", ["--models 7B 1B 70B --rows 8192 --ranks 16 --kinds one clients --compile",
                              "--models 7B --rows 8192 --kinds downlink", "--kinds one clients"],
        "--models tiny --rows 64 --ranks 4 --dtypes fp32 --repeats 2 --kinds one downlink clients")),
    "overhead": Part("what a call costs the host", *bench("bench_overhead", [""], "--rounds 1")),
    "merge": Part("ten clients into the weights of a 7B model", *bench("bench_merge", [""], "--models 64x48 --repeats 2")),
    "round": Part("rounds of ten clients of TinyLlama's size", *bench(
        "bench_round", [f"{TINYLLAMA} --sequences 1 8 --steps 10 --repeats 5"], TINY)),
    "cohort": Part("training steps and peak memory of ten clients of TinyLlama's size", *bench(
        "bench_cohort", [f"{TINYLLAMA} --sequences 1 8 --clients 10 --full --steps 5 --repeats 3",
                         f"{TINYLLAMA} --sequences 1 4 --clients 1 2 5 20 --full --steps 5 --repeats 3"], f"{TINY} --full")),
    "qlora": Part("LoRA on a 4-bit base, against PEFT and bitsandbytes", *bench(
        "bench_qlora", [""], "--rows 64 --repeats 2"), ["bitsandbytes"]),
    "papers": Part("the tables of the FLoRA paper on SmolLM2-135M", [[*PYTHON, "benchmarks.papers.run", "--scale", "gpu"]],
                   needs=RUN),
    "hierarchy": Part("HierFedLoRA's tables on SmolLM2-135M",
                      [[*PYTHON, "benchmarks.papers.run", "--paper", "hierfedlora", "--scale", "gpu"]], needs=RUN),
}


def run(name: str, commands: Sequence[Sequence[str]], seconds: float, log: Path, settings: Mapping[str, str]) -> str:
    """Runs a part's commands one after another, shows and logs what they print, and says how it ended. One that fails does not keep
    the next from running; the time is for all of them together."""
    ends, outcome = time.monotonic() + seconds, "done"
    with log.open("w", encoding="utf-8") as file:
        for command in commands:
            print(f"--- {name}: {' '.join(command)}", flush=True)
            process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **settings}, stdout=subprocess.PIPE,
                                       stderr=subprocess.STDOUT, text=True, start_new_session=True)
            stopper = threading.Timer(max(0.0, ends - time.monotonic()), stop, [process])
            stopper.start()
            try:
                for line in process.stdout:
                    print(line, end="", flush=True)
                    file.write(line)
                code = process.wait()
            finally:                                                    # Ctrl-C reaches us alone
                stopper.cancel()
                stop(process)
            if time.monotonic() >= ends:
                return f"stopped after {seconds / 60:g} minutes; what it had published is kept"
            outcome = f"failed: exit code {code}, see {log.name}" if code else outcome
    return outcome


def stop(process: subprocess.Popen) -> None:
    """Ends a command with all its processes, politely, then for good; nothing where it has ended."""
    for how in (signal.SIGTERM, signal.SIGKILL) if process.poll() is None else ():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
            return


def settings_of(small: bool, outcomes: Mapping[str, str]) -> dict[str, str]:
    """What the commands are told. FLORA_GREEN: the tests have passed, so that no benchmark runs them once more."""
    told = {"FLORA_RESULTS": str(folder()), "FLORA_REQUIRE_NATIVE": "1", "PYTHONUNBUFFERED": "1"}
    return told | {"FLORA_GREEN": "1"} if small or outcomes.get("tests") == "done" else told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="parts:\n" + "\n".join(f"  {name:12} {part.about}" for name, part in PARTS.items()))
    parser.add_argument("parts", nargs="*", metavar="PART", help="default: all, in this order")
    parser.add_argument("--minutes", type=float, default=8.0, help="that a part may take")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    if unknown := [name for name in options.parts if name not in PARTS]:
        parser.error(f"expected parts of {', '.join(PARTS)}; got {', '.join(unknown)}")
    if options.small:
        os.environ.setdefault("FLORA_RESULTS", str(ROOT / "build" / "gpu-small"))
    elif not torch.cuda.is_available():
        sys.exit("expected an NVIDIA GPU that torch can use; found none. --small runs everything with tiny shapes on a CPU")
    out, parts = folder(), {}
    out.mkdir(parents=True, exist_ok=True)
    path = out / "parts.json"
    if path.exists():
        parts = json.loads(path.read_text())["parts"]
    here: dict[str, str] = {}
    for name in options.parts or PARTS:
        part, began = PARTS[name], time.monotonic()
        commands = part.small if options.small else part.commands
        missing = [package for package in part.needs if importlib.util.find_spec(package) is None]
        missing += [] if options.small or shutil.which(part.tool) else [part.tool]
        if missing or not commands:
            here[name] = f"left out: {', '.join(missing)} not installed" if missing else "left out: it has no small form"
        else:
            here[name] = run(name, commands, 60 * options.minutes, out / f"{name}.log", settings_of(options.small, here))
        parts[name] = {"about": part.about, "outcome": here[name], "seconds": round(time.monotonic() - began, 1)}
        path.write_text(json.dumps({"about": environment(), "parts": parts}, indent=1) + "\n")
        (out / "summary.md").write_text(summary.markdown(out), encoding="utf-8")
        print(f"--- {name}: {here[name]} ({parts[name]['seconds']:.0f} s)", flush=True)
    print(summary.targets_and_parts(out))
    print(f"tables: {out / 'summary.md'}")
    sys.exit(any(outcome.startswith("failed") for outcome in here.values()))


if __name__ == "__main__":
    main()
