"""benchmarks/soak.py with two kills of each command. By itself it makes 200.

It kills training in both stages, collecting, converting and downloading.
"""

import importlib.util
import re
import subprocess
import sys

import pytest
from conftest import ROOT

JOBS = ["comadice", "icq", "collect", "convert", "download"]
KILLS = 10


@pytest.mark.skipif(sys.platform != "linux", reason="the soak looks into /proc")
def test_killed_commands_end_as_undisturbed_ones(tmp_path):
    jobs = [job for job in JOBS if job != "download" or importlib.util.find_spec("tensorstore")]
    words = [sys.executable, "-m", "benchmarks.soak", "--folder", str(tmp_path), "--each", "2", "--jobs"]
    done = subprocess.run(
        [*words, *jobs, "--kills", str(KILLS)], capture_output=True, text=True, cwd=ROOT, timeout=2400
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert re.search(rf"^{KILLS} kills in \d+ s: every result is that of an undisturbed run$", done.stdout, re.M)
    assert not list(tmp_path.iterdir())
