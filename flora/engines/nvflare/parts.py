"""The server's parts of a job: FedAvg's controller with flora's sampling, who answers what, and the run folder as its persistor."""
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from flora.engines.nvflare.settings import KEY, NVFlareConfig, came_of, settings, to_model, told_of
from flora.engines.remote import Came, Hello, RemoteRun
from flora.errors import MessageError, RunError, StrategyError, needs

with needs("nvflare", "nvflare"):
    from nvflare.apis.dxo import from_shareable
    from nvflare.apis.event_type import EventType
    from nvflare.apis.filter import Filter
    from nvflare.apis.fl_context import FLContext
    from nvflare.apis.shareable import Shareable
    from nvflare.app_common.abstract.fl_model import FLModel
    from nvflare.app_common.abstract.model import ModelLearnable, make_model_learnable
    from nvflare.app_common.abstract.model_persistor import ModelPersistor
    from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
    from nvflare.app_common.workflows.fedavg import FedAvg

PERSISTOR = "persistor"                                         # id of the component


class FloraPersistor(ModelPersistor):
    """Holds the run: opens its folder, resumes from it, and writes the result. Everything there is safetensors or text.

    job: keys and values of a run, with a section `nvflare` (settings.py). NVFlare's own model is one number, the version that is
    due, as its model may not be empty.
    """

    def __init__(self, job: dict[str, Any]):
        super().__init__()
        self.job = job
        self.run: RemoteRun | None = None
        self.names: dict[str, str] = {}                         # of the clients, by site
        self.own: NVFlareConfig | None = None
        self.behind: dict[str, int] = {}                        # versions that clients have said their bases are at
        self.lock = threading.Lock()                            # tasks are sent from several threads

    def load_model(self, fl_ctx: FLContext) -> ModelLearnable:
        """Opens the run, or goes on with it. Raises what RemoteRun does."""
        config, self.own = settings(self.job)
        self.run = RemoteRun(config, self.own.resume, self.own.server_model)
        sizes = zip(config.ranks(), config.alphas(), strict=True)
        hellos = [Hello(f"client-{k}", k, rank, alpha) for k, (rank, alpha) in enumerate(sizes)]
        self.run.open(hellos)
        self.names = {site: hello.name for site, hello in zip(self.own.sites, hellos, strict=True)}
        return make_model_learnable({KEY: np.array([self.run.server.broadcast.version])}, {})

    def save_model(self, model: ModelLearnable, fl_ctx: FLContext) -> None:
        """Writes the result after the last round; a round was written when it was aggregated."""
        if self.run.done:
            self.log_info(fl_ctx, f"the run is in {self.run.folder.path}, its result in {self.run.finish()}")

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Lets go of the folder when the job ends."""
        if event_type == EventType.END_RUN and self.run is not None:
            if not self.run.done:
                self.run.folder.stopped("failed")
            self.run.leave()


def persistor_of(fl_ctx: FLContext) -> FloraPersistor:
    """The persistor of this job. Raises RunError for a job that has another."""
    found = fl_ctx.get_engine().get_component(PERSISTOR)
    if not isinstance(found, FloraPersistor):
        raise RunError(f"expected a FloraPersistor as the job's component {PERSISTOR}; got {type(found).__name__}. Make the job "
                       "with flora_recipe.")
    return found


class FloraAggregator(ModelAggregator):
    """Gives a round's answers to flora's server: each is judged alone, and one that is refused takes nothing from the others."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: dict[str, Came] = {}
        self.lost: dict[str, str] = {}
        self.sampled: list[str] = []

    def reset_stats(self) -> None:
        """Begins a round; whom it waits for, the controller has said (sample_clients)."""
        self.answers = {}

    def accept_model(self, model: FLModel) -> None:
        """Takes what a site sent. NVFlare says which; an answer that cannot be read is its client's failure alone."""
        site = (model.meta or {}).get("client_name", "")
        name = persistor_of(self.fl_ctx).names.get(site)
        if name is None:
            self.warning(f"an answer of {site!r} is left out: it is no site of this run")
            return
        try:
            self.answers[name] = came_of(model)
        except MessageError as error:
            self.lost[name] = str(error)

    def aggregate_model(self) -> FLModel:
        """Closes the round. Raises RunError where too few are left (min_clients): the job fails, and can be resumed."""
        run = persistor_of(self.fl_ctx).run
        silent = {name: "its site has sent no answer" for name in self.sampled if name not in {**self.answers, **self.lost}}
        row = run.close(self.answers, {**silent, **self.lost})
        for name, reason in run.refused.items():
            self.warning(f"round {row['rounds_done'] - 1}: {name} is left out: {reason}")
        numbers = {name: float(value) for name, value in row.items() if isinstance(value, (int, float))}
        return FLModel(params={KEY: np.array([run.server.broadcast.version])}, metrics=numbers)


