"""Files that are whole or not there, and names of folders."""
import os

import pytest

from flora.files import ASIDE, safe_name, staged, write_text


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
