"""Flower's Strategy of a run of flora: who the nodes are, what each is sent, and what came back."""
import contextlib
import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flora.config import RunConfig, parse
from flora.engines.flower.records import FlowerConfig, came_of, to_arrays
from flora.engines.remote import Came, Hello, RemoteRun
from flora.errors import FloraError, MessageError, RunError, StrategyError, needs

with needs("flwr", "flower"):
    from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import Strategy

log = logging.getLogger("flwr")                                 # whose lines Flower streams to who started the run


class FloraStrategy(Strategy):
    """Flower's strategy of a run of flora: `FloraStrategy(config).run(grid)`.

    config: a RunConfig, or its keys and values; own: what Flower adds. The weights of `start`'s protocol (arrays) are not used:
    what is sent differs from client to client. round: the RemoteRun: server, report, folder. Raises what RemoteRun does.
    """

    def __init__(self, config: RunConfig | Mapping[str, Any], own: FlowerConfig | None = None):
        self.own = own or FlowerConfig()
        self.config = config if isinstance(config, RunConfig) else parse(config, "the config of FloraStrategy")
        self.round = RemoteRun(self.config, self.own.resume, self.own.server_model)
        self._hellos: dict[int, Hello | None] = {}              # None: a node that is refused
        self._grid: Grid | None = None
        self._lost: dict[str, str] = {}
        self._sampled: list[str] = []
        self._opened = False

    def run(self, grid: Grid) -> Path | None:
        """The whole run; returns where its result lies. Raises RunError where a round is left with too few clients."""
        rounds = self.config.num_rounds - self.round.number
        try:
            self._open(grid)
            self.start(grid, ArrayRecord(), rounds, timeout=self.own.round_timeout)
        except BaseException:
            if self._opened:
                with contextlib.suppress(Exception):            # the disk may be full; the first error is the one to show
                    self.round.folder.mark("failed", self.round.number)
            self.round.leave()
            raise
        where = self.round.finish()
        log.info("the run is in %s, its result in %s", self.round.folder.path, where)
        return where

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """A message to every client that is sampled. server_round, arrays and config are not used."""
        if not self._opened:
            self._open(grid)
        self._grid = grid
        self._greet(grid)
        self._sampled, self._lost = self.round.sampled(), {}
        return self._messages(dict.fromkeys(self._sampled))

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Closes the round on these replies (server_round is not used), and on those of clients whose base was elsewhere than
        this server knew: they are sent what they lack, once. Raises RunError where too few are left."""
        answers = self._answers(replies)
        behind = {name: came.have for name, came in answers.items() if came.update is None}
        answers = {name: came for name, came in answers.items() if came.update is not None}
        again = self._messages(behind)
        if again:
            answers |= self._answers(self._grid.send_and_receive(again, timeout=self.own.round_timeout))
        missing = {name: f"its node has not answered within {self.own.round_timeout:g} s" for name in self._sampled
                   if name not in answers and name not in self._lost}
        row = self.round.close(answers, {**missing, **self._lost})
        for name, reason in self.round.refused.items():
            log.warning("round %d: %s is left out: %s", row["rounds_done"] - 1, name, reason)
        numbers = {name: float(value) for name, value in row.items() if isinstance(value, (int, float))}
        return None, MetricRecord(numbers)

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """None: clients evaluate where they train. Neither server_round nor the rest is used."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """None, as nobody was asked: server_round and replies are not used."""
        return None

    def summary(self) -> None:
        """Says what runs."""
        log.info("flora: strategy %s, %d of %d rounds are done, run folder %s", self.config.strategy, self.round.number,
                 self.config.num_rounds, self.round.folder.path)

    def _open(self, grid: Grid) -> None:
        """Waits for the nodes of the run, and starts it with those that there are."""
        until = time.monotonic() + self.own.wait_seconds
        while len(self._known()) < self.config.num_clients:
            self._greet(grid)
            if len(self._known()) >= self.config.num_clients or time.monotonic() >= until:
                break
            time.sleep(min(1.0, self.own.wait_seconds))
        if len(self._known()) < self.config.num_clients:
            log.warning("expected %d clients; %d have joined within %g s, and the run is theirs", self.config.num_clients,
                        len(self._known()), self.own.wait_seconds)
        self.round.open(list(self._known().values()))
        self._opened = True

    def _known(self) -> dict[int, Hello]:
        return {node: hello for node, hello in self._hellos.items() if hello is not None}

    def _greet(self, grid: Grid) -> None:
        """Asks nodes that are new who they are; forgets those that have gone. Whose name another node has already is refused."""
        present = set(grid.get_node_ids())
        self._hellos = {node: hello for node, hello in self._hellos.items() if node in present}
        new = sorted(present - set(self._hellos))
        asked = [Message(RecordDict(), node, "query") for node in new]
        replies = grid.send_and_receive(asked, timeout=self.own.round_timeout) if asked else []
        found = {reply.metadata.src_node_id: reply for reply in replies}
        for node in (node for node in new if node in found):
            try:
                self._hellos[node] = self._admitted(found[node])
            except FloraError as error:
                self._hellos[node] = None
                log.warning("a node is refused: %s", error)

    def _admitted(self, reply: Message) -> Hello:
        """Who a node is. Raises MessageError, StrategyError."""
        if reply.has_error():
            raise MessageError(f"expected its name; got the error {reply.error.reason}")
        told = reply.content.config_records.get("flora", {})
        if "error" in told:
            raise MessageError(f"expected its name; got the error {told['error']}")
        kinds = {"name": str, "place": int, "rank": int, "alpha": float, "examples": int}
        wrong = [key for key, kind in kinds.items() if type(told.get(key)) is not kind]
        most = max(max(shape) for shape in self.round.shapes.values())
        if wrong or not told["name"] or not 1 <= told["rank"] <= most or told["alpha"] <= 0 or told["examples"] < 1:
            raise MessageError(f"expected a client's name, place, rank (1 to {most}), alpha and examples; got "
                               f"{str(dict(told))[:200]}")
        hello = Hello(**{key: told[key] for key in kinds})
        if any(hello.name == other.name for other in self._known().values()):
            raise StrategyError(f"expected a node for each client; got another one that says it is {hello.name!r}. Give "
                                "every node a partition-id of its own.")
        return hello

    def _messages(self, versions: Mapping[str, int | None]) -> list[Message]:
        """What these clients are sent; versions: where each one's base is (None: as the server knows)."""
        nodes = {hello.name: node for node, hello in self._known().items()}
        out = []
        for name, have in versions.items():
            try:
                if name not in nodes:
                    raise RunError("its node is not connected")
                data = self.round.message(name, have)
            except (StrategyError, RunError) as error:
                self._lost[name] = str(error)
                continue
            due = self.round.server.broadcast
            config = ConfigRecord({"run": due.run, "version": due.version, "needed": self.round.server.changed,
                                   "round": self.round.number, "rank": self.round.rank(name), "measured": self.round.measured})
            out.append(Message(RecordDict({"arrays": to_arrays(data), "flora": config}), nodes[name], "train",
                               group_id=str(self.round.number)))
        return out

    def _answers(self, replies: Iterable[Message]) -> dict[str, Came]:
        """Replies by client; why others have none is noted."""
        names = {node: hello.name for node, hello in self._known().items()}
        found = {}
        for reply in replies:
            name = names.get(reply.metadata.src_node_id)
            if name not in self._sampled:
                continue
            try:
                found[name] = came_of(reply)
            except MessageError as error:
                self._lost[name] = str(error)
        return found
