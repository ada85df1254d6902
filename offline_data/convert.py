"""The command that converts a public dataset. formats.py reads the formats.

    python -m offline_data convert hopper.vlt/Medium --format vault --env mamujoco --task hopper --quality medium

The C libraries that read the formats can crash or hang on a damaged file. So a second process does the reading
(formats.py, run as a script). This process watches it and turns a crash into one line. If this process is killed, the
reader sees that its input has ended, and ends too.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

import tyro

from environments import stops
from environments.checks import BadInput
from offline_data.card import DATA_ROOT, check_free, dataset_path, partial_of, remove_partial
from offline_data.lock import locked

ROOT = Path(__file__).parent.parent
CHILD_COMMAND = (sys.executable, "-m", "offline_data.formats")  # the process that `convert` starts
STALL = 300  # seconds without progress after which a conversion counts as hanging


def written(folder: Path) -> int:
    """Bytes below a folder that another process is writing, and may rename or remove at any moment."""
    total = 0
    try:
        for file in folder.rglob("*"):
            total += file.stat().st_size
    except OSError:
        pass
    return total


def read(source: str, format: str, job: dict, partial: Path) -> tuple[int, list[str]]:
    """Runs the reader and watches it write `partial`. Returns its exit code and the lines of its error output."""
    with tempfile.TemporaryFile() as errors:
        path_of_modules = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        child = subprocess.Popen(
            [*CHILD_COMMAND, json.dumps(job)],
            stdin=subprocess.PIPE,  # nothing is written to it; it closes when this process ends
            stderr=errors,
            env=os.environ | {"PYTHONPATH": path_of_modules},
        )
        try:
            progress, since = 0, time.monotonic()
            while child.poll() is None:
                stops.leave()
                time.sleep(0.1)
                before, progress = progress, written(partial)
                since = time.monotonic() if progress != before else since
                if time.monotonic() - since > STALL:
                    raise BadInput(
                        f"{source} can't be read as {format}: the reader did nothing for {STALL} seconds and was "
                        "stopped; the source is damaged"
                    )
        finally:
            child.kill()
            child.wait()
            if child.returncode:
                with suppress(BadInput):  # the reader has said already that something else is there
                    remove_partial(partial)
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip().splitlines() or [""]
    return child.returncode, said


def convert(
    source: tyro.conf.Positional[str],
    format: Literal["vault", "omiga", "npz", "pymarl", "minari"],
    env: str,
    task: str,
    quality: str,
    out: str | None = None,
    interface: str | None = None,
    limit: int | None = None,
    last_row: Literal["auto", "observation", "transition"] = "auto",
    return_to_go: bool = False,
    overwrite: bool = False,
) -> Path:
    """Convert a public dataset into the native format.

    Args:
        source: file or folder
        format: format of the source
        env: mamujoco, smacv1, smacv2 or smax
        task: the task it was recorded in; for minari with the partition (ant_4x2)
        quality: the dataset's quality, which names its folder here
        out: directory to write, instead of data/ENV/TASK/QUALITY
        interface: what the agents see: benchmark, standard or agent_obsk=K (default: benchmark; standard for smax and
            for smacv1 in the format pymarl)
        limit: the recording's step limit, if it differs from the task's
        last_row: what the row with the done flag holds: a transition, or only the last observation (vault, omiga)
        return_to_go: replace the reward by the return-to-go, as the released code does in SMAC
        overwrite: replace a dataset that is already there
    """
    path = dataset_path(out, env, task, quality, str(DATA_ROOT))
    check_free(path, overwrite)
    job = {"source": str(source), "format": format, "env": env, "task": task, "quality": quality, "out": str(path)}
    job |= {"interface": interface, "limit": limit, "last_row": last_row}
    job |= {"return_to_go": return_to_go, "overwrite": overwrite}
    with locked(path, beside=True):
        code, said = read(source, format, job, partial_of(path))
    if code == 2 and said[-1].startswith("error: "):
        raise BadInput(said[-1].removeprefix("error: "))
    if code:
        raise BadInput(
            f"{source} can't be read as {format}: the reader crashed (exit code {code}; {said[-1][:200]}); "
            "the file is damaged"
        )
    from offline_data.published import info  # here, so that torch is not loaded for --help

    info(str(path))
    return path
