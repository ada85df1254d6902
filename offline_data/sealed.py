"""Checkpoints that load unchanged or not at all: torch.save's file with a checksum of all its bytes at its end.

PyTorch compares no checksum when it loads: most files with one flipped bit load, with wrong numbers. Nothing but
tensors and plain values is ever loaded.
"""

import hashlib
import io
import pickle
import zipfile
from pathlib import Path

import torch

from environments.checks import BadInput
from offline_data.durable import AGAIN, write_bytes

MARK = b"SHA-256 of the bytes before: "  # at the end of a file


def sealed(archive: bytes) -> bytes:
    """A zip file, which is what torch.save writes, with a checksum of all its bytes as its comment.

    The CRCs of a zip file cover its members, but not its directory. Damage to the directory can exchange tensors.
    """
    seal = len(MARK) + 2 * hashlib.sha256().digest_size
    archive = archive[:-2] + seal.to_bytes(2, "little")  # a zip file ends with the length of its comment, 0 so far
    return archive + MARK + hashlib.sha256(archive).hexdigest().encode()


def save(path: Path, content, again: str = AGAIN):
    """Writes what torch.save can write, as a whole file. `again` says what to do after a full disk."""
    file = io.BytesIO()
    torch.save(content, file)
    write_bytes(path, sealed(file.getvalue()), again)


def load(path: Path):
    """A file's content on the CPU. Raises BadInput for a missing, damaged or foreign file, before PyTorch reads it."""
    if not path.is_file():
        raise BadInput(f"no checkpoint at {path}: give a run directory, such as OUT/ENV/TASK/QUALITY/METHOD/seed0")
    unreadable = f"{path} is not a checkpoint that can be read: "
    damaged = unreadable + "it is damaged, or no checkpoint at all"
    try:
        data = path.read_bytes()
        body, mark, digest = data.rpartition(MARK)
        if mark and hashlib.sha256(body).hexdigest().encode() != digest:
            raise BadInput(damaged)
        # A checkpoint that other code wrote has no checksum: then only the CRCs are checked.
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if not mark and archive.testzip() is not None:
                raise BadInput(damaged)
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise BadInput(unreadable + "it holds more than tensors and plain values") from None
    except OSError as error:
        raise BadInput(unreadable + f"{error.strerror or error}") from None
    except BadInput:
        raise
    except Exception:  # zipfile and torch.load raise many types for a truncated or foreign file
        raise BadInput(damaged) from None
