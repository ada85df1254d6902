"""From run directories to the paper's tables, learning curves and ablation charts.

    python comadice_eval.py report runs/        # -> runs/report/report.md, report.csv and PNGs

Every folder below RUNS that holds a finished run is a seed of a cell: an instance (simulator, task, quality), a method, and the
arguments with which it ran. Runs of other arguments are never averaged: where a method ran with several, as in an ablation
(--out runs/alpha0.1 and so on), each has a column, named by what differs. What is left out is listed with its reason.
"""

import csv
import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tyro

from comadice_data import BadInput, read_json
from comadice_published import published
from comadice_runs import FREE

METHODS = ["bc", "bcq", "cql", "icq", "omar", "omiga", "comadice"]  # the paper's order
ABLATIONS = {"alpha": "alpha", "f": "f-divergence", "mixer_layers": "layers of the mixer"}  # Sections B.4, B.5, B.6
RUN_FILES = {"config.json", "metrics.csv", "summary.json", "checkpoint.pt"}
PAPER = Path(__file__).parent / "paper_tables.csv"


@dataclass
class Args:
    runs: tyro.conf.Positional[str]
    """folder that holds run directories, at any depth"""
    out: str | None = None
    """folder for the report (default RUNS/report)"""
    last: float = 0.1
    """a seed's score is its mean over this share of its evaluations, the last ones, and at least one: single checkpoints swing"""


class Run(NamedTuple):
    """One finished seed; return and winrate (percent) at each evaluation."""

    path: Path
    instance: tuple  # env, task, quality, engine, the dataset's mean return
    method: str
    config: tuple  # the arguments that make a difference, as sorted (name, value)
    seed: int
    steps: list[int]
    curves: dict[str, list[float]]  # metric -> a value an evaluation


class Cell(NamedTuple):
    """What one instance's runs of one method and one setting give."""

    instance: tuple
    method: str
    setting: tuple  # (name, value) of each argument that varies among this method's runs of an instance
    runs: list[Run]

    @property
    def column(self) -> str:
        return " ".join([self.method, *(f"{k}={show(v)}" for k, v in self.setting)])


def show(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def mean_std(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))


# ---------------------------------------------------------------- reading