class FloraFilter(Filter):
    """Puts a client's own message in the place of the model that FedAvg sends to all: cut to its rank, with the merges it lacks."""

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Another Shareable, as the one that came in is shared by all sites. A client that has missed more than the server holds is
        told so in its place, and answers it."""
        persistor = persistor_of(fl_ctx)
        with persistor.lock:
            model = self._message(persistor, persistor.names[fl_ctx.get_peer_context().get_identity_name()])
        dxo = from_shareable(shareable)
        dxo.data, dxo.meta = model.params, {**dxo.meta, **model.meta}
        out = Shareable()
        out.update(shareable)
        out["__headers__"] = dict(shareable["__headers__"])
        return dxo.update_shareable(out)

    def _message(self, persistor: FloraPersistor, name: str) -> FLModel:
        run = persistor.run
        try:
            data = run.message(name, persistor.behind.pop(name, None))
        except StrategyError as error:
            return to_model(b"", {"error": str(error)})
        return to_model(data, {"needed": run.server.changed, "rank": run.rank(name), "measured": run.measured})


class FloraFedAvg(FedAvg):
    """NVFlare's FedAvg for a run of flora: its sampling, its rounds, a limit of time, and a second try for who is behind.

    num_clients, num_rounds: of the run; aggregator: a FloraAggregator; round_timeout: seconds (0: none).
    """

    def __init__(self, num_clients: int, num_rounds: int, aggregator: ModelAggregator, round_timeout: int = 0):
        super().__init__(num_clients=num_clients, num_rounds=num_rounds, aggregator=aggregator, persistor_id=PERSISTOR,
                         ignore_result_error=True)              # a site that fails is its client's failure, not the job's
        self.round_timeout = round_timeout

    def load_model(self) -> FLModel:
        """The model to begin with, and at which round."""
        model = super().load_model()
        if model is not None:
            run = self.persistor.run
            self.start_round, self.num_rounds = run.number, run.config.num_rounds - run.number
        return model

    def sample_clients(self, num_clients: int | None = None) -> list[str]:
        """The sites of the clients that the run samples in this round. num_clients is not used."""
        persistor = self.persistor
        site_of = {name: site for site, name in persistor.names.items()}
        here = {client.name for client in self.engine.get_clients()}
        self.aggregator.sampled, self.aggregator.lost = persistor.run.sampled(), {}
        for name in self.aggregator.sampled:
            if site_of[name] not in here:
                self.aggregator.lost[name] = f"its site {site_of[name]} does not take part in this job"
        return [site_of[name] for name in self.aggregator.sampled if site_of[name] in here]

    def send_model(self, task_name: str = "train", data: FLModel | None = None, targets: list[str] | None = None,
                   min_responses: int | None = None, timeout: int = 0, callback: Callable[[FLModel], Any] | None = None) -> None:
        """Sends a task. A site whose base was elsewhere than the server knew is sent what it lacks, in the same round, once."""
        limit = timeout or self.round_timeout

        def received(result: FLModel) -> Any:
            site, told = result.meta["client_name"], told_of(result)
            have, name = told.get("have"), self.persistor.names.get(site)
            if told.get("behind") is not True or name is None or type(have) is not int or have < 0:
                return callback(result)
            self.persistor.behind[name] = have
            self._send(task_name, data, [site], limit, callback)
            return False

        self._send(task_name, data, targets, limit, received)

    def _send(self, task_name: str, data: FLModel, targets: list[str], limit: int, callback: Callable[[FLModel], Any]) -> None:
        super().send_model(task_name, data, targets, None, limit, callback)
