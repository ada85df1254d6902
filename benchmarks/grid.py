"""The paper's experiment as a list of cells: instances x methods, and the ablations of Tables 10 to 24.

A cell is all seeds of one method on one instance with one setting. Its runs are ordinary run directories:

    OUT/main/ENV/TASK/QUALITY/METHOD/seedN
    OUT/alpha0.1/ENV/TASK/QUALITY/comadice/seedN     an ablation; its default value is the run in OUT/main
    OUT/grid/                                        the plan, reasons of failures, logs
"""

import environments.cpu  # noqa: F401 -- before torch

# isort: split
import contextlib
import importlib
import json
import os
import re
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from environments.checks import BadInput, run_script
from offline_data.card import check_card, check_name, read_json
from offline_data.durable import write_text
from offline_data.lock import holder_of
from offline_data.published import published
from support.runs import FREE, has_summary

# Method -> its script, and its flags. The paper's seven, and BC on the best 10% of episodes to compare with.
METHODS = {
    "bc": ("comadice_bc", {}),
    "bcq": ("baselines.bcq", {}),
    "cql": ("baselines.cql", {}),
    "icq": ("baselines.icq", {}),
    "omar": ("baselines.omar", {}),
    "omiga": ("baselines.omiga", {}),
    "comadice": ("comadice_train", {}),
    "bc-best10": ("comadice_bc", {"best": 0.1}),
}
# Ablation -> (flag, the values of Tables 10 to 24). ComaDICE's default values are missing: those runs are in OUT/main.
ABLATIONS = {
    "alpha": ("alpha", [0.01, 0.1, 1.0, 10.0, 100.0]),
    "f": ("f", ["chi2", "kl"]),
    "mixer": ("mixer_layers", [2]),
}
# Flags of the scripts that this command sets itself.
OWN = {"env", "task", "quality", "data", "out", "seeds", "steps", "evals", "eval_episodes", "resume", "overwrite",
       "quiet", "device", "best", "checkpoint"}  # fmt: skip
BUDGET = {"steps", "evals", "eval_episodes"}
# Errors that may not come again later or on another machine. The task is tried again.
PASSING = "not enough memory|in use by"
PATIENCE = 60  # seconds to wait for a process that is about to end, for example on a machine that was lost


def failure_file(out: str | Path, name: str, seed: int | str | None) -> Path:
    """Where the line is kept that says why a seed of the cell `name` failed; with None, why the whole cell did."""
    return Path(out, "grid", "failed", name.replace("/", ".") + ("" if seed is None else f".seed{seed}") + ".txt")


@dataclass
class Cell:
    """All seeds of one method on one instance with one setting."""

    out: str
    part: str
    """main, or an ablation's setting"""
    instance: tuple[str, str, str]
    """env, task, quality"""
    method: str
    flags: dict
    """of the method's script, without its seeds"""
    seeds: list[int]

    @property
    def setting(self) -> dict:
        """The flags that change the result, without the budget and the dataset."""
        return {name: value for name, value in self.flags.items() if name not in OWN | set(FREE)}

    @property
    def name(self) -> str:
        return "/".join((self.part, *self.instance, self.method))

    def path(self, seed: int) -> Path:
        return Path(self.out, self.name, f"seed{seed}")

    def config(self, seed: int) -> dict:
        """The config.json of a run. Empty if it is not there, damaged, or of other flags: its script reports those."""
        try:
            config = read_json(self.path(seed) / "config.json")
        except BadInput:
            return {}
        wanted = self.setting | {"eval_episodes": self.flags["eval_episodes"]}
        return config if all(config.get(name) == value for name, value in wanted.items()) else {}

    def begun(self, seed: int) -> bool:
        """Whether this run has begun, perhaps with fewer steps, which its script extends."""
        return self.config(seed).get("steps") in range(1, self.flags["steps"] + 1)

    def finished(self, seed: int) -> bool:
        if not has_summary(self.path(seed)):
            return False
        config = self.config(seed)
        return all(config.get(name) == self.flags[name] for name in BUDGET)

    def failure(self, seed: int | None = None) -> Path:
        """The file that keeps the line of a failure, of one seed or of the whole cell."""
        return failure_file(self.out, self.name, seed)


# ---------------------------------------------------------------- which cells


def paper_instances() -> list[tuple[str, str, str]]:
    """The 39 instances of Tables 1 and 2, which are those of Table 3."""
    return [name for name, (_, table3, _) in published().items() if table3]


