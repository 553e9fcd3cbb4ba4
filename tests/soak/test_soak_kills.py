"""Runs struck wherever they touch the disk, and killed at fifty random moments, end at the bits of the undisturbed run."""
import random
import shutil

import pytest
from kills import CASES, WRITES, Runs, ended, finished, half, strike, strike_resume, to_the_end

pytestmark = pytest.mark.soak
KILLS = 50


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with Runs(tmp_path_factory.mktemp("kills")) as started:
        yield started


@pytest.fixture(scope="module")
def whole(runs):
    """An undisturbed run of every case: what it said, and what it left."""
    found = {}
    for case, changes in CASES.items():
        config = runs.settings(f"whole-{case}", **changes)
        said = runs.run(config)
        assert not said["error"], said["error"]
        found[case] = said, ended(config["output_dir"])
    return found


def test_fifty_random_kills_are_fifty_identical_resumes(runs, whole):
    """Every fifth resume is killed too, once more and then once more, before it may end."""
    draw, struck = random.Random(0), 0
    while struck < KILLS:
        case = draw.choice(sorted(CASES))
        said, left = whole[case]
        config = runs.settings(f"killed-{struck}", **CASES[case])
        done = runs.run(config, after=said["seconds"] * draw.random())
        assert not done["error"], done["error"]
        if not done["killed"] or finished(config["output_dir"]):
            shutil.rmtree(config["output_dir"])
            continue
        struck += 1
        for _ in range(2 if struck % 5 == 0 else 0):
            if not finished(config["output_dir"]):
                assert runs.go_on(config, after=said["seconds"] * draw.random())["error"] == ""
        to_the_end(runs, config, left)
        shutil.rmtree(config["output_dir"])
    print(f"{struck} kills, {struck} identical resumes")


@pytest.mark.parametrize("how", ["power", "EIO", "ENOSPC"])
def test_a_run_is_struck_at_every_thing_it_does_to_its_folder(runs, whole, how):
    """ENOSPC where bytes or names are made; EIO there and where they are flushed; power at all of them."""
    said, _ = whole["flora"]
    able = {"power": {*WRITES, "remove"}, "EIO": {*WRITES}, "ENOSPC": {"open", "write", "mkdir", "link"}}[how]
    points = [at for at, what in enumerate(said["seen"]) if what in able]
    assert len(points) > 50
    for at in points:
        strike(runs, "flora", whole["flora"], at, how)
    print(f"{how}: struck at {len(points)} of {len(said['seen'])} points, {len(points)} identical ends")


@pytest.mark.parametrize("case", ["fedit", "residual"])
def test_a_resume_loses_power_at_every_thing_that_it_does(runs, whole, case):
    halved = half(runs, case, whole[case])
    for at in range(len(halved[2])):
        strike_resume(runs, halved, whole[case], at)
    print(f"{case}: power lost at {len(halved[2])} points of a resume, {len(halved[2])} identical ends")


@pytest.mark.parametrize("case", sorted({*CASES} - {"flora"}))
def test_the_other_cases_are_struck_at_one_point_in_eight(runs, whole, case):
    said, _ = whole[case]
    for at in range(random.Random(case).randrange(8), len(said["seen"]), 8):
        strike(runs, case, whole[case], at, "power")
