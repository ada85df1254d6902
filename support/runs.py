"""Run directories: what the flags of a training script name, and what a run leaves on disk.

    OUT/ENV/TASK/QUALITY/ALGO/seedN/
        config.json      every argument
        metrics.csv      a row an evaluation
        summary.json     the result, written once the run is finished
        checkpoint.pt    parameters, optimisers, random state; loads with weights_only=True
"""

import csv
import json
import resource
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tensordict import TensorDict

from environments.checks import BadInput, pick_device
from environments.simulators import check_task
from offline_data.dataset import DATA_ROOT, dataset_path, open_dataset, read_json
from offline_data.published import downloadable

# Flags of a run that its summary.json repeats.
METHOD_FLAGS = ("preset", "objective", "advantage", "alpha", "episode_alpha", "tau", "lr")
FITS = 0.7  # of a GPU's free memory may be the dataset's, the rest is for the work on it
# arguments that may differ when a run is resumed
FREE = ("seeds", "data", "out", "resume", "overwrite", "device", "workers", "graph")


def check_args(args):
    """Raises BadInput for a flag out of its range."""
    for name in ("steps", "batch_size", "hidden", "evals", "eval_episodes", "workers"):
        if getattr(args, name) < 1:
            raise BadInput(f"--{name.replace('_', '-')} is {getattr(args, name)}: give a positive number")
    if not args.seeds or len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0:
        raise BadInput(f"--seeds {args.seeds}: give different numbers from 0 on, at least one")
    if args.resume and args.overwrite:
        raise BadInput("--resume and --overwrite contradict each other: give one of them")


def check_discount(args):
    """Raises BadInput for a discount or a target's step out of its range."""
    if not 0 <= args.gamma < 1 or not 0 < args.tau <= 1:
        raise BadInput(f"--gamma must be in [0, 1) and --tau in (0, 1], they are {args.gamma} and {args.tau}")


def eval_steps(args) -> set[int]:
    """The steps after which a stage is evaluated: args.evals of them, evenly spread, the last step among them."""
    return {max(round(i * args.steps / args.evals), 1) for i in range(1, args.evals + 1)}


def load_dataset(args, device: torch.device) -> tuple[TensorDict, dict]:
    """The dataset that the flags name, its rows on `device`; fills in args.env, task and quality from the card."""
    if args.data is None:
        args.env = args.env or "mamujoco"
        args.task = args.task or ("hopper" if args.env == "mamujoco" else "zerg_5_vs_5")
        if args.quality is None:
            args.quality = "medium-replay" if args.env == "mamujoco" else "medium"
            demo = dataset_path(None, args.env, args.task, "demo", DATA_ROOT)
            if demo.is_dir() and not demo.with_name(args.quality).is_dir():
                print(
                    f"no {args.quality} dataset of {args.env} {args.task} here: training on the small one that comes "
                    "with the code, quality demo"
                )
                args.quality = "demo"
    path = dataset_path(args.data, args.env, args.task, args.quality, DATA_ROOT)
    if args.data is None and not path.is_dir():
        check_task(args.env, args.task)
        how = f"make it with `python -m offline_data collect --env {args.env} --task {args.task}`"
        if args.env in ("smacv1", "smacv2"):
            how += " (which needs StarCraft II; `--env smax` has the same tasks without it)"
        if (args.env, args.task, args.quality) in downloadable():
            public = f"--env {args.env} --task {args.task} --quality {args.quality}"
            how = f"get the public one with `python -m offline_data download {public}`, or {how}"
        raise BadInput(f"no dataset at {path}: {how}, or name a directory with --data")
    rows, card = open_dataset(path, args.env, args.task)
    args.env, args.task, args.quality = card["env"], card["task"], args.quality or card["quality"]
    if device.type == "cuda":
        size, free = sum(card["bytes"].values()), torch.cuda.mem_get_info(device)[0]
        if size <= FITS * free:
            return rows.to(device), card
        print(
            f"the dataset ({size / 2**30:.1f} GiB) stays in the computer's memory, the GPU has {free / 2**30:.1f} GiB "
            "free: batches stream to it"
        )
    return rows, card


# ---------------------------------------------------------------- one run's directory


@dataclass
class Run:
    """A seed's run directory on its way."""

    seed: int
    path: Path
    state: dict
    """the latest checkpoint"""
    metrics: list[dict]
    """the rows of metrics.csv"""
    finished: bool


def start_runs(args, algo: str, card: dict, rows: TensorDict, first: dict) -> dict[int, Run]:
    """Makes or finds the run directory of every seed; `first` is what a method's checkpoint holds before the first
    step.

    Raises BadInput, before anything is written, where a run is in the way (without --resume or --overwrite) or was made
    with other arguments or on another device, whose random numbers are others; and where OUT can't be written.
    """
    runs, config = {}, asdict(args) | {"algo": algo}
    where = f"{pick_device(args.device).type} with the data on {rows['is_init'].device.type}"
    first = {
        "algo": algo,
        "card": card,
        "config": asdict(args),
        "where": where,
        "policy": {},
        "step": 0,
        "seconds": 0.0,
        "wall": 0.0,
    } | first
    for seed in args.seeds:
        path = Path(args.out, args.env, args.task, args.quality, algo, f"seed{seed}")
        runs[seed] = Run(seed, path, dict(first), [], False)
        if (path / "config.json").exists() and not args.overwrite:
            if not args.resume:
                raise BadInput(
                    f"{path} already holds a run: --resume goes on with it, --overwrite replaces it, --out goes "
                    "elsewhere"
                )
            old = read_json(path / "config.json")
            changed = sorted(k for k in config if k not in FREE and old.get(k) != config[k])
            if changed:
                raise BadInput(
                    f"{path} was started with other arguments ({', '.join(f'{k} {old.get(k)}' for k in changed)}): "
                    "give them again to resume"
                )
            if (path / "checkpoint.pt").exists():
                state = load_checkpoint(path)
                check_checkpoint(state, card, path)
                if state["where"] != where:
                    raise BadInput(
                        f"{path} was trained on {state['where']}, this would be {where}: random numbers differ, resume "
                        "it there (--device)"
                    )
                runs[seed] = Run(seed, path, state, state.pop("metrics"), (path / "summary.json").exists())
    try:
        for seed, run in runs.items():
            run.path.mkdir(parents=True, exist_ok=True)
            if not run.metrics:
                for name in ("summary.json", "checkpoint.pt", "metrics.csv"):
                    (run.path / name).unlink(missing_ok=True)
                write_atomically(run.path / "config.json", json.dumps(config | {"seed": seed}, indent=2) + "\n")
    except OSError as error:
        raise BadInput(f"can't write to --out {args.out}: {error.strerror}") from None
    return runs


