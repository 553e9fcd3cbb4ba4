"""`flora chat`: the same question to the base, the trained model and clients' own models, side by side.

One model is in memory and seen through each view in turn (outcome.py). In a conversation every view goes on with its own answers.
"""
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from flora.data.templates import tokenize_prompts
from flora.evaluate import Decoding, answers
from flora.mt_bench import room_for_prompt
from flora.outcome import Outcome, open_outcome
from flora.scoring import pad_and_ends

NARROW = 32                                                     # columns that an answer needs to stand beside others
HELP = "expected a question, /clear (begin anew) or /quit"


@dataclass(frozen=True)
class Sampling:
    """How answers are written. temperature: 0 takes the likeliest token each time; seed: of what is drawn, the same for every
    model."""
    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0


class Conversation:
    """The turns of every view so far."""

    def __init__(self, outcome: Outcome, sampling: Sampling):
        self.outcome, self.sampling = outcome, sampling
        self.turns: dict[str, list[dict[str, str]]] = {}
        self.clear()

    def clear(self) -> None:
        """Forgets every turn."""
        self.turns = {name: [] for name in self.outcome.views}

    def ask(self, prompt: str) -> dict[str, str]:
        """Every view's answer, by name. What fails leaves the turns as they were. Raises DataError, ConfigError."""
        asked = {name: [*turns, {"role": "user", "content": prompt}] for name, turns in self.turns.items()}
        found = {name: self._answer(name, turns) for name, turns in asked.items()}
        self.turns = {name: [*asked[name], {"role": "assistant", "content": text}] for name, text in found.items()}
        return found

    def _answer(self, name: str, turns: list[dict[str, str]]) -> str:
        outcome, how = self.outcome, self.sampling
        room, (pad, ends) = room_for_prompt(outcome.model, how.max_new_tokens), pad_and_ends(outcome.model, outcome.tokenizer)
        # one question without a template is a text to go on with, as rows of a run are; several are lines with roles
        asked = turns[0]["content"] if len(turns) == 1 else turns
        [ids] = tokenize_prompts(outcome.tokenizer, [{"prompt": asked}], room, outcome.config.chat_template)
        with outcome.seen(name) as model, torch.random.fork_rng():
            torch.manual_seed(how.seed)
            [answer] = answers(model, [ids], Decoding(how.max_new_tokens, pad, ends, how.temperature))
        return str(outcome.tokenizer.decode(answer, skip_special_tokens=True)).strip()


def chat(target: str | Path, prompt: str, clients: Sequence[str] = (), sampling: Sampling | None = None,
         settings: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The answers to one prompt by view: "base", "global" (of a run), "adapter", "model", and each client's own model.

    target, clients, settings: as eval_model takes them. Raises RunError, DataError, ConfigError.
    """
    outcome = open_outcome(target, clients, True, settings)
    return Conversation(outcome, sampling or Sampling()).ask(prompt)


def converse(target: str | Path, clients: Sequence[str] = (), sampling: Sampling | None = None,
             settings: Mapping[str, Any] | None = None) -> None:
    """Asks until the input ends or says /quit, and prints the answers. Ctrl-C while they are written drops the question."""
    console = Console()
    talk = Conversation(open_outcome(target, clients, True, settings), sampling or Sampling())
    here = sys.stdin.isatty()
    if here:
        import readline  # noqa: F401 - lines can be edited and called back

        console.print(f"{', '.join(talk.turns)}; /clear begins anew, /quit or Ctrl-D ends", markup=False, highlight=False)
    for prompt in _questions(lambda: input("> " if here else "")):
        if prompt == "/clear":
            talk.clear()
        elif prompt.startswith("/"):
            console.print(f"{HELP}; got {prompt}", markup=False, highlight=False)
        else:
            try:
                show(talk.ask(prompt), console)
            except KeyboardInterrupt:
                if not here:
                    raise
                console.print("stopped; the question is dropped")


def _questions(read: Callable[[], str]) -> Iterator[str]:
    """Lines that say something, until the end or /quit."""
    while True:
        try:
            line = read().strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line:
            yield line


def show(found: Mapping[str, str], console: Console | None = None) -> None:
    """Prints the answers: side by side where a terminal has room for all, else one under another."""
    console = console or Console()
    texts = {name: _printable(text) or "(nothing)" for name, text in found.items()}
    width = console.width // len(texts) - 1
    if console.is_terminal and width >= NARROW:
        console.print(Columns([Panel(Text(text), title=Text(name), width=width) for name, text in texts.items()]))
        return
    for name, text in texts.items():
        console.print(f"--- {name}\n{text}\n", markup=False, highlight=False, soft_wrap=True)


def _printable(text: str) -> str:
    """A model's text without what would steer a terminal."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t").strip()
