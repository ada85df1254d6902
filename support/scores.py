"""The parts of a report that cover all instances: seeds.csv, the section "All instances together", its two figures, and
the scores in the format of Gorsane et al. 2022 for their tools.

Methods are compared on the instances that all of them have, and only at equal budgets: steps, evaluations, episodes.

A win rate is compared as it is. A return is divided by the mean return of its dataset: 1 is as good as what was
recorded. This needs no other method and no expert, so a method's number does not change when another one is added. It
can't be done if the data's mean return is not positive. If it is near 0, dividing by it makes an instance's scores so
large that they decide the average alone. So an instance is left out, and named, if its data's mean return is less than
SMALL times their standard deviation.
"""

import csv
import json
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.statistics import DRAWS, interval, iqm, probability_of_improvement, profile

YARDSTICKS = ("bc", "omiga")  # columns that all others are compared with
MARL_EVAL = {"return": ("return", 1.0), "winrate": ("win_rate", 0.01)}  # its name of a metric, and its unit
SMALL = 0.1  # in standard deviations: a mean return below it can't be divided by
UNIT = {"return": "return / mean return of the data", "winrate": "battles won (%)"}


class Score(NamedTuple):
    """One seed's score on one instance."""

    instance: tuple  # env, task, quality, engine, the dataset's mean return
    metric: str  # return or winrate, in percent
    column: str  # method and setting
    seed: int
    score: float
    budget: tuple  # steps, evaluations, episodes of each
    steps: list[int]
    curve: list[float]  # the metric at each of these steps
    data_std: float  # of the dataset's returns

    @property
    def normalised(self) -> float | None:
        """The score in UNIT. None if the data's mean return is not positive, or near 0."""
        if self.metric == "winrate":
            return self.score
        mean = self.instance[4]
        return self.score / mean if mean > 0 and mean >= SMALL * self.data_std else None


def write_seeds(scores: list[Score], path: Path):
    """Every seed's score, a row each."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["env", "task", "quality", "engine", "data_return", "metric", "method", "seed", "score",
                         "normalised", "steps", "evals", "eval_episodes"])  # fmt: skip
        for s in sorted(scores, key=lambda s: (s.instance, s.metric, s.column, s.budget, s.seed)):
            normalised = "" if s.normalised is None else s.normalised
            writer.writerow([*s.instance, s.metric, s.column, s.seed, s.score, normalised, *s.budget])


# ---------------------------------------------------------------- all instances together


class Group(NamedTuple):
    """Methods that can be compared: the same instances, the same budget."""

    env: str
    metric: str
    budget: tuple
    instances: list[tuple]
    columns: dict[str, list[np.ndarray]]  # column -> for each instance the array of its seeds' scores
    notes: list[str]


def said(budget: tuple) -> str:
    """A budget in words."""
    steps, evals, episodes = budget
    return f"{steps:,} steps per stage, {evals} evaluations of {episodes} episodes"


def groups(scores: list[Score]) -> tuple[list[Group], list[str]]:
    """A group for each env, metric and budget with two methods or more, if all of them have an instance in common.

    If they have none, a line says so.
    """
    cells = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for s in scores:
        cells[s.instance[0], s.metric, s.budget][s.column][s.instance].append(s.normalised)
    found, nothing_shared = [], []
    for (env, metric, budget), columns in cells.items():
        every = sorted({instance for own in columns.values() for instance in own})
        usable = [i for i in every if not any(None in own.get(i, ()) for own in columns.values())]
        shared = [instance for instance in usable if all(instance in own for own in columns.values())]
        if len(columns) < 2:
            continue
        if not shared:
            why = f"no instance has runs of them all and a mean return of the data of at least {SMALL:g} deviations"
            nothing_shared.append(f"{env} {metric}, {said(budget)}: {', '.join(columns)} are not compared, since {why}")
            continue
        notes = []
        if len(usable) < len(every):
            names = ", ".join(" ".join(i[1:3]) for i in every if i not in usable)
            notes.append(f"left out, the data's mean return is below {SMALL:g} of its standard deviation: {names}")
        if len(shared) < len(usable):
            names = ", ".join(" ".join(i[1:3]) for i in usable if i not in shared)
            notes.append(f"left out, not every method has runs: {names}")
        arrays = {column: [np.array(own[instance]) for instance in shared] for column, own in columns.items()}
        counts = sorted({len(task) for tasks in arrays.values() for task in tasks})
        if len(counts) > 1:
            notes.append(f"cells have {counts[0]} to {counts[-1]} seeds; those with more seeds count more in the mean")
        if counts[0] == 1:
            notes.append("a cell with one seed adds nothing to the width of an interval")
        found.append(Group(env, metric, budget, shared, arrays, notes))
    return found, nothing_shared


def count(group: Group) -> str:
    return f"{len(group.instances)} instance{'s' * (len(group.instances) > 1)}"


def between(statistic, *methods) -> str:
    """A statistic with its interval, as text."""
    value, (low, high) = statistic(*methods), interval(statistic, *methods)
    digits = 1 if max(abs(low), abs(high)) >= 10 else 2
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def section(found: list[Group]) -> list[str]:
    """Lines of Markdown."""
    lines = [
        "## All instances together",
        "",
        "The interquartile mean of all seeds' scores on all instances, and the probability that a run is better than",
        "one of another method on the same instance (0.5: equally good). In brackets 95% intervals, by a bootstrap of",
        f"the seeds within each instance ({DRAWS:,} draws). Returns are divided by the mean return of the data, win",
        "rates are in percent.",
        "",
    ]
    if len({group.budget for group in found}) > 1:
        lines += ["There are runs of several budgets. Each has a table of its own.", ""]
    for group in found:
        names = [name for name in YARDSTICKS if name in group.columns]
        lines += [f"**{group.env}, {UNIT[group.metric]}**: {count(group)}, {said(group.budget)}.", ""]
        lines += ["| method | interquartile mean |" + "".join(f" better than {name} |" for name in names)]
        lines += ["| --- | --- |" + " --- |" * len(names)]
        for column, own in group.columns.items():
            words = [f"| {column} | {between(iqm, own)} |"]
            for name in names:
                text = "" if name == column else between(probability_of_improvement, own, group.columns[name])
                words.append(f" {text} |")
            lines.append("".join(words))
        lines += ["", *(f"- {note}" for note in group.notes), ""] if group.notes else [""]
    return lines


def panel_title(group: Group) -> str:
    return f"{group.env}, {count(group)}\n{said(group.budget)}"


def escape(text: str) -> str:
    return text.replace("$", r"\$")  # matplotlib reads $ as the start of a formula


def draw_intervals(found: list[Group], path: Path):
    """The interquartile mean of each method and its interval, one panel per group."""
    from matplotlib.figure import Figure

    rows = max(len(group.columns) for group in found)
    figure = Figure(figsize=(4.6 * len(found), 1.2 + 0.32 * rows), layout="constrained")
    for axis, group in zip(figure.subplots(1, len(found), squeeze=False).flat, found):
        for i, own in enumerate(group.columns.values()):
            low, high = interval(iqm, own)
            axis.plot([low, high], [i, i], color="C0", linewidth=5, alpha=0.35, solid_capstyle="butt")
            axis.plot([iqm(own)], [i], "o", color="C0", markersize=5)
        axis.set_yticks(range(len(group.columns)), [escape(column) for column in group.columns], fontsize=8)
        axis.set_ylim(len(group.columns) - 0.5, -0.5)
        axis.grid(axis="x", alpha=0.3)
        axis.set_xlabel(f"{UNIT[group.metric]}\ninterquartile mean, 95% interval", fontsize=8)
        axis.set_title(panel_title(group), fontsize=8)
    figure.savefig(path, dpi=150)


def draw_profiles(found: list[Group], path: Path):
    """Which share of a method's runs scores more than x, one panel per group. Only ComaDICE's interval is shaded."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(found), 4.4), layout="constrained")
    for axis, group in zip(figure.subplots(1, len(found), squeeze=False).flat, found):
        pooled = np.concatenate([task for own in group.columns.values() for task in own])
        low, high = min(0.0, pooled.min()), pooled.max() * 1.02
        taus = np.linspace(low, max(high, low + 1e-6), 201)
        for i, (column, own) in enumerate(group.columns.items()):
            width = 2.2 if column == "comadice" else 1.2
            axis.plot(taus, profile(own, taus), label=escape(column), color=f"C{i % 10}", linewidth=width)
            if column == "comadice":
                band = interval(lambda drawn, taus=taus: profile(drawn, taus), own, draws=1000)
                axis.fill_between(taus, *band, color=f"C{i % 10}", alpha=0.2, linewidth=0)
        axis.set(ylim=(0, 1.02), ylabel="share of runs that score more")
        shaded = "\nshaded: 95% interval" if "comadice" in group.columns else ""
        axis.set_xlabel(UNIT[group.metric] + shaded, fontsize=8)
        axis.set_title(panel_title(group), fontsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=150)