def same_step(runs: dict[int, Run]) -> list[list[int]]:
    """The seeds that are not finished, in groups at the same step: a group can be trained together."""
    groups = {}
    for seed, run in runs.items():
        if not run.finished:
            groups.setdefault((run.state.get("critic_step"), run.state["step"]), []).append(seed)
    return list(groups.values())


def write_atomically(path: Path, text: str):
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def save_checkpoint(run: Run, progress: dict, row: dict):
    """Adds `progress` to the run's state and `row` to its table, and writes metrics.csv and checkpoint.pt, each
    replaced as a whole.

    The table's rows are in the checkpoint too, and the table comes first, so a run that is killed between the two
    writes its row again when it is resumed.
    """
    run.state |= progress
    run.metrics.append(row)
    keys = list(dict.fromkeys(key for row in run.metrics for key in row))
    with open(run.path / "metrics.csv.partial", "w", newline="") as file:
        table = csv.DictWriter(file, keys)
        table.writeheader()
        table.writerows(run.metrics)
    (run.path / "metrics.csv.partial").replace(run.path / "metrics.csv")
    torch.save(run.state | {"metrics": run.metrics}, run.path / "checkpoint.pt.partial")
    (run.path / "checkpoint.pt.partial").replace(run.path / "checkpoint.pt")


def save_checkpoints(runs: dict[int, Run], seeds: list[int], progress: list[tuple[dict, dict]]):
    for seed, (state, row) in zip(seeds, progress):
        save_checkpoint(runs[seed], state, row)


def load_checkpoint(run: str | Path) -> dict:
    """A run's checkpoint on the CPU. Raises BadInput for a missing or unreadable one."""
    path = Path(run, "checkpoint.pt")
    if not path.is_file():
        raise BadInput(f"no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no one type for a file that is cut, foreign or unsafe
        raise BadInput(f"{path} is not a checkpoint that can be read: {str(error).splitlines()[0]}") from None
    if (
        not isinstance(state, dict)
        or not {"algo", "card", "config", "where", "policy", "step", "metrics"} <= state.keys()
    ):
        raise BadInput(f"{path} is not a checkpoint of this project")
    return state


def check_checkpoint(state: dict, card: dict, run: str | Path):
    """Raises BadInput where a checkpoint was made from another dataset than the card's."""
    for key in (
        "env",
        "task",
        "quality",
        "interface",
        "n_agents",
        "state_dim",
        "obs_dim",
        "action_dim",
        "discrete",
        "samples",
        "return_mean",
    ):
        if state["card"].get(key) != card.get(key):
            raise BadInput(f"{run}: the checkpoint's {key} is {state['card'].get(key)!r}, here it is {card.get(key)!r}")


def last_evaluations(metrics: list[dict]) -> list[dict]:
    """The evaluations that a run is judged by: the last half of them, at most ten. Empty where rollouts were off."""
    evaluated = [row for row in metrics if row["stage"] == "policy" and row.get("return") is not None]
    return evaluated[-judged(len(evaluated)) :] if evaluated else []


def judged(evaluations: int) -> int:
    """How many of a run's evaluations it is judged by."""
    return min(10, (evaluations + 1) // 2)


def random_state() -> dict:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_random_state(state: dict):
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def finish_run(run: Run, args, card: dict, together: int, updates: int, seconds: float, wall: float):
    """Writes summary.json: the mean return of the last evaluations (null where rollouts were off), and the speed.

    `updates` took `seconds`, `together` seeds at once, out of `wall` seconds with the waiting for evaluations.
    """
    last, device = last_evaluations(run.metrics), pick_device(args.device)
    mean = lambda key: sum(row[key] for row in last) / len(last)
    battles = bool(last) and last[0]["winrate"] is not None
    summary = {
        "env": args.env,
        "task": args.task,
        "quality": args.quality,
        "algo": run.state["algo"],
        "seed": run.seed,
        "steps": args.steps,
        "return": mean("return") if last else None,
        "winrate": mean("winrate") if battles else None,
        "evaluations": len(last),
        **{name: getattr(args, name) for name in METHOD_FLAGS if hasattr(args, name)},
        "dataset_return": card["return_mean"],
        "seeds_together": together,
        "updates_per_second": updates / seconds,
        "update_share": seconds / wall,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "engine": card.get("engine"),
    }
    write_atomically(run.path / "summary.json", json.dumps(summary, indent=2) + "\n")
    run.finished = True
