"""Measures what Ray costs: the paper's tasks on a pretended cluster, with stubs that sleep instead of training.

    python -m benchmarks.cluster                                # 64 slots, 1,365 tasks of 20 s
    python -m benchmarks.cluster --slots 4 --tasks 20 --seconds 5

Ray is told that this machine has --slots cores, and benchmarks.paper hands it its tasks as usual: each in a process of
its own. The time that a task takes beyond its sleep is compared with the length of a run, --run hours. This machine
starts the processes of all slots. The machines of a cluster start their own, so the cost here is an upper bound.

A stub loads neither torch nor this project: on a cluster each machine does that itself, as part of the run.
"""

import math
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import benchmarks.ray_env  # noqa: F401 -- before Ray

# isort: split
import tyro

from support.flags import program


@dataclass
class Args:
    slots: int = 64
    """number of tasks at the same time"""
    tasks: int = 1365
    """number of tasks (39 instances x 7 methods x 5 seeds)"""
    seconds: float = 20.0
    """seconds that a task sleeps"""
    run: float = 0.33
    """hours of the shortest run, as benchmarks.paper --plan says (BC on hopper, 200,000 steps, one core)"""


if __name__ == "__main__":  # before the slow imports, so that --help and a mistyped flag answer at once
    ARGS = tyro.cli(Args, prog=program())

# isort: split
from benchmarks import paper
from environments import stops
from environments.checks import BadInput, run_script


@dataclass
class Stub:
    """What benchmarks.paper.work needs of a cell: one of benchmarks/grid.py would load torch in every process."""

    name: str
    seeds: list[int]
    folder: str

    def path(self, seed: int) -> Path:
        return Path(self.folder, self.name, f"seed{seed}")

    def finished(self, seed: int) -> bool:
        return False

    def failure(self, seed: int | None = None) -> Path:
        return Path(self.folder, f"{self.name}.txt")


def main(args: Args):
    if min(args.slots, args.tasks) < 1 or args.seconds <= 0 or args.run <= 0:
        raise BadInput("--slots, --tasks, --seconds and --run must be positive")
    ray = paper.find_ray()
    options = {"include_dashboard": False, "object_store_memory": 100 * 2**20, "logging_level": "ERROR"}
    ray.init("local", num_cpus=args.slots, **options)
    seconds = args.seconds

    def train(cell: Stub, seeds: list[int], device: str) -> tuple[str, str]:
        time.sleep(seconds)
        return "finished", ""

    with tempfile.TemporaryDirectory() as folder:
        cells = [Stub(f"task{number}", [0], folder) for number in range(args.tasks)]
        stops.catch()
        stops.hold()
        began, driver = time.perf_counter(), time.process_time()
        paper.work(ray, cells, paper.Args(out=folder, gpu_fraction=0), train)
        elapsed, driver = time.perf_counter() - began, time.process_time() - driver
    ray.shutdown()
    waves = math.ceil(args.tasks / args.slots)
    over = (elapsed - waves * args.seconds) / waves  # between the end of a slot's task and the start of its next
    print(
        f"{args.tasks} tasks of {args.seconds:g} s on {args.slots} slots: {elapsed:.1f} s, without any cost "
        f"{waves * args.seconds:.1f} s. A task costs {over:.2f} s of its slot, {100 * over / (3600 * args.run):.2f}% "
        f"of a run of {args.run:g} hours. The driver used {1000 * driver / args.tasks:.1f} ms of a core for each task."
    )


if __name__ == "__main__":
    run_script(main, ARGS, go_on=shlex.join(sys.orig_argv))
