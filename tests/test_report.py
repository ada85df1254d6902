"""The report: means over known numbers, what it leaves out and says so, and the paper's tables against each other."""

import csv
import importlib.metadata
import json
import math
import shutil
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure

import comadice_bc
import comadice_train
import support.report
from environments.checks import BadInput
from support.presets import resolve

INSTANCE = {"env": "mamujoco", "task": "hopper", "quality": "medium-replay"}


def make_run(
    root,
    algo="comadice",
    seed=0,
    returns=(1.0,),
    winrates=None,
    engine="MuJoCo",
    data_return=234.5,
    data_std=100.0,
    steps=100,
    **config,
) -> Path:
    """A finished run directory with these evaluations."""
    name = INSTANCE | {k: config.pop(k) for k in tuple(config) if k in INSTANCE}
    run = Path(root, *name.values(), algo, f"seed{seed}")
    run.mkdir(parents=True)
    arguments = (
        name
        | {
            "algo": algo,
            "seed": seed,
            "steps": steps,
            "evals": len(returns),
            "out": str(root),
            "seeds": [seed],
            "data": None,
        }
        | config
    )
    (run / "config.json").write_text(json.dumps(arguments))
    with open(run / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["stage", "step", "return", "winrate"])
        writer.writeheader()
        writer.writerow({"stage": "critics", "step": 1})
        for i, value in enumerate(returns):
            won = "" if winrates is None else winrates[i]
            writer.writerow(
                {"stage": "policy", "step": steps * (i + 1) // len(returns), "return": value, "winrate": won}
            )
    summary = {
        "return": returns[-1],
        "winrate": winrates and winrates[-1],
        "engine": engine,
        "dataset_return": data_return,
        "dataset_std": data_std,
    }
    (run / "summary.json").write_text(json.dumps(summary))
    return run


def report(root, **flags) -> tuple[str, list[dict]]:
    """report.md, and the rows of report.csv."""
    support.report.main(support.report.Args(runs=str(root), **flags))
    with open(root / "report/report.csv", newline="") as file:
        return (root / "report/report.md").read_text(), list(csv.DictReader(file))


def test_means_and_deviations_over_seeds(tmp_path):
    """A seed's score is its mean over the last share of evaluations.

    The scores are 30, 50 and 100: mean 60, sample standard deviation sqrt(2600 / 2).
    """
    for seed, last in enumerate((30.0, 50.0, 100.0)):
        make_run(tmp_path, "comadice", seed, [-1000.0] * 8 + [last - 10, last + 10], alpha=1.0)
        make_run(tmp_path, "bc", seed, [40.0] * 10)
    text, rows = report(tmp_path, last=0.2)
    row = next(row for row in rows if row["method"] == "comadice")
    assert float(row["mean"]) == pytest.approx(60) and float(row["std"]) == pytest.approx(math.sqrt(2600 / 2))
    assert row["seeds"] == "0 1 2" and (row["paper_mean"], row["paper_std"]) == ("906.3", "242.1")  # Table 2
    assert "| hopper medium-replay | 234.5 | 40.0 ± 0.0 | **60.0 ± 36.1** |" in text
    assert "| the paper's | 746.4 | 133.3 ± 53.5 | 906.3 ± 242.1 |" in text  # Tables 3 and 7
    assert text.endswith("## Missing and left out\n\n- nothing\n")
    scores = {}
    for flags in ({"last": 0.1}, {}):  # the last of ten evaluations; what a run is judged by, the last five of ten
        rows = report(tmp_path, **flags)[1]
        scores[len(flags)] = float(next(row for row in rows if row["method"] == "comadice")["mean"])
    assert scores == {1: pytest.approx(70), 0: pytest.approx((3 * -1000 + 2 * 60) / 5)}


def test_a_method_whose_name_has_a_dot(tmp_path):
    """comadice_bc.py --best 0.025 is bc-best2.5."""
    for algo in ("bc-best2.5", "bc-best10", "bc"):
        make_run(tmp_path, algo, returns=[3.0])
    text, rows = report(tmp_path)
    assert [row["method"] for row in rows] == ["bc-best2.5", "bc", "bc-best10"]
    assert text.endswith("## Missing and left out\n\n- nothing\n")


def test_winrates_have_a_table_of_their_own(tmp_path):
    for seed, won in enumerate((0.25, 0.75)):
        make_run(
            tmp_path,
            seed=seed,
            returns=[10.0],
            winrates=[won],
            env="smacv2",
            task="zerg_5_vs_5",
            quality="medium",
            engine="StarCraft II",
        )
        make_run(
            tmp_path,
            seed=seed,
            returns=[1.0],
            winrates=[won],
            env="smax",
            task="zerg_5_vs_5",
            quality="medium",
            engine="SMAX",
        )
    text, rows = report(tmp_path)
    parts = text.split("## ")
    assert [part.splitlines()[0] for part in parts[1:5]] == [
        f"{env}: {m}" for env in ("smacv2", "smax") for m in ("return", "winrate (% of battles won)")
    ]
    assert "**50.0 ± 35.4**" in parts[2] and "31.2 ± 7.7" in parts[2]  # Table 9
    assert "**50.0 ± 35.4**" in parts[4]
    assert "the paper's" not in parts[3] + parts[4]  # another engine than the paper's
    assert {row["paper_mean"] for row in rows if row["env"] == "smax"} == {""}
    assert {path.name for path in (tmp_path / "report").glob("*.png")} == {
        f"curves_{e}_{m}.png" for e in ("smacv2", "smax") for m in ("return", "winrate")
    }


def test_other_arguments_are_never_averaged(tmp_path):
    """alpha 0.1 and 10 are drawn and stand in columns of their own, beside the paper's ablation (Table 12).

    The place of the run makes no difference.
    """
    for alpha in (0.1, 10.0):
        for seed in (0, 1):
            make_run(tmp_path / f"alpha{alpha:g}", seed=seed, returns=[alpha * 10 + seed], alpha=alpha, f="soft_chi2")
    text, rows = report(tmp_path)
    assert [(row["setting"], float(row["mean"]), row["paper_mean"]) for row in rows] == [
        ("alpha=0.1", 1.5, "109.6"),
        ("alpha=10", 100.5, "906.3"),
    ]
    assert "| comadice alpha=0.1 | comadice alpha=10 |" in text
    assert (tmp_path / "report/ablation_alpha_mamujoco_return.png").stat().st_size > 5000
    assert not (tmp_path / "report/ablation_f_mamujoco_return.png").exists()


def test_an_ablation_of_alpha_names_alpha_alone(tmp_path):
    """--episode-alpha grows with a large --alpha by itself. Another value, given by hand, is named."""
    for alpha in (0.1, 1.0, 11.33, 30.0, 100.0):
        args = resolve(comadice_train.Args(alpha=alpha), 2.266, 108.4)
        make_run(tmp_path / f"alpha{alpha:g}", returns=[alpha], alpha=args.alpha, episode_alpha=args.episode_alpha)
    _, rows = report(tmp_path)
    assert [row["setting"] for row in rows] == [f"alpha={alpha}" for alpha in ("0.1", "1", "11.33", "30", "100")]
    make_run(tmp_path / "other", returns=[5.0], alpha=5.0, episode_alpha=0.0)
    _, rows = report(tmp_path)
    assert "alpha=5 episode_alpha=0" in [row["setting"] for row in rows]


def test_episode_alpha_follows_from_neighbours_too(tmp_path):
    """Two ways of preferring episodes on two datasets are two columns."""
    for task, sizes in (("hopper", (2.0, 108.4, 40.0)), ("ant", (1.0, 29.5, 17.0))):
        for neighbours in (False, True):
            args = resolve(comadice_train.Args(neighbours=neighbours), *sizes)
            flags = {name: getattr(args, name) for name in ("neighbours", "alpha", "episode_alpha")}
            make_run(tmp_path / f"{task}-{neighbours}", returns=[1.0], task=task, **flags)
    _, rows = report(tmp_path)
    assert {row["setting"] for row in rows} == {"neighbours=true", "neighbours=false"}


def test_a_flag_that_is_gone_does_not_split_a_column(tmp_path):
    """--residual had no effect on w* from the TD form."""
    make_run(tmp_path / "old", seed=0, returns=[1.0], objective="semi", advantage="td", residual=0.3)
    make_run(tmp_path / "new", seed=1, returns=[2.0], objective="semi", advantage="td")
    _, rows = report(tmp_path)
    assert len(rows) == 1, rows


def test_runs_from_before_the_action_scale(tmp_path):
    """A robot's run without --action-scale counts as one with 1. In battles the flag is ignored."""
    make_run(tmp_path / "old", "bc", seed=0, returns=[1.0])
    make_run(tmp_path / "mean", "bc", seed=1, returns=[2.0], action_scale=1.0)
    make_run(tmp_path / "new", "bc", seed=0, returns=[3.0], action_scale=0.85)
    for seed, config in enumerate(({}, {"action_scale": 0.85})):
        make_run(tmp_path / f"battle{seed}", "bc", seed=seed, returns=[1.0], winrates=[0.5], env="smax", **config)
    _, rows = report(tmp_path)
    found = {(row["env"], row["metric"], row["setting"]): row["seeds"] for row in rows}
    assert found == {
        ("mamujoco", "return", "action_scale=0.85"): "0",
        ("mamujoco", "return", "action_scale=1"): "0 1",
        ("smax", "return", "action_scale=(none)"): "0 1",
        ("smax", "winrate", "action_scale=(none)"): "0 1",
    }


def test_runs_evaluated_more_often_are_never_averaged(tmp_path):
    make_run(tmp_path / "a", seed=0, returns=[1.0] * 10)
    make_run(tmp_path / "b", seed=1, returns=[3.0] * 20)
    text, rows = report(tmp_path)
    assert [(row["setting"], float(row["mean"]), row["seeds"]) for row in rows] == [
        ("evals=10", 1.0, "0"),
        ("evals=20", 3.0, "1"),
    ]
    assert "evals=10: no seed 1" in text


def test_other_data_and_engines_are_never_averaged(tmp_path):
    make_run(tmp_path / "a", returns=[1.0])
    make_run(tmp_path / "b", returns=[2.0], data_return=746.4)
    make_run(tmp_path / "c", returns=[3.0], engine="another")
    _, rows = report(tmp_path)
    assert sorted(float(row["mean"]) for row in rows) == [1, 2, 3]


def test_missing_seeds_are_said(tmp_path):
    for seed in (0, 1, 2):
        make_run(tmp_path, "comadice", seed, [1.0])
        if seed != 1:
            make_run(tmp_path, "bc", seed, [1.0])
    text, _ = report(tmp_path)
    assert "- mamujoco hopper medium-replay, bc: no seed 1; its mean is over 2\n" in text and "(2 of 3 seeds)" in text


def damage(run: Path, how: str):
    metrics = run / "metrics.csv"
    if how == "no summary":
        (run / "summary.json").unlink()
    elif how == "only config":
        (run / "summary.json").unlink()
        metrics.unlink()
    elif how == "no rollouts":
        (run / "summary.json").write_text(json.dumps(json.loads((run / "summary.json").read_text()) | {"return": None}))
    elif how == "one rollout":  # it was begun without a simulator, and went on with one
        metrics.write_text(metrics.read_text().replace("5.0", "", 1))
    elif how == "engine":
        (run / "summary.json").write_text(
            json.dumps(json.loads((run / "summary.json").read_text()) | {"engine": "\x1b[31m"})
        )
    elif how == "cut number":
        metrics.write_text(metrics.read_text().rsplit("7.0", 1)[0] + "7")
    elif how == "not json":
        (run / "config.json").write_text("{")
    elif how == "foreign config":
        (run / "config.json").write_text('{"learning_rate": 1}')
    elif how == "no config":
        (run / "config.json").unlink()
    elif how == "cut":
        metrics.write_text(metrics.read_text().rsplit("policy", 1)[0])
    elif how == "nan":
        metrics.write_text(metrics.read_text().replace("7.0", "nan"))
    elif how == "text":
        metrics.write_text(metrics.read_text().replace("7.0", "seven"))
    elif how == "other table":
        metrics.write_text("a,b\n1,2\n")


@pytest.mark.parametrize(
    "how, why",
    [
        ("no summary", "not finished: 100 of 100 steps"),
        ("only config", "not finished: no metrics.csv"),
        ("no rollouts", "not all of its policies were played"),
        ("one rollout", "not all of its policies were played"),
        ("not json", "config.json"),
        ("foreign config", "not that of a run of this project"),
        ("no config", "not a run directory"),
        ("cut", "has 1 evaluations up to step 50"),
        ("cut number", "metrics.csv is cut off"),
        ("engine", "summary.json is not that of a run"),
        ("nan", "can't be a return or winrate"),
        ("text", "damaged"),
        ("other table", "damaged"),
    ],
)
def test_a_run_that_is_left_out_is_named(how, why, tmp_path, capsys):
    for seed in (0, 1):
        make_run(tmp_path, seed=seed, returns=[5.0, 7.0] if seed else [5.0, 6.0])
    damage(tmp_path / "mamujoco/hopper/medium-replay/comadice/seed1", how)
    text, rows = report(tmp_path)
    assert float(rows[0]["mean"]) == 6 and rows[0]["seeds"] == "0"
    line = next(line for line in text.splitlines() if line.startswith("- left out"))
    assert "comadice/seed1: " in line and why in line and line in capsys.readouterr().out


def test_foreign_folders_and_copies(tmp_path):
    run = make_run(tmp_path, returns=[5.0])
    (run.parent.parent / "learning_curve.png").write_bytes(b"")  # lies above runs, and is ours
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("")
    make_run(tmp_path / "copy", returns=[9.0])
    text, rows = report(tmp_path)
    assert len(rows) == 1 and rows[0]["seeds"] == "0"
    assert f"- left out {tmp_path}/notes: not a run directory of this project" in text
    assert text.count("- left out") == 2 and "the same run as" in text
    again, _ = report(tmp_path)  # the report of the first time is no run
    assert again == text


@pytest.mark.parametrize(
    "change",
    [
        {"seed": "1"}, {"seed": True}, {"seed": None}, {"env": ["a"]}, {"algo": {}}, {"task": "../../x"},
        {"algo": ".."}, {"task": "a|b"}, {"quality": ""}, {"steps": 0}, {"steps": "100"}, {"evals": 7},
        {"evals": None}, {"eval_episodes": "../../x"}, {"task": "x" * 65}, {"steps": 10**12, "evals": 10**12},
    ],
)  # fmt: skip
def test_odd_arguments_leave_a_run_out(change, tmp_path):
    make_run(tmp_path, seed=0)
    run = make_run(tmp_path, seed=1)
    (run / "config.json").write_text(json.dumps(json.loads((run / "config.json").read_text()) | change))
    text, rows = report(tmp_path)
    assert [row["seeds"] for row in rows] == ["0"] and f"left out {run}" in text


def test_arguments_that_are_new_or_null_are_told_apart(tmp_path):
    """Four cells: runs from before an argument existed, with null, and with two close numbers.

    They stay apart, whatever their columns are called.
    """
    make_run(tmp_path / "a", returns=[1.0])
    for i, mass in enumerate((None, 0.5, 0.5 + 1e-12)):
        make_run(tmp_path / f"b{i}", returns=[2.0 + i], mass=mass)
    text, rows = report(tmp_path)
    assert sorted(float(row["mean"]) for row in rows) == [1, 2, 3, 4]
    assert all(f"{x}.000 (1 seed)" in text for x in (1, 2, 3, 4))
    assert {row["paper_mean"] for row in rows} == {""}  # which of them would be the paper's?


def test_a_winrate_that_only_one_seed_has(tmp_path):
    make_run(tmp_path, seed=0, returns=[1.0], winrates=[0.5])
    make_run(tmp_path, seed=1, returns=[1.0])
    text, rows = report(tmp_path)
    assert {row["seeds"] for row in rows} == {"0"} and "has a winrate and the other has none" in text


def test_the_report_replaces_only_a_report(tmp_path):
    make_run(tmp_path / "runs", returns=[1.0])
    old = tmp_path / "notes"
    old.mkdir()
    (old / "mine.txt").write_text("x")
    mixed = tmp_path / "docs"
    mixed.mkdir()
    (mixed / "report.md").write_text("x")
    (mixed / "thesis.tex").write_text("x")
    runs = tmp_path / "runs"
    refused = (old, "is not a report"), (mixed, "holds other files too"), (tmp_path, "holds the runs")
    for out, match in (*refused, (runs, "holds the runs")):
        with pytest.raises(BadInput, match=match):
            support.report.main(support.report.Args(runs=str(runs), out=str(out)))
    assert [p.name for p in old.iterdir()] == ["mine.txt"] and (mixed / "thesis.tex").read_text() == "x"
    report(tmp_path / "runs")
    kept = (runs / "report.old", runs / "report.partial")  # copies that a user made
    for folder in kept:
        shutil.copytree(runs / "report", folder)
    stale = tmp_path / "runs/report/ablation_alpha_mamujoco_return.png"
    stale.write_bytes(b"")
    report(tmp_path / "runs")
    assert not stale.exists() and all((folder / "report.md").exists() for folder in kept)
    assert not [path.name for path in runs.iterdir() if path.name.startswith(".")]


def test_a_report_that_is_stopped_leaves_the_old_one(tmp_path, monkeypatch):
    make_run(tmp_path, returns=[1.0])
    report(tmp_path)
    old, rename = (tmp_path / "report/report.md").read_text(), Path.rename

    def stopped(path, target):
        if path.name == "new":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(KeyboardInterrupt):
        support.report.main(support.report.Args(runs=str(tmp_path)))
    assert (tmp_path / "report/report.md").read_text() == old


@pytest.mark.parametrize(
    "flags, match",
    [({"runs": "nowhere"}, "no folder at nowhere"), ({"last": 0.0}, "--last"), ({}, "no finished run below")],
)
def test_bad_input(flags, match, tmp_path):
    with pytest.raises(BadInput, match=match):
        support.report.main(support.report.Args(**{"runs": str(tmp_path)} | flags))
    assert not list(tmp_path.iterdir())


def test_runs_of_a_training_script(hopper_data, tmp_path):
    """What comadice_bc.py writes is read: the report's score is that of summary.json."""
    args = comadice_bc.Args(
        data=str(hopper_data),
        out=str(tmp_path),
        steps=4,
        evals=4,
        eval_episodes=2,
        hidden=16,
        batch_size=8,
        seeds=[0, 1],
        device="cpu",
    )
    comadice_bc.main(args)
    _, rows = report(tmp_path)
    returns = [
        json.loads((tmp_path / f"mamujoco/hopper/random/bc/seed{seed}/summary.json").read_text())["return"]
        for seed in (0, 1)
    ]
    assert [row["method"] for row in rows] == ["bc"]
    assert float(rows[0]["mean"]) == pytest.approx(sum(returns) / 2, rel=1e-6)


# ---------------------------------------------------------------- the paper's numbers


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that are saved from now on."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (figures.append(self), save(self, *args, **kwargs))
    )
    return figures


