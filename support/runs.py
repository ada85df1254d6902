"""Run directories: finding a script's dataset and its runs, and the files that a run writes.

    OUT/ENV/TASK/QUALITY/ALGO/seedN/
        config.json      every argument
        metrics.csv      one row per evaluation
        summary.json     the result, written once the run is finished
        checkpoint.pt    parameters, optimisers, random state; loads with weights_only=True
        ratio.png        of ComaDICE, see ratio_picture.py
        csv, tensorboard, wandb    with --logger, see loggers.py
        LOCK             while a process trains there

The checkpoint holds the whole state of training, and the rows of metrics.csv. A stopped run that goes on with --resume
ends with the same bits as one that was not stopped. With more --steps, --resume extends a run. Its critics go on where
they were, w* is computed again, and then its policies go on. The learning rate falls to 0 at the last step, which is
later now. So the rate is larger again when the run goes on.
"""

import csv
import hashlib
import io
import json
import resource
import shutil
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tensordict import TensorDict
from torch import nn

from comadice_losses import DIVERGENCES
from environments import stops
from environments.checks import BadInput, check_positive, fail_at_end, out_of_memory, pick_device
from environments.simulators import check_task, engine
from offline_data import sealed
from offline_data.card import DATA_ROOT, DEEPEST, check_name, dataset_path, read_json, short, sound
from offline_data.dataset import open_dataset
from offline_data.durable import disk_errors, write_text
from offline_data.lock import lock, unlock
from offline_data.published import downloadable
from support import loggers
from support.flags import ABOUT, commit, versions
from support.seeds import name_seeds

# Flags of a run that its summary.json repeats.
METHOD_FLAGS = ("preset", "objective", "advantage", "alpha", "policy_alpha", "episode_alpha", "neighbours",
                "action_scale", "tau", "lr")  # fmt: skip
# What ComaDICE's runs from before these flags are taken to have.
OLDER = {"policy_alpha": 1.0, "neighbours": False, "critic_lr_decay": False}
FITS = 0.7  # share of a GPU's free memory that a dataset may take; training needs the rest
# Arguments that may differ when a run is resumed.
FREE = ("seeds", "data", "out", "resume", "overwrite", "device", "data_device", "workers", "graph", "quiet", "logger",
        *ABOUT)  # fmt: skip
GROWS = ("steps", "evals")  # may differ when a run is extended
# What a checkpoint must hold, and its card and config.
STATE_KEYS = {"algo": str, "card": dict, "config": dict, "where": str, "policy": dict}
STATE_KEYS |= {"step": int, "seconds": float, "wall": float, "metrics": list}
CARD_KEYS = dict.fromkeys(("env", "task", "quality", "interface"), str)
CARD_KEYS |= dict.fromkeys(("n_agents", "state_dim", "obs_dim", "action_dim", "samples"), int)
CARD_KEYS |= {"discrete": bool, "return_mean": (int, float)}
CONFIG_KEYS = {"hidden": int, "steps": int, "evals": int, "seeds": list}
AGAIN = "run the same command again with --resume"
BEGIN_AGAIN = "begin again with --overwrite"
SMALL_BATCH = 1024  # a batch of this size is accepted for any dataset
LIMIT = 1e4  # a larger parameter has diverged: Adam moves it by about --lr per step, so by at most some hundreds
LOOK = 2000  # parameters are checked every LOOK steps, and at evaluations


def check_seeds(seeds: list[int]):
    """Raises BadInput for seeds that are out of range or not different."""
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0 or max(seeds) >= 2**31:
        raise BadInput(f"--seeds {seeds}: give different numbers from 0 to {2**31 - 1}, at least one")


def check_args(args):
    """Raises BadInput for a flag out of its range."""
    check_positive(args, "steps", "batch_size", "hidden", "evals", "eval_episodes", "workers")
    check_seeds(args.seeds)
    if not args.out:
        raise BadInput("--out is empty: name a folder")
    if args.resume and args.overwrite:
        raise BadInput("--resume and --overwrite contradict each other: give one of them")
    loggers.check(args.logger)


