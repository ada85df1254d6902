"""The benchmark as one command: which runs it has, how far they are, and that they have the scripts' bits."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest
import torch
from conftest import ROOT
from test_report import make_run

import comadice_bc
import comadice_train
from benchmarks import cluster, estimate, grid, paper
from benchmarks.disturb import same
from benchmarks.progress import Board, duration, show
from environments.checks import BadInput
from support.runs import load_checkpoint

DEMO = str(ROOT / "data/mamujoco/hopper/demo")
SMALL = {"hidden": 8, "batch_size": 16}
WORDS = "--steps 30 --evals 2 --eval-episodes 1 -- --hidden 8 --batch-size 16".split()
BUDGET = {"steps": 30, "evals": 2, "eval_episodes": 1}
METHODS = paper.Args().methods


def cells_of(
    out, only=(), data=(), methods=METHODS, seeds=(0, 1, 2, 3, 4), ablations=(), extra=None, budget=BUDGET
):
    return grid.make_cells(
        str(out),
        grid.choose_instances(list(only), list(data)),
        list(methods),
        list(seeds),
        list(ablations),
        budget,
        extra or {},
    )


def assert_same_runs(one: Path, other: Path):
    """All runs below two folders are there, finished, and have the same bits and metrics."""
    names = sorted(str(path.parent.relative_to(one)) for path in one.rglob("config.json"))
    assert names and names == sorted(str(path.parent.relative_to(other)) for path in other.rglob("config.json"))
    for name in names:
        assert (one / name / "summary.json").exists() and (other / name / "summary.json").exists(), name
        assert same(load_checkpoint(one / name), load_checkpoint(other / name)), name
        assert (one / name / "metrics.csv").read_bytes() == (other / name / "metrics.csv").read_bytes(), name


# ---------------------------------------------------------------- the plan


def test_the_whole_paper_has_1365_runs(tmp_path):
    """39 instances x 7 methods x 5 seeds (Section C of the paper); the ablations add 5 alphas, 2 f and 1 mixer."""
    cells = cells_of(tmp_path)
    assert len(cells) == 39 * 7 and sum(len(cell.seeds) for cell in cells) == 1365
    assert Counter(cell.instance[0] for cell in cells) == {"mamujoco": 12 * 7, "smacv1": 12 * 7, "smacv2": 15 * 7}
    more = cells_of(tmp_path, ablations=["alpha", "f", "mixer"])
    assert sum(len(cell.seeds) for cell in more) == 1365 + 39 * 5 * (5 + 2 + 1)
    assert len({cell.path(seed) for cell in more for seed in cell.seeds}) == sum(len(cell.seeds) for cell in more)


def test_the_methods_that_can_be_asked_for_are_those_that_there_are():
    """The list in paper.py is a copy, so that --help does not load torch."""
    assert list(get_args(paper.Method)) == list(grid.METHODS) and paper.Args().methods == list(grid.METHODS)[:-1]


def test_ablations_have_the_values_of_the_papers_tables():
    with open(ROOT / "support/paper_tables.csv") as file:
        settings = {line.split(",")[6] for line in file} - {"", "setting"}
    here = {
        f"{flag}={value:g}" if flag != "f" else f"f={value}"
        for flag, values in grid.ABLATIONS.values()
        for value in values
    }
    assert here | {"f=soft_chi2", "mixer_layers=1"} == settings
    assert (comadice_train.Args().f, comadice_train.Args().mixer_layers) == ("soft_chi2", 1)


def test_choosing_instances(tmp_path):
    assert len(grid.choose_instances(["hopper", "zerg_5_vs_5"], [])) == 5
    assert list(grid.choose_instances(["hopper/expert"], [])) == [("mamujoco", "hopper", "expert")]
    assert list(grid.choose_instances(["smax/zerg_5_vs_5/medium-replay"], [])) == [
        ("smax", "zerg_5_vs_5", "medium-replay")
    ]
    assert grid.choose_instances([], [DEMO]) == {("mamujoco", "hopper", "demo"): str(Path(DEMO).absolute())}
    for only, data, why in (
        (["hoper"], [], "no env, task or quality"),
        ([], [DEMO, DEMO], "are both mamujoco hopper demo"),
        (["../x/y"], [], "--only: env"),
        ([], [str(tmp_path)], "card.json"),
    ):
        with pytest.raises(BadInput, match=why):
            grid.choose_instances(only, data)


def test_flags_that_are_passed_on():
    """A flag goes to the methods that have it."""
    given = grid.split_extra(
        "--hidden 64 --tau=0.01 --no-lr-decay --objective exact".split(), ["bc", "omiga", "comadice"]
    )
    assert given["bc"] == {"hidden": 64, "lr_decay": False}
    assert given["omiga"] == given["bc"] | {"tau": 0.01}
    assert given["comadice"] == given["omiga"] | {"objective": "exact"}
    assert grid.split_extra(["--lr-decay", "True"], ["bc"])["bc"] == {"lr_decay": True}
    for words, why in (
        (["--steps", "5"], "--steps is set by this command"),
        (["--objective", "exact"], "none of bc has"),
        (["5"], "is not one"),
        (["--lr-decay", "false"], "give --lr-decay or --no-lr-decay"),
    ):
        with pytest.raises(BadInput, match=why):
            grid.split_extra(words, ["bc"])


def test_the_plan_is_printed_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(estimate, "seconds_per_run", lambda cells, device: {cell.name: 7200.0 for cell in cells})
    paper.main(paper.Args(plan=True, ablation=["mixer"], out=str(tmp_path / "out")), [])
    said = capsys.readouterr().out
    assert sum(line.endswith("  2.0 h") for line in said.splitlines()) == 1365 + 39 * 5
    assert "1,560 runs, of which 1,560 are to be done" in said and "  main: 1,365 runs, 2,730.0 " in said
    assert "--array=0-1559" in said
    assert "no dataset here for 39 of the instances" in said and not (tmp_path / "out").exists()
    assert "smacv1/" in said.split("note: ")[1] and "26 more can be trained here, but not played" in said


def test_the_plan_of_a_large_batch_is_estimated(tmp_path):
    """More than the transitions of the noise that is otherwise trained on."""
    (cell,) = cells_of(tmp_path, data=[DEMO], methods=["bc"], extra={"bc": {"hidden": 8, "batch_size": 2048}})
    assert estimate.seconds_per_run([cell], "cpu")[cell.name] > 0


def test_a_cell_has_one_setting(tmp_path):
    """Seeds that are added later must have the flags of those before."""
    cells = lambda **extra: cells_of(tmp_path, data=[DEMO], methods=["bc"], extra={"bc": extra})
    grid.save_plan(str(tmp_path), cells(hidden=8))
    before = (tmp_path / "grid/plan.json").read_bytes()
    for extra, now in (({}, "none"), ({"hidden": 16}, "--hidden 16")):
        why = f"main/mamujoco/hopper/demo/bc was planned with other flags .then --hidden 8, now {now}.: give the same"
        with pytest.raises(BadInput, match=why):
            grid.save_plan(str(tmp_path), cells(**extra))
    grid.save_plan(str(tmp_path), cells(hidden=8, workers=2, quiet=True))  # these change no result
    assert (tmp_path / "grid/plan.json").read_bytes() == before


def test_runs_of_unknown_sizes_are_in_the_plan_but_not_in_its_hours(tmp_path, monkeypatch, capsys):
    times = {"hopper": 3600.0, "no_such": None}
    monkeypatch.setattr(
        estimate, "seconds_per_run", lambda cells, device: {cell.name: times[cell.instance[1]] for cell in cells}
    )
    only = ["hopper/expert", "smax/no_such/medium"]
    paper.main(paper.Args(plan=True, only=only, methods=["bc"], seeds=[0, 1], out=str(tmp_path)), [])
    said = capsys.readouterr().out
    assert "4 runs, of which 4 are to be done" in said and "  main: 4 runs, 2.0 " in said
    assert "2 runs (?) are not counted in the hours" in said


def test_the_estimate_grows_with_the_task(tmp_path):
    """Times of real updates: twenty agents take longer than three, and an instance without sizes has none."""
    cells = cells_of(
        tmp_path,
        ["hopper/expert", "smacv2/protoss_20_vs_20", "smax/no_such/medium"],
        methods=["bc"],
        seeds=[0],
        extra={"bc": {"hidden": 32}},
    )
    hopper, protoss, unknown = map(estimate.seconds_per_run(cells, "cpu").get, [cell.name for cell in cells])
    assert 0 < hopper < protoss and unknown is None and not list(tmp_path.iterdir())


def test_the_first_estimate_of_a_process_is_no_smaller(tmp_path):
    """What libraries do once, in the first run, must not be taken off the time of the updates."""
    code = (
        "import sys; from benchmarks import estimate, grid; "
        "cells = grid.make_cells(sys.argv[1], grid.choose_instances(['hopper/expert'], []), ['comadice'], [0], [], "
        "{'steps': 1000, 'evals': 1, 'eval_episodes': 1}, {}); "
        "print(*(estimate.seconds_per_run(cells, 'cpu')[cells[0].name] for _ in range(2)))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True)
    first, again = map(float, done.stdout.split())
    assert again / 3 < first < 3 * again


# ---------------------------------------------------------------- one task, without Ray


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """BC and ComaDICE on the demonstration's data, two seeds each, by their own scripts, one call a seed."""
    out = tmp_path_factory.mktemp("undisturbed")
    for module in (comadice_bc, comadice_train):
        for seed in (0, 1):
            module.main(
                module.Args(data=DEMO, out=str(out / "main"), seeds=[seed], device="cpu", quiet=True, **SMALL, **BUDGET)
            )
    return out


