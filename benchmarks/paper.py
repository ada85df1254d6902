"""The paper's experiment as one command: 39 instances x 7 methods x 5 seeds, and its ablations. Or any part of it.

    python -m benchmarks.paper --plan                                    # what would run, and for how long
    python -m benchmarks.paper --only hopper --methods bc comadice       # every quality of hopper
    python -m benchmarks.paper --only hopper/medium-replay --methods comadice --ablation alpha f mixer
    python -m benchmarks.paper --data data/smax/zerg_5_vs_5/demo --steps 3000 -- --hidden 128
    python -m benchmarks.paper status runs/paper                         # progress of all runs
    python -m benchmarks.paper report runs/paper                         # tables and figures of what is finished

The runs are tasks of Ray (requirements-ray.txt). On one machine Ray starts by itself. If RAY_ADDRESS names a cluster,
they run there. Without a GPU a task is one seed, on one core with one thread. With GPUs it is all seeds of a cell, on
--gpu-fraction of a GPU. All machines must share a disk with the run directories, the datasets and this code.

To continue, give the same command again: finished runs stay, others continue from their checkpoints. This works after a
kill, after the loss of a machine, and with more seeds or methods. docs/slurm/ has templates for clusters.
"""

import environments.cpu  # noqa: F401 -- before torch

# isort: split
import benchmarks.ray_env  # noqa: F401 -- before Ray

# isort: split
import os
import shlex
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import tyro

from support.flags import program

Method = Literal["bc", "bcq", "cql", "icq", "omar", "omiga", "comadice", "bc-best10"]


@dataclass
class Args:
    """Run the paper's experiment, or a part of it. Words after a lone -- are flags of the training scripts.

    `status OUT` shows the progress of the runs in a folder, and `report OUT` makes their tables and figures.
    """

    only: list[str] = field(default_factory=list)
    """envs, tasks or qualities of the paper, or parts such as hopper/expert; ENV/TASK/QUALITY may be any dataset"""
    data: list[str] = field(default_factory=list)
    """dataset directories, in addition to --only or instead of it (default: the paper's 39 instances)"""
    methods: list[Method] = field(default_factory=lambda: list(get_args(Method)[:-1]))
    """methods (default: the paper's seven)"""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    """seeds of every cell"""
    ablation: list[Literal["alpha", "f", "mixer"]] = field(default_factory=list)
    """also ComaDICE with the values of Tables 10 to 14 (alpha: all five), and with those of 15 to 19 (f) and 20 to 24
    (mixer) that are not the default"""
    steps: int = 200_000
    """gradient steps of each stage"""
    evals: int = 100
    """evaluations over the training of the policies (Table 4)"""
    eval_episodes: int = 32
    """episodes per evaluation (Table 4)"""
    out: str = "runs/paper"
    """folder of the run directories and the report"""
    gpu_fraction: float = 0.25
    """share of a GPU for each task, if there are GPUs; 0: use none"""
    retries: int = 3
    """how often a task is started again after its worker or machine was lost; a new checkpoint sets the count back"""
    plan: bool = False
    """print what would run, with an estimate of the time, and run nothing"""
    index: int | None = None
    """run only the run of this number in the plan, in this process and without Ray: for a job array"""


if __name__ == "__main__":  # before the slow imports, so that --help and a mistyped flag answer at once
    WORDS = sys.argv[1:]
    ON_RUNS = WORDS[:1] in (["status"], ["report"])
    if ON_RUNS and (len(WORDS) != 2 or WORDS[1].startswith("-")):
        print(f"error: give the folder of the runs: python -m benchmarks.paper {WORDS[0]} runs/paper", file=sys.stderr)
        sys.exit(2)
    END = WORDS.index("--") if "--" in WORDS else len(WORDS)
    ARGS = None if ON_RUNS else tyro.cli(Args, args=WORDS[:END], prog=program())

# isort: split
import torch

