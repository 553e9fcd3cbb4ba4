"""The loop of a client's script: receive a message, train on it as a cohort of one, answer in bytes."""
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flora.config import RunConfig
from flora.data.fetch import cache_folder
from flora.engines.nvflare.settings import NVFlareConfig, from_model, settings, to_model, told_of
from flora.engines.party import Answer, Base, Own, Party
from flora.errors import ConfigError, FloraError, MessageError, needs

with needs("nvflare", "nvflare"):
    from nvflare import client as flare
    from nvflare.app_common.abstract.fl_model import FLModel

log = logging.getLogger(__name__)


def client_loop(job: str | Path | Mapping[str, Any], own: Own | None = None, folder: Path | None = None) -> None:
    """Runs a client until its job ends. job: as `settings` takes it; own: what this site says for itself (its rows, its model is
    `model_name_or_path` of the job that it gives here); folder: where it keeps what its base was sent.

    Whatever goes wrong in a round is answered with its reason, and the next round is tried: the server leaves the client out.
    """
    flare.init()
    party: Party | None = None
    while flare.is_running():
        model = flare.receive()
        if model is None:
            return
        try:
            party = party or party_at(flare.get_site_name(), *settings(job), own, folder)
            answer = answer_of(party.answer, model)
        except FloraError as error:
            answer = refusal(str(error))
        except Exception as error:                              # a script that ends takes its site out of the whole job
            log.exception("no update in this round")
            answer = refusal(f"{type(error).__name__}: {error}")
        flare.send(answer)


def party_at(site: str, config: RunConfig, job: NVFlareConfig, own: Own | None = None, folder: Path | None = None) -> Party:
    """The client of a site. Raises ConfigError for a site that the job does not name, and what Party raises."""
    if site not in job.sites:
        raise ConfigError(f"expected a site of this job: {', '.join(job.sites)}; got {site!r}. Name it in nvflare.sites.")
    place = job.sites.index(site)
    own = Own(own.rank, own.alpha, own.dataset, f"client-{place}") if own else Own(name=f"client-{place}")
    return Party(config, place, Base(config, folder or cache_folder() / "nvflare"), own)


def answer_of(train: Callable[[bytes, int, int, bool], Answer], model: FLModel) -> FLModel:
    """What a client answers to a message; train: Party.answer. Raises what that raises, MessageError for no message of flora."""
    told = told_of(model)
    if "error" in told:
        raise MessageError(str(told["error"])[:1000])
    wrong = [key for key, kind in (("needed", int), ("rank", int), ("measured", bool)) if type(told.get(key)) is not kind]
    if wrong:
        raise MessageError(f"expected {', '.join(wrong)} in the meta of a message; got {str(dict(told))[:200]}. Make the job with "
                           "flora_recipe, whose filter says them.")
    answer = train(from_model(model), told["needed"], told["rank"], told["measured"])
    told = {"have": answer.have, "behind": answer.update is None, "metrics": dict(answer.metrics)}
    return to_model(answer.update or b"", told)


def refusal(reason: str) -> FLModel:
    """An answer without an update."""
    return to_model(b"", {"error": reason})