def test_a_job_array_trains_the_plan_run_by_run(undisturbed, tmp_path, capsys):
    """The first run is the template's own command, with the number that Slurm sets. The others run in this process.

    All have the bits of the plain scripts' runs.
    """
    template = (
        (ROOT / "docs/slurm/array.sbatch").read_text().splitlines()[-1].replace("exec srun python", sys.executable)
    )
    line = template.replace(
        '"$@"', f"--data {DEMO} --methods bc comadice --seeds 0 1 --out {tmp_path} {' '.join(WORDS)}"
    )
    done = subprocess.run(
        ["bash", "-euc", line], cwd=ROOT, env=os.environ | {"SLURM_ARRAY_TASK_ID": "0"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert Counter(run.state for run in Board(tmp_path).read()) == {"done": 1, "waiting": 3}
    args = paper.Args(data=[DEMO], methods=["bc", "comadice"], seeds=[0, 1], out=str(tmp_path), **BUDGET)
    for index in range(4):
        paper.main(dataclasses.replace(args, index=index), WORDS[WORDS.index("--") + 1 :])
    assert capsys.readouterr().out.count("it is finished") == 1
    with pytest.raises(BadInput, match="the plan has the runs 0 to 3"):
        paper.main(dataclasses.replace(args, index=4), [])
    assert_same_runs(undisturbed, tmp_path)
    assert Counter(run.state for run in Board(tmp_path).read()) == {"done": 4}
    paper.write_reports(str(tmp_path))
    assert "| hopper demo |" in (tmp_path / "report/report.md").read_text()


@pytest.mark.parametrize("name", ["ray", "array"])
def test_the_templates_are_shell(name):
    assert subprocess.run(["bash", "-n", ROOT / f"docs/slurm/{name}.sbatch"]).returncode == 0


def test_what_becomes_of_a_task(tmp_path, monkeypatch):
    """A task can finish or fail.

    It fails by input that can't be used, seeds that diverge, an error of the code, or another process in its directory.
    """
    (cell,) = cells_of(tmp_path, data=[DEMO], methods=["bc"], seeds=[0, 1], extra={"bc": SMALL})
    assert grid.train(cell, [0], "cpu") == ("finished", "") and cell.finished(0) and not cell.finished(1)

    (other,) = cells_of(tmp_path, data=[DEMO], methods=["bc"], seeds=[0, 1], extra={"bc": SMALL | {"lr": 0.1}})
    outcome, line = grid.train(other, [0], "cpu")
    assert not other.finished(0) and outcome == "input"
    assert "was started with other arguments (lr 0.001, not 0.1)" in line
    assert other.failure().read_text() == line + "\n"
    assert {run.state for run in Board(tmp_path).read()} == {"done"}  # that failure is not this run's

    (short,) = cells_of(tmp_path / "c", data=[DEMO], methods=["bc"], seeds=[0, 1], extra={"bc": SMALL})
    assert grid.train(short, [0], "cpu")[0] == "finished"
    (short.path(0) / "summary.json").unlink()
    (short.path(0) / "checkpoint.pt").write_bytes(b"damaged")
    outcome, line = grid.train(short, [0], "cpu")
    assert outcome == "failed" and "checkpoint.pt" in line and short.failure(0).read_text() == line + "\n"
    assert not short.failure().exists() and grid.train(short, [1], "cpu") == ("finished", "")

    # While a grid is extended, a damaged run stops itself alone.
    longer = {"steps": 2 * short.flags["steps"], "evals": 2 * short.flags["evals"]}
    (extended,) = cells_of(tmp_path / "c", data=[DEMO], methods=["bc"], seeds=[0, 1], extra={"bc": SMALL | longer})
    assert not extended.finished(1) and grid.train(extended, [0], "cpu")[0] == "failed"
    assert grid.train(extended, [1], "cpu") == ("finished", "") and extended.finished(1)

    (lost,) = cells_of(tmp_path / "b", data=[DEMO], methods=["bc"], seeds=[0, 1], extra={"bc": SMALL | {"lr": 1e30}})
    outcome, line = grid.train(lost, [1], "cpu")
    assert outcome == "failed" and line.startswith("seed 1 diverged") and lost.failure(1).exists()
    assert not lost.failure().exists()

    def broken(args):
        raise RuntimeError("a bug\nin two lines")

    monkeypatch.setattr(comadice_bc, "main", broken)
    outcome, line = grid.train(cell, [1], "cpu")
    assert outcome == "failed" and line.startswith("RuntimeError: a bug (traceback: ")
    assert "in broken" in Path(line.split(": ")[-1].rstrip(")")).read_text()
    monkeypatch.setattr(grid, "PATIENCE", 1)
    monkeypatch.setattr(grid, "holder_of", lambda path: "process 5 on moon")
    assert grid.train(cell, [1], "cpu") == ("stopped", f"{cell.path(1)} is in use by process 5 on moon")


def test_flags_that_change_no_result_leave_a_run_finished(tmp_path):
    (cell,) = cells_of(tmp_path, data=[DEMO], methods=["bc"], seeds=[0], extra={"bc": SMALL})
    assert grid.train(cell, [0], "cpu") == ("finished", "")
    for name, value in (("workers", 2), ("graph", False), ("logger", "csv"), ("data_device", "device")):
        (other,) = cells_of(tmp_path, data=[DEMO], methods=["bc"], seeds=[0], extra={"bc": SMALL | {name: value}})
        assert other.finished(0)
    (other,) = cells_of(tmp_path, data=[DEMO], methods=["bc"], seeds=[0], extra={"bc": SMALL | {"hidden": 16}})
    assert not other.finished(0)


def test_one_damaged_run_stops_none_of_those_beside_it(tmp_path):
    """On a GPU the seeds of a cell are trained together."""
    (cell,) = cells_of(tmp_path, data=[DEMO], methods=["bc"], seeds=[0, 1, 2], extra={"bc": SMALL})
    assert grid.train(cell, [0], "cpu") == ("finished", "")
    (cell.path(0) / "summary.json").unlink()
    (cell.path(0) / "checkpoint.pt").write_bytes(b"damaged")
    outcome, line = grid.train(cell, [0, 1, 2], "cpu")
    assert outcome == "failed" and "seed0/checkpoint.pt" in line
    assert [cell.finished(seed) for seed in cell.seeds] == [False, True, True]
    assert [cell.failure(seed).exists() for seed in cell.seeds] == [True, False, False]


@pytest.mark.parametrize(
    "error, outcome",
    [
        (MemoryError("no 9 GB"), "stopped"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB."), "stopped"),
        (BadInput("the run is in use by process 5: wait for it or stop it"), "stopped"),
        (BadInput("no such dataset"), "input"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value,
)
def test_what_may_pass_is_tried_again(error, outcome, tmp_path, monkeypatch):
    """A lack of memory, and a lock that another process was quicker to take."""

    def fails(args):
        raise error

    (cell,) = cells_of(tmp_path, data=[DEMO], methods=["bc"], seeds=[0, 1])
    monkeypatch.setattr(comadice_bc, "main", fails)
    said, line = grid.train(cell, [0], "cpu")
    assert said == outcome and str(error) in line
    assert cell.failure().exists() == (outcome == "input")


def test_the_demonstrations_data_are_data_like_any_other(tmp_path):
    """Only comadice_train.py without a task and data runs the demonstration, with BC beside it."""
    data = str(ROOT / "data/mamujoco/hopper/few-good")
    (cell,) = cells_of(tmp_path, data=[data], methods=["comadice"], seeds=[0], extra={"comadice": SMALL})
    assert grid.train(cell, [0], "cpu")[0] == "finished"
    assert [p.name for p in (tmp_path / "main/mamujoco/hopper/few-good").iterdir() if p.is_dir()] == ["comadice"]


# ---------------------------------------------------------------- progress


def test_the_plan_counts_what_is_left_of_a_stopped_run(undisturbed, tmp_path, monkeypatch, capsys):
    shutil.copytree(undisturbed / "main", tmp_path / "main")
    run = tmp_path / "main/mamujoco/hopper/demo/comadice/seed0"
    (run / "summary.json").unlink()
    torch.save(load_checkpoint(run) | {"step": 0, "critic_step": 30}, run / "checkpoint.pt")  # after its first stage
    monkeypatch.setattr(estimate, "seconds_per_run", lambda cells, device: {cell.name: 7200.0 for cell in cells})
    extra = {"comadice": SMALL}
    cells = cells_of(tmp_path, data=[DEMO], methods=["comadice"], seeds=[0, 1, 2], extra=extra)
    paper.print_plan(cells, paper.Args(out=str(tmp_path)))
    said = capsys.readouterr().out
    states = [line.rsplit("  ", 1)[1] for line in said.splitlines() if "comadice/seed" in line]
    assert states == ["60.0 min", "finished", "2.0 h"] and "main: 2 runs, 3.0 " in said


def test_progress_is_read_from_the_run_directories(undisturbed, tmp_path):
    shutil.copytree(undisturbed / "main", tmp_path / "main")
    folder = tmp_path / "main/mamujoco/hopper/demo"
    plan = {f"main/mamujoco/hopper/demo/{method}/seed{seed}": 30 for method in ("bc", "comadice") for seed in range(4)}
    (tmp_path / "grid/failed").mkdir(parents=True)
    (tmp_path / "grid/plan.json").write_text(json.dumps({"steps": plan}))
    (tmp_path / "grid/failed/main.mamujoco.hopper.demo.bc.txt").write_text("no dataset\n")
    (folder / "comadice/seed1/summary.json").unlink()  # stopped at its end
    (folder / "comadice/seed0/summary.json").unlink()
    state = load_checkpoint(folder / "comadice/seed0")  # halfway, after 10 s, and running
    torch.save(
        state | {"step": 0, "critic_step": 30, "critic_seconds": 10.0, "wall": 0.0},
        folder / "comadice/seed0/checkpoint.pt",
    )
    code = (
        "import sys, time; from pathlib import Path; from offline_data.lock import lock; "
        f"lock(Path({str(folder / 'comadice/seed0')!r})); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        now = time.time()
        os.utime(folder / "comadice/seed0/checkpoint.pt", (now, now))
        board = Board(tmp_path)
        runs = {run.name.removeprefix("main/mamujoco/hopper/demo/"): run for run in board.read()}
        longer = json.dumps({"steps": plan | dict.fromkeys([n for n in plan if "/bc/" in n], 60)})
        (tmp_path / "grid/plan.json").write_text(longer)  # BC shall be extended
        assert not [run.name for run in board.read() if "/bc/" in run.name and run.state == "done"]
        (tmp_path / "grid/plan.json").write_text(json.dumps({"steps": plan}))
        process.kill()
    states = {name: run.state for name, run in runs.items()}
    assert states == {
        "bc/seed0": "done",
        "bc/seed1": "done",
        "bc/seed2": "failed",
        "bc/seed3": "failed",
        "comadice/seed0": "running",
        "comadice/seed1": "waiting",
        "comadice/seed2": "waiting",
        "comadice/seed3": "waiting",
    }
    assert runs["comadice/seed0"].text == "step 30 of 60" and runs["comadice/seed0"].left == pytest.approx(10, abs=5)
    assert runs["comadice/seed1"].text == "goes on at step 60 of 60" and runs["bc/seed2"].text == "no dataset"
    lines = show(list(runs.values()))
    assert lines[0].split() == ["done", "running", "failed", "waiting"]
    assert "failed   main/mamujoco/hopper/demo/bc/seed2 and 1 more: no dataset" in lines
    again = Board(tmp_path).look("main/mamujoco/hopper/demo/comadice/seed0", 30)  # its process was killed
    assert (again.state, again.text) == ("waiting", "goes on at step 30 of 60")


def test_ablation_reports_have_the_default_beside_them(tmp_path, capsys):
    """ComaDICE's default alpha, and the one between episodes, follow the data; they make no columns of their own."""
    for part, alpha, episodes in (("main", 11.33, 88.84), ("alpha0.1", 0.1, 0.78), ("alpha10", 10.0, 78.4)):
        for quality in ("medium", "expert"):
            more = {
                "alpha": alpha * (1 + (part == "main" and quality == "expert")),
                "episode_alpha": episodes,
                "f": "soft_chi2",
            }
            make_run(tmp_path / part, seed=0, returns=[alpha], quality=quality, **more)
    make_run(tmp_path / "main", "bc", returns=[1.0], quality="expert")
    make_run(tmp_path / "f-kl", seed=0, returns=[3.0], quality="expert", alpha=22.66, episode_alpha=88.84, f="kl")
    paper.write_reports(str(tmp_path))
    header = lambda name: next(
        line for line in (tmp_path / name / "report.md").read_text().splitlines() if line.startswith("| instance")
    )
    assert header("report") == "| instance | data | bc | comadice |"
    assert (
        header("report-alpha")
        == "| instance | data | comadice alpha=0.1 | comadice alpha=10 | comadice alpha=default |"
    )
    assert header("report-f") == "| instance | data | comadice f=kl | comadice f=soft_chi2 |"
    assert (tmp_path / "report-alpha/ablation_alpha_mamujoco_return.png").exists()
    assert (tmp_path / "report-f/ablation_f_mamujoco_return.png").exists()
    again = {path: path.read_bytes() for path in tmp_path.rglob("report*/*.csv")}
    paper.write_reports(str(tmp_path))
    assert again == {path: path.read_bytes() for path in tmp_path.rglob("report*/*.csv")}


def test_an_ablation_may_have_the_setting_of_main(tmp_path):
    for part, alpha in (("main", 10.0), ("alpha10", 10.0), ("alpha1", 1.0)):
        make_run(tmp_path / part, seed=0, returns=[alpha], alpha=alpha, episode_alpha=5.0)
    make_run(tmp_path / "main", "bc", seed=0, returns=[1.0])
    shutil.copytree(tmp_path / "main", tmp_path / "backup")
    paper.write_reports(str(tmp_path))
    assert "| instance | data | bc | comadice |" in (tmp_path / "report/report.md").read_text()
    columns = "| instance | data | comadice alpha=1 | comadice alpha=10 | comadice alpha=default |"
    assert columns in (tmp_path / "report-alpha/report.md").read_text()


def test_the_report_names_the_runs_that_are_not_in_it(tmp_path):
    """A run that never began, one that failed, and not one that failed and was trained later."""
    path = make_run(tmp_path / "main", "bc", seed=0, returns=[1.0])
    cell = str(path.parent.relative_to(tmp_path))
    (tmp_path / "grid/failed").mkdir(parents=True)
    plan = {f"{cell}/seed{seed}": 30 for seed in range(3)} | {f"{cell.replace('main', 'f-kl')}/seed0": 30}
    (tmp_path / "grid/plan.json").write_text(json.dumps({"steps": plan}))
    for seed in (0, 1):
        grid.failure_file(tmp_path, cell, seed).write_text(f"seed {seed}: given up\n")
    paper.write_reports(str(tmp_path))
    notes = (tmp_path / "report/report.md").read_text().partition("## Missing and left out")[2].split("\n")
    wanted = [(1, "seed 1: given up"), (2, "not begun")]
    assert [line for line in notes if line] == [f"- left out {tmp_path}/{cell}/seed{s}: {why}" for s, why in wanted]


def test_durations():
    assert [duration(x) for x in (5, 89, 91, 5400, 3 * 86400)] == ["5 s", "89 s", "1.5 min", "1.5 h", "3.0 days"]


# ---------------------------------------------------------------- without Ray


def test_a_seed_that_starts_late_keeps_the_failure_of_its_cell(tmp_path, monkeypatch):
    """One seed finds that the input can't be used while the next one starts, and is stopped for this reason."""

    def stopped(*_):
        raise SystemExit(143)

    cell = cells_of(tmp_path, ["hopper/expert"], methods=["bc"])[0]
    grid.keep_failures(cell, {None: "no dataset"})
    monkeypatch.setattr(grid, "run_script", stopped)
    assert grid.train(cell, [1], "cpu")[0] == "stopped"
    assert cell.failure().read_text() == "no dataset\n"


def test_without_ray_there_is_one_line(tmp_path):
    code = (
        "import sys; sys.modules['ray'] = None; import runpy; runpy.run_module('benchmarks.paper', run_name='__main__')"
    )
    words = [sys.executable, "-c", code, "--data", DEMO, "--out", str(tmp_path / "grid")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: Ray is missing: pip install -r requirements-ray.txt")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "grid").exists()


# ---------------------------------------------------------------- the driver, on a stand-in for Ray


class StandIn:
    """Ray's functions that benchmarks.paper.work uses. Tasks run one after another, in this process."""

    class exceptions:
        class RayError(Exception):
            pass

        class RayTaskError(RayError):
            pass

        class TaskCancelledError(RayError):
            pass

    def __init__(self, gpus=0):
        self.gpus, self.options, self.tasks, self.cancelled, self.count = gpus, None, {}, set(), 0

    def cluster_resources(self):
        return {"CPU": 2.0} | ({"GPU": float(self.gpus)} if self.gpus else {})

    def remote(self, function=None, **options):
        if function is None:
            self.options = options
            return self.remote
        ray = self

        class Remote:
            @staticmethod
            def remote(*args):
                ray.count += 1
                ray.tasks[ray.count] = lambda: function(*args)
                return ray.count

        return Remote

    def wait(self, refs, timeout):
        return refs[:1], refs[1:]

    def get(self, ref):
        if ref in self.cancelled:
            raise self.exceptions.TaskCancelledError
        return self.tasks[ref]()

    def cancel(self, ref):
        self.cancelled.add(ref)


def test_a_task_is_given_up_after_its_retries(tmp_path, capsys):
    """One worker is lost every time, one only once. The failure is kept, and a later command removes it."""
    (cell,) = cells_of(tmp_path, data=[DEMO], methods=["bc"], seeds=[0, 1])
    tries = Counter()

    def train(cell, seeds, device):
        tries[seeds[0]] += 1
        if seeds == [0] or tries[1] == 1:
            raise StandIn.exceptions.RayError
        return "finished", ""

    paper.work(StandIn(), [cell], paper.Args(out=str(tmp_path), retries=2), train)
    assert tries == {0: 3, 1: 2}
    assert cell.failure(0).read_text() == "given up after 3 tries: its worker was lost (RayError)\n"
    assert not cell.failure(1).exists() and "once more (2 of 2)" in capsys.readouterr().out
    paper.work(StandIn(), [cell], paper.Args(out=str(tmp_path)), lambda *_: ("finished", ""))
    assert not cell.failure(0).exists()


def test_the_table_of_progress_also_stands_where_nothing_is_left_to_do(tmp_path, capsys):
    cells = cells_of(tmp_path, data=[DEMO], methods=["bc"], seeds=[0])
    grid.save_plan(str(tmp_path), cells)
    paper.work(StandIn(), [dataclasses.replace(cells[0], seeds=[])], paper.Args(out=str(tmp_path)))
    assert "hopper" in capsys.readouterr().out


def test_a_task_that_gets_on_is_not_given_up(tmp_path, capsys):
    """Six pre-emptions, each after another checkpoint, then an error of its machine, then none."""
    (cell,) = cells_of(tmp_path, data=[DEMO], methods=["bc"], seeds=[0])
    tries = []

    def train(cell, seeds, device):
        tries.append(1)
        cell.path(0).mkdir(parents=True, exist_ok=True)
        (cell.path(0) / "checkpoint.pt").touch()
        os.utime(cell.path(0) / "checkpoint.pt", (min(len(tries), 6),) * 2)
        if len(tries) == 7:
            raise StandIn.exceptions.RayTaskError("no module\nModuleNotFoundError: no module")
        return ("stopped", "stopped by a signal") if len(tries) < 7 else ("finished", "")

    paper.work(StandIn(), [cell], paper.Args(out=str(tmp_path), retries=2), train)
    printed = capsys.readouterr().out
    assert len(tries) == 8 and not cell.failure(0).exists()
    assert printed.count("once more (1 of 2)") == 6 and "ModuleNotFoundError: no module; once more (2 of 2)" in printed


def test_a_full_disk_does_not_stop_the_other_cells(tmp_path, monkeypatch, capsys):
    cells = cells_of(tmp_path, data=[DEMO], methods=["bc", "omiga"], seeds=[0])

    def train(cell, *_):
        if cell.method == "bc":
            raise StandIn.exceptions.RayTaskError("OSError: no space left")
        return "finished", ""

    def full(*_):
        raise BadInput("can't write: no space left")

    monkeypatch.setattr(grid, "keep_failures", full)
    paper.work(StandIn(), cells, paper.Args(out=str(tmp_path), retries=0), train)
    assert "given up after 1 tries: OSError: no space left" in capsys.readouterr().out


def test_the_stub_of_the_cluster_measurement_is_all_that_work_needs(tmp_path):
    done = []
    stubs = [cluster.Stub(f"task{number}", [0], str(tmp_path)) for number in range(3)]
    train = lambda cell, seeds, device: done.append((cell.name, seeds)) or ("finished", "")
    paper.work(StandIn(), stubs, paper.Args(out=str(tmp_path)), train)
    assert done == [("task0", [0]), ("task1", [0]), ("task2", [0])]


def test_on_gpus_the_seeds_of_a_cell_are_one_task(tmp_path):
    cells = cells_of(tmp_path, data=[DEMO], methods=["bc", "comadice"], seeds=[0, 1])
    for gpus, fraction, wanted in ((1, 0.5, [[0, 1], [0, 1]]), (1, 0, [[0], [1], [0], [1]]), (0, 0.5, [[0], [1]] * 2)):
        ray, found = StandIn(gpus), []
        train = lambda cell, seeds, device, found=found: found.append((seeds, device)) or ("finished", "")
        paper.work(ray, cells, paper.Args(out=str(tmp_path), gpu_fraction=fraction), train)
        on_gpu = bool(gpus and fraction)
        assert found == [(seeds, "cuda" if on_gpu else "cpu") for seeds in wanted]
        assert ray.options["num_gpus"] == (fraction if on_gpu else 0) and ray.options["num_cpus"] == 1


def test_a_stop_cancels_what_runs_and_repeats_nothing(tmp_path, monkeypatch):
    cells = cells_of(tmp_path, data=[DEMO], methods=["bc"], seeds=[0, 1, 2])
    ray = StandIn()

    def train(cell, seeds, device):  # SIGTERM comes while the first task runs, and it saves its state
        monkeypatch.setattr(paper.stops, "asked", lambda: True)
        return "finished", ""

    left = []
    monkeypatch.setattr(paper.stops, "leave", lambda: left.append(1))
    paper.work(ray, cells, paper.Args(out=str(tmp_path)), train)
    assert ray.cancelled == {2, 3} and ray.count == 3 and left
    assert not list(tmp_path.rglob("failed/*"))


def test_input_that_cannot_be_used_stops_its_cell_once(tmp_path, capsys):
    cells = cells_of(tmp_path, ["hopper/expert"], data=[DEMO], methods=["bc"], seeds=[0, 1, 2])
    outcome = lambda cell, *_: ("input", "no dataset") if cell.instance[2] == "expert" else ("finished", "")
    ray = StandIn()
    paper.work(ray, cells, paper.Args(out=str(tmp_path)), outcome)
    assert capsys.readouterr().out.count("no dataset") == 1 and ray.cancelled == {2, 3}


def test_runs_without_a_simulator_are_said_to_be_trained_only(tmp_path, monkeypatch):
    from environments.checks import NoSimulator

    def missing(*_):
        raise NoSimulator("robots are not installed")

    cells = cells_of(tmp_path, data=[DEMO], methods=["bc"], seeds=[0], extra={"bc": SMALL})
    monkeypatch.setattr("comadice_eval.eval_env", missing)
    monkeypatch.setattr(paper, "check_playable", missing)
    (line,) = paper.unplayable(cells)
    assert line == "note: mamujoco/hopper/demo can be trained here, but not played: robots are not installed"
    outcome, line = grid.train(cells[0], [0], "cpu")
    assert outcome == "finished" and line.startswith("trained, but not played: seeds [0]") and cells[0].finished(0)