from benchmarks import estimate, grid
from benchmarks.grid import Cell
from benchmarks.progress import STATES, Board, duration, show
from environments import stops
from environments.checks import BadInput, NoSimulator, fail_at_end, run_script
from environments.simulators import check_playable
from offline_data.card import DATA_ROOT, dataset_path
from support import report
from support.runs import check_seeds

SECONDS = 5  # between two looks at the run directories
LINE = 60  # seconds between two lines where the output is not a terminal
SAVING = 120  # seconds that stopped runs have to write their checkpoints
PATH = str(Path(__file__).parent.parent)

# ---------------------------------------------------------------- the work, as tasks of Ray


def find_ray():
    """The module of Ray. Raises BadInput if it is not installed."""
    try:
        import ray
    except ModuleNotFoundError:
        how = "pip install -r requirements-ray.txt (benchmarks.paper --index trains single runs without it)"
        raise BadInput(f"Ray is missing: {how}") from None
    return ray


def start_ray(ray):
    """Joins the cluster that RAY_ADDRESS names, or starts Ray here."""
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if "RAY_ADDRESS" in os.environ:
        where, options = f"no Ray cluster at RAY_ADDRESS {os.environ['RAY_ADDRESS']}", {}
    else:  # nothing is sent through the object store, so it needs little memory
        where = "Ray does not start here; a busy machine may be too slow for it, so try again"
        cores = len(os.sched_getaffinity(0))  # those this process may use; Ray would count all
        options = {"address": "local", "num_cpus": cores, "include_dashboard": False}
        options["object_store_memory"] = 100 * 2**20
    try:
        ray.init(**options, **quiet)
    except Exception as error:  # ConnectionError, ValueError, RuntimeError, and after a timeout a bare Exception
        raise BadInput(f"{where} ({type(error).__name__}: {str(error).strip().splitlines()[0]})") from None


def result(ray, ref) -> tuple[str, str]:
    """What grid.train returned, or what happened to its process: an outcome and a line."""
    try:
        return ray.get(ref)
    except ray.exceptions.TaskCancelledError:
        return "stopped", "cancelled before it began"
    except ray.exceptions.RayTaskError as error:  # not of training: the code can't be loaded there, or its disk is full
        return "stopped", str(error).strip().splitlines()[-1]
    except ray.exceptions.RayError as error:
        return "stopped", f"its worker was lost ({type(error).__name__})"


def checkpoints(cell: Cell, seeds: list[int]) -> list[float | None]:
    """The time at which each seed's checkpoint was written. None for a seed without one."""
    paths = [cell.path(seed) / "checkpoint.pt" for seed in seeds]
    return [path.stat().st_mtime if path.exists() else None for path in paths]


class Display:
    """The table of progress, redrawn in a terminal. Elsewhere one line per minute, and the table at the end."""

    def __init__(self):
        self.terminal, self.drawn, self.at = sys.stdout.isatty(), 0, time.monotonic()

    def say(self, line: str):
        self.clear()
        print(line, flush=True)

    def clear(self):
        if self.drawn:
            print(f"\033[{self.drawn}F\033[J", end="")
        self.drawn = 0

    def draw(self, board: Board, last: bool = False):
        if not last and time.monotonic() - self.at < (SECONDS if self.terminal else LINE):
            return
        runs, self.at = board.read(), time.monotonic()
        if last:
            lines = show(runs)
        elif self.terminal:
            lines = show(runs)[-os.get_terminal_size().lines + 2 :]
        else:
            count = Counter(run.state for run in runs)
            lines = [time.strftime("%H:%M:%S ") + ", ".join(f"{count[state]} {state}" for state in STATES)]
        self.clear()
        width = os.get_terminal_size().columns - 1 if self.terminal else None
        print("\n".join(line[:width] for line in lines), flush=True)
        self.drawn = len(lines) if self.terminal and not last else 0