def check_discount(args):
    """Raises BadInput for a discount or a target's step out of its range."""
    if not 0 <= args.gamma < 1 or not 0 < args.tau <= 1:
        raise BadInput(f"--gamma must be in [0, 1) and --tau in (0, 1], they are {args.gamma} and {args.tau}")


def check_policy_stage(args):
    """Raises BadInput for a flag of the policies' training out of its range."""
    check_positive(args, "lr")
    if not 0 <= args.ema < 1:
        raise BadInput(f"--ema is {args.ema}: give a number in [0, 1)")


def eval_steps(args) -> set[int]:
    """The steps after which a stage is evaluated: args.evals of them, evenly spread, the last step among them.

    With more evaluations than steps there is one after every step.
    """
    evals = min(args.evals, args.steps)
    return {max(round(i * args.steps / evals), 1) for i in range(1, evals + 1)}


def default_dataset(args):
    """Fills in args.env, task and quality if they are not given."""
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
            stops.also_needs("--quality", "demo")  # another quality may be there when the run goes on


def no_dataset(args, path: Path) -> BadInput:
    """The error for a missing dataset at `path`, which says how to get one. Raises BadInput for an unknown task."""
    check_task(args.env, args.task)
    how = f"make it with `python -m offline_data collect --env {args.env} --task {args.task}`"
    if args.env in ("smacv1", "smacv2"):
        how += " (which needs StarCraft II; `--env smax` has the same tasks without it)"
    if (args.env, args.task, args.quality) in downloadable():
        public = f"--env {args.env} --task {args.task} --quality {args.quality}"
        how = f"get the public one with `python -m offline_data download {public}`, or {how}"
    return BadInput(f"no dataset at {path}: {how}, or name a directory with --data")


def run_paths(args, algo: str) -> dict[int, Path]:
    """Each seed's run directory."""
    return {seed: Path(args.out, args.env, args.task, args.quality, algo, f"seed{seed}") for seed in args.seeds}


def recorded_place(args, algo: str) -> str | None:
    """--data-device of the run that is resumed, if there is one."""
    for path in run_paths(args, algo).values():
        if (path / "config.json").exists():
            place = read_json(path / "config.json").get("data_device")
            return place if place in ("cpu", "device") else None
    return None


def free_place(card: dict, device: torch.device) -> str:
    """Where --data-device auto keeps the dataset: on the GPU if it fits into the free memory there."""
    size, free = sum(card["bytes"].values()), torch.cuda.mem_get_info(device)[0]
    if size <= FITS * free:
        return "device"
    print(
        f"the dataset ({size / 2**30:.1f} GiB) stays in the computer's memory, the GPU has {free / 2**30:.1f} GiB "
        "free: batches stream to it"
    )
    return "cpu"


def load_dataset(args, device: torch.device, algo: str) -> tuple[TensorDict, dict]:
    """The dataset that the flags name: its rows, on the device of --data-device, and its card.

    Fills in args.env, task and quality from the card, and args.data_device. Random numbers depend on data_device, so a
    resumed run of `algo` keeps its own.
    """
    if args.quality is not None:
        check_name("--quality", args.quality)  # it names a folder in --out
    if args.data is None:
        default_dataset(args)
    path = dataset_path(args.data, args.env, args.task, args.quality, DATA_ROOT)
    if args.data is None and not path.is_dir():
        raise no_dataset(args, path)
    rows, card = open_dataset(path, args.env, args.task, args.quality)
    args.env, args.task, args.quality = card["env"], card["task"], card["quality"]
    for name in ("batch_size", "init_batch_size"):
        # Rows are drawn with replacement. A batch much larger than the dataset would repeat them, and may not fit.
        if getattr(args, name, 0) > max(card["samples"], SMALL_BATCH):
            flag = f"--{name.replace('_', '-')} {short(getattr(args, name))}"
            raise BadInput(f"{flag} is more than the {card['samples']} transitions of {path}: give a smaller one")
    if device.type != "cuda":
        args.data_device = "cpu"
    elif args.data_device == "auto":
        args.data_device = (recorded_place(args, algo) if args.resume else None) or free_place(card, device)
    if args.data_device == "device":
        try:
            rows = rows.to(device)
        except torch.OutOfMemoryError:
            raise BadInput(
                f"the dataset ({sum(card['bytes'].values()) / 2**30:.1f} GiB) does not fit into the GPU's free memory: "
                "free some, or begin a run with --data-device cpu"
            ) from None
    return rows, card