def curves_of(folder: Path, metric: str, drawn: list[Figure]):
    """The panel and the legend that draw_curves makes of the runs below a folder."""
    runs, left_out = support.report.find_runs(folder, [folder / "report"])
    assert left_out == []
    support.report.draw_curves(support.report.make_cells(runs), metric, None, folder / "curves.png")
    return drawn[-1].axes[0], drawn[-1].legends[0]


def test_bands_are_the_standard_error_and_say_so(tmp_path, drawn):
    returns = np.array([[1.0, 4.0], [2.0, 8.0], [6.0, 3.0]])
    for seed, own in enumerate(returns):
        make_run(tmp_path, seed=seed, returns=own.tolist())
    axis, legend = curves_of(tmp_path, "return", drawn)
    error = returns.std(0, ddof=1) / np.sqrt(3)
    corners = axis.collections[0].get_paths()[0].vertices
    for step, low, high in zip((50, 100), returns.mean(0) - error, returns.mean(0) + error):
        at = corners[corners[:, 0] == step, 1]
        assert (at.min(), at.max()) == (pytest.approx(low), pytest.approx(high))
    assert legend.get_title().get_text() == "mean over seeds; bands: ± standard error of the mean"


def test_winrates_are_drawn_from_0_to_100(tmp_path, drawn):
    make_run(
        tmp_path,
        returns=[1.0, 2.0],
        winrates=[0.4, 0.5],
        env="smax",
        task="zerg_5_vs_5",
        quality="medium",
        engine="SMAX",
    )
    axis, legend = curves_of(tmp_path, "winrate", drawn)
    assert axis.get_ylim() == (0, 100) and legend.get_title().get_text() == "one seed"
    assert axis.get_lines()[0].get_ydata().tolist() == [40, 50]


