"""Makes the paper's tables, learning curves and ablation charts from run directories. Prints a script's final summary.

    python comadice_eval.py report runs/        # -> runs/report: report.md, report.csv, seeds.csv, marl_eval.json, PNGs

Every finished run below RUNS is one seed of a cell. A cell is an instance (simulator, task, quality, data), a method
and its arguments. Runs with different arguments are never averaged. If a method ran with several settings, as in an
ablation (--out runs/alpha0.1 and so on), each setting has a column, named by what differs. The report lists what it
leaves out, and why.
"""

import csv
import json
import math
import os
import re
import tempfile
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

from environments.checks import BadInput
from environments.simulators import engine
from offline_data.card import DEEPEST, read_json, sound
from offline_data.durable import write_figure
from offline_data.published import published
from support import loggers, scores
from support.report_args import Args
from support.runs import FREE, eval_steps, evaluations_that_count, last_evaluations, with_older

METHODS = ["bc", "bc-best10", "bcq", "cql", "icq", "omar", "omiga", "comadice"]  # the paper's order, with bc-best10
ABLATIONS = {"alpha": "alpha", "f": "f-divergence", "mixer_layers": "layers of the mixer"}  # Sections B.4, B.5, B.6
AXIS = {"return": "return", "winrate": "winrate (%)"}
COLOURED = 4  # curves in colour, in a figure of six or more
DASHES = ["--", "-.", ":", (0, (9, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (2, 4))]  # of the grey curves
RUN_FILES = {"config.json", "metrics.csv", "summary.json", "checkpoint.pt"}
# The files that a report consists of.
REPORT_FILE = re.compile(r"(report|seeds|marl_eval\w*|intervals|profiles|(curves|ablation)_\w+)\.(md|csv|json|png)")
PAPER = Path(__file__).parent / "paper_tables.csv"


class Run(NamedTuple):
    """One finished seed, with return and winrate (percent) at each evaluation."""

    path: Path
    instance: tuple  # env, task, quality, engine, the dataset's mean return
    method: str
    config: tuple  # the arguments that change the result, as sorted (name, text)
    seed: int
    steps: list[int]
    curves: dict[str, list[float]]  # metric -> one value per evaluation
    data_std: float  # standard deviation of the dataset's returns, 0 for a run that is too old to have it


class Cell(NamedTuple):
    """The runs of one instance, method and setting."""

    instance: tuple
    method: str
    setting: tuple  # (name, text) of each argument that varies between this method's runs
    runs: list[Run]

    @property
    def label(self) -> str:
        """The setting as text, as paper_tables.csv names ablations."""
        return " ".join(f"{k}={v}" for k, v in self.setting)

    @property
    def column(self) -> str:
        return f"{self.method} {self.label}".strip()


def show(value) -> str:
    """An argument as text. Equal values have equal texts: 10.0 is 10."""
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return value if isinstance(value, str) else json.dumps(value)


def numeric(text: str) -> tuple:
    """Sort key: numbers by value, then other text."""
    try:
        return (0, float(text), "")
    except ValueError:
        return (1, 0.0, text)


def mean_std(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, which is 0 for a single value."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1))


# ---------------------------------------------------------------- reading


def read_run(path: Path) -> Run:
    """Reads a finished run directory. Raises BadInput, with the reason, for any other directory."""
    if not (path / "config.json").is_file():
        raise BadInput("no config.json: not a run directory of this project")
    config = read_json(path / "config.json")
    kinds = {"algo": str, "env": str, "task": str, "quality": str, "seed": int, "steps": int, "evals": int}
    if not sound(config, DEEPEST) or any(type(config.get(k)) is not kind for k, kind in kinds.items()):
        raise BadInput("config.json is not that of a run of this project")
    for key in ("algo", "env", "task", "quality"):
        if not re.fullmatch(r"[\w-][\w.-]{,63}", config[key]):  # bc-best2.5 has a dot
            raise BadInput(f"config.json: {key} is {config[key]!r}, which is not a name")
    episodes = config.get("eval_episodes", 1)
    if type(episodes) is not int or min(config["steps"], config["evals"], episodes) < 1:
        raise BadInput("config.json: steps, evals and eval_episodes must be positive numbers")
    if not (path / "metrics.csv").is_file():
        raise BadInput("not finished: no metrics.csv yet")
    try:
        text = (path / "metrics.csv").read_bytes().decode()
        if not text.endswith("\n"):
            raise BadInput("metrics.csv is cut off: its last line has no end")
        rows = [row for row in csv.DictReader(text.splitlines()) if row["stage"] == "policy"]
        steps = [int(row["step"]) for row in rows]
        if not (path / "summary.json").is_file():
            raise BadInput(
                f"not finished: {steps[-1] if steps else 0:,} of {config['steps']:,} steps of the policy; go on with "
                "--resume"
            )
        asked = min(config["evals"], config["steps"])  # compared first: a damaged config may ask for billions
        if len(steps) != asked or steps != sorted(eval_steps(SimpleNamespace(**config))):
            raise BadInput(f"metrics.csv has {len(steps)} evaluations up to step {steps[-1] if steps else 0:,}, "
                           f"config.json asks for {config['evals']} up to step {config['steps']:,}")
        summary = read_json(path / "summary.json")
        if not sound(summary, DEEPEST) or not isinstance(summary["engine"], str):
            raise BadInput("summary.json is not that of a run of this project")
        if summary["return"] is None or not all(row["return"] for row in rows):
            raise BadInput("not all of its policies were played; comadice_eval.py --run plays the last one")
        curves = {"return": [float(row["return"]) for row in rows]}
        if summary["winrate"] is not None:
            curves["winrate"] = [100 * float(row["winrate"]) for row in rows]
        instance = tuple(config[key] for key in ("env", "task", "quality"))
        instance += (summary["engine"], float(summary["dataset_return"]))
        data_std = float(summary.get("dataset_std", 0.0))
    except BadInput:
        raise
    except (KeyError, ValueError, TypeError, OverflowError, OSError, csv.Error) as error:
        raise BadInput(f"metrics.csv or summary.json is damaged ({type(error).__name__}: {error})") from None
    if not all(abs(v) < 1e12 for v in (*instance[4:], data_std, *curves["return"])) or not all(
        0 <= v <= 100 for v in curves.get("winrate", [])
    ):
        raise BadInput("metrics.csv or summary.json holds a number that can't be a return or winrate")
    if config["env"] == "mamujoco":
        config.setdefault("action_scale", 1.0)  # runs from before this flag play their mean action
    else:
        config.pop("action_scale", None)  # battles have discrete actions
    if config["algo"] == "comadice":
        config = with_older(config)
    settings = {k: show(v) for k, v in config.items() if k in ("steps", "evals") or k not in (*FREE, *kinds)}
    if "checkpoint" in settings:  # weighted BC: each seed has the ratio of another run
        settings["checkpoint"] = re.sub(r"seed\d+$", "seed*", settings["checkpoint"])
    return Run(path, instance, config["algo"], tuple(sorted(settings.items())), config["seed"], steps, curves, data_std)


def find_runs(root: Path, skip: list[Path]) -> tuple[list[Run], list[tuple[Path, str]]]:
    """(finished runs below root, the folders that are left out, with the reason). Folders in `skip` are ignored."""
    left_out, holds, skip = [], {}, {path.resolve() for path in skip}
    for folder, folders, files in os.walk(
        root, onerror=lambda error: left_out.append((Path(error.filename), f"can't be read: {error.strerror}"))
    ):
        left_out += [
            (Path(folder, name), "a link, which is not followed") for name in folders if Path(folder, name).is_symlink()
        ]
        if files:
            holds[Path(folder)] = set(files)
        # Folders that a logger made within a run hold no runs.
        logged = set(loggers.FOLDERS) if RUN_FILES & set(files) else set()
        folders[:] = sorted(name for name in folders if Path(folder, name).resolve() not in skip and name not in logged)
    above = {parent for folder in holds if holds[folder] & RUN_FILES for parent in folder.parents}
    runs, seen = [], {}
    for folder in holds:
        if not holds[folder] & RUN_FILES:
            if folder not in above:  # folders above runs hold learning curves
                left_out.append((folder, "not a run directory of this project"))
            continue
        try:
            run = read_run(folder)
            like = seen.setdefault((run.instance, run.method, run.config), [])
            same = next((other for other in like if other.seed == run.seed), None)
            if same:
                raise BadInput(f"the same run as {same.path}")
            if like and like[0].curves.keys() != run.curves.keys():
                raise BadInput(f"of it and {like[0].path}, one has a winrate and the other has none")
        except BadInput as error:
            left_out.append((folder, str(error)))
            continue
        like.append(run)
        runs.append(run)
    return runs, left_out


def follows_alpha(configs: list[dict]) -> bool:
    """Whether every episode_alpha of one instance's runs is what support/presets.py derives from their alpha.

    That is constant up to alpha's default, and from there on grows with alpha's square.
    """
    values = [[numeric(config.get(name, "")) for name in ("alpha", "episode_alpha")] for config in configs]
    if any(kind for pair in values for kind, *_ in pair):  # not a number, or not there
        return False
    pairs = {(alpha, own) for (_, alpha, _), (_, own, _) in values}
    least = min(own for _, own in pairs)
    if len(dict(pairs)) < len(pairs) or least <= 0:
        return False
    defaults = [alpha / math.sqrt(own / least) for alpha, own in pairs if own > 1.001 * least]  # alpha's, from each
    smaller = [alpha for alpha, own in pairs if own <= 1.001 * least]
    return not defaults or (max(defaults) < 1.01 * min(defaults) and max(smaller) < 1.01 * min(defaults))


def make_cells(runs: list[Run]) -> list[Cell]:
    """Groups seeds into cells. A setting names all arguments that vary within any instance, so a column means the same
    in every row. episode_alpha is not named where it follows from alpha."""
    by_method = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for run in runs:
        by_method[run.method][run.instance][run.config].append(run)
    cells = []
    for method, by_instance in by_method.items():
        varying = set()
        for configs in by_instance.values():
            names = {name for config in configs for name, _ in config}
            varying |= {name for name in names if len({dict(config).get(name, "(none)") for config in configs}) > 1}
        of_rules = defaultdict(list)  # what --episode-alpha is derived from depends on the dataset and on --neighbours
        for instance, configs in by_instance.items():
            for config in map(dict, configs):
                of_rules[instance, config.get("neighbours")].append(config)
        if all(map(follows_alpha, of_rules.values())):
            varying.discard("episode_alpha")
        for instance, configs in by_instance.items():
            for config, seeds in configs.items():
                setting = tuple((k, dict(config).get(k, "(none)")) for k in sorted(varying))
                cells.append(Cell(instance, method, setting, sorted(seeds, key=lambda run: run.seed)))
    rank = {method: i for i, method in enumerate(METHODS)}
    return sorted(cells, key=lambda c: (rank.get(c.method, -1), c.method, [(k, *numeric(v)) for k, v in c.setting]))


def missing_seeds(cells: list[Cell]) -> list[str]:
    """A line for each cell without some of the seeds that the instance's other cells have."""
    seeds = defaultdict(set)
    for cell in cells:
        seeds[cell.instance] |= {run.seed for run in cell.runs}
    lines = []
    for cell in cells:
        missing = sorted(seeds[cell.instance] - {run.seed for run in cell.runs})
        if missing:
            lines.append(
                f"{' '.join(cell.instance[:3])}, {cell.column}: no seed {', '.join(map(str, missing))}; its mean is "
                f"over {len(cell.runs)}"
            )
    return lines


def seed_scores(cell: Cell, metric: str, last: float | None) -> list[float]:
    """Each seed's score: its mean over the last evaluations."""
    evaluations = len(cell.runs[0].steps)
    count = evaluations_that_count(evaluations) if last is None else max(round(last * evaluations), 1)
    return [sum(run.curves[metric][-count:]) / count for run in cell.runs]


def score(cell: Cell, metric: str, last: float | None) -> tuple[float, float]:
    """Mean and standard deviation over seeds."""
    return mean_std(seed_scores(cell, metric, last))


def all_scores(cells: list[Cell], last: float | None) -> list[scores.Score]:
    """Every seed's score in every metric."""
    found = []
    for cell in cells:
        config = dict(cell.runs[0].config)
        budget = int(config["steps"]), int(config["evals"]), config.get("eval_episodes", "?")
        # Cells of different budgets are not compared, so a column needs no budget in its name.
        setting = tuple(pair for pair in cell.setting if pair[0] not in ("steps", "evals", "eval_episodes"))
        column = cell._replace(setting=setting).column
        for metric in cell.runs[0].curves:
            for run, value in zip(cell.runs, seed_scores(cell, metric, last)):
                about = cell.instance, metric, column, run.seed, value, budget
                found.append(scores.Score(*about, run.steps, run.curves[metric], run.data_std))
    return found


def paper_numbers() -> dict[tuple, tuple[str, str]]:
    """(env, task, quality, metric, method, setting) -> (mean, std), as printed in Tables 1, 2 and 5 to 24."""
    with open(PAPER, newline="") as file:
        return {
            tuple(row[k] for k in ("env", "task", "quality", "metric", "method", "setting")): (row["mean"], row["std"])
            for row in csv.DictReader(file)
        }


def of_paper(paper: dict, cell: Cell, metric: str) -> tuple[str, str] | None:
    """The paper's number for a cell: from the main tables if no argument varies, from an ablation's table if one does,
    else None."""
    return paper.get((*cell.instance[:3], metric, cell.method, cell.label))


# ---------------------------------------------------------------- writing


def title(instance: tuple, instances: list[tuple]) -> str:
    """An instance's name, with engine and data if the name is not unique."""
    name = f"{instance[1]} {instance[2]}"
    alike = [other for other in instances if other[:3] == instance[:3]]
    return name if len(alike) == 1 else f"{name} ({instance[3]}, data {instance[4]:g})"


def table(cells: list[Cell], metric: str, last: float | None, paper: dict) -> list[str]:
    """Lines of Markdown: one row per instance, one column per method and setting. The best mean is bold, and the
    paper's numbers are below ours."""
    columns = list(dict.fromkeys(cell.column for cell in cells))
    instances = sorted({cell.instance for cell in cells})
    most = max(abs(score(cell, metric, last)[0]) for cell in cells)
    digits = 1 if metric == "winrate" or most >= 10 else 3
    lines = [f"| instance | data | {' | '.join(columns)} |", "| --- " * (len(columns) + 2) + "|"]
    for instance in instances:
        row = {cell.column: cell for cell in cells if cell.instance == instance}
        best = max(score(cell, metric, last)[0] for cell in row.values())
        most_seeds = max(len(cell.runs) for cell in row.values())
        statistics = published().get(instance[:3], ["", "", ""])[1]
        ours, theirs = (
            [title(instance, instances), f"{instance[4]:.{digits}f}"],
            ["the paper's", statistics[2] if statistics else ""],
        )
        if metric == "winrate":
            ours[1] = theirs[1] = ""
        for column in columns:
            cell, text, number = row.get(column), "", None
            if cell is not None:
                mean, std = score(cell, metric, last)
                text = f"{mean:.{digits}f} ± {std:.{digits}f}" if len(cell.runs) > 1 else f"{mean:.{digits}f} (1 seed)"
                text = f"**{text}**" if mean == best else text
                if 1 < len(cell.runs) < most_seeds:
                    text += f" ({len(cell.runs)} of {most_seeds} seeds)"
                number = of_paper(paper, cell, metric)
            ours.append(text)
            theirs.append(" ± ".join(number) if number else "")
        lines.append(f"| {' | '.join(ours)} |")
        if any(theirs[2:]):
            lines.append(f"| {' | '.join(theirs)} |")
    return lines


def write_csv(cells: list[Cell], last: float | None, paper: dict, path: Path):
    """The tables as one CSV: a row per instance, metric, method and setting."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        instance, ours = ["env", "task", "quality", "engine", "data_return"], ["mean", "std", "seeds"]
        writer.writerow([*instance, "metric", "method", "setting", *ours, "paper_mean", "paper_std"])
        for cell in sorted(cells, key=lambda c: c.instance):
            for metric in cell.runs[0].curves:
                seeds = " ".join(str(run.seed) for run in cell.runs)
                numbers = (*score(cell, metric, last), seeds, *(of_paper(paper, cell, metric) or ("", "")))
                writer.writerow([*cell.instance, metric, cell.method, cell.label, *numbers])


def panels(count: int):
    """A figure with `count` panels, at most three in a row."""
    from matplotlib.figure import Figure

    across = min(count, 3)
    down = math.ceil(count / across)
    figure = Figure(figsize=(4.2 * across, 3.1 * down))
    axes = figure.subplots(down, across, squeeze=False)
    for axis in axes.flat[count:]:
        axis.axis("off")
    return figure, axes.flat


def in_colour(cells: list[Cell], metric: str, last: float | None) -> list[str]:
    """The columns to draw in colour: all if there are few, else ComaDICE and the best others by their mean rank."""
    columns = list(dict.fromkeys(cell.column for cell in cells))
    if len(columns) <= COLOURED + 1:
        return columns
    ranks = defaultdict(list)
    for instance in {cell.instance for cell in cells}:
        here = sorted((cell for cell in cells if cell.instance == instance), key=lambda c: -score(c, metric, last)[0])
        for place, cell in enumerate(here):
            ranks[cell.column].append(place / len(here))
    order = sorted(columns, key=lambda column: (column != "comadice", sum(ranks[column]) / len(ranks[column])))
    return [column for column in columns if column in order[:COLOURED]]


def draw_curves(cells: list[Cell], metric: str, last: float | None, path: Path):
    """Figures 1 and 4 to 8: mean over seeds and its standard error at every evaluation, one panel per instance.

    With many methods a few are in colour (in_colour). The others are grey dashes without a band.
    """
    from matplotlib.ticker import EngFormatter

    instances = sorted({cell.instance for cell in cells})
    figure, axes = panels(len(instances))
    columns, coloured = list(dict.fromkeys(cell.column for cell in cells)), in_colour(cells, metric, last)
    color = {column: f"C{i % 10}" for i, column in enumerate(coloured)}
    dashes = {column: DASHES[i % len(DASHES)] for i, column in enumerate(c for c in columns if c not in color)}
    for axis, instance in zip(axes, instances):
        for cell in (cell for cell in cells if cell.instance == instance):
            steps, label = cell.runs[0].steps, scores.escape(cell.column)
            points = [mean_std(list(values)) for values in zip(*(run.curves[metric] for run in cell.runs))]
            mean, error = zip(*((m, s / math.sqrt(len(cell.runs))) for m, s in points))
            if cell.column not in color:
                axis.plot(steps, mean, label=label, color="0.6", linestyle=dashes[cell.column], linewidth=1, zorder=1)
                continue
            axis.plot(steps, mean, label=label, color=color[cell.column])
            low, high = zip(*((m - e, m + e) for m, e in zip(mean, error)))
            axis.fill_between(steps, low, high, alpha=0.2, color=color[cell.column], linewidth=0)
        if metric == "return":
            axis.axhline(instance[4], color="black", linestyle=":", linewidth=1, label="behaviour data")
        else:
            axis.set_ylim(0, 100)
        axis.set(title=title(instance, instances), xlabel="gradient steps of the policy", ylabel=AXIS[metric])
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    # one legend below all panels, since in a panel it would hide curves
    lines = {line.get_label(): line for axis in figure.axes for line in axis.get_lines()}
    figure.tight_layout()
    several = max(len(cell.runs) for cell in cells) > 1
    said = "mean over seeds; bands: ± standard error of the mean" if several else "one seed"
    figure.legend(
        lines.values(), lines.keys(), loc="upper center", bbox_to_anchor=(0.5, 0), ncols=min(4, 2 * len(instances)),
        fontsize=8, title=said, title_fontsize=8,
    )  # fmt: skip
    figure.savefig(path, dpi=150, bbox_inches="tight")


def series(cells: list[Cell], key: str) -> list[list[Cell]]:
    """Groups of two or more of ComaDICE's cells of one instance that differ only in `key`."""
    groups = defaultdict(list)
    for cell in cells:
        if cell.method == "comadice" and key in dict(cell.setting):
            groups[tuple((k, v) for k, v in cell.setting if k != key)].append(cell)
    return [group for group in groups.values() if len(group) > 1]


def draw_ablation(cells: list[Cell], key: str, metric: str, last: float | None, paper: dict, path: Path) -> bool:
    """Figures 2, 9 and 10: the score at each value of `key`, one panel per instance. False if `key` never varies."""
    instances = sorted({cell.instance for cell in cells})
    charts = [(instance, group) for instance in instances
              for group in series([cell for cell in cells if cell.instance == instance], key)]
    if not charts:
        return False
    figure, axes = panels(len(charts))
    for axis, (instance, group) in zip(axes, charts):
        names = [dict(cell.setting)[key] for cell in group]
        mean, std = zip(*(score(cell, metric, last) for cell in group))
        axis.bar(names, mean, yerr=std, color="C0", capsize=3, label="here, ± standard deviation over seeds")
        numbers = [
            (name, *map(float, number)) for name, cell in zip(names, group) if (number := of_paper(paper, cell, metric))
        ]
        if numbers:
            x, m, s = zip(*numbers)
            axis.errorbar(x, m, yerr=s, fmt="o", color="C1", capsize=3, label="the paper, on its data, likewise")
        others = " ".join(f"{k}={v}" for k, v in group[0].setting if k != key)
        name = scores.escape(f"{title(instance, instances)} {others}".strip())
        axis.set(title=name, xlabel=ABLATIONS[key], ylabel=AXIS[metric])
        if metric == "winrate":
            axis.set_ylim(0, 100)
        else:
            axis.margins(y=0.25)  # room for the legend above the bars
        axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    return True


def is_report(folder: Path) -> bool:
    """Whether a folder holds a report and nothing else, so that a new report may replace it."""
    return (folder / "report.md").is_file() and all(REPORT_FILE.fullmatch(path.name) for path in folder.iterdir())


def write_report(cells: list[Cell], left_out: list[tuple[Path, str]], last: float | None, out: Path) -> list[str]:
    """Writes all files into `out` and returns their names."""
    paper, lines, names = paper_numbers(), [], ["report.md", "report.csv"]
    for env in dict.fromkeys(cell.instance[0] for cell in cells):
        family = [cell for cell in cells if cell.instance[0] == env]
        engines = sorted({cell.instance[3] for cell in family})
        for metric in ("return", "winrate"):
            measured = [cell for cell in family if metric in cell.runs[0].curves]
            if not measured:
                continue
            unit = " (% of battles won)" if metric == "winrate" else ""
            lines += [
                f"## {env}: {metric}{unit}",
                "",
                f"Mean ± standard deviation over seeds, played in {', '.join(engines)}.",
                "",
            ]
            lines += [*table(measured, metric, last, paper), ""]
            names.append(f"curves_{env}_{metric}.png")
            draw_curves(measured, metric, last, out / names[-1])
            for key in ABLATIONS:
                name = f"ablation_{key}_{env}_{metric}.png"
                if draw_ablation(measured, key, metric, last, paper, out / name):
                    names.append(name)
    every = all_scores(cells, last)
    scores.write_seeds(every, out / "seeds.csv")
    whole, incomplete = scores.complete(every)
    names += ["seeds.csv", *scores.write_exchange(whole, out)]
    together, not_compared = scores.groups(every)
    if together:
        lines += scores.section(together)
        names += ["intervals.png", "profiles.png"]
        scores.draw_intervals(together, out / "intervals.png")
        scores.draw_profiles(together, out / "profiles.png")
    notes = missing_seeds(cells) + [f"left out {path}: {why}" for path, why in left_out] + not_compared
    if incomplete:
        notes.append(f"not in the files for marl-eval, since not every method has them: {', '.join(incomplete)}")
    lines += ["## Missing and left out", "", *(f"- {note}" for note in notes or ["nothing"])]
    (out / "report.md").write_text("\n".join(lines) + "\n")
    write_csv(cells, last, paper, out / "report.csv")
    return names


def publish(cells: list[Cell], left_out: list[tuple[Path, str]], last: float | None, out: Path):
    """Writes and prints a report. It replaces an older report in `out` as a whole. If writing fails, that one stays."""
    if out.exists() and not is_report(out):
        raise BadInput(f"{out} exists and is not a report, or holds other files too: give another --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            partial = Path(folder, "new")
            partial.mkdir()
            names = write_report(cells, left_out, last, partial)
            old = Path(folder, "old")
            try:
                if out.exists():
                    out.rename(old)
                partial.rename(out)
            except BaseException:
                if old.exists() and not out.exists():
                    old.rename(out)
                raise
    except (OSError, UnicodeEncodeError) as error:
        raise BadInput(f"can't write the report to {out}: {error}") from None
    print((out / "report.md").read_text())
    print(f"written: {', '.join(str(out / name) for name in names)}")


def main(args: Args):
    root = Path(args.runs)
    if not root.is_dir():
        raise BadInput(f"no folder at {root}")
    if args.last is not None and not 0 < args.last <= 1:
        raise BadInput(f"--last is {args.last}: give a share of the evaluations, above 0 and at most 1")
    out = Path(args.out) if args.out else root / "report"
    if root.resolve().is_relative_to(out.resolve()):
        raise BadInput(f"--out {out} holds the runs: give another folder")
    runs, left_out = find_runs(root, [out])
    if not runs:
        reasons = "".join(f"; {path}: {why}" for path, why in left_out[:3])
        raise BadInput(f"no finished run below {root}{reasons}")
    publish(make_cells(runs), left_out, args.last, out)


# ---------------------------------------------------------------- at the end of a training script


def plot_curves(curves: dict[str, list[list[dict]]], dataset_return: float, title: str, path: Path):
    """Learning curves: for each method the mean return over seeds, with its standard error as a band.

    Each curve shows the steps at which all of its seeds were evaluated.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4))
    axis = figure.subplots()
    for name, seeds in curves.items():
        seeds = [{row["step"]: row["return"] for row in metrics if row.get("return") is not None} for metrics in seeds]
        steps = sorted(set.intersection(*map(set, seeds)))
        returns = torch.tensor([[at_step[step] for step in steps] for at_step in seeds])
        mean = returns.mean(0)
        axis.plot(steps, mean, label=name)
        if len(seeds) > 1:
            error = returns.std(0) / math.sqrt(len(seeds))
            axis.fill_between(steps, mean - error, mean + error, alpha=0.2)
    axis.axhline(dataset_return, color="grey", linestyle="--", label="behaviour data")
    several = max(len(seeds) for seeds in curves.values()) > 1
    said = "return: mean over seeds, bands: ± standard error" if several else "return"
    axis.set(xlabel="gradient steps of the policy", ylabel=said, title=title)
    axis.legend()
    figure.tight_layout()
    write_figure(path, figure, 150, shared=True)  # other seeds may be trained by other processes


def report(curves: dict[str, list[list[dict]]], card: dict, args, picture: str):
    """Prints each method's return beside the data's, and draws the learning curves into the folder of the runs.

    A seed's return is the mean over its last evaluations (support.runs.last_evaluations).
    """
    evaluated = {name: [last_evaluations(metrics) for metrics in seeds] for name, seeds in curves.items()}
    counts = {len(rows) for seeds in evaluated.values() for rows in seeds}
    said = f"mean of the last {max(counts)} evaluations, ± standard deviation over seeds" if max(counts) else ""
    simulator = card.get("engine") if 0 in counts else engine(args.env)  # what the policies were played in
    print(f"\n{args.env} {args.task} {args.quality}, {args.steps:,} steps, seeds {args.seeds}, {simulator}")
    print(f"{'':<24}{'return':>12}   {said}")
    print(f"{'behaviour data':<24}{card['return_mean']:>12.2f} ± {card['return_std']:.2f} (over episodes)")
    if 0 in counts:
        print("not all policies were played, so no results are shown; comadice_eval.py --run RUN plays a run's policy")
        return
    for name, seeds in evaluated.items():
        mean = lambda rows, key: sum(row[key] for row in rows) / len(rows)
        returns = torch.tensor([mean(rows, "return") for rows in seeds])
        spread = f" ± {returns.std():.2f}" if len(seeds) > 1 else ""
        each = f"   seeds: {' '.join(f'{x:.4g}' for x in returns.tolist())}" if len(seeds) > 1 else ""
        battles = seeds[0][0]["winrate"] is not None
        wins = f"{100 * sum(mean(rows, 'winrate') for rows in seeds) / len(seeds):.1f}% won" if battles else ""
        print(f"{name:<24}{returns.mean():>12.2f}{spread:<10}{wins}{each}")
    path = Path(args.out, args.env, args.task, args.quality, picture)
    plot_curves(curves, card["return_mean"], f"{args.task} {args.quality}", path)
    print(f"learning curve: {path}")