def choose_instances(only: list[str], data: list[str]) -> dict[tuple[str, str, str], str | None]:
    """(env, task, quality) -> the dataset's directory, None for data/ENV/TASK/QUALITY.

    A word of `only` is an env, a task or a quality of the paper, a part such as hopper/expert, or any ENV/TASK/QUALITY.
    """
    chosen = {}
    for word in only:
        slashes = f"/{word.strip('/')}/"
        found = [name for name in paper_instances() if slashes in f"/{'/'.join(name)}/"]
        if not found and word.count("/") == 2:
            found = [tuple(word.split("/"))]
            for what, name in zip(("env", "task", "quality"), found[0]):
                check_name(what, name, "--only: ")
        if not found:
            raise BadInput(f"--only {word}: no env, task or quality of the paper; name others as ENV/TASK/QUALITY")
        chosen |= dict.fromkeys(found)
    for path in data:
        card = read_json(Path(path, "card.json"))
        check_card(Path(path), card)
        name = card["env"], card["task"], card["quality"]
        if chosen.get(name):
            raise BadInput(f"--data {path} and {chosen[name]} are both {' '.join(name)}: give each its own --out")
        chosen[name] = str(Path(path).absolute())
    return chosen or dict.fromkeys(paper_instances())


def split_extra(words: list[str], methods: list[str]) -> dict[str, dict]:
    """The words after -- as flags of each method's script: {method: {flag: value}}. A flag goes to the methods that
    have it. Raises BadInput for one that none has."""
    import tyro

    groups = []
    for word in words:
        if word.startswith("--"):
            groups.append([*word.split("=", 1)])
        elif groups:
            groups[-1].append(word)
        else:
            raise BadInput(f"after -- give flags of the training scripts: {word!r} is not one")
    for group in groups:
        if group[0].startswith("--no-"):  # a switch (--x, --no-x) in some scripts takes True or False in others
            group[:] = ["--" + group[0][5:], "False"]
    names = [group[0][2:].replace("-", "_") for group in groups]
    given = {}
    for method in methods:
        Args = importlib.import_module(METHODS[method][0]).Args
        words, own, default = [], [name for name in names if name in Args.__dataclass_fields__], Args()
        for name, (flag, *values) in zip(names, groups):
            if name in own and isinstance(getattr(default, name), bool):
                if values not in ([], ["True"], ["False"]):
                    raise BadInput(f"{flag} {' '.join(values)}: give {flag} or --no-{flag[2:]}")
                words.append(flag if values != ["False"] else f"--no-{flag[2:]}")
            elif name in own:
                words += [flag, *values]
        args = tyro.cli(Args, args=words)
        given[method] = {name: getattr(args, name) for name in own}
    for name, group in zip(names, groups):
        if name in OWN:
            raise BadInput(f"{group[0]} is set by this command: give it before --, or leave it out")
        if not any(name in flags for flags in given.values()):
            raise BadInput(f"{group[0]}: none of {', '.join(methods)} has this flag")
    return given


def ablation_parts(ablation: str) -> dict[str, float | str]:
    """Name of an ablation's folder -> the value of its flag."""
    _, values = ABLATIONS[ablation]
    return {f"f-{value}" if ablation == "f" else f"{ablation}{value:g}": value for value in values}


def make_cells(out: str, instances: dict, methods: list[str], seeds: list[int], ablations: list[str], budget: dict,
               extra: dict[str, dict]) -> list[Cell]:  # fmt: skip
    """All cells, in the order in which they are begun.

    With ablations, `methods` must contain comadice: its default is what they are compared with.
    """
    settings = [("main", method, {}) for method in methods]
    for key in ablations:
        settings += [(part, "comadice", {ABLATIONS[key][0]: value}) for part, value in ablation_parts(key).items()]
    cells = []
    for instance, data in instances.items():
        for part, method, ablated in settings:
            flags = METHODS[method][1] | budget | extra.get(method, {}) | ablated
            flags |= dict(zip(("env", "task", "quality"), instance)) | {"data": data, "out": str(Path(out, part))}
            cells.append(Cell(out, part, instance, method, flags, seeds))
    return cells


def read_plan(out: str | Path) -> tuple[dict[str, int], dict[str, dict]]:
    """(run directory below OUT -> its steps, cell's name -> its setting)."""
    path = Path(out, "grid", "plan.json")
    plan = read_json(path) if path.is_file() else {"steps": {}}
    if not isinstance(plan, dict) or not all(isinstance(plan.get(key, {}), dict) for key in ("steps", "settings")):
        raise BadInput(f"{path} is not a plan of this command")
    return plan.get("steps", {}), plan.get("settings", {})


