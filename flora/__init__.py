"""flora: federated LoRA fine-tuning with mixed ranks, aggregated exactly by stacking.

Names are imported when they are first used, so that a user who wants one function loads one file.
"""
import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_WHERE = {
    "Adapter": "adapter", "Adapters": "adapter", "stack": "adapter", "mean": "adapter", "pad": "adapter",
    "truncate": "adapter", "compress": "adapter", "rescale": "adapter", "fold": "adapter",
    "LoRALinear": "layer", "attach": "nn", "adapters": "nn", "load_adapters": "nn", "merge": "nn", "detach": "nn",
    "Update": "messages", "Broadcast": "messages", "aggregate": "strategies", "STRATEGIES": "strategies",
    "LocalClient": "client", "TrainConfig": "client", "Cohort": "cohort", "run": "engines.local",
    "Group": "group", "GroupCohort": "group", "compare": "comparison", "verify": "verification", "resume": "engines.local",
    "label_skew": "skew", "eval_model": "evaluation", "chat": "conversation", "export": "exporting", "merge_files": "shards",
    "init": "starter", "fetch": "data", "bench": "benchmark", "tune": "tuning", "diagnose": "doctor",
    "completion_script": "verbs.completion", "write_report": "page",
}
_MODULES = ("adapter", "cli", "client", "cohort", "config", "data", "engines", "errors", "evaluate", "formats", "group", "grouping",
            "kernels", "layer", "messages", "nn", "ops", "page", "report", "server", "strategies")
__all__ = sorted(_WHERE)

if TYPE_CHECKING:                       # "as": exported, for type checkers; a test compares them with what is found at run time
    from flora import adapter as adapter
    from flora import cli as cli
    from flora import client as client
    from flora import cohort as cohort
    from flora import config as config
    from flora import data as data
    from flora import engines as engines
    from flora import errors as errors
    from flora import evaluate as evaluate
    from flora import formats as formats
    from flora import group as group
    from flora import grouping as grouping
    from flora import kernels as kernels
    from flora import layer as layer
    from flora import messages as messages
    from flora import nn as nn
    from flora import ops as ops
    from flora import page as page
    from flora import report as report
    from flora import server as server
    from flora import strategies as strategies
    from flora.adapter import Adapter as Adapter
    from flora.adapter import Adapters as Adapters
    from flora.adapter import compress as compress
    from flora.adapter import fold as fold
    from flora.adapter import mean as mean
    from flora.adapter import pad as pad
    from flora.adapter import rescale as rescale
    from flora.adapter import stack as stack
    from flora.adapter import truncate as truncate
    from flora.benchmark import bench as bench
    from flora.client import LocalClient as LocalClient
    from flora.client import TrainConfig as TrainConfig
    from flora.cohort import Cohort as Cohort
    from flora.comparison import compare as compare
    from flora.conversation import chat as chat
    from flora.data import fetch as fetch
    from flora.doctor import diagnose as diagnose
    from flora.engines.local import resume as resume
    from flora.engines.local import run as run
    from flora.evaluation import eval_model as eval_model
    from flora.exporting import export as export
    from flora.group import Group as Group
    from flora.group import GroupCohort as GroupCohort
    from flora.layer import LoRALinear as LoRALinear
    from flora.messages import Broadcast as Broadcast
    from flora.messages import Update as Update
    from flora.nn import adapters as adapters
    from flora.nn import attach as attach
    from flora.nn import detach as detach
    from flora.nn import load_adapters as load_adapters
    from flora.nn import merge as merge
    from flora.page import write_report as write_report
    from flora.shards import merge_files as merge_files
    from flora.skew import label_skew as label_skew
    from flora.starter import init as init
    from flora.strategies import STRATEGIES as STRATEGIES
    from flora.strategies import aggregate as aggregate
    from flora.tuning import tune as tune
    from flora.verbs.completion import completion_script as completion_script
    from flora.verification import verify as verify
else:
    def __getattr__(name: str) -> object:
        if name in _WHERE:
            value = getattr(importlib.import_module(f"flora.{_WHERE[name]}"), name)
            globals()[name] = value
            return value
        if name in _MODULES:
            return importlib.import_module(f"flora.{name}")
        raise AttributeError(f"module 'flora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE, *_MODULES})