def work(ray, cells: list[Cell], args: Args, train=grid.train):
    """Runs what is not finished, and waits for it. `train` is what a task calls."""
    gpus = ray.cluster_resources().get("GPU", 0) if args.gpu_fraction else 0
    device = "cuda" if gpus else "cpu"
    where = os.pathsep.join([PATH, *filter(None, [os.environ.get("PYTHONPATH")])])  # this code before other modules
    remote = ray.remote(
        num_cpus=1,
        num_gpus=args.gpu_fraction if gpus else 0,
        max_retries=0,  # retries are counted below: Ray would retry endlessly if a task needs too much memory
        max_calls=1,  # each task in a new process, whose end frees all memory
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "PYTHONPATH": where}},
    )(train)
    tasks = []
    for cell in cells:
        for seed in (None, *cell.seeds):
            cell.failure(seed).unlink(missing_ok=True)  # of an earlier command
        seeds = [seed for seed in cell.seeds if not cell.finished(seed)]
        tasks += [(cell, seeds)] if gpus and seeds else [(cell, [seed]) for seed in seeds]
    running = {remote.remote(*task, device): (*task, 0, checkpoints(*task)) for task in tasks}
    board, display, failed, cancelled = Board(args.out), Display(), set(), False
    while running:
        ready, _ = ray.wait(list(running), timeout=SECONDS)
        for ref in ready:
            cell, seeds, tries, before = running.pop(ref)
            outcome, line = result(ray, ref)
            if outcome == "stopped" and not cancelled and cell.name not in failed:
                now = checkpoints(cell, seeds)
                tries = tries if now == before else 0  # a job that makes progress is never given up
                if tries < args.retries:
                    display.say(f"{cell.name}, seeds {seeds}: {line}; once more ({tries + 1} of {args.retries})")
                    running[remote.remote(cell, seeds, device)] = (cell, seeds, tries + 1, now)
                    continue
                outcome, line = "lost", f"given up after {tries + 1} tries: {line}"
            if outcome == "lost":  # the task itself could not write its failure's file
                with suppress(BadInput):  # nor can this process, if the disk is full; the line is printed below
                    grid.keep_failures(cell, {seed: line for seed in seeds})
            if line and outcome != "stopped" and cell.name not in failed:
                display.say(f"{cell.name}, seeds {seeds}: {line}")
            if outcome == "input":  # the other seeds of this cell would fail too
                failed.add(cell.name)
                for other, (its_cell, *_) in running.items():
                    if its_cell is cell:
                        ray.cancel(other)
        if stops.asked() and not cancelled:  # a running task sees the cancellation as Ctrl-C, and saves its state
            cancelled, until = True, time.monotonic() + SAVING
            for ref in running:
                ray.cancel(ref)
        if cancelled and time.monotonic() > until:
            break
        display.draw(board)
    display.draw(board, last=True)
    stops.leave()


# ---------------------------------------------------------------- what is printed and written


def own_device(args: Args) -> str:
    return "cuda" if torch.cuda.is_available() and args.gpu_fraction else "cpu"


def unplayable(cells: list[Cell]) -> list[str]:
    """A line for each reason why instances can't be played on this machine."""
    reasons = {}
    for instance in dict.fromkeys(cell.instance for cell in cells):
        try:
            check_playable(*instance[:2])
        except NoSimulator as error:
            reasons.setdefault(str(error), []).append("/".join(instance))
    return [
        f"note: {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''} can be trained here, but not played: "
        f"{reason}"
        for reason, names in reasons.items()
    ]


def has_data(cell: Cell) -> bool:
    return (dataset_path(cell.flags["data"], *cell.instance, DATA_ROOT) / "card.json").is_file()