def save_plan(out: str, cells: list[Cell]):
    """OUT/grid/plan.json: the runs that were asked for, so that `status` knows what is waiting, and their settings.

    Raises BadInput if a cell had another setting in an earlier command. Its seeds would else be of two settings.
    """
    path = Path(out, "grid", "plan.json")
    known, settings = read_plan(out)
    words = lambda setting: " ".join(f"--{k.replace('_', '-')} {v}" for k, v in setting.items()) or "none"
    for cell in cells:
        old = settings.get(cell.name, cell.setting)
        if old != cell.setting:
            raise BadInput(
                f"{cell.name} was planned with other flags (then {words(old)}, now {words(cell.setting)}): give the "
                "same words after --, or another --out"
            )
    runs = known | {f"{cell.name}/seed{seed}": cell.flags["steps"] for cell in cells for seed in cell.seeds}
    own = settings | {cell.name: cell.setting for cell in cells}
    if (runs, own) != (known, settings):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"steps": runs, "settings": own}, indent=0) + "\n", shared=True)


# ---------------------------------------------------------------- one task


def keep_failures(cell: Cell, lines: dict[int | None, str]) -> str:
    """Writes the line of each seed's failure, or with None the cell's, where `status` finds it."""
    for seed, line in lines.items():
        path = cell.failure(seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, line + "\n", shared=True)
    return next(iter(lines.values()))


OUTCOMES = ["finished", "input", "failed", "stopped"]  # of several seeds' outcomes the one furthest right is returned


def train(cell: Cell, seeds: list[int], device: str) -> tuple[str, str]:
    """Trains seeds of a cell in this process, from their last checkpoints, by the method's own script.

    Returns an outcome and a line that explains it. "finished"; the line says if it was not played. "stopped": by a
    signal, by a lack of memory, or since another process does not end. "failed": these seeds only. "input": the input
    can't be used, so the cell's other seeds can't run either. What the script prints goes to OUT/grid/logs. The failure
    file of the whole cell is not deleted here: another seed may just have written it.
    """
    log = Path(cell.out, "grid", "logs", cell.name.replace("/", ".") + f".seed{'-'.join(map(str, seeds))}.txt")
    log.parent.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        cell.failure(seed).unlink(missing_ok=True)
    for _ in range(PATIENCE):
        others = {seed: holder for seed in seeds if (holder := holder_of(cell.path(seed)))}
        if not others:
            break
        time.sleep(1)
    else:
        seed, holder = next(iter(others.items()))
        return "stopped", f"{cell.path(seed)} is in use by {holder}"
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        start = file.tell()
        print(time.strftime("%Y-%m-%d %H:%M:%S"), f"process {os.getpid()}", flush=True)
        script = importlib.import_module(METHODS[cell.method][0])
        flags = cell.flags | {"seeds": seeds, "device": device, "resume": True, "quiet": True}
        try:
            run_script(script.main, script.Args(**flags))
        except SystemExit as end:
            code = end.code
        except Exception as error:
            traceback.print_exc(file=file)
            line = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''} (traceback: {log})"
            return "failed", keep_failures(cell, {seed: line for seed in seeds})
        else:
            code = 0
    with open(log) as file:
        file.seek(start)
        lines = [line.removeprefix("error: ").strip() for line in file if line.startswith("error: ")]
    # The script's picture shows only these seeds, and other tasks overwrite it. The report's pictures show all seeds.
    picture = "learning_curve.png" if cell.method == "comadice" else f"learning_curve_{cell.method}.png"
    cell.path(seeds[0]).parents[1].joinpath(picture).unlink(missing_ok=True)
    if code in (130, 143):
        return "stopped", f"stopped by a signal, {cell.name} goes on from its checkpoint"
    diverged = {int(line.split()[1]): line for line in lines if re.match(r"seed \d+ diverged", line)}
    if diverged:
        return "failed", keep_failures(cell, diverged)
    if code:
        line = lines[-1] if lines else f"exit code {code} (see {log})"
        if re.search(PASSING, line):
            return "stopped", line
        if not any(cell.begun(seed) for seed in cell.seeds):
            return "input", keep_failures(cell, {None: line})
        if len(seeds) > 1:  # one damaged run stops all that are trained together
            outcomes = [train(cell, [seed], device) for seed in seeds]
            return max(outcomes, key=lambda outcome: OUTCOMES.index(outcome[0]))
        if "was trained on" in line and device != "cpu":
            line += " (here: --gpu-fraction 0)"
        return "failed", keep_failures(cell, dict.fromkeys(seeds, line))  # a damaged checkpoint, a full disk, ...
    unplayed = [seed for seed in seeds if read_json(cell.path(seed) / "summary.json")["return"] is None]
    return "finished", f"trained, but not played: seeds {unplayed} (see {log})" if unplayed else ""