@pytest.mark.parametrize(
    "methods, coloured",
    [
        ({"bc": 1, "omiga": 5, "comadice": 2, "icq": 3, "cql": 4}, {"bc", "omiga", "comadice", "icq", "cql"}),
        (
            {"bc": 3, "bcq": 2, "cql": 7, "icq": 6, "omar": 5, "omiga": 4, "comadice": 1},
            {"comadice", "cql", "icq", "omar"},
        ),
    ],
)
def test_of_many_methods_the_best_few_are_in_colour(methods, coloured, tmp_path, drawn):
    """ComaDICE always is, as here where it is the worst."""
    for algo, value in methods.items():
        make_run(tmp_path, algo, returns=[0.0, float(value)])
    axis, _ = curves_of(tmp_path, "return", drawn)
    lines = {line.get_label(): line for line in axis.get_lines() if line.get_label() != "behaviour data"}
    assert lines.keys() == methods.keys()
    assert {name for name, line in lines.items() if line.get_color() != "0.6"} == coloured
    assert len({(line.get_color(), str(line._dash_pattern)) for line in lines.values()}) == len(methods), (
        "no two look alike"
    )


def test_training_ends_with_what_all_seeds_have(tmp_path, capsys):
    """A simulator that was installed halfway: seed 1 was evaluated less often, seed 2 never."""
    args = SimpleNamespace(env="mamujoco", task="hopper", quality="demo", steps=4, seeds=[0, 1], out=str(tmp_path))
    row = lambda step, value: {"stage": "policy", "step": step, "return": value, "winrate": None}
    seeds = [[row(2, 1.0), row(4, 3.0)], [{"stage": "policy", "step": 2}, row(4, 5.0)]]
    (tmp_path / "mamujoco/hopper/demo").mkdir(parents=True)
    card = {"engine": "x", "return_mean": 0.0, "return_std": 1.0}
    support.report.report({"BC": seeds}, card, args, "curve.png")
    printed = capsys.readouterr().out
    assert f"{'BC':<24}{'4.00':>12} ± 1.41" in printed
    # The simulator that played, and not that of the data: converted data say "as the source was recorded".
    assert f"mujoco {importlib.metadata.version('mujoco')}, " in printed and ", x" not in printed
    assert (tmp_path / "mamujoco/hopper/demo/curve.png").exists()
    support.report.report({"BC": [*seeds, [{"stage": "policy", "step": 2}]]}, card, args, "other.png")
    said = "not all policies were played, so no results are shown; comadice_eval.py --run RUN"
    assert said in capsys.readouterr().out
    assert not (tmp_path / "mamujoco/hopper/demo/other.png").exists()