def print_plan(cells: list[Cell], args: Args):
    """Prints every run with its time, and the sums."""
    device = own_device(args)
    seconds, machine = estimate.seconds_per_run(cells, device), "GPU" if device == "cuda" else "core"
    number, unknown, parts, board = 0, 0, {}, Board(args.out)
    for cell in cells:
        steps = cell.flags["steps"] * (2 if cell.method == "comadice" else 1)
        for seed in cell.seeds:
            done = board.step(cell.path(seed))[0]  # of a run that was stopped
            own = None if seconds[cell.name] is None else seconds[cell.name] * max(1 - done / steps, 0.0)
            state = "finished" if cell.finished(seed) else "?" if own is None else duration(own)
            print(f"{number:>5}  {cell.name}/seed{seed}  {state}")
            number += 1
            if state != "finished":
                parts.setdefault(cell.part, []).append(own or 0.0)
                unknown += own is None
    print(f"\n{number:,} runs, of which {sum(map(len, parts.values())):,} are to be done:")
    for part, own in parts.items():
        print(f"  {part}: {len(own):,} runs, {sum(own) / 3600:,.1f} {machine}-hours")
    total = sum(sum(own) for own in parts.values())
    missing = sorted({"/".join(cell.instance) for cell in cells if not has_data(cell)})
    print(
        f"together {total / 3600:,.1f} {machine}-hours of updates, measured just now on noise of each task's sizes"
        + (f", {args.gpu_fraction:g} of a GPU counted as a whole one" if machine == "GPU" else "")
        + ". Evaluations come on top, where a simulator is installed."
    )
    if unknown:
        print(f"{unknown:,} runs (?) are not counted in the hours: neither Table 3 nor a dataset says their sizes")
    for line in unplayable(cells):
        print(line)
    if missing:
        print(f"no dataset here for {len(missing)} of the instances: {', '.join(missing)}")
    print(f"as a job array: --array=0-{number - 1}, each with --index")


def without_episodes(run: report.Run) -> report.Run:
    """Leaves out --episode-alpha, which follows from --alpha and is not a setting of its own."""
    return run._replace(config=tuple((k, v) for k, v in run.config if k != "episode_alpha"))


def as_default(run: report.Run) -> report.Run:
    """Names the default alpha "default", so that it has one column, though its value depends on the data's rewards."""
    return without_episodes(run._replace(config=tuple((k, "default" if k == "alpha" else v) for k, v in run.config)))


def find_runs(out: str) -> tuple[dict[str, list[report.Run]], list[tuple[Path, str]]]:
    """(part -> its finished runs, what is left out and why). A part is main, or an ablation's setting."""
    runs, left_out = {}, []
    for part in ("main", *(part for name in grid.ABLATIONS for part in grid.ablation_parts(name))):
        # Each by itself: a value of an ablation may be the setting of main, and both charts need the run.
        runs[part], its_own = report.find_runs(Path(out, part), []) if Path(out, part).is_dir() else ([], [])
        left_out += its_own
    return runs, left_out


def not_there(out: str, runs: dict[str, list[report.Run]], left_out: list[tuple[Path, str]]) -> list[tuple[Path, str]]:
    """The planned runs that are neither in the report nor in what is left out, with the reason if one is known."""
    named = {run.path for own in runs.values() for run in own} | {path for path, _ in left_out}
    missing = []
    for path in (Path(out, name) for name in grid.read_plan(out)[0]):
        if path not in named:
            cell, _, seed = str(path.relative_to(out)).rpartition("/seed")
            files = [grid.failure_file(out, cell, own) for own in (seed, None)]
            why = next((file.read_text().strip() for file in files if file.is_file()), "not begun")
            missing.append((path, why))
    return missing