def read_run(path: Path) -> Run:
    """A finished run directory. Raises BadInput with the reason for which a directory is none."""
    if not (path / "config.json").is_file():
        raise BadInput("no config.json: not a run directory of this project")
    config = read_json(path / "config.json")
    needed = {"algo", "seed", "steps", "env", "task", "quality"}
    if not isinstance(config, dict) or not needed <= config.keys():
        raise BadInput("config.json is not that of a run of this project")
    if not (path / "metrics.csv").is_file():
        raise BadInput("not finished: no metrics.csv yet")
    try:
        with open(path / "metrics.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["stage"] == "policy"]
        steps = [int(row["step"]) for row in rows]
        last = steps[-1] if steps else 0
        if not (path / "summary.json").is_file():
            raise BadInput(f"not finished: {last:,} of {config['steps']:,} steps of the policy; go on with --resume")
        if last != config["steps"]:
            raise BadInput(f"metrics.csv ends at step {last:,}, not at {config['steps']:,}")
        summary = read_json(path / "summary.json")
        if summary["return"] is None:
            raise BadInput("its policy was not rolled out")
        curves = {"return": [float(row["return"]) for row in rows]}
        if summary["winrate"] is not None:
            curves["winrate"] = [100 * float(row["winrate"]) for row in rows]
        instance = (config["env"], config["task"], config["quality"], summary["engine"], float(summary["dataset_return"]))
    except BadInput:
        raise
    except (KeyError, ValueError, TypeError) as error:
        raise BadInput(f"metrics.csv or summary.json is damaged ({type(error).__name__}: {error})") from None
    if not all(math.isfinite(v) for values in curves.values() for v in values):
        raise BadInput("metrics.csv holds a value that is not finite")
    settings = {k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in config.items() if k not in (*FREE, *needed - {"steps"})}
    return Run(path, instance, config["algo"], tuple(sorted(settings.items())), config["seed"], steps, curves)


def find_runs(root: Path, out: Path) -> tuple[list[Run], list[tuple[Path, str]]]:
    """(finished runs below root, what was left out and why)."""
    folders = [p for p in (root, *sorted(root.rglob("*"))) if p.is_dir() and p != out and out not in p.parents]
    holds = {p: {file.name for file in p.iterdir() if file.is_file()} for p in folders}
    runs, left_out, seen = [], [], {}
    for folder in folders:
        if not holds[folder]:
            continue
        if not holds[folder] & RUN_FILES:
            if not any(folder in other.parents and holds[other] & RUN_FILES for other in folders):  # learning curves lie above runs
                left_out.append((folder, "not a run directory of this project"))
            continue
        try:
            run = read_run(folder)
        except BadInput as error:
            left_out.append((folder, str(error)))
            continue
        name = (run.instance, run.method, run.config, run.seed)
        if name in seen:
            left_out.append((folder, f"the same run as {seen[name]}"))
            continue
        seen[name] = folder
        runs.append(run)
    return runs, left_out


def make_cells(runs: list[Run]) -> list[Cell]:
    """Groups seeds; a setting names the arguments that vary within some instance, so that columns mean the same in every row."""
    by_method = defaultdict(lambda: defaultdict(set))
    for run in runs:
        by_method[run.method][run.instance].add(run.config)
    cells = []
    for method, by_instance in by_method.items():
        varying = set()
        for configs in by_instance.values():
            names = {name for config in configs for name, _ in config}
            varying |= {name for name in names if len({dict(config).get(name) for config in configs}) > 1}
        for instance, configs in by_instance.items():
            for config in configs:
                setting = tuple((k, v) for k, v in config if k in varying)
                seeds = [run for run in runs if (run.instance, run.method, run.config) == (instance, method, config)]
                cells.append(Cell(instance, method, setting, sorted(seeds, key=lambda run: run.seed)))
    rank = {method: i for i, method in enumerate(METHODS)}
    return sorted(cells, key=lambda c: (rank.get(c.method, -1), c.method, [(k, isinstance(v, str), v if v is not None else -1) for k, v in c.setting]))


def missing_seeds(cells: list[Cell]) -> list[str]:
    """A line for each cell that lacks seeds that another cell of its instance has."""
    seeds = defaultdict(set)
    for cell in cells:
        seeds[cell.instance] |= {run.seed for run in cell.runs}
    lines = []
    for cell in cells:
        missing = sorted(seeds[cell.instance] - {run.seed for run in cell.runs})
        if missing:
            lines.append(f"{' '.join(cell.instance[:3])}, {cell.column}: no seed {', '.join(map(str, missing))}; its mean is over {len(cell.runs)}")
    return lines


def score(cell: Cell, metric: str, last: float) -> tuple[float, float]:
    """Mean and standard deviation over seeds; a seed's score is its mean over the last evaluations."""
    count = max(round(last * len(cell.runs[0].steps)), 1)
    return mean_std([sum(run.curves[metric][-count:]) / count for run in cell.runs])


def paper_numbers() -> dict[tuple, tuple[str, str]]:
    """(env, task, quality, metric, method, setting) -> (mean, std), as printed in Tables 1, 2 and 5 to 24."""
    with open(PAPER, newline="") as file:
        return {tuple(row[k] for k in ("env", "task", "quality", "metric", "method", "setting")): (row["mean"], row["std"]) for row in csv.DictReader(file)}


def of_paper(paper: dict, cell: Cell, metric: str) -> tuple[str, str] | None:
    """The paper's number of a cell: that of the ablation where exactly one of its arguments varies, else the main tables'."""
    ablated = [f"{k}={show(v)}" for k, v in cell.setting if k in ABLATIONS]
    return paper.get((*cell.instance[:3], metric, cell.method, ablated[0] if len(ablated) == 1 else ""))


# ---------------------------------------------------------------- writing


def table(cells: list[Cell], metric: str, last: float, paper: dict) -> list[str]:
    """Lines of Markdown: a row an instance, a column a method and setting, the best mean in bold, the paper's numbers below ours."""
    columns = list(dict.fromkeys(cell.column for cell in cells))
    found = {(cell.instance, cell.column): cell for cell in cells}
    most = max(abs(score(cell, metric, last)[0]) for cell in cells)
    digits = 1 if metric == "winrate" or most >= 10 else 3
    lines = [f"| instance | {'data | ' if metric == 'return' else ''}{' | '.join(columns)} |", "| --- " * (len(columns) + 1 + (metric == "return")) + "|"]
    for instance in sorted({cell.instance for cell in cells}, key=str):
        row = [cell for cell in cells if cell.instance == instance]
        best = max(score(cell, metric, last)[0] for cell in row)
        most_seeds = max(len(cell.runs) for cell in row)
        ours, theirs = [f"{instance[1]} {instance[2]}"], ["the paper's"]
        if metric == "return":
            statistics = published().get(instance[:3], ["", "", ""])[1]
            ours.append(f"{instance[4]:.{digits}f}")
            theirs.append(statistics[2] if statistics else "")
        for column in columns:
            cell = found.get((instance, column))
            if cell is None:
                ours.append("")
                theirs.append("")
                continue
            mean, std = score(cell, metric, last)
            text = f"{mean:.{digits}f} ± {std:.{digits}f}"
            text = f"**{text}**" if mean == best else text
            ours.append(text if len(cell.runs) == most_seeds else f"{text} ({len(cell.runs)} of {most_seeds} seeds)")
            number = of_paper(paper, cell, metric)
            theirs.append(" ± ".join(number) if number else "")
        lines.append(f"| {' | '.join(ours)} |")
        if any(theirs[1 + (metric == "return") :]):
            lines.append(f"| {' | '.join(theirs)} |")
    return lines


def write_csv(cells: list[Cell], last: float, paper: dict, path: Path):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["env", "task", "quality", "engine", "data_return", "metric", "method", "setting", "mean", "std", "seeds", "paper_mean", "paper_std"])
        for cell in sorted(cells, key=lambda c: str(c.instance)):
            for metric in cell.runs[0].curves:
                setting = " ".join(f"{k}={show(v)}" for k, v in cell.setting)
                seeds = " ".join(str(run.seed) for run in cell.runs)
                numbers = (*score(cell, metric, last), seeds, *(of_paper(paper, cell, metric) or ("", "")))
                writer.writerow([*cell.instance, metric, cell.method, setting, *numbers])


