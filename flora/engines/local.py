"""A whole federated run on one machine: the loop that DESIGN calls the one a newcomer looks for."""
import contextlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from torch import Tensor

from flora.adapter import Adapters
from flora.allocator import keep_large_blocks
from flora.budget import Budget
from flora.checkpoint import RunFolder
from flora.cohort import Cohort
from flora.config import RunConfig, load, parse
from flora.data.batches import steps_per_epoch
from flora.display import Board, Display, errors_only
from flora.distributed import Team, first
from flora.engines import guards
from flora.engines.hierarchy import Hierarchy, clock_row, hierarchy_of
from flora.engines.measure import NOTHING, after, before, client_row, over_group, server_row, unmeasured_row, views_at_home
from flora.engines.plan import bytes_of_a_round
from flora.engines.prepare import Job, new_server, prepare, rehearse, sent_up
from flora.engines.processes import follow, put_back, several
from flora.engines.telling import closing, opening
from flora.engines.traffic import Traffic, total
from flora.environment import environment
from flora.errors import ConfigError
from flora.group import Group, GroupCohort, leaves
from flora.messages import Broadcast, Update
from flora.nn import target_shapes, weights
from flora.profiling import traced
from flora.report import Report
from flora.server import Server
from flora.snapshot import Carried, Resumed
from flora.tracking import check, trackers
from flora.versions import bring_to, write_into

LOST = {"vanished": "its device has vanished in this round", "late": "its device is late in this round",
        "next": "its device is late in this round; its update counts less in the next one"}
HOW = {"vanished": "failed", "late": "late", "next": "late"}        # what the display calls them
NO_ROUND = "the round"


def run(config: RunConfig | Mapping[str, Any] | str | Path, resume: bool = False) -> Path:
    """Runs a federated fine-tuning and returns its folder.

    config: a RunConfig, its keys and values, or the path of a YAML file. resume: go on after the last whole round of the run
    in output_dir. Ctrl-C leaves a readable folder. Raises ConfigError, DataError, FetchError, RunError, StrategyError.
    """
    if not isinstance(config, RunConfig):
        config = parse(config) if isinstance(config, Mapping) else parse(load(config), str(config))
    check(config.report_to)
    rehearse(config)
    keep_large_blocks()
    with several(config) as team:                               # the processes of one torchrun; None: this one is alone
        return _whole(config, resume, team) if first() else follow(config, team, resume)


def _whole(config: RunConfig, resume: bool, team: Team | None) -> Path:
    """A run as the process that leads it, or that is alone, sees it."""
    with RunFolder(config.output_dir, config.overwrite, resume) as folder, errors_only(config.quiet):
        resumed = folder.load_checkpoint() if resume else None
        display = Display(Board(config.num_rounds, resumed.number if resumed else 0), config.quiet)
        job = prepare(config, display.say, resumed.base if resumed else None)
        if team:
            team.begin()
            job = replace(job, team=team)
        folder.begin(yaml.safe_dump(config.model_dump(exclude={"overwrite"}), sort_keys=False), environment(),
                     resumed.number if resumed else 0)
        try:
            _run(config, folder, job, resumed, display)
        except KeyboardInterrupt:
            folder.stopped("interrupted")
            raise
        except BaseException:
            with contextlib.suppress(Exception):                # the disk may be full; the first error is the one to show
                folder.stopped("failed")
            raise
    return folder.path