# ---------------------------------------------------------------- one run's directory


@dataclass
class Run:
    """One seed's run, while it is trained."""

    seed: int
    path: Path
    state: dict
    """the latest checkpoint"""
    metrics: list[dict]
    """the rows of metrics.csv"""
    finished: bool
    begun: bool = False
    """whether it has a checkpoint"""
    lost: str = ""
    """why it can't go on, if it diverged"""
    logger: object = None
    """TorchRL's logger; None with --logger none"""


class Diverged(BadInput):
    """The parameters of these seeds diverged. Other seeds that are trained with them did not."""

    def __init__(self, seeds: list[int], what: str):
        super().__init__(f"{name_seeds(seeds)}: {what}")
        self.seeds, self.what = seeds, what


def check_parameters(module: nn.Module, seeds: list[int], where: str):
    """Raises Diverged for seeds with a parameter that is huge or not finite. `module` is stacked, see support/seeds.py.

    It waits for the GPU, so it is called only before checkpoints and every LOOK steps. That is enough: with Adam, a
    parameter that is not finite remains not finite.
    """
    largest = torch.stack([p.detach().reshape(len(seeds), -1).abs().amax(1) for p in module.parameters()]).amax(0)
    lost = [seed for seed, well in zip(seeds, (largest < LIMIT).tolist()) if not well]
    if lost:
        raise Diverged(lost, f"a parameter is not finite or above {LIMIT:g} at {where}")


@contextmanager
def loading(runs: list[Run]):
    """Raises BadInput if the state of these runs does not fit the networks that it is loaded into in this block."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        where, said = " and ".join(str(run.path) for run in runs), str(error).splitlines()[0]
        raise BadInput(
            f"{where}: the checkpoint's state does not fit these networks ({type(error).__name__}: {said}): "
            f"{BEGIN_AGAIN}"
        ) from None


def give_up(runs: dict[int, Run], diverged: Diverged):
    """Ends the diverged seeds. Their last checkpoints stay, and the group's other seeds go on from theirs."""
    for seed in diverged.seeds:
        run = runs[seed]
        run.lost = diverged.what
        kept = f"its last checkpoint, from before, is in {run.path}" if run.begun else "it has no checkpoint yet"
        fail_at_end(f"seed {seed} diverged: {diverged.what}; {kept}; to begin again, change a flag and add --overwrite")


def has_summary(path: Path) -> bool:
    """Whether a run has a complete summary.json. An empty file does not count."""
    try:
        return {"return", "steps", "seed"} <= read_json(path / "summary.json").keys()
    except BadInput:
        return False


def is_row(row: object) -> bool:
    """Whether this is a row of metrics.csv: a stage, a step, and numbers or nothing."""
    return (
        isinstance(row, dict)
        and isinstance(row.get("stage"), str)
        and isinstance(row.get("step"), int)
        and all(value is None or isinstance(value, int | float) for key, value in row.items() if key != "stage")
    )


def with_older(config: dict) -> dict:
    """A ComaDICE run's config, plus the flags that did not exist yet when it was begun.

    Without --residual, which is gone, if it had no effect on the run.
    """
    config = OLDER | config
    if config.get("objective") != "semi" or config.get("advantage") == "td":
        config.pop("residual", None)
    return config


def load_checkpoint(run: str | Path) -> dict:
    """A run's checkpoint, on the CPU. Raises BadInput if it is missing, damaged or not of this project.

    The config of a ComaDICE run has all flags, see with_older.
    """
    path = Path(run, "checkpoint.pt")
    state = sealed.load(path)
    foreign = f"{path} is not a checkpoint of this project"
    if not isinstance(state, dict) or not all(isinstance(state.get(key), kind) for key, kind in STATE_KEYS.items()):
        raise BadInput(foreign)
    for part, keys in (("card", CARD_KEYS), ("config", CONFIG_KEYS)):
        if not sound(state[part], DEEPEST):
            raise BadInput(
                f"{foreign}: its {part} holds control characters, a number that is too large, or too many levels"
            )
        missing = [key for key, kind in keys.items() if not isinstance(state[part].get(key), kind)]
        if missing:
            raise BadInput(f"{foreign}: its {part} lacks {', '.join(missing)}, or has something else there")
    if not 0 <= state["step"] <= state["config"]["steps"]:
        raise BadInput(f"{foreign}: its step is {state['step']}, beyond its {state['config']['steps']} steps")
    if not all(map(is_row, state["metrics"])):
        raise BadInput(f"{foreign}: its metrics are not a table of numbers")
    if state["algo"] == "comadice":
        state["config"] = with_older(state["config"])
    return state


