"""Kills parts of `python -m benchmarks.paper` while it runs, and checks that it ends with the same bits.

    python -m benchmarks.disturb                     # 2 datasets x 3 methods x 4 seeds of 300 steps, four times
    python -m benchmarks.disturb --victims node

The grid (all runs of the command) runs undisturbed once. Then it runs once for each victim, in a folder of its own. The
victim is a part that is killed with SIGKILL as soon as a third of the runs is done:

    worker    a process that trains; Ray begins its task again
    driver    the command itself; the same command is given again
    node      all processes of the second of two Ray nodes on this machine (ray start); its tasks go to the first
    all       driver, Ray and all workers at once; the same command is given again

At the end every checkpoint and every metrics.csv must have the bits of the undisturbed grid. Linux only.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from support.flags import program

ROOT = Path(__file__).parent.parent
DATA = [str(ROOT / "data/mamujoco/hopper" / name) for name in ("demo", "few-good")]
CLOCKS = {"seconds", "wall", "critic_seconds", "config"}  # parts of a checkpoint that differ; the config by its --out
PORT = 26379


@dataclass
class Args:
    victims: list[Literal["worker", "driver", "node", "all"]] = field(
        default_factory=lambda: ["worker", "driver", "node", "all"]
    )
    """what is killed; each in a grid of its own"""
    methods: list[str] = field(default_factory=lambda: ["bc", "omiga", "comadice"])
    """methods of the grid"""
    seeds: int = 4
    """seeds of the grid"""
    steps: int = 300
    """steps of each stage"""
    folder: str | None = None
    """a new folder, where the grids are kept (default: they are deleted)"""


if __name__ == "__main__":  # before the slow imports, so that --help and a mistyped flag answer at once
    ARGS = tyro.cli(Args, prog=program())

# isort: split
import torch

from benchmarks.ray_env import TOKEN
from environments.checks import BadInput, run_script
from support.runs import load_checkpoint


def command(args: Args, out: Path, **more) -> subprocess.Popen:
    words = ["--data", *DATA, "--methods", *args.methods, "--seeds", *map(str, range(args.seeds))]
    words += ["--steps", str(args.steps), "--evals", "2", "--eval-episodes", "2", "--out", str(out)]
    with open(out.with_suffix(".log"), "a") as log:
        line = [sys.executable, "-m", "benchmarks.paper", *words]
        return subprocess.Popen(line, cwd=ROOT, stdout=log, stderr=log, start_new_session=True, env=os.environ | more)


def processes() -> dict[int, tuple[int, str]]:
    """Process -> (its parent, its command line)."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            found[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1]), line
        except OSError:  # it has just ended
            continue
    return found


def below(pid: int) -> list[int]:
    """A process and all its descendants."""
    found, every = [pid], processes()
    for one in found:
        found += [child for child, (parent, _) in every.items() if parent == one]
    return found


def trainers(out: Path) -> list[int]:
    """The processes that train: those that are named in a LOCK and still exist."""
    words = [path.read_text().split() for path in out.rglob("LOCK")]
    return [int(word[1]) for word in words if len(word) > 1 and Path("/proc", word[1]).exists()]


def kill(pids: list[int]):
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:  # it ended with its parent
            pass


def ended(log: Path, how: str) -> BadInput:
    """The error of a grid that ended too early. It has the log's last line, since a temporary folder is deleted."""
    lines = log.read_text(errors="replace").split("\n")
    said = next((line for line in reversed(lines) if line.strip()), "nothing printed")
    return BadInput(f"the grid ended {how}: {said} (--folder keeps the whole log)")


def wait_until(what, process: subprocess.Popen, log: Path):
    until = time.monotonic() + 3600
    while not (found := what()):
        if process.poll() is not None or time.monotonic() > until:
            raise ended(log, "before anything was killed")
        time.sleep(0.1)
    return found


