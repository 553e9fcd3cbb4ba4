"""Words of a command line: a verb's own options (argparse), and a config's keys over a file (tyro). A mistake is one paragraph."""
import argparse
import contextlib
import dataclasses
import difflib
import io
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

if TYPE_CHECKING:
    from pydantic import BaseModel

    from flora.config import RunConfig

# Keys with keys of their own that a command line has no room for.
FILE_ONLY = ("groups", "fleet", "privacy", "secure_aggregation", "limits")


class Usage(Exception):
    """Words after `flora` that are no call of it: exit code 2."""


def nearest(word: str, known: Iterable[str]) -> str:
    """How a message that names an unknown word ends: "; did you mean X?", or a full stop."""
    bare = {name.lstrip("-"): name for name in known}           # dashes would make any two options alike
    near = difflib.get_close_matches(word.lstrip("-"), list(bare), 1)
    return f"; did you mean {bare[near[0]]}?" if near else "."


class Parser(argparse.ArgumentParser):
    """argparse's parser of a verb. keys: after its own options it takes a config file and every key of a run."""

    def __init__(self, verb: str, doc: str, prog: str | None = None):
        """doc: a paragraph of what it does, more where it is needed, and last the examples, a line each."""
        about, _, examples = "\n".join(line.strip() for line in doc.strip().splitlines()).rpartition("\n\n")
        super().__init__(prog=prog or f"flora {verb}", description=about, allow_abbrev=False,
                         epilog="\n  ".join(["examples:", *examples.splitlines()]),
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        self.keys = self.show_keys = False

    def take_keys(self, show: bool = False) -> None:
        """The verb is called as: flora VERB [CONFIG.yaml] [its options] [--key value ...]. show: its help lists them all."""
        self.keys, self.show_keys = True, show
        own = self.format_usage().split("[-h]")[-1].strip().replace("\n", " ")
        self.usage = " ".join(f"{self.prog} [CONFIG.yaml] {own} [--key value ...]".split())

    def print_help(self, file: Any = None) -> None:
        """argparse's help, and the keys."""
        super().print_help(file)
        if self.show_keys:
            _print_keys()
        elif self.keys:
            print("\nEvery key of a config is an option too: flora run --help lists them.", file=file)

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """What was given; .words: for a verb with keys, the file and the keys, unread. Raises Usage."""
        known = [option for action in self._actions for option in action.option_strings]
        strange = [name for word in words if word.startswith("--") and (name := word.partition("=")[0]) not in known]
        if strange and self.keys:
            run = key_options()
            strange, known = [name for name in strange if name.replace("_", "-") not in run], [*known, *run]
        if strange:
            raise Usage(f"{self.prog}: no such option: {strange[0]}{nearest(strange[0].replace('_', '-'), known)} "
                        f"{self._more()}")
        given, rest = self.parse_known_args(list(words))
        if rest and not self.keys:
            raise Usage(f"{self.prog}: expected no more words; got {' '.join(rest)}. {self._more()}")
        given.words = rest
        return given

    def error(self, message: str) -> NoReturn:
        """Raises Usage in the place of argparse's two lines and exit."""
        raise Usage(f"{self.prog}: {message}. {self._more()}")

    def _more(self) -> str:
        return f"Usage: {' '.join(self.format_usage().removeprefix('usage: ').split())}"


def config_of(words: Sequence[str], verb: str) -> "RunConfig":
    """A verb's config: the file that the first word names, if it is no option, and options over it. Raises ConfigError, Usage."""
    from flora.config import load, parse

    rest, settings, name = list(words), {}, ""
    if rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        settings = load(name)
    config = parse(settings, name or "the settings")
    if rest:
        import tyro

        options, said = _options(config), io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                given = dataclasses.asdict(tyro.cli(type(options), prog=f"flora {verb}", args=rest, default=options))
        except SystemExit:
            raise Usage(f"flora {verb}: {_sentence(said.getvalue())}. flora run --help lists every key.") from None
        settings = {**config.model_dump(), **given}
        config = parse(settings, f"{name} and the command line" if name else "the command line")
    return config


def _print_keys() -> None:
    """Every key of a run as an option, with its meaning and its default."""
    import tyro

    from flora.config import RunConfig

    options = _options(RunConfig.model_construct())
    with contextlib.suppress(SystemExit):
        tyro.cli(type(options), prog="flora run [CONFIG.yaml]", args=["--help"], default=options)


def key_options() -> list[str]:
    """Every key of a run as a word of the command line: --lora-r, --partition.by; --no-quiet, which takes a switch back."""
    from flora.config import RunConfig

    def names(options: Any, prefix: str) -> list[str]:
        out = []
        for field in dataclasses.fields(options):
            value, name = getattr(options, field.name), field.name.replace("_", "-")
            if dataclasses.is_dataclass(value):
                out += names(value, f"{prefix}{name}.")
            else:
                out += [f"--{prefix}{name}"] + [f"--{prefix}no-{name}"] * isinstance(value, bool)
        return out

    return names(_options(RunConfig.model_construct()), "")


def _sentence(box: str) -> str:
    """What tyro's box says before its first rule, as one line."""
    lines = [line.strip(" │╭╮╰╯") for line in box.splitlines()[1:]]
    said = lines[:next((i for i, line in enumerate(lines) if line.startswith("─")), len(lines))]
    return " ".join(" ".join(said).split()).rstrip(".")


def _options(config: "BaseModel") -> Any:
    """A config as a plain dataclass for tyro to fill in, so that one place (config.parse) checks the values."""
    import tyro
    from pydantic import BaseModel

    fields = []
    for name, field in type(config).model_fields.items():
        if name in FILE_ONLY:
            continue
        value = getattr(config, name)
        nested = isinstance(value, BaseModel)
        default = _options(value) if nested else value
        kind = type(default) if nested else Annotated[field.annotation, tyro.conf.arg(help=field.description)]
        fields.append((name, kind, dataclasses.field(default_factory=partial(lambda value: value, default))))
    return dataclasses.make_dataclass(type(config).__name__, fields, namespace={"__doc__": type(config).__doc__})()
