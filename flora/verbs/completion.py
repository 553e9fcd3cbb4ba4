"""`flora completion`: a script that completes verbs, options, keys, files and folders in a shell: by shtab, from the parsers."""
from argparse import ArgumentParser

from flora.errors import ConfigError, needs
from flora.options import Parser, key_options
from flora.verbs import VERBS

FOLDERS, FILES = ("FOLDER", "DIR", "BASE"), ("FILE", "FILE.svg", "CONFIG.yaml")


def completion_script(shell: str) -> str:
    """The script of a shell: "bash", "zsh" or "fish". Raises ConfigError for another, or without shtab."""
    if shell not in ("bash", "zsh", "fish"):
        raise ConfigError(f"expected bash, zsh or fish; got {shell!r}. Name one of these.")
    with needs("shtab", "completion"):
        import shtab
    flora = ArgumentParser("flora", allow_abbrev=False)
    flora.add_argument("--version", action="store_true", help="the version")
    flora.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = flora.add_subparsers(parser_class=Parser)
    for name, verb in VERBS.items():
        doc = verb.declare.__doc__ or ""
        parser = verbs.add_parser(name, help=doc.strip().splitlines()[0], verb=name, doc=doc)
        verb.declare(parser)
        if parser.keys:
            parser.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="a run's settings")
            for key in key_options():
                parser.add_argument(f"--{key[2:].replace('-', '_')}", metavar="VALUE", help="a key of the config")
        for action in parser._actions:
            kind = shtab.DIRECTORY if action.metavar in FOLDERS else shtab.FILE if action.metavar in FILES else None
            if kind:
                vars(action)["complete"] = kind
    return shtab.complete(flora, shell)
