"""One process at a time in a run directory, or at a dataset.

    lock(folder)                          # until unlock(folder), or the end of the process
    with locked(folder, beside=True): ... # a dataset is moved here when it is complete, so its lock is beside it

It is a lock of the operating system on the file LOCK. So it ends with the process, however that ends, and it also works
between machines that share a file system. The text in the file only names the holder. Importing this module does not
load torch.
"""

import atexit
import errno
import fcntl
import os
import socket
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from environments.checks import BadInput
from offline_data.durable import AGAIN, disk_errors

HELD = {}  # folder -> (its open lock file, the folders to remove if they stay empty), in this process


def _is_there(file) -> bool:
    """Whether an open lock file still has its name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except OSError:
        return False


def lock(folder: Path, beside: bool = False, again: str = AGAIN):
    """Locks the folder by FOLDER/LOCK, or with `beside` by FOLDER.LOCK. Missing folders above that file are made.

    Raises BadInput if another process has the lock, or if the file can't be written; `again` says what to do then. A
    process that has the lock already keeps it. On a disk without locks it prints a line and locks nothing.
    """
    folder = folder.absolute()
    if folder in HELD and _is_there(HELD[folder][0]):
        return
    path = folder.with_name(folder.name + ".LOCK") if beside else folder / "LOCK"
    tries = 2  # the first may fail because holder_of, in another process, has the lock for a moment
    with disk_errors(path, again):
        # Of a run only its own folder: other runs may just be starting in those above.
        made = [above for above in path.parents if not above.exists()] if beside else [folder]
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = open(path, "a+")
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                holder = file.read(300).strip() or "another process"
                file.close()
                tries -= 1
                if tries and error.errno in (errno.EACCES, errno.EAGAIN):
                    time.sleep(0.05)
                    continue
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    print(f"{folder} can't be locked ({error.strerror}): make sure that only one process writes there")
                    return
                raise BadInput(
                    f"{folder} is in use by {holder}: wait for it or stop it, or choose another --out"
                ) from None
            if _is_there(file):
                break
            file.close()  # the last holder removed the file between the two calls
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    except OSError:  # a full disk: the lock works without a name
        pass
    HELD[folder] = file, made


def holder_of(folder: Path) -> str | None:
    """The process that trains in the folder, as named in its LOCK, or None. A killed process's LOCK does not count."""
    if folder.absolute() in HELD:  # a process that closes its own lock file loses the lock
        return "this process"
    try:
        with open(folder / "LOCK") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    return None  # a disk without locks, as lock() says when a run begins there
                return file.read(300).strip() or "another process"
    except FileNotFoundError:
        pass
    return None


def unlock(folder: Path):
    """Removes the lock file while the lock is still held, and the folders that were made for it if they are empty."""
    folder = folder.absolute()
    if folder in HELD:
        file, made = HELD.pop(folder)
        with suppress(OSError):
            if _is_there(file):
                os.unlink(file.name)
            for empty in made:
                empty.rmdir()  # fails if the folder holds a run
        with suppress(OSError):  # closing repeats a write that failed on a full disk
            file.close()


@contextmanager
def locked(folder: Path, beside: bool = False):
    """Within it the folder is locked. If it was locked before, it stays locked afterwards."""
    before = folder.absolute() in HELD
    lock(folder, beside)
    try:
        yield
    finally:
        if not before:
            unlock(folder)


@atexit.register
def _unlock_all():
    """A script that ends leaves no LOCK behind. A killed one does, but that file locks nothing."""
    for folder in list(HELD):
        unlock(folder)