def ray(*words: str) -> subprocess.CompletedProcess:
    script = str(Path(sys.executable).with_name("ray"))
    env = os.environ | ({"RAY_AUTH_MODE": "token"} if TOKEN else {})  # a second node does not show it by itself either
    done = subprocess.run([script, *words], capture_output=True, text=True, cwd=ROOT, env=env)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "failed").splitlines()
        raise BadInput(f"ray {' '.join(words)}: {said[-1]}")
    return done


def grid(args: Args, out: Path, victim: str | None) -> str:
    """Runs the grid to its end; returns what happened."""
    more = {}
    if victim == "node":
        node = ["--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats"]
        ray("start", "--head", f"--port={PORT}", "--include-dashboard=false", *node)
        more = {"RAY_ADDRESS": f"127.0.0.1:{PORT}"}
    try:  # after the head: where its port is another Ray's, that one is left alone
        if victim == "node":
            ray("start", f"--address=127.0.0.1:{PORT}", "--node-name=victim", *node)
        process, said = command(args, out, **more), "undisturbed"
        if victim:
            total, log = len(DATA) * len(args.methods) * args.seeds, out.with_suffix(".log")
            wait_until(lambda: len(list(out.rglob("summary.json"))) >= total // 3, process, log)
            done = len(list(out.rglob("summary.json")))
            if victim == "node":
                named = [pid for pid, (_, line) in processes().items() if "--node-name=victim" in line]
                (raylet,) = [pid for pid in named if processes()[pid][1].split()[0].endswith("raylet")]
                of_node = lambda: [pid for pid in trainers(out) if pid in below(raylet)]
                wait_until(of_node, process, log)
                pids = below(raylet)
            elif victim == "worker":
                pids = wait_until(lambda: trainers(out), process, log)[:1]
            else:
                wait_until(lambda: trainers(out), process, log)
                pids = below(process.pid) if victim == "all" else [process.pid]
            kill(pids)
            said = f"{len(pids)} processes killed when {done} of {total} runs were done"
        code = process.wait()
        if victim in ("driver", "all"):
            code = command(args, out, **more).wait()
        if code or not (out / "report/report.md").is_file():
            raise ended(out.with_suffix(".log"), f"with code {code}")
    finally:
        if victim == "node":
            ours = [pid for pid, (_, line) in processes().items() if str(PORT) in line and "ray" in line]
            kill([pid for own in ours for pid in below(own)])
    return said


def same(a, b) -> bool:
    """Whether two checkpoints hold the same bits. Clocks and the config may differ."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(key in CLOCKS or same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b or (a != a and b != b)


def compare(one: Path, other: Path) -> int:
    """The number of runs. Raises BadInput if one differs."""
    runs = sorted(path.parent.relative_to(one) for path in one.rglob("summary.json"))
    if runs != sorted(path.parent.relative_to(other) for path in other.rglob("summary.json")):
        raise BadInput(f"{other} has other runs than {one}")
    for run in runs:
        tables = [(folder / run / "metrics.csv").read_bytes() for folder in (one, other)]
        if tables[0] != tables[1] or not same(load_checkpoint(one / run), load_checkpoint(other / run)):
            raise BadInput(f"{run} differs")
    return len(runs)


def main(args: Args):
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary).absolute()
        if args.folder and folder.exists():
            raise BadInput(f"--folder {args.folder} is already there: name a new one")
        folder.mkdir(parents=True, exist_ok=True)
        for victim in [None, *args.victims]:
            began = time.monotonic()
            said = grid(args, folder / (victim or "undisturbed"), victim)
            runs = compare(folder / "undisturbed", folder / (victim or "undisturbed"))
            took = f"{time.monotonic() - began:.0f} s"
            print(f"{victim or 'nothing'}: {said}; {runs} runs have the bits of undisturbed ones, {took}", flush=True)


if __name__ == "__main__":
    run_script(main, ARGS)
