"""Files that are whole or not there, and names of folders."""
import os

import pytest

from flora.errors import RunError
from flora.files import ASIDE, LOCK, append, hold, make_folder, release, remove, safe_name, staged, sweep, write_text


@pytest.fixture
def acts(monkeypatch):
    """What is flushed and named, in order; a temporary name reads "~"."""
    seen, flush, rename = [], os.fsync, os.replace

    def plain(path):
        return "~" if str(path).split("/")[-1].startswith(".") else str(path).split("/")[-1]

    def fsync(handle):
        seen.append(f"flush {plain(os.readlink(f'/proc/self/fd/{handle}'))}")
        flush(handle)

    def replace(source, to):
        seen.append(f"{plain(source)} is {plain(to)}")
        rename(source, to)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    return seen


def test_nothing_has_a_name_before_the_disk_holds_it(tmp_path, acts):
    """Contents, then their folder, then the name, then the folder that holds the name."""
    here = tmp_path.name
    with staged(tmp_path / "target") as stage:
        (stage / "in").mkdir()
        (stage / "in" / "a").write_text("1")
        (stage / "b").write_text("2")
        assert acts == []
    assert acts == ["flush b", "flush ~", "flush a", "flush in", "~ is target", f"flush {here}"]
    acts.clear()
    with staged(tmp_path / "target"):
        pass
    assert acts == ["flush ~", "target is ~", "~ is target", f"flush {here}"]
    acts.clear()
    write_text(tmp_path / "x", "1")
    assert acts == ["flush ~", "~ is x", f"flush {here}"]
    acts.clear()
    append(tmp_path / "x", "2", lasting=False)
    append(tmp_path / "x", "3", lasting=True)
    assert acts == ["flush x"] and (tmp_path / "x").read_text() == "123"
    acts.clear()
    make_folder(tmp_path / "deep" / "er")
    assert sorted(acts) == sorted([f"flush {here}", "flush deep"])
    acts.clear()
    remove(tmp_path / "target")
    assert acts == ["target is ~", f"flush {here}"] and sorted(p.name for p in tmp_path.iterdir()) == ["deep", "x"]


def test_what_is_removed_loses_its_name_before_its_content(tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "a").write_text("1")

    def killed(path, **_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shutil.rmtree", killed)
        remove(tmp_path / "old")
    assert not (tmp_path / "old").exists() and len(list(tmp_path.iterdir())) == 1
    (tmp_path / ".x.new").write_text("half")
    (tmp_path / ".flora-1-before").mkdir()
    (tmp_path / LOCK).write_text("me")
    sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".flora-1-before", LOCK]
    sweep(tmp_path / "nowhere")
    remove(tmp_path / "nowhere")


def test_a_folder_has_one_holder(tmp_path):
    first = hold(tmp_path)
    for _ in range(2):
        with pytest.raises(RunError, match=f"process {os.getpid()} on .* since 20.* is writing to it"):
            hold(tmp_path)
    release(tmp_path, first)
    assert list(tmp_path.iterdir()) == []
    release(tmp_path, hold(tmp_path))


def test_a_lock_file_that_its_holder_takes_away_is_not_taken_for_the_lock(tmp_path, monkeypatch):
    """Between a second process's open and its lock, the first one ends, and a third takes the folder."""
    import fcntl
    flock, held = fcntl.flock, [hold(tmp_path)]

    def late(handle, how):
        monkeypatch.setattr(fcntl, "flock", flock)
        release(tmp_path, held.pop())
        held.append(hold(tmp_path))
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(RunError, match="is writing"):
        hold(tmp_path)
    release(tmp_path, held.pop())


def test_a_staged_folder_takes_its_name_only_when_the_block_ends_well(tmp_path):
    target = tmp_path / "deep" / "target"
    with staged(target) as stage:
        (stage / "a").write_text("1")
        assert not target.exists()
    with pytest.raises(KeyboardInterrupt), staged(target) as stage:
        (stage / "a").write_text("2")
        raise KeyboardInterrupt
    assert (target / "a").read_text() == "1"
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    with staged(tmp_path / "target") as stage:
        dead = stage.with_name(stage.name + "dead")
    dead.mkdir()
    for other in (".target-backup", "target-2", ".flora-mine"):
        (tmp_path / other).mkdir()
    with staged(tmp_path / "target-2"):
        assert dead.exists()                                    # another target's
    with staged(tmp_path / "target"):
        assert not dead.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"target", ".target-backup", "target-2", ".flora-mine"}


def test_what_was_there_is_kept_until_the_new_folder_has_its_name(tmp_path, monkeypatch):
    """A rename that fails puts it back; a process killed between the two renames leaves it for the next to put back."""
    target = tmp_path / "target"
    with staged(target) as stage:
        (stage / "old").write_text("1")
    replace = os.replace

    def fails(source, to):
        if to == target and not str(source).endswith(ASIDE):
            raise OSError("no")
        replace(source, to)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no"):
        patch.setattr(os, "replace", fails)
        with staged(target) as stage:
            (stage / "new").write_text("2")
    assert [p.name for p in target.iterdir()] == ["old"] and len(list(tmp_path.iterdir())) == 1
    replace(target, stage.with_name(stage.name + ASIDE))
    with pytest.raises(KeyError), staged(target):
        raise KeyError
    assert [p.name for p in target.iterdir()] == ["old"]


def test_a_text_is_replaced_whole(tmp_path):
    for text in ("old", "new"):
        write_text(tmp_path / "x", text)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]


def test_two_clients_never_share_a_folder():
    names = ["ann", "a b", "a_b", "a/b", "../b", "..", ".", "", "é", "ü", "a:b"]
    folders = [safe_name(name) for name in names]
    assert len(set(folders)) == len(names)
    assert safe_name("ann") == "ann"
    assert all(folder and "/" not in folder and folder not in (".", "..") for folder in folders)
