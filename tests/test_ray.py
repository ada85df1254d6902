"""The benchmark on Ray. Skipped without Ray.

A killed worker, a killed command and bad input change no bit of the other runs.
"""

import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from test_paper import DEMO, WORDS, assert_same_runs, undisturbed  # noqa: F401 -- a fixture

from benchmarks.progress import Board

ray = pytest.importorskip("ray", reason="Ray is not installed (requirements-ray.txt)")


def command(out, *words, **options):
    """python -m benchmarks.paper in a process of its own."""
    line = [
        sys.executable, "-m", "benchmarks.paper", "--data", DEMO, "--methods", "bc", "comadice", "--seeds", "0", "1",
        "--out", str(out), *words, *WORDS,
    ]  # fmt: skip
    return subprocess.Popen(
        line, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, **options
    )


def wait_for(what, process, seconds=600):
    """Until what() is true."""
    until = time.monotonic() + seconds
    while not (found := what()):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < until, "in vain"
        time.sleep(0.05)
    return found


def holders(out: Path) -> dict[Path, int]:
    """Run directory -> the process that trains in it."""
    words = {lock.parent: lock.read_text().split() for lock in out.rglob("LOCK")}
    return {path: int(word[1]) for path, word in words.items() if len(word) > 1}


def finish(process) -> str:
    said, _ = process.communicate(timeout=1200)
    return said


def kill_one(out: Path, process, driver: bool):
    """kill -9 of the command, or of a process that trains, once a run has a checkpoint."""
    trained = lambda: {path: pid for path, pid in holders(out).items() if (path / "checkpoint.pt").exists()}
    pid = next(iter(wait_for(trained, process).values()))
    os.kill(process.pid if driver else pid, signal.SIGKILL)


def test_a_lost_worker_and_bad_input(undisturbed, tmp_path):
    """The killed worker's task is begun again and ends with the same bits.

    The cells of a missing dataset fail once, with their line.
    """
    process = command(tmp_path, "--only", "smax/no_such_task/medium")
    kill_one(tmp_path, process, driver=False)
    said = finish(process)
    assert "its worker was lost" in said and "once more (1 of 3)" in said
    assert process.returncode == 1 and "4 runs are not finished" in said
    lines = [line for line in said.splitlines() if line.startswith("main/smax/no_such_task/medium/")]
    assert len(lines) == 2, said  # one a cell
    shutil.rmtree(tmp_path / "main/smax", ignore_errors=True)
    assert_same_runs(undisturbed, tmp_path)
    assert Counter(run.state for run in Board(tmp_path).read()) == {"done": 4, "failed": 4}
    left_out = f"- left out {tmp_path}/main/smax/no_such_task/medium/"
    notes = [line for line in (tmp_path / "report/report.md").read_text().splitlines() if line.startswith(left_out)]
    assert len(notes) == 4 and all("no_such_task" in note.partition(": ")[2] for note in notes)
    assert not holders(tmp_path) and not list((tmp_path / "main").rglob("learning_curve*"))


def test_a_killed_driver(undisturbed, tmp_path):
    """Nothing outlives the command for long, and the same command goes on to the same bits."""
    process = command(tmp_path)
    kill_one(tmp_path, process, driver=True)
    finish(process)
    assert process.returncode == -signal.SIGKILL
    process = command(tmp_path)
    said = finish(process)
    assert process.returncode == 0, said
    assert_same_runs(undisturbed, tmp_path)
    assert (tmp_path / "report/report.md").exists() and not holders(tmp_path)


def test_ray_beside_the_protobuf_of_smacv2():
    """smacv2 pins protobuf below 3.21. This test says whether it is installed. If so, the tests above ran with it."""
    protobuf = pytest.importorskip("google.protobuf", reason="protobuf is not installed")
    if tuple(map(int, protobuf.__version__.split(".")[:2])) >= (3, 21):
        pytest.skip(
            f"protobuf {protobuf.__version__} is installed; smacv2 needs one below 3.21: pip install 'protobuf<3.21'"
        )
    needed = [
        line for line in importlib.metadata.requires("ray") if line.startswith("protobuf") and "extra" not in line
    ]
    assert needed and all(protobuf.__version__ in Requirement(line).specifier for line in needed)
    assert ray.__version__
