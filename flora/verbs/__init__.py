"""Every verb of the command line, a line each. Nothing heavy is imported before one is called: help is to come at once."""
from flora.verbs import machine, results, runs
from flora.verbs.base import Verb

VERBS = {
    "run": Verb(runs.run, "run"),
    "resume": Verb(runs.resume, "resume"),
    "compare": Verb(runs.compare, "compare"),
    "verify": Verb(runs.verify, "verify"),
    "partition": Verb(runs.partition, "label_skew"),
    "eval": Verb(results.evaluate, "eval_model"),
    "chat": Verb(results.chat, "chat"),
    "report": Verb(results.report, "write_report"),
    "export": Verb(results.export, "export"),
    "merge": Verb(results.merge, "merge_files"),
    "init": Verb(machine.init, "init"),
    "fetch": Verb(machine.fetch, "fetch"),
    "bench": Verb(machine.bench, "bench"),
    "tune": Verb(machine.tune, "tune"),
    "doctor": Verb(machine.doctor, "diagnose"),
    "completion": Verb(machine.completion, "completion_script"),
}
