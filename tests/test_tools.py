"""The tools around datasets: durable writing, listing, and what a signal leaves."""

import errno
import os
import subprocess

import pytest

from environments.checks import BadInput
from offline_data import durable

# ---------------------------------------------------------------- durable writing


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "a.txt"
    durable.write_text(path, "old")
    durable.write_text(path, "new ±")
    assert path.read_text() == "new ±" and os.listdir(tmp_path) == ["a.txt"]


def test_files_are_flushed_before_they_are_renamed(tmp_path, monkeypatch):
    """A power cut after the rename must find the bytes: every file and folder is flushed first, the parent last."""
    calls = []
    names = lambda handle: os.readlink(f"/proc/self/fd/{handle}")
    flush, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append(names(handle)), flush(handle)))
    monkeypatch.setattr(os, "rename", lambda a, b: (calls.append(f"{a} -> {b}"), rename(a, b)))
    partial, path = tmp_path / "set.partial", tmp_path / "set"
    (partial / "agents").mkdir(parents=True)
    for name in ("one", "agents/two"):
        (partial / name).write_text(name)
    durable.replace(partial, path)
    assert sorted(calls[:4]) == sorted(map(str, (partial, partial / "agents", partial / "one", partial / "agents" / "two")))
    assert calls[4:] == [f"{partial} -> {path}", str(tmp_path)] and (path / "agents" / "two").read_text() == "agents/two"


@pytest.mark.parametrize("there", ["folder", "file"])
def test_a_folder_takes_nobodys_place(there, tmp_path):
    partial, path = tmp_path / "set.partial", tmp_path / "set"
    partial.mkdir()
    (partial / "new").write_text("")
    if there == "folder":
        path.mkdir()
        (path / "mine").write_text("precious")
    else:
        path.write_text("precious")
    with pytest.raises(BadInput, match="is already there and is left alone"):
        durable.replace(partial, path)
    assert (path / "mine" if there == "folder" else path).read_text() == "precious" and (partial / "new").exists()


@pytest.mark.parametrize("number, said", [
    (errno.ENOSPC, "^no space left on /.*; free some and run again with --resume"),
    (errno.EDQUOT, "^your quota on /.* is used up; free some and run again with --resume"),
    (errno.EROFS, "is mounted read-only"), (errno.EACCES, "not allowed"), (errno.EIO, "can't write .*: Input/output error"),
])
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_what_the_disk_refuses_is_one_line(number, said, call, tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    durable.write_text(path, "old")

    def fail(*args):
        raise OSError(number, os.strerror(number))

    if call == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(durable.Path, "write_bytes", fail)
    with pytest.raises(BadInput, match=said) as caught:
        durable.write_text(path, "new", "run again with --resume")
    assert "\n" not in str(caught.value) and path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_that_was_removed(tmp_path):
    with pytest.raises(BadInput, match="was removed meanwhile"):
        durable.write_text(tmp_path / "gone" / "a.txt", "new")


def test_a_disk_that_is_full(tmp_path):
    """A real small disk, where this may be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small tmpfs can't be mounted here")
    try:
        durable.write_bytes(disk / "a", b"x" * 1000)
        with pytest.raises(BadInput, match=f"^no space left on {disk}; free some"):
            durable.write_bytes(disk / "a", b"x" * 100_000)
        assert (disk / "a").read_bytes() == b"x" * 1000 and os.listdir(disk) == ["a"]
    finally:
        subprocess.run(["umount", disk], check=True)