def panels(count: int, width: float = 4.2, height: float = 3.1):
    """A figure with `count` panels, at most three in a row."""
    from matplotlib.figure import Figure

    across = min(count, 3)
    down = math.ceil(count / across)
    figure = Figure(figsize=(width * across, height * down))
    axes = figure.subplots(down, across, squeeze=False)
    for axis in axes.flat[count:]:
        axis.axis("off")
    return figure, axes.flat


def draw_curves(cells: list[Cell], metric: str, path: Path):
    """Figures 1 and 4 to 8: mean and standard deviation over seeds at every evaluation, a panel an instance."""
    instances = sorted({cell.instance for cell in cells}, key=str)
    figure, axes = panels(len(instances))
    color = {column: f"C{i % 10}" for i, column in enumerate(dict.fromkeys(cell.column for cell in cells))}
    for axis, instance in zip(axes, instances):
        for cell in (cell for cell in cells if cell.instance == instance):
            points = [mean_std(list(values)) for values in zip(*(run.curves[metric] for run in cell.runs))]
            mean, low, high = zip(*((m, m - s, m + s) for m, s in points))
            axis.plot(cell.runs[0].steps, mean, label=cell.column, color=color[cell.column])
            axis.fill_between(cell.runs[0].steps, low, high, alpha=0.15, color=color[cell.column], linewidth=0)
        if metric == "return":
            axis.axhline(instance[4], color="grey", linestyle="--", linewidth=1, label="behaviour data")
        axis.set(title=f"{instance[1]} {instance[2]}", xlabel="gradient steps of the policy", ylabel=metric + (" (%)" if metric == "winrate" else ""))
        axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def series(cells: list[Cell], key: str) -> list[list[Cell]]:
    """ComaDICE's cells of one instance that differ in `key` alone, two or more together."""
    groups = defaultdict(list)
    for cell in cells:
        if cell.method == "comadice" and key in dict(cell.setting):
            groups[tuple((k, v) for k, v in cell.setting if k != key)].append(cell)
    return [group for group in groups.values() if len(group) > 1]