def test_what_loggers_left_in_a_run_is_no_run(tmp_path):
    run = make_run(tmp_path)
    for folder in ("csv/scalars/policy", "tensorboard", "wandb/offline-run-1/files"):
        (run / folder).mkdir(parents=True)
        (run / folder / "config.json").write_text("{}")
    runs, left_out = support.report.find_runs(tmp_path, [tmp_path / "report"])
    assert [found.path for found in runs] == [run] and left_out == []


def paper() -> dict[int, dict]:
    """table -> {(env, task, quality, metric, method, setting): (mean, std)}."""
    tables = defaultdict(dict)
    with open(support.report.PAPER, newline="") as file:
        for row in csv.DictReader(file):
            tables[int(row["table"])][
                tuple(row[k] for k in ("env", "task", "quality", "metric", "method", "setting"))
            ] = (row["mean"], row["std"])
    return tables


def test_paper_tables_agree_with_each_other():
    """The paper prints ComaDICE's numbers up to four times; Table 1 again as 9, and Table 2 within 7."""
    tables = paper()
    assert tables[1] == tables[9] and tables[2].items() <= tables[7].items()
    for main, *ablations in ((5, 10, 15, 20), (6, 11, 16, 21), (7, 12, 22), (8, 13, 18, 23), (9, 14, 19, 24)):
        for ablation in ablations:
            own = {k for k in tables[ablation] if k[-1] in ("alpha=10", "f=soft_chi2", "mixer_layers=1")}
            assert len(own) >= 11
            for key in own:
                assert tables[ablation][key] == tables[main][(*key[:-1], "")], key


def test_paper_tables_cover_the_39_instances():
    """Two tables lost cells on their way into text: 17 all of them, and 10 three of 2c_vs_64zg."""
    tables = paper()
    for number in (5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 18, 19, 20, 21, 22, 23, 24):
        methods = 7 if number < 10 else 5 if number < 15 else 3 if number < 20 else 2
        instances = {key[:3] for key in tables[number]}
        assert len(instances) == (15 if ("smacv2", "zerg_5_vs_5", "medium") in instances else 12), number
        assert len(tables[number]) == methods * len(instances), number
    assert 17 not in tables and len(tables[10]) == 57
