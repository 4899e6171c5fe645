"""Files are written whole or not at all, and a full disk loses nothing."""

import errno
import struct

import pytest

from controlfill import files
from controlfill.errors import UserError


def test_write_whole_replaces_and_leaves_nothing_else(tmp_path):
    files.write_whole(tmp_path / "a" / "x.txt", b"one")
    files.write_whole(tmp_path / "a" / "x.txt", b"two")
    assert (tmp_path / "a" / "x.txt").read_bytes() == b"two"
    assert len(list((tmp_path / "a").iterdir())) == 1


def test_full_disk_is_one_line_and_keeps_the_old_file(tmp_path, monkeypatch):
    files.write_whole(tmp_path / "x.txt", b"old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full.*nothing written before is lost"):
        files.write_whole(tmp_path / "x.txt", b"new")
    assert (tmp_path / "x.txt").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_libraries_words_for_a_full_disk_are_understood(tmp_path):
    with pytest.raises(UserError, match="disk is full"), files.write_folder(tmp_path / "c"):
        raise RuntimeError("Error while serializing: I/O error: No space left on device")


def test_write_folder_appears_only_when_done(tmp_path):
    target = tmp_path / "c"
    with files.write_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    with files.write_folder(target) as folder:
        (folder / "b").write_text("2")
    assert [p.name for p in target.iterdir()] == ["b"]


def test_what_is_written_may_be_read_by_others(tmp_path):
    with files.write_folder(tmp_path / "c") as folder:
        (folder / "a").touch(mode=0o600)
    assert (tmp_path / "c" / "a").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o755


def test_the_old_folder_comes_back_when_the_new_one_cannot_move_in(tmp_path, monkeypatch):
    with files.write_folder(tmp_path / "c") as folder:
        (folder / "a").write_text("old")
    replace, calls = files.os.replace, []

    def second_fails(*names):
        calls.append(names)
        if len(calls) == 2:
            raise OSError(5, "input/output error")
        replace(*names)

    monkeypatch.setattr(files.os, "replace", second_fails)
    with pytest.raises(OSError, match="input/output"), files.write_folder(tmp_path / "c"):
        pass
    assert (tmp_path / "c" / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_failed_folder_leaves_the_old_one(tmp_path):
    with files.write_folder(tmp_path / "c") as folder:
        (folder / "a").write_text("1")
    with pytest.raises(KeyError), files.write_folder(tmp_path / "c") as folder:
        (folder / "a").write_text("2")
        raise KeyError
    assert (tmp_path / "c" / "a").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_result_needs_a_new_folder(tmp_path):
    (tmp_path / "x").touch()
    for taken, words in ((tmp_path / "x", "x is a file; name a new folder"), (tmp_path, "not emp")):
        with pytest.raises(UserError, match=words):
            files.check_empty(taken, "result")
    files.check_empty(tmp_path / "y", "result")


def test_leftovers_of_killed_processes_go(tmp_path):
    (tmp_path / ".tmp-checkpoint-3-abc").mkdir()
    (tmp_path / "checkpoint-2").mkdir()
    files.remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]


def test_json_errors_are_one_line(tmp_path):
    files.write_json(tmp_path / "x.json", {"a": tmp_path})
    assert files.read_json(tmp_path / "x.json") == {"a": str(tmp_path)}
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="not readable JSON"):
        files.read_json(tmp_path / "x.json")
    with pytest.raises(UserError, match="does not exist"):
        files.read_json(tmp_path / "y.json")


@pytest.mark.parametrize("data", [b"", b"short", struct.pack("<Q", 2**60), b"\x05" + b"\0" * 9])
def test_what_is_no_safetensors_file_is_refused(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(UserError, match="is not a safetensors file"):
        files.read_header(tmp_path / "x")
