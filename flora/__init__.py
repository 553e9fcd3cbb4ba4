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

if TYPE_CHECKING:
    from flora.adapter import Adapter, Adapters, compress, fold, mean, pad, rescale, stack, truncate
    from flora.benchmark import bench
    from flora.client import LocalClient, TrainConfig
    from flora.cohort import Cohort
    from flora.comparison import compare
    from flora.conversation import chat
    from flora.data import fetch
    from flora.doctor import diagnose
    from flora.engines.local import resume, run
    from flora.evaluation import eval_model
    from flora.exporting import export
    from flora.group import Group, GroupCohort
    from flora.layer import LoRALinear
    from flora.messages import Broadcast, Update
    from flora.nn import adapters, attach, detach, load_adapters, merge
    from flora.page import write_report
    from flora.shards import merge_files
    from flora.skew import label_skew
    from flora.starter import init
    from flora.strategies import STRATEGIES, aggregate
    from flora.tuning import tune
    from flora.verbs.completion import completion_script
    from flora.verification import verify


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