def write_reports(out: str):
    """OUT/report of the runs in OUT/main, and OUT/report-ABLATION of each ablation beside ComaDICE's default."""
    if not Path(out).is_dir():
        raise BadInput(f"no folder at {out}")
    by_part, left_out = find_runs(out)
    left_out += not_there(out, by_part, left_out)
    of_parts = lambda parts: [(path, why) for path, why in left_out if path.relative_to(out).parts[0] in parts]
    runs, main = [run for own in by_part.values() for run in own], by_part["main"]
    if not runs:
        reasons = "".join(f"; {path}: {why}" for path, why in left_out[:3])
        print(f"no report, since no finished run below {out} was played in a simulator{reasons}")
    if main:
        report.publish(report.make_cells(main), of_parts(["main"]), None, Path(out, "report"))
    for name, (flag, _) in grid.ABLATIONS.items():
        parts = grid.ablation_parts(name)
        ablated = [run for part in parts for run in by_part[part]]
        if ablated:
            instances = {run.instance for run in ablated}
            default = [run for run in main if run.method == "comadice" and run.instance in instances]
            if flag == "alpha":
                default, ablated = [as_default(run) for run in default], [without_episodes(run) for run in ablated]
            report.publish(report.make_cells(default + ablated), of_parts(parts), None, Path(out, f"report-{name}"))


# ---------------------------------------------------------------- the command


def check(args: Args):
    """Raises BadInput for a flag out of its range."""
    if min(args.steps, args.evals, args.eval_episodes) < 1:
        raise BadInput("--steps, --evals and --eval-episodes must be positive")
    check_seeds(args.seeds)
    if not args.methods or not 0 <= args.gpu_fraction <= 1 or args.retries < 0:
        raise BadInput("give at least one method to --methods, --gpu-fraction from 0 to 1, --retries of at least 0")


def end(cells: list[Cell]):
    """Makes the exit code 1 if a run is not finished."""
    unfinished = sum(not cell.finished(seed) for cell in cells for seed in cell.seeds)
    if unfinished:
        fail_at_end(f"{unfinished} runs are not finished: see the reasons above, and run the same command again")


def run_one(cells: list[Cell], args: Args):
    """Runs number --index of the plan."""
    runs = [(cell, seed) for cell in cells for seed in cell.seeds]
    cell, seed = runs[args.index]
    print(f"run {args.index} of {len(runs)}: {cell.path(seed)}", flush=True)
    if cell.finished(seed):
        return print("it is finished")
    device = own_device(args)
    cell.failure().unlink(missing_ok=True)  # of an earlier command
    outcome, line = grid.train(cell, [seed], device)
    if outcome not in ("finished", "stopped"):
        return fail_at_end(line)
    print(f"{outcome}: {line}" if line else outcome)
    if outcome == "stopped":
        sys.exit(143)


def main(args: Args, extra: list[str]):
    check(args)
    out, budget = str(Path(args.out).absolute()), {name: getattr(args, name) for name in sorted(grid.BUDGET)}
    instances = grid.choose_instances(args.only, args.data)
    methods = list(dict.fromkeys(args.methods))
    all_methods = methods if "comadice" in methods or not args.ablation else [*methods, "comadice"]
    cells = grid.make_cells(out, instances, all_methods, args.seeds, list(dict.fromkeys(args.ablation)), budget,
                            grid.split_extra(extra, all_methods))  # fmt: skip
    if args.plan:
        return print_plan(cells, args)
    number = sum(len(cell.seeds) for cell in cells)
    if args.index is not None and not 0 <= args.index < number:
        raise BadInput(f"--index {args.index}: the plan has the runs 0 to {number - 1}")
    ray = find_ray() if args.index is None else None  # before anything is written
    for line in unplayable(cells):
        print(line)
    grid.save_plan(out, cells)
    if ray is None:
        return run_one(cells, args)
    start_ray(ray)
    try:
        stops.catch()  # again, since Ray has set its own handlers
        stops.hold()
        work(ray, cells, args)
    finally:
        ray.shutdown()
    write_reports(out)
    end(cells)


def status(out: str):
    """Prints the progress of the runs below a folder."""
    if not Path(out).is_dir():
        raise BadInput(f"no folder at {out}")
    print("\n".join(show(Board(out).read())))


if __name__ == "__main__":
    if ON_RUNS:
        run_script(status if WORDS[0] == "status" else write_reports, WORDS[1])
    else:
        run_script(main, ARGS, WORDS[END + 1 :], go_on=shlex.join(sys.orig_argv))