def load_ratio_run(run: str | Path) -> dict:
    """load_checkpoint of a ComaDICE run, with its ratio "w" [T]. Raises BadInput if it has none (yet)."""
    state = load_checkpoint(run)
    if state["algo"] != "comadice" or state.get("w") is None:
        raise BadInput(f"{run} holds no ratio: give a run of comadice_train.py whose critics are trained")
    # Runs older than --episode-alpha drew all episodes equally.
    state["config"] = config = {"episode_alpha": 0.0} | state["config"]
    w, shape = state["w"], (state["card"]["samples"],)
    if not isinstance(w, torch.Tensor) or w.shape != shape or not w.is_floating_point():
        raise BadInput(f"{run}: its ratio is not one number for each of the dataset's {shape[0]} transitions")
    flags = {"f": str, "episode_alpha": int | float, "neighbours": bool, "data": str | None, "quality": str}
    if not all(isinstance(config.get(k), kind) for k, kind in flags.items()) or config["f"] not in DIVERGENCES:
        raise BadInput(f"{run}: the checkpoint's config is not that of a run of comadice_train.py")
    return state


def check_checkpoint(state: dict, card: dict, run: str | Path):
    """Raises BadInput if a checkpoint was made from another dataset than the card's."""
    for key in CARD_KEYS:
        if state["card"].get(key) != card.get(key):
            raise BadInput(f"{run}: the checkpoint's {key} is {state['card'].get(key)!r}, here it is {card.get(key)!r}")


def begin(args, algo: str, card: dict, where: str, seed: int, path: Path, first: dict) -> Run:
    """The run of one seed, from its directory or new. Raises BadInput if a run is there that can't go on."""
    config = asdict(args) | {"algo": algo}
    state = {"algo": algo, "card": card, "where": where, "policy": {}, "step": 0, "seconds": 0.0, "wall": 0.0} | first
    run = Run(seed, path, state | {"config": asdict(args)}, [], False)
    if args.overwrite or not any((path / name).exists() for name in ("config.json", "checkpoint.pt")):
        return run
    if not args.resume:
        raise BadInput(
            f"{path} already holds a run: --resume goes on with it, --overwrite replaces it, --out goes elsewhere"
        )
    old = read_json(path / "config.json")
    if not sound(old, DEEPEST):
        raise BadInput(f"{path}/config.json is not that of a run")
    if "action_scale" in config:  # runs older than this flag play their mean action; in battles it has no effect
        old = {"action_scale": config["action_scale"] if card["discrete"] else 1.0} | old
    old = with_older(old) if algo == "comadice" else old
    if "residual" in old:
        raise BadInput(
            f"{path} was begun by an older version of this code, whose --residual is gone: go on with that version "
            f"(its config.json names the commit), or {BEGIN_AGAIN}"
        )
    grows = isinstance(old.get("steps"), int) and args.steps > old["steps"]
    free = FREE + GROWS * grows
    changed = [key for key in sorted(config) if key not in free and old.get(key) != config[key]]
    if changed:
        raise BadInput(
            f"{path} was started with other arguments "
            f"({', '.join(f'{key} {old.get(key)}, not {config[key]}' for key in changed)}): give them again to resume"
        )
    if (path / "checkpoint.pt").exists():
        state = load_checkpoint(path)
        check_checkpoint(state, card, path)
        if state["where"] != where:
            raise BadInput(
                f"{path} was trained on {state['where']}, this would be {where}: random numbers differ, resume it "
                "there (--device, --data-device)"
            )
        wrong = [key for key, value in first.items() if key != "w" and not isinstance(state.get(key), type(value))]
        if wrong or not isinstance(state.get("unplayed", []), list):
            raise BadInput(f"{path}: the checkpoint's {', '.join(wrong) or 'unplayed'} can't be used: {BEGIN_AGAIN}")
        run.metrics = state.pop("metrics")
        run.state, run.begun = state | {"config": state["config"] | {key: config[key] for key in GROWS}}, True
        run.finished = run.state["step"] == args.steps and has_summary(path)
        same_w = first.get("w") is None or (
            isinstance(state.get("w"), torch.Tensor) and torch.equal(state["w"], first["w"].cpu())
        )
        if not same_w:
            raise BadInput(
                f"{path} was begun with another ratio w*, so the run {args.checkpoint} has changed since: "
                f"{BEGIN_AGAIN}, or elsewhere with --out"
            )
        if not {row["step"] for row in run.metrics if row["stage"] == "policy"} <= eval_steps(args):
            then = f"it was begun with --steps {old.get('steps')} --evals {old.get('evals')}"
            raise BadInput(
                f"{path} was evaluated at other steps: raise --evals by the same factor as --steps ({then})"
            )
        if not run.finished and "generator" not in state:
            raise BadInput(
                f"{path} was begun by an older version of this code, which kept its random state in another way: go on "
                f"with that version (its config.json names the commit), or {BEGIN_AGAIN}"
            )
    return run


