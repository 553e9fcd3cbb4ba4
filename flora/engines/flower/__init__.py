"""flora on Flower: a Strategy for its ServerApp and a ClientApp, on its message API (ServerApp.main with a Grid, ClientApp.train).

A message carries one Array of bytes, flora's own (messages.py), since Flower has no bfloat16 and no ranks that differ; and a
ConfigRecord with what decides how to read it. Before a round the server asks nodes that it does not know who they are
(ClientApp.query); replies come in any order, under node ids that are random, so everything is kept by the clients' names.

`server_app` and `client_app` are whole apps: pyproject.toml's [tool.flwr.app.config] holds a run's keys and values.
"""
import logging
from pathlib import Path

from flora.data.fetch import cache_folder
from flora.engines.flower.records import FlowerConfig, from_arrays, settings, to_arrays
from flora.engines.flower.strategy import FloraStrategy
from flora.engines.party import Base, Own, Party
from flora.engines.prepare import merge_config
from flora.errors import ConfigError, FloraError, needs

with needs("flwr", "flower"):
    from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp

__all__ = ["FloraStrategy", "FlowerConfig", "client_app", "server_app"]

log = logging.getLogger("flwr")
server_app, client_app = ServerApp(), ClientApp()
_bases: dict[tuple, Base] = {}                                  # of this process: one model for all nodes that live in it
_parties: dict[tuple, Party] = {}


@server_app.main()
def run(grid: Grid, context: Context) -> None:
    """A whole run, by the app's config."""
    config, own = settings(context.run_config)
    FloraStrategy(config, own).run(grid)


@client_app.query()
def hello(message: Message, context: Context) -> Message:
    """Who this node is."""
    try:
        client = _party(context).client
        told = {"name": client.name, "place": _place(context), "rank": client.rank, "alpha": float(client.alpha),
                "examples": len(client.rows)}
    except FloraError as error:
        told = {"error": str(error)}
    return Message(RecordDict({"flora": ConfigRecord(told)}), reply_to=message)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """The update of this node, or the version that its base is at. The state of the node says which that is, too."""
    told = message.content.config_records["flora"]
    content = RecordDict()
    try:
        answer = _party(context).answer(from_arrays(message.content), told["needed"], told["rank"], told["measured"])
        content["flora"] = ConfigRecord({"have": answer.have, "behind": answer.update is None})
        content["metrics"] = MetricRecord(dict(answer.metrics))
        if answer.update is not None:
            content["arrays"] = to_arrays(answer.update)
        context.state["flora"] = ConfigRecord({"run": told["run"], "version": answer.have})
    except FloraError as error:
        log.warning("no update in round %s: %s", told["round"], error)
        content = RecordDict({"flora": ConfigRecord({"error": str(error)})})
    return Message(content, reply_to=message)


def _place(context: Context) -> int:
    """Which client of the run this node is. Raises ConfigError."""
    place = context.node_config.get("partition-id")
    if type(place) is not int or place < 0:
        raise ConfigError(f"partition-id: expected a number from 0 in the node's config; got {place!r}. Start it with "
                          "--node-config 'partition-id=0'.")
    return place


def _party(context: Context) -> Party:
    """The client of this node, made once a process. Raises what its data and model raise."""
    config, _ = settings(context.run_config)
    node, place = context.node_config, _place(context)
    own = Own(node.get("lora-rank"), node.get("lora-alpha"), node.get("dataset"), node.get("name"))
    if own.dataset is None and place >= config.num_clients:
        raise ConfigError(f"partition-id: expected 0 to {config.num_clients - 1}, as the run has {config.num_clients} clients; got "
                          f"{place}. Change num_clients, or give the node a dataset of its own.")
    if "model" in node:
        config = config.model_copy(update={"model_name_or_path": node["model"]})
    kind = (config.model_name_or_path, config.num_hidden_layers, config.dtype, config.device, merge_config(config))
    key = (config.model_dump_json(), place, own)
    if key not in _parties:
        if kind not in _bases:
            _bases.clear()
            _parties.clear()
            _bases[kind] = Base(config, _folder(node.get("flora-folder")))
        _parties[key] = Party(config, place, _bases[kind], own)
    return _parties[key]


def _folder(given: object) -> Path:
    """Where a node keeps what its base was sent (merge_log.py)."""
    return Path(str(given)).expanduser() if given else cache_folder() / "flower"
