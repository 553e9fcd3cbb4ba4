"""Files that are whole or not there, and names of folders."""
import pytest

from flora.files import safe_name, staged, write_text


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
    (tmp_path / ".target-dead").mkdir()
    with staged(tmp_path / "target"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


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
