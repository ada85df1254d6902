"""The progress of the runs below a folder, read from their directories. OUT/grid/plan.json lists the runs
that were asked for.

A run is running while a process holds its LOCK. Its step is that of its last checkpoint. The time left assumes that the
remaining steps take as long as the steps so far.
"""

import os
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from benchmarks.grid import failure_file, read_plan
from environments.checks import BadInput
from offline_data.card import read_json
from offline_data.lock import holder_of
from support.runs import load_checkpoint

STATES = ("done", "running", "failed", "waiting")


class Progress(NamedTuple):
    """The state of one run."""

    name: str
    """the run's directory below OUT"""
    state: str
    """one of STATES"""
    text: str = ""
    """its step, or why it failed"""
    left: float | None = None
    """seconds to its end"""


class Board:
    """The state of all runs below `out`. A finished run, or an unchanged checkpoint, is not read again."""

    def __init__(self, out: str | Path):
        self.out, self.done, self.checkpoints = Path(out), {}, {}

    def read(self) -> list[Progress]:
        folders = os.walk(self.out)  # unlike rglob it takes no offence at a folder that vanishes meanwhile
        found = {
            os.path.relpath(folder, self.out)
            for folder, _, files in folders
            if "config.json" in files and os.path.basename(folder).startswith("seed")
        }
        plan, _ = read_plan(self.out)
        return [self.look(name, plan.get(name, 0)) for name in dict.fromkeys([*plan, *sorted(found)])]

    def look(self, name: str, planned: int) -> Progress:
        """The state of a run. It is done if its summary is of `planned` steps or more."""
        path = self.out / name
        if self.done.get(name, -1) < planned:
            with suppress(BadInput, KeyError):  # no complete summary yet
                self.done[name] = read_json(path / "summary.json")["steps"]
        holder = holder_of(path)
        if self.done.get(name, -1) >= planned and holder is None:
            return Progress(name, "done")
        step, total, left = self.step(path)
        if holder:
            return Progress(name, "running", f"step {step:,} of {total:,}" if total else "begins", left)
        cell, _, seed = name.rpartition("/seed")
        for file in (failure_file(self.out, cell, seed), failure_file(self.out, cell, None)):
            if file.is_file():
                return Progress(name, "failed", file.read_text().strip())
        return Progress(name, "waiting", f"goes on at step {step:,} of {total:,}" if step else "")

    def step(self, path: Path) -> tuple[int, int, float | None]:
        """(gradient steps so far, in total, seconds left at its speed so far), both stages together."""
        try:
            config = read_json(path / "config.json")
            total = config["steps"] * (2 if config["algo"] == "comadice" else 1)
        except (BadInput, KeyError, TypeError):  # not there yet, or just being written
            return 0, 0, None
        try:
            written = (path / "checkpoint.pt").stat().st_mtime
        except FileNotFoundError:
            return 0, total, None
        if self.checkpoints.get(path, (0,))[0] != written:
            try:
                state = load_checkpoint(path)
            except BadInput:  # damaged; the run's script says so when it is resumed
                return 0, total, None
            done = state["step"] + state.get("critic_step", 0)
            self.checkpoints[path] = written, done, state["wall"] + state.get("critic_seconds", 0.0)
        _, done, seconds = self.checkpoints[path]
        since = min(time.time() - written, seconds / max(done, 1) * (total - done))
        return done, total, seconds / done * (total - done) - since if done else None


def duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def show(runs: list[Progress]) -> list[str]:
    """The table, one row per instance, and a line for each running run and each reason of failures."""
    groups = {}
    for run in runs:
        groups.setdefault(run.name.rsplit("/", 2)[0], []).append(run)
    width = max([len(name) for name in groups] + [8])
    lines = [f"{'':<{width}}" + "".join(f"{state:>9}" for state in STATES)]
    row = lambda name, members: f"{name:<{width}}" + "".join(
        f"{Counter(run.state for run in members)[state] or '':>9}" for state in STATES
    )
    lines += [row(name, members) for name, members in groups.items()] + [row("together", runs)]
    for run in runs:
        if run.state == "running":
            left = "" if run.left is None else f", about {duration(run.left)} left"
            lines.append(f"running  {run.name}: {run.text}{left}")
        elif run.state == "waiting" and run.text:
            lines.append(f"waiting  {run.name}: {run.text}")
    reasons = {}
    for run in runs:
        if run.state == "failed":
            reasons.setdefault(run.text, []).append(run.name)
    for text, names in reasons.items():
        lines.append(f"failed   {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {text}")
    return lines
