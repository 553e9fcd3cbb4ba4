"""The command line: finds the verb (verbs.py), calls it, and turns what goes wrong into one paragraph and an exit code."""
import os
import sys
from collections.abc import Sequence

from flora.errors import FloraError
from flora.options import Parser, Usage, nearest
from flora.verbs import VERBS

HEAD = "flora: federated LoRA fine-tuning with mixed ranks, aggregated exactly"
TAIL = """\
flora VERB --help says more of a verb. --debug, anywhere, shows the traceback of an error; --version the version. Exit codes: 0
done, 1 refused or failed (the message says what to do), 2 wrong usage, 130 Ctrl-C, 141 nobody read on.
"""
GO_ON = {"run": "a run goes on with: flora resume FOLDER", "resume": "it goes on with the same command",
         "compare": "it goes on with the same command"}


def usage() -> str:
    """The help of flora itself: a line a verb, with an example."""
    lines = [HEAD, ""]
    for name, verb in VERBS.items():
        about, _, examples = verb.declare.__doc__.strip().rpartition("\n\n")
        lines.append(f"  {name:<11}{about.splitlines()[0].rstrip('.'):<63}{examples.splitlines()[0].strip()}")
    return "\n".join([*lines, "", TAIL])


def _call(words: Sequence[str]) -> None:
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage(), end="")
    elif words[0] == "--version":
        from flora import __version__
        print(__version__)
    elif words[0] not in VERBS:
        raise Usage(f"flora: no such verb: {words[0]}{nearest(words[0], VERBS)} flora --help lists them.")
    else:
        declare = VERBS[words[0]].declare
        parser = Parser(words[0], declare.__doc__)
        call = declare(parser)
        call(parser.parse(words[1:]))


def _unexpected(error: Exception, again: str) -> str:
    """What is said of an error that flora did not raise on purpose. again: the command that shows its traceback."""
    what = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, OSError):
        return f"cannot read or write: {what}. Check the path, its permissions and the room on the disk."
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__:
        return f"out of memory: {what}. Lower per_device_train_batch_size, max_tokens_per_batch or max_length, or the ranks."
    return f"unexpected, a bug of flora or of what it calls: {what}. Please report it with the traceback: {again}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    words = [word for word in given if word != "--debug"]
    try:
        _call(words)
        sys.stdout.flush()
        return 0
    except Usage as error:
        print(error, file=sys.stderr)
        return 2
    except SystemExit as stop:                                  # of argparse, after --help; of rich, when nobody reads on
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        more = GO_ON.get(words[0])
        print(f"\nflora: stopped.{f' What was written is readable; {more}' if more else ''}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # or the interpreter tells of it when it closes
        return 141
    except Exception as error:
        if debug:
            raise
        said = str(error) if isinstance(error, FloraError) else _unexpected(error, f"flora --debug {' '.join(words)}")
        print(f"flora: {said}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
