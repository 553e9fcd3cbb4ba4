"""Flower without its processes: a Grid that calls the client apps of its nodes where it stands, so that a run takes a second."""
from collections.abc import Callable

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity


class OneProcess(Grid):
    """nodes: every node's config by its id; app: the ClientApp of all. changed(node, message, reply) may give another reply, or
    None for a node that never answers. Replies come in the reverse order of the messages. sent: (node, kind, bytes) of each."""

    def __init__(self, app, nodes: dict[int, dict], run_config: dict, changed: Callable | None = None):
        self.app, self.nodes, self.run_config, self.changed = app, nodes, run_config, changed
        self.states = {node: RecordDict() for node in nodes}
        self.sent = []
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1     # what a ServerApp's process is told

    def set_run(self, run):
        """Not used."""

    run = property(lambda self: None)
    create_message = push_messages = pull_messages = None

    def get_node_ids(self):
        return list(self.nodes)

    def context(self, node):
        return Context(run_id=1, node_id=node, node_config=self.nodes[node], state=self.states[node], run_config=self.run_config)

    def _answer(self, message):
        node = message.metadata.dst_node_id
        try:
            reply = self.app(message, self.context(node))
        except Exception as error:
            reply = Message(Error(2, str(error)), reply_to=message)
        return reply if self.changed is None else self.changed(node, message, reply)

    def send_and_receive(self, messages, *, timeout=None):
        replies = []
        for message in messages:
            size = sum(len(a.data) for r in message.content.array_records.values() for a in r.values())
            self.sent.append((message.metadata.dst_node_id, message.metadata.message_type, size))
            replies.append(self._answer(message))
        return [reply for reply in reversed(replies) if reply is not None]