def draw_ablation(cells: list[Cell], key: str, metric: str, last: float, paper: dict, path: Path) -> bool:
    """Figures 2, 9 and 10: the score at each value of `key`, a panel an instance; False where nothing was ablated."""
    charts = [(instance, group) for instance in sorted({cell.instance for cell in cells}, key=str)
              for group in series([cell for cell in cells if cell.instance == instance], key)]
    if not charts:
        return False
    figure, axes = panels(len(charts))
    for axis, (instance, group) in zip(axes, charts):
        names = [show(dict(cell.setting)[key]) for cell in group]
        mean, std = zip(*(score(cell, metric, last) for cell in group))
        axis.bar(names, mean, yerr=std, color="C0", capsize=3, label="here")
        numbers = [(name, of_paper(paper, cell, metric)) for name, cell in zip(names, group)]
        numbers = [(name, float(m), float(s)) for name, (m, s) in ((name, number) for name, number in numbers if number)]
        if numbers:
            x, m, s = zip(*numbers)
            axis.errorbar(x, m, yerr=s, fmt="o", color="C1", capsize=3, label="the paper, on its data")
        others = " ".join(f"{k}={show(v)}" for k, v in group[0].setting if k != key)
        axis.set(title=f"{instance[1]} {instance[2]} {others}".strip(), xlabel=ABLATIONS[key], ylabel=metric + (" (%)" if metric == "winrate" else ""))
        axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    return True


def main(args: Args):
    root = Path(args.runs)
    if not root.is_dir():
        raise BadInput(f"no folder at {root}")
    if not 0 < args.last <= 1:
        raise BadInput(f"--last is {args.last}: give a share of the evaluations, above 0 and at most 1")
    out = Path(args.out) if args.out else root / "report"
    runs, left_out = find_runs(root, out)
    if not runs:
        reasons = "".join(f"; {path}: {why}" for path, why in left_out[:3])
        raise BadInput(f"no finished run below {root}{reasons}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"can't write to {out}: {error.strerror}") from None
    cells, paper = make_cells(runs), paper_numbers()
    lines, figures = [], []
    for env in dict.fromkeys(cell.instance[0] for cell in cells):
        family = [cell for cell in cells if cell.instance[0] == env]
        engines = sorted({str(cell.instance[3]) for cell in family})
        for metric in ("return", "winrate"):
            measured = [cell for cell in family if metric in cell.runs[0].curves]
            if not measured:
                continue
            unit = " (% of battles won)" if metric == "winrate" else ""
            lines += [f"## {env}: {metric}{unit}", "", f"Mean ± standard deviation over seeds, engine {', '.join(engines)}.", ""]
            lines += [*table(measured, metric, args.last, paper), ""]
            figures.append(out / f"curves_{env}_{metric}.png")
            draw_curves(measured, metric, figures[-1])
            for key in ABLATIONS:
                path = out / f"ablation_{key}_{env}_{metric}.png"
                if draw_ablation(measured, key, metric, args.last, paper, path):
                    figures.append(path)
    notes = missing_seeds(cells) + [f"left out {path}: {why}" for path, why in left_out]
    lines += ["## Missing and left out", "", *(f"- {note}" for note in notes or ["nothing"])]
    (out / "report.md").write_text("\n".join(lines) + "\n")
    write_csv(cells, args.last, paper, out / "report.csv")
    print("\n".join(lines))
    print(f"\nwritten: {', '.join(str(path) for path in (out / 'report.md', out / 'report.csv', *figures))}")
