"""A job of NVFlare from a config of flora."""
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from flora.config import RunConfig
from flora.engines.nvflare.parts import FloraAggregator, FloraFedAvg, FloraFilter, FloraPersistor
from flora.engines.nvflare.settings import NVFlareConfig, as_job, settings
from flora.engines.remote import refuse
from flora.errors import needs

with needs("nvflare", "nvflare"):
    from nvflare.app_common.executors.client_api_executor import ClientAPIExecutor
    from nvflare.client.config import ExchangeFormat
    from nvflare.job_config.script_runner import FrameworkType
    from nvflare.recipe.fedavg import FedAvgRecipe

JOB, SCRIPT = "flora_job.yaml", "flora_client.py"
LOOP = f'''"""A client of flora: see flora.engines.nvflare."""
from pathlib import Path

from flora.engines.nvflare import client_loop

client_loop(Path(__file__).with_name("{JOB}"))
'''


class FloraRecipe(FedAvgRecipe):
    """NVFlare's FedAvgRecipe with flora's parts. name: of the job. sites: of the clients, in the run's order, for
    SimEnv(clients=...).

    The job carries the clients' script and the run's settings beside it, not flora, which is installed at the sites. script: one
    that the sites have, by its absolute path, and beside which lies flora_job.yaml: then the job carries no code.
    """

    def __init__(self, config: RunConfig, own: NVFlareConfig, name: str, script: str | None):
        self.sites, self._limit, self._script = list(own.sites), own.round_timeout, script
        self._folder = tempfile.TemporaryDirectory(prefix="flora-job-")
        job = as_job(config, own)
        (Path(self._folder.name) / SCRIPT).write_text(LOOP, encoding="utf-8")
        (Path(self._folder.name) / JOB).write_text(yaml.safe_dump(job, sort_keys=False), encoding="utf-8")
        super().__init__(name=name, min_clients=own.min_sites or len(own.sites), num_rounds=config.num_rounds,
                         train_script=script or SCRIPT, aggregator=FloraAggregator(), model_persistor=FloraPersistor(job),
                         framework=FrameworkType.NUMPY, server_expected_format=ExchangeFormat.NUMPY, key_metric="")
        self._job.set_app_packages(["flora"])                   # FedJob would copy what it can find of it
        self.add_server_output_filter(FloraFilter(), tasks=["train"])

    def _create_controller(self, persistor_id: str, model_params: Any, model_aggregator: Any) -> FloraFedAvg:
        return FloraFedAvg(len(self.sites), self.num_rounds, model_aggregator, self._limit)

    def _prepare_client_apps(self) -> None:
        """Not with a ScriptRunner, which takes an absolute path for one at the sites and a relative one for the caller's folder."""
        self._job.to_clients(ClientAPIExecutor("in_process", task_script_path=self.train_script,
                                               params_exchange_format=ExchangeFormat.NUMPY,
                                               server_expected_format=ExchangeFormat.NUMPY), tasks=["train"])
        if self._script is None:
            self._job.to_clients(self._folder.name)


def flora_recipe(job: RunConfig | Mapping[str, Any] | str | Path, name: str = "flora", script: str | None = None,
                 resume: bool | None = None) -> FloraRecipe:
    """The recipe of a run: `recipe.execute(SimEnv(clients=recipe.sites))`. job: keys and values, a YAML file, or a RunConfig; keys
    of NVFlare's part are in its section `nvflare`; name: of the job; script: of the clients, as of FloraRecipe (None: one that
    calls client_loop, carried by the job); resume: in the place of nvflare.resume.

    Raises ConfigError, before anything is sent, for what a run of separate processes cannot have.
    """
    config, own = settings(job.model_dump(exclude_defaults=True) if isinstance(job, RunConfig) else job)
    refuse(config)
    return FloraRecipe(config, own if resume is None else replace(own, resume=resume), name, script)