def say_changes(path: Path, old: dict, about: dict):
    """Prints a line if a run goes on with other packages, another commit, card or --workers than it began with."""

    def flat(facts: dict) -> dict:
        packages = facts.get("versions")
        others = {key: facts[key] for key in (*ABOUT, "workers") if key in facts and key != "versions"}
        return (packages if isinstance(packages, dict) else {}) | others

    before, now = flat(old), flat(about)
    changed = [f"{key} {before[key]}, now {now.get(key)}" for key in before if before[key] != now.get(key)]
    if changed:
        print(f"{path} was begun with {'; '.join(changed)}: its result may differ from that of an uninterrupted run")


def table(metrics: list[dict]) -> str:
    """The text of metrics.csv."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(dict.fromkeys(key for row in metrics for key in row)))
    writer.writeheader()
    writer.writerows(metrics)
    return file.getvalue()


def same_text(path: Path, text: str) -> bool:
    """Whether the file is there and holds this text."""
    return path.is_file() and path.read_bytes() == text.encode()


def start_runs(args, algo: str, card: dict, rows: TensorDict, first: dict) -> dict[int, Run]:
    """Makes or finds the run directory of every seed. `first` is a method's state before the first step.

    Raises BadInput, before anything is written, if a run is there (without --resume or --overwrite), if another process
    trains it, if it was made with other arguments or on another device (random numbers differ there), or if OUT can't
    be written. From here on a stop of the script waits until a training loop can save.
    """
    where = f"{pick_device(args.device).type} with the data on {rows['is_init'].device.type}"
    paths = run_paths(args, algo)
    digest = hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()
    about = {"versions": versions(), "commit": commit(), "dataset": f"sha256 of the card {digest}"}
    try:
        for path in paths.values():
            lock(path, again=AGAIN)
        runs = {seed: begin(args, algo, card, where, seed, path, first) for seed, path in paths.items()}
        stops.hold()
        for seed, run in runs.items():
            if not run.begun:
                with disk_errors(run.path, AGAIN):
                    for name in ("summary.json", "checkpoint.pt", "metrics.csv", "ratio.png"):
                        (run.path / name).unlink(missing_ok=True)
                    for folder in (run.path / name for name in loggers.FOLDERS):
                        if folder.is_dir():
                            shutil.rmtree(folder)
            elif not run.finished:
                (run.path / "summary.json").unlink(missing_ok=True)  # it belongs to the run before it was extended
            old = read_json(run.path / "config.json") if run.begun else {}
            if not run.finished:
                say_changes(run.path, old, about | {"workers": args.workers})  # start states depend on it
            if not run.begun or old["steps"] != args.steps:
                config = asdict(args) | {"algo": algo, "seed": seed} | about
                write_text(run.path / "config.json", json.dumps(config, indent=2) + "\n", AGAIN)
            if run.metrics and not same_text(run.path / "metrics.csv", table(run.metrics)):
                write_text(run.path / "metrics.csv", table(run.metrics), AGAIN)
            if not run.finished:
                run.logger = loggers.open_logger(args.logger, run.path, run.metrics)
    except BaseException:
        for path in paths.values():
            unlock(path)
        raise
    return runs


def end_runs(runs: dict[int, Run]) -> list[list[dict]]:
    """Unlocks the run directories. Returns the rows of metrics.csv for the seeds that did not diverge."""
    for run in runs.values():
        unlock(run.path)
        if run.logger is not None:
            run.logger.close()
    if all(run.lost for run in runs.values()):
        raise BadInput("every seed diverged, there is nothing to report")
    return [run.metrics for run in runs.values() if not run.lost]


def next_group(runs: dict[int, Run]) -> list[Run]:
    """An unfinished run and all others at the same step: they can be trained together. Empty when all are finished."""
    left = [run for run in runs.values() if not run.finished and not run.lost]
    step = lambda run: (run.state.get("critic_step"), run.state["step"], len(run.state.get("unplayed", [])))
    return [run for run in left if step(run) == step(left[0])]


def save_checkpoint(run: Run, progress: dict, row: dict | None):
    """Adds `progress` to the run's state and `row` to its table. Writes metrics.csv, checkpoint.pt and the record.

    Each file is replaced as a whole, metrics.csv first. The checkpoint holds the table's rows too. So a run that is
    killed between the two files writes the row again when it is resumed. The logger's record comes last, so it never
    has a row that the checkpoint lacks.
    """
    run.state |= progress
    if row is not None:
        run.metrics.append(row)
        write_text(run.path / "metrics.csv", table(run.metrics), AGAIN)
    sealed.save(run.path / "checkpoint.pt", run.state | {"metrics": run.metrics}, AGAIN)
    run.begun = True
    if row is not None:
        loggers.log_row(run.logger, row)


def save_checkpoints(runs: list[Run], progress: list[dict], rows: list[dict | None]):
    """save_checkpoint for each run."""
    for run, state, row in zip(runs, progress, rows):
        save_checkpoint(run, state, row)


def evaluations_that_count(evaluations: int) -> int:
    """How many of a run's evaluations make its score."""
    return min(10, (evaluations + 1) // 2)


def last_evaluations(metrics: list[dict]) -> list[dict]:
    """The evaluations that make a run's score: the last half of them, at most ten. Empty if rollouts were off."""
    evaluated = [row for row in metrics if row["stage"] == "policy" and row.get("return") is not None]
    return evaluated[-evaluations_that_count(len(evaluated)) :] if evaluated else []


def finish_run(run: Run, args, card: dict, together: int):
    """Writes summary.json: the mean return of the last evaluations (null if rollouts were off), and the speed.

    `together` is the number of seeds that were trained at once.
    """
    state, stages = run.state, 2 if "critic_step" in run.state else 1
    seconds = state["seconds"] + state.get("critic_seconds", 0.0)
    wall = state["wall"] + state.get("critic_seconds", 0.0)  # including the time spent waiting for evaluations
    last, device = last_evaluations(run.metrics), pick_device(args.device)
    mean = lambda key: sum(row[key] for row in last) / len(last)
    battles = bool(last) and last[0]["winrate"] is not None
    summary = {
        "env": args.env,
        "task": args.task,
        "quality": args.quality,
        "algo": state["algo"],
        "seed": run.seed,
        "steps": args.steps,
        "return": mean("return") if last else None,
        "winrate": mean("winrate") if battles else None,
        "evaluations": len(last),
        **{name: getattr(args, name) for name in METHOD_FLAGS if hasattr(args, name)},
        "dataset_return": card["return_mean"],
        "dataset_std": card["return_std"],
        "seeds_together": together,
        "updates_per_second": stages * args.steps / seconds,
        "update_share": seconds / wall,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "engine": engine(card["env"]) if last else card.get("engine"),  # of the evaluations; the card's is the data's
    }
    write_text(run.path / "summary.json", json.dumps(summary, indent=2) + "\n", AGAIN)
    run.finished = True
