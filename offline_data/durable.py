"""Writes files that are either complete or absent, even after a crash, a kill or a power cut.

    write_text(path, text)          # a new file, or an existing one replaced as a whole
    write_bytes(path, data)         # for example what torch.save wrote into an io.BytesIO
    write_figure(path, figure, dpi) # of matplotlib
    replace(partial, path)          # a file or folder that is ready takes its final name
    with disk_errors(path): ...     # an OSError in here becomes BadInput with one line

A reader never sees half of a file under its final name: the bytes are written to PATH.partial, flushed to the disk, and
then renamed, and the folder's entry is flushed as well. If the system refuses to write (a full disk, a quota, a
read-only folder), BadInput is raised with one line that says what to do. Importing this module does not load torch.
"""

import errno
import io
import os
import socket
from contextlib import contextmanager, suppress
from pathlib import Path

from environments.checks import BadInput

AGAIN = "run the command again"


def device_of(path: str | Path) -> str:
    """The mount point of a path's disk. The path need not exist."""
    path = Path(path).absolute()
    return str(next(folder for folder in (path, *path.parents) if os.path.ismount(folder) or folder == folder.parent))


@contextmanager
def disk_errors(path: str | Path, again: str = AGAIN):
    """Within it, an OSError becomes BadInput. `path` is what is being written, `again` what to do once there is space.

    torch.save to a path hides that the disk is full ("unexpected pos ..."), so save to an io.BytesIO and use
    write_bytes.
    """
    try:
        yield
    except OSError as error:
        at = error.filename if isinstance(error.filename, str) else path
        if error.errno == errno.ENOSPC:
            what = f"no space left on {device_of(path)}; free some and {again} (it was writing {path})"
        elif error.errno == errno.EDQUOT:
            what = f"your quota on {device_of(path)} is used up; free some and {again} (it was writing {path})"
        elif error.errno == errno.EROFS:
            what = f"can't write {path}: {device_of(path)} is mounted read-only; choose another folder"
        elif error.errno in (errno.EACCES, errno.EPERM):
            what = (
                f"can't write {path}: you are not allowed to write {at}; change its permissions or choose another "
                "folder"
            )
        elif error.errno == errno.ENOENT:
            what = f"can't write {path}: {at} is not there, or was removed meanwhile; {again}"
        else:
            what = f"can't write {path}: {error.strerror or error}"
        raise BadInput(what) from None


def fsync_folder(path: str | Path):
    """Flushes a folder's list of names. Some network file systems can't do that for a folder, and need not."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


def fsync_tree(path: str | Path):
    """Flushes a file, or every file and folder below a folder. Links are not followed."""
    if not os.path.isdir(path):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        return
    for folder, _, names in os.walk(path):
        for name in names:
            if not os.path.islink(os.path.join(folder, name)):
                fsync_tree(os.path.join(folder, name))
        fsync_folder(folder)


def replace(partial: str | Path, path: str | Path, again: str = AGAIN):
    """Gives a file or folder that is completely written its final name, flushed to the disk before and after.

    A file replaces an older file. A folder replaces nothing but an empty folder: the system itself refuses anything
    else, which is raised as BadInput.
    """
    with disk_errors(path, again):
        fsync_tree(partial)
        try:
            os.rename(partial, path)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
                raise BadInput(
                    f"{path} is already there and is left alone: move it away, or choose another place"
                ) from None
            raise
        fsync_folder(Path(path).parent)


def write_bytes(path: str | Path, data: bytes | memoryview, again: str = AGAIN, shared: bool = False):
    """Writes a file as a whole. If that fails, an older file at `path` is unchanged and no partial file is left.

    If other processes may write the same file at the same time, on any machine, it must be `shared`: the last one wins.
    """
    path = Path(path)
    who = f".{socket.gethostname()}.{os.getpid()}" if shared else ""
    partial = path.with_name(f"{path.name}{who}.partial")
    try:
        with disk_errors(path, again):
            partial.write_bytes(data)
        replace(partial, path, again)
    except BaseException:  # Ctrl-C too: no half of a file stays behind
        with suppress(OSError):
            partial.unlink()
        raise


def check_new(flag: str, path: str | Path):
    """Raises BadInput if a flag names a file that is already there, or that can't be written."""
    if os.path.lexists(path):
        raise BadInput(f"{flag} {path} is already there: give another name")
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise BadInput(f"can't write {flag} {path}: its folder does not exist")
    if not os.access(folder, os.W_OK):
        raise BadInput(f"can't write {flag} {path}: nothing can be written to its folder")


def write_text(path: str | Path, text: str, again: str = AGAIN, shared: bool = False):
    """Writes a text file as a whole, in UTF-8."""
    write_bytes(path, text.encode(), again, shared)


def write_figure(path: str | Path, figure, dpi: int, again: str = AGAIN, shared: bool = False):
    """Writes a matplotlib figure as a whole, in the format of the path's suffix, by default PNG.

    Raises BadInput for a format that matplotlib does not know.
    """
    image = io.BytesIO()
    try:
        figure.savefig(image, dpi=dpi, format=Path(path).suffix.lstrip(".") or "png")
    except ValueError as error:
        raise BadInput(f"can't write {path}: {error}") from None
    write_bytes(path, image.getbuffer(), again, shared)