# ---------------------------------------------------------------- for other tools


def complete(scores: list[Score]) -> tuple[list[Score], list[str]]:
    """The scores of seeds and instances that all methods have, which marl-eval needs, and what is left out."""
    columns, found = defaultdict(set), defaultdict(set)
    for s in scores:
        columns[s.instance[0], s.budget].add(s.column)
        found[s.instance, s.budget, s.seed].add(s.column)
    kept, left_out = [], set()
    for s in scores:
        if found[s.instance, s.budget, s.seed] == columns[s.instance[0], s.budget]:
            kept.append(s)
        else:
            left_out.add(f"{' '.join(s.instance[:3])} seed {s.seed}")
    return kept, sorted(left_out)


def exchange(scores: list[Score]) -> dict[tuple, dict]:
    """Budget -> the scores as marl-eval reads them: env, task, algorithm, run, step_1 and so on, absolute_metrics.

    marl-eval needs the same steps in all runs, so each budget has its own. An evaluation is one number, its mean over
    episodes, and win rates are shares. absolute_metrics, which it expects last, has the seed's score.
    """
    alike = defaultdict(set)
    for s in scores:
        alike[s.instance[:3]].add(s.instance)

    def run_of(s: Score) -> dict:
        task = "_".join(s.instance[1:3])
        if len(alike[s.instance[:3]]) > 1:
            task += f"_{s.instance[3]}_{s.instance[4]:g}"
        node = found[s.budget]
        for key in (s.instance[0], task.lower(), s.column.lower(), f"seed_{s.seed}"):
            node = node.setdefault(key, {})
        return node

    found = defaultdict(dict)
    for s in scores:
        name, unit = MARL_EVAL[s.metric]
        for i, (step, value) in enumerate(zip(s.steps, s.curve), 1):
            run_of(s).setdefault(f"step_{i}", {"step_count": step})[name] = [unit * value]
    for s in scores:
        name, unit = MARL_EVAL[s.metric]
        run_of(s).setdefault("absolute_metrics", {})[name] = [unit * s.score]
    return found


def write_exchange(scores: list[Score], out: Path) -> list[str]:
    """Writes marl_eval.json, or with several budgets one file for each. Returns the files' names."""
    found, names = exchange(scores), []
    for budget, content in sorted(found.items()):
        names.append("marl_eval.json" if len(found) == 1 else f"marl_eval_{'_'.join(map(str, budget))}.json")
        (out / names[-1]).write_text(json.dumps(content, indent=1) + "\n")
    return names