def _run(config: RunConfig, folder: RunFolder, job: Job, resumed: Resumed | None, display: Display) -> None:
    """The run itself, in a folder that is open."""
    put_back(job, resumed)
    with Report(folder.path, resumed.number if resumed else 0, display) as report:
        report.tracked = trackers(config.report_to, folder.path, report.first, config.model_dump(), report.say)
        key = folder.secret(resumed is not None) if config.privacy else guards.NO_KEY
        job = replace(job, train_config=guards.example_private(config, job.train_config, job.clients, key))
        tree = new_hierarchy(config, job, resumed)
        tree.observe(report.rows)
        for name, reason in tree.left_out.items():
            report.say(f"{name} is left out of the run: {reason}")
        server = new_server(config, target_shapes(job.model, config.target_modules), tree.everybody(),
                            resumed.broadcast if resumed else None, key)
        if resumed:
            resumed.remind(server)
        report.say(opening(config, server.shapes, tree.everybody(), str(job.model.device)))
        budget = Budget(job.model, config.max_tokens_per_batch, resumed.budget if resumed else None)
        state = State(budget, dict(resumed.home), resumed.optimizers, dict(resumed.late)) if resumed else State(budget)
        if config.optimizer_state == "keep":
            state.optimizers = state.optimizers or {}
        traffic = Traffic(resumed.received, server.broadcast) if resumed else Traffic()
        if report.first == 0:
            sizes = traffic.down(server, server.sample(0))
            report.add(server_row(0, job, server, state.home, {}) | {"bytes_down": sum(sizes.values())})
        done = rounds(config, job, server, report, folder, state, traffic, tree)
        if server.broadcast.start is not None:
            seed = job.merge_config.seed_of(server.broadcast.version)
            write_into(job.model, server.broadcast.start, job.merge_config, seed)    # last: nothing trains on this model any more
        for path in job.scores.write_answers(job.model, folder.path, folder.path.name):
            report.say(f"answers in {path}")
        saved = folder.save_model(job.model, job.tokenizer, config.model_name_or_path) if config.save_model else None
        folder.mark("finished", done)
    console = Console()
    if config.quiet:
        console.print(folder.path, highlight=False, soft_wrap=True)
        return
    for table in report.table():
        console.print(table)
    for line in closing(folder.path, saved, bool(server.strategy.home)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


@dataclass
class State:
    """What is carried from round to round: the budget of tokens, what stays at the clients' homes, AdamW's moments, where they are
    kept; late: updates that the next round takes."""
    budget: Budget
    home: dict[str, Adapters] = field(default_factory=dict)
    optimizers: dict[str, dict[str, Tensor]] | None = None
    late: dict[str, Update] = field(default_factory=dict)


def rounds(config: RunConfig, job: Job, server: Server, report: Report, folder: RunFolder, state: State,
           traffic: Traffic, tree: Hierarchy) -> int:
    """The federated loop; returns how many rounds are done."""
    for number in range(report.first, config.num_rounds):
        if config.communication_budget_mb and over_budget(config, report, server, tree):
            if "eval_loss" not in report.rows[-1]:
                report.add(server_row(number, job, server, state.home, {}))
            return number
        measured = (number + 1) % config.eval_every == 0 or number + 1 == config.num_rounds
        sent, own = server.broadcast, views_at_home(server, state.home)
        server.clients = tree.parties(traffic.received) if tree.members else server.clients
        sampled = [party for party in server.sample(number) if party.name not in state.late] or server.sample(number)
        due, clock = tree.clock(number, sampled, traffic.received, sent.train, enough(config)) if sampled else ([], None)
        lost = dict(clock.lost) if clock else {}
        if config.late == "next":
            due = [party for party in sampled if lost.get(party.name) != "vanished"]
            lost = {name: "next" if how == "late" else how for name, how in lost.items()}
        parties = [party if isinstance(party, Group) else replace(party, start=own.get(party.name)) for party in due]
        clients = leaves(parties)
        bring_to(job.model, sent, job.merge_config)
        found = before(job, clients, sent, report, number) if measured else {}
        maker = GroupCohort if tree.members else Cohort
        cohort = maker(job.model, parties, job.train_config, config.target_modules, state.budget, job.merge_config,
                        optimizer_states=state.optimizers)
        cohort.team = job.team
        report.train(number, parties)
        with traced(config.profile and number == profiled(config, report), job.model, folder.path / "profile", report.say):
            updates = cohort.fit(sent, on_step=lambda *step, cohort=cohort: report.on_step(
                *step, cohort.speed(step[0]), cohort.tokens_per_second))
        trained = after(job, updates, sent, report, number, parties) if measured else {}
        state.home.update({u.client: u.adapters for u in updates} if server.strategy.home else {})

        began = time.perf_counter()
        leaving = [sent_up(u, server.strategy.home) for u in updates]
        arrived = state.late | {u.client: u for u in leaving if lost.get(u.client) != "next"}
        state.late = {u.client: u for u in leaving if lost.get(u.client) == "next"}
        left_out = {name: LOST[how] for name, how in lost.items()} | cohort.failures | server.take(arrived)
        left_out |= {NO_ROUND: reason} if (reason := server.short()) and arrived else {}
        guards.fresh(server.trust)
        server.close((), dense_weights(job, server))
        left_out |= {} if reason else server.sifted.left_out
        seconds = cohort.seconds | {"aggregate": time.perf_counter() - began}
        seconds["evaluate"] = sum(one["seconds"] for one in (*found.values(), *trained.values()))

        up = guards.sent_up(server.trust, traffic.up(server, leaving, sent))
        for client, update in ((p, u) for p in parties for u in updates if u.client == p.name):
            both = [over_group(some, client, job) if isinstance(client, Group) else some.get(client.name, NOTHING)
                    for some in (found, trained)]
            row = client_row(number, client, update, *both)
            tree.observe([row])
            report.add(row | {"bytes_up": up.get(client.name, 0), "bytes_down": traffic.received.get(client.name, 0)})
        for name, reason in left_out.items():
            how = HOW[lost[name]] if name in lost else "failed" if name in cohort.failures else "refused"
            report.leave_out(number, name, reason, how)
        server.shrink(updates)
        tree.shrink(leaves(server.clients))
        down = sum(traffic.down(server, server.sample(number + 1)).values())
        began = time.perf_counter()
        made = Broadcast() if reason else server.broadcast
        folder.save_round(number, updates, made, config.keep_rounds, config.model_name_or_path)
        seconds["save"] = time.perf_counter() - began
        row = (server_row(number + 1, job, server, state.home, seconds) if measured
               else unmeasured_row(number + 1, job, server, seconds))
        row |= {"bytes_up": sum(up.values()), "bytes_down": down, "tokens_per_second": cohort.rate}
        row |= guards.row(config, job.train_config, job.clients, server.trust, number + 1)
        report.add(row | clock_row(clock, max((r.get("simulated_total", 0.0) for r in report.rows), default=0.0)))
        if config.checkpoint_every and (number + 1) % config.checkpoint_every == 0:
            carried = Carried(traffic.received, state.home, state.optimizers, state.budget.state(), state.late)
            folder.save_checkpoint(job.model, number + 1, server, carried)
        folder.mark("running", number + 1)
        report.round_done(number, row)
    return config.num_rounds


def profiled(config: RunConfig, report: Report) -> int:
    """The round that is traced: the second, in which nothing is done for the first time, or the next best."""
    return max(report.first, min(1, config.num_rounds - 1))


def enough(config: RunConfig) -> int | None:
    """Answers that end a round of which more were sampled; None where none were."""
    return max(1, round(config.fraction_train * config.num_clients)) if config.over_sampling > 1 else None


def over_budget(config: RunConfig, report: Report, server: Server, tree: Hierarchy) -> bool:
    """Whether a round of as many bytes as the largest one so far would go beyond the budget; the first, of as many as a dry run
    says. Says so."""
    sizes = [row["bytes_up"] + row["bytes_down"] for row in report.rows if row["kind"] == "server" and row["rounds_done"]]
    spent, most = total(report.rows), max(sizes) if sizes else bytes_of_a_round(config, server.shapes, tree.everybody())
    if spent + most <= 1e6 * config.communication_budget_mb:
        return False
    report.say(f"stopped: {spent / 1e6:.1f} MB have travelled, a round takes {most / 1e6:.1f} MB, and the budget is "
               f"{config.communication_budget_mb:g} MB")
    return True


def dense_weights(job: Job, server: Server) -> Mapping[str, Tensor] | None:
    """The base's weights, where the downlink may send some in the place of an update."""
    if server.downlink.how not in ("dense", "auto") or job.merge_config.into != "base":
        return None
    return weights(job.model, list(server.shapes))


def new_hierarchy(config: RunConfig, job: Job, resumed: Resumed | None) -> Hierarchy:
    """The groups and the fleet of this run, without either: its clients as they are."""
    shapes, own = target_shapes(job.model, config.target_modules), job.train_config
    steps = {c.name: own.max_steps or math.ceil(own.num_train_epochs * steps_per_epoch(
        len(c.rows), own.per_device_train_batch_size, own.gradient_accumulation_steps)) for c in job.clients}
    tree = hierarchy_of(config, shapes, job.clients, job.histograms, steps)
    if resumed:                                                 # HetLoRA's clients prune their ranks; alpha stays as it began
        tree.clients = {n: replace(c, rank=min(c.rank, resumed.ranks.get(n, c.rank))) for n, c in tree.clients.items()}
    return tree


def resume(folder: str | Path) -> Path:
    """Goes on with an unfinished run after its last whole round, with its own config. Raises RunError where there is none."""
    settings = load(Path(folder) / "config.yaml")
    if not settings:
        raise ConfigError(f"expected the resolved config of a run in {folder}; got an empty config.yaml")
    return run(parse({**settings, "output_dir": str(folder)}), resume=True)
