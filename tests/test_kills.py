"""Runs that are killed, lose power or meet a disk that fails end, once resumed, as the run that nobody disturbed: bit by bit."""
import os
import random
import shutil

import pytest
from kills import CASES, Runs, ended, finished, half, spread, strike, strike_resume, to_the_end

from flora.files import LOCK, hold, release


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with Runs(tmp_path_factory.mktemp("kills")) as started:
        yield started


@pytest.fixture(scope="module")
def undisturbed(runs):
    """A run of every case, when it is first asked for: what it said, and what it left."""
    known = {}

    def of(case):
        if case not in known:
            config = runs.settings(f"whole-{case}", **CASES[case])
            said = runs.run(config)
            assert not said["error"], said["error"]
            known[case] = said, ended(config["output_dir"])
        return known[case]

    return of


@pytest.mark.parametrize("case", CASES)
def test_a_run_killed_and_killed_again_while_it_resumes_ends_at_the_same_bits(runs, undisturbed, case):
    """At a random moment; then power is lost at a drawn call on its folder, after the first checkpoint."""
    said, whole = undisturbed(case)
    draw = random.Random(case)
    config = runs.settings(f"killed-{case}", **CASES[case])
    assert runs.run(config, after=said["seconds"] * draw.uniform(0.1, 0.6))["error"] == ""
    if finished(config["output_dir"]):                          # the machine was quicker than before
        shutil.rmtree(config["output_dir"])
    assert runs.go_on(config, at=int(len(said["seen"]) * draw.uniform(0.6, 0.75)), how="power")["error"] == ""
    to_the_end(runs, config, whole)


@pytest.mark.parametrize("part", range(8))
def test_wherever_it_is_struck_it_goes_on(runs, undisturbed, part):
    """A sample of all that a run does to its folder; `make soak` strikes at every one."""
    said, _ = undisturbed("flora")
    strike(runs, "flora", undisturbed("flora"), spread(8, len(said["seen"]))[part], ("kill", "EIO", "power", "ENOSPC")[part % 4])


@pytest.mark.parametrize("how", ["kill", "power"])
def test_a_checkpoint_that_is_half_written_is_none(runs, undisturbed, how):
    """Struck between the files of the second checkpoint, the first to link to another."""
    seen = undisturbed("flora")[0]["seen"]
    strike(runs, "flora", undisturbed("flora"), seen.index("link", seen.index("link") + 1) + 1, how)


@pytest.fixture(scope="module")
def halved(runs, undisturbed):
    return half(runs, "fedit", undisturbed("fedit"))


@pytest.mark.parametrize("at", [3, 9, 15, 18, 24])
def test_power_is_lost_while_a_resume_tidies_up(runs, undisturbed, halved, at):
    """Rows of a round that was not finished are dropped, what was half written is swept away: all of it once more, if need be."""
    assert len(halved[2]) > 60
    strike_resume(runs, halved, undisturbed("fedit"), at)


@pytest.mark.parametrize("part", range(4))
def test_a_run_killed_while_it_replaces_another_is_the_one_or_the_other(runs, undisturbed, part):
    """`--overwrite` takes an old run away: whatever is left resumes to a whole run of the old config or of the new one."""
    (_, old), (_, new) = undisturbed("fedit"), undisturbed("flora")
    config = runs.settings(f"over-{part}", **CASES["flora"])
    shutil.copytree(runs.place / "whole-fedit", config["output_dir"])
    (runs.place / config["output_dir"] / "config.yaml").write_text(
        (runs.place / "whole-fedit" / "config.yaml").read_text().replace("whole-fedit", f"over-{part}"))
    at = spread(4, 40, seed=part)[part]
    assert runs.run(config | {"overwrite": True}, at=at, how=("kill", "power")[part % 2])["killed"]
    folder = runs.place / config["output_dir"]
    strategy = "flora" if "strategy: flora" in (folder / "config.yaml").read_text() else "fedit"
    to_the_end(runs, config, new if strategy == "flora" else old)


def test_a_second_process_is_refused_and_the_lock_goes_with_its_process(runs, undisturbed):
    said, whole = undisturbed("flora")
    config = runs.settings("locked", **CASES["flora"])
    assert runs.run(config, at=len(said["seen"]) // 2, how="kill")["killed"]
    folder = runs.place / config["output_dir"]
    assert (folder / LOCK).exists()                             # the file is still there, the lock is not:
    mine = hold(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    for again in (lambda: runs.go_on(config), lambda: runs.run(config | {"overwrite": True})):
        refused = again()["error"]
        assert refused.startswith("RunError: expected") and f"process {os.getpid()} on " in refused and "is writing" in refused
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    release(folder, mine)
    to_the_end(runs, config, whole)
