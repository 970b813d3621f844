import errno
import os

import pytest
from faults import failing, watched

from mgt_fast.durable import explained, make_folder, remove_leftovers, replace_file, sync_folder, write_all


def synced(monkeypatch):
    """Record the paths that are synced."""
    paths = []
    monkeypatch.setattr(os, "fsync", lambda file: paths.append(os.readlink(f"/proc/self/fd/{file}")))
    return paths


def test_a_file_and_its_name_are_synced(tmp_path, monkeypatch):
    paths = synced(monkeypatch)
    replace_file(tmp_path / "file", b"contents")
    assert paths == [str(tmp_path / f".file.{os.getpid()}.tmp"), str(tmp_path)]
    assert (tmp_path / "file").read_bytes() == b"contents"


def test_every_new_folder_is_synced(tmp_path, monkeypatch):
    paths = synced(monkeypatch)
    make_folder(tmp_path / "a" / "b" / "c")
    assert paths == [str(tmp_path / "a" / "b"), str(tmp_path / "a"), str(tmp_path)]
    make_folder(tmp_path / "a" / "b" / "c")
    assert len(paths) == 3


def test_a_disk_may_take_a_file_in_pieces(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:7]))
    with (tmp_path / "file").open("wb") as file:
        write_all(file.fileno(), bytes(range(100)))
    assert (tmp_path / "file").read_bytes() == bytes(range(100))


def test_a_file_system_that_syncs_no_folders_is_put_up_with_and_a_failing_one_is_not(tmp_path):
    with watched(failing(0, errno.EINVAL)):
        sync_folder(tmp_path)
    with watched(failing(0, errno.EIO)), pytest.raises(OSError, match="Input/output error"):
        sync_folder(tmp_path)


def test_leftovers_of_this_file_alone_are_removed(tmp_path):
    for name in (".file.12.tmp", ".file.345.tmp", ".other.12.tmp", "file", ".file.tmp"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path / "file")
    assert sorted(os.listdir(tmp_path)) == [".file.tmp", ".other.12.tmp", "file"]


def test_the_error_names_what_is_known(tmp_path, monkeypatch):
    def fail(folder):
        with explained("the file", folder, 12_345_678, lambda: "nothing is lost"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    text = "the file could not be written .No space left on device.: it needs 12,345,678 bytes, and "
    with pytest.raises(OSError, match=rf"{text}[\d,]+ are free in {tmp_path} .*; nothing is lost") as failure:
        fail(tmp_path / "not" / "made")
    assert failure.value.errno == errno.ENOSPC
    monkeypatch.setattr("shutil.disk_usage", lambda folder: (_ for _ in ()).throw(OSError(errno.EIO, "I/O")))
    with pytest.raises(OSError, match=r"does not tell how many are free \(I/O\)"):
        fail(tmp_path)
