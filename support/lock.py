"""One process at a time in a run directory.

It is a lock of the operating system on the file LOCK. So it ends with the process, however that ends, and it also works
between machines that share a file system. The text in the file only names the holder.
"""

import atexit
import errno
import fcntl
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from environments.checks import BadInput

HELD = {}  # run directory -> its open LOCK, in this process


def lock(folder: Path):
    """Makes the folder if it is missing, and locks it. Raises BadInput if another process has locked it.

    A process that has the lock already keeps it.
    """
    folder = folder.absolute()
    if folder in HELD and _is_at(HELD[folder], folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    again = True
    while True:
        file = open(folder / "LOCK", "a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read(300).strip() or "another process"
            file.close()
            if again and error.errno in (errno.EACCES, errno.EAGAIN):  # it may be holder_of, which looks for a moment
                again = False
                time.sleep(0.05)
                continue
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                print(f"{folder} can't be locked ({error.strerror}): make sure that only one process trains there")
                return
            raise BadInput(
                f"{folder} is in use by {holder}: wait for it or stop it, or choose another --out"
            ) from None
        if _is_at(file, folder):
            break
        file.close()  # the last holder removed the file between the two calls
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    except OSError:  # a full disk: the lock works without a name
        pass
    HELD[folder] = file


def holder_of(folder: Path) -> str | None:
    """Who trains in the folder, as its LOCK says, or None. What a process that was killed left counts as nobody."""
    if folder.absolute() in HELD:  # a process that closes its own lock file loses the lock
        return "this process"
    try:
        with open(folder / "LOCK") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                return file.read(300).strip() or "another process"
    except FileNotFoundError:
        pass
    return None


def unlock(folder: Path):
    """Removes LOCK, while it is held, and the folder if nothing else is in it."""
    folder = folder.absolute()
    file = HELD.pop(folder, None)
    if file is not None:
        with suppress(OSError):
            if _is_at(file, folder):
                (folder / "LOCK").unlink()
            folder.rmdir()  # fails where there is a run
        with suppress(OSError):  # closing tries again what could not be written to a full disk
            file.close()


def _is_at(file, folder: Path) -> bool:
    """Whether folder/LOCK is still the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(folder / "LOCK"))
    except OSError:
        return False


@atexit.register
def _unlock_all():
    """A script that ends leaves no LOCK behind. A killed one does, but that file locks nothing."""
    for folder in list(HELD):
        unlock(folder)
