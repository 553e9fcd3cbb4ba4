"""NVFlare without its processes: FedAvg's real run, whose tasks go to the clients' real loop where it stands, through NVFlare's own
serialisation, so that a job takes a second."""
import contextlib
from types import SimpleNamespace

from nvflare.apis.client import Client
from nvflare.apis.controller_spec import ClientTask
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.signal import Signal
from nvflare.app_common.decomposers import numpy_decomposers
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.fuel.utils import fobs

from flora.engines.nvflare import FloraAggregator, FloraFedAvg, FloraFilter, FloraPersistor, settings
from flora.engines.nvflare import client as client_side
from flora.engines.nvflare.settings import as_job

numpy_decomposers.register()


def context(engine, site=None):
    """NVFlare's context: the engine, and whose task it is."""
    found = FLContext()
    found.set_prop(ReservedKey.ENGINE, engine, private=True, sticky=False)
    if site is not None:
        peer = FLContext()
        peer.set_prop(ReservedKey.IDENTITY_NAME, site, private=False, sticky=False)
        found.set_peer_context(peer)
    return found


class Flare:
    """The Client API of a site with one task."""

    def __init__(self, site, model):
        self.site, self.model, self.answer = site, model, None

    def init(self):
        """Nothing to begin."""

    def is_running(self):
        return self.answer is None

    def receive(self):
        return self.model

    def send(self, model):
        self.answer = model

    def get_site_name(self):
        return self.site


class OneProcess(FloraFedAvg):
    """One job. changed(site, round, answer) may give another answer, or None for a site that never answers; present: sites that
    take part; replies come in the reverse order. sent: (site, bytes of flora, bytes of NVFlare down, up) of every task."""

    def __init__(self, job, changed=None, present=None):
        config, own = settings(job)
        super().__init__(config.num_clients, config.num_rounds, FloraAggregator(), own.round_timeout)
        self.held, self.filter = FloraPersistor(as_job(config, own)), FloraFilter()
        self.changed, self.sent, self.parties = changed, [], {}
        self.engine = SimpleNamespace(
            get_component=lambda name: self.held if name == "persistor" else None, fire_event=lambda event, ctx: None,
            get_clients=lambda: [Client(site, "") for site in (own.sites if present is None else present)])

    def start(self):
        """Runs the job; gives its RemoteRun. Raises what NVFlare would log, and end the job for."""
        ctx = context(self.engine)
        self.aggregator.handle_event(EventType.START_RUN, ctx)
        self.start_controller(ctx)
        self.abort_signal = Signal()
        try:
            self.run()
        finally:
            self.held.handle_event(EventType.END_RUN, ctx)
        return self.held.run

    def get_num_standing_tasks(self):
        return 0

    def broadcast(self, task, fl_ctx, targets=None, min_responses=1, wait_time_after_min_received=0):
        self.limit = task.timeout
        for site in reversed(targets):
            self._one(site, task, fl_ctx)

    def _one(self, site, task, fl_ctx):
        down = fobs.dumps(self.filter.process(task.data, context(self.engine, site)))
        model = FLModelUtils.from_shareable(fobs.loads(down))
        size = model.params["flora"].nbytes
        answer = self._answer(site, model)
        answer = answer if self.changed is None else self.changed(site, self.current_round, answer)
        if answer is None:
            return
        up = fobs.dumps(FLModelUtils.to_shareable(answer))
        self.sent.append((site, size, len(down), len(up)))
        done = ClientTask(Client(site, ""), task)
        done.result = fobs.loads(up)
        task.result_received_cb(done, fl_ctx)

    def _answer(self, site, model):
        """What the loop of the client's script sends; its party lives on until `parties` is cleared."""
        with contextlib.ExitStack() as undone:
            flare, make = Flare(site, model), client_side.party_at
            undone.callback(setattr, client_side, "flare", client_side.flare)
            undone.callback(setattr, client_side, "party_at", make)
            client_side.flare = flare
            client_side.party_at = lambda *given: self.parties.setdefault(site, None) or self.parties.update(
                {site: make(*given)}) or self.parties[site]
            client_side.client_loop(self.held.job)
        return flare.answer
