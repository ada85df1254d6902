"""One process at a time in a run directory, or at a dataset.

    lock(folder)                          # until unlock(folder), or the end of the process
    with locked(folder, beside=True): ... # a dataset is made elsewhere and moved here: its lock lies beside it

The lock is the operating system's, on the file LOCK, so it is gone with the process however that ends, and it holds
between the machines of a shared file system. What stands in the file only names the holder. Importing this module does
not load torch.
"""

import atexit
import errno
import fcntl
import os
import socket
from contextlib import contextmanager, suppress
from pathlib import Path

from environments.checks import BadInput
from offline_data.durable import AGAIN, disk_errors

HELD = {}  # folder -> its open lock file, in this process


def lock(folder: Path, beside: bool = False, again: str = AGAIN):
    """Locks the folder by FOLDER/LOCK, or by FOLDER.LOCK; what is missing on the way to that file is made.

    Raises BadInput if another process has the lock, or if the file can't be written; `again` is how to go on then. A
    process that has the lock already keeps it.
    """
    folder = folder.absolute()
    if folder in HELD and _is_there(HELD[folder]):
        return
    path = folder.with_name(folder.name + ".LOCK") if beside else folder / "LOCK"
    with disk_errors(path, again):
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = open(path, "a+")
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                holder = file.read(300).strip() or "another process"
                file.close()
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    print(f"{folder} can't be locked ({error.strerror}): see to it that only one process writes there")
                    return
                raise BadInput(
                    f"{folder} is in use by {holder}: wait for it or stop it, or choose another --out"
                ) from None
            if _is_there(file):
                break
            file.close()  # the holder before removed the file between the two calls
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    except OSError:  # a full disk: the lock holds without a name
        pass
    HELD[folder] = file


def unlock(folder: Path):
    """Removes the lock file, while it is held, and a folder with nothing else in it."""
    folder = folder.absolute()
    file = HELD.pop(folder, None)
    if file is not None:
        with suppress(OSError):
            if _is_there(file):
                os.unlink(file.name)
            if os.path.dirname(file.name) == str(folder):
                folder.rmdir()  # fails where there is a run
        with suppress(OSError):  # what could not be written on a full disk is tried again here
            file.close()


@contextmanager
def locked(folder: Path, beside: bool = False):
    """Within it the folder is locked; one that was locked before stays locked."""
    before = folder.absolute() in HELD
    lock(folder, beside)
    try:
        yield
    finally:
        if not before:
            unlock(folder)


def _is_there(file) -> bool:
    """Whether an open lock file still has its name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except OSError:
        return False


@atexit.register
def _unlock_all():
    """A script that ends leaves no LOCK behind; one that is killed does, and it locks nothing."""
    for folder in list(HELD):
        unlock(folder)
