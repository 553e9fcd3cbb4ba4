"""What a verb is made of."""
from argparse import Namespace
from collections.abc import Callable
from typing import NamedTuple

from flora.options import Parser

Call = Callable[[Namespace], object]


class Verb(NamedTuple):
    """declare: its docstring is the help (what it does, then examples), its body declares the options, what it returns does the
    work. python: the function of `flora` that a program calls in its place."""
    declare: Callable[[Parser], Call]
    python: str
