"""Interquartile means, probabilities of improvement, profiles and intervals: closed forms, and scipy's bootstrap."""

import csv
import json

import numpy as np
import pytest
import scipy.stats
from test_report import make_run, report

from support.statistics import interval, iqm, probability_of_improvement, profile

KNOWN = [np.array([0.0, 1.0, 2.0, 3.0]), np.array([10.0, 20.0, 30.0, 40.0])]  # two tasks, four seeds


def random_scores(seed: int, counts=(5, 5, 5)) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.normal(size=count) * (t + 1) + t for t, count in enumerate(counts)]


def test_known_scores():
    """Of eight scores the middle four are 2, 3, 10 and 20.

    Against scores shifted by 1.5, three of the 16 pairs of the first task are won.
    """
    assert iqm(KNOWN) == 35 / 4
    other = [KNOWN[0] + 1.5, KNOWN[1] - 100]
    won = np.mean([[a > b for b in other[0]] for a in KNOWN[0]])
    assert won == 3 / 16 and probability_of_improvement(KNOWN, other) == (3 / 16 + 1) / 2
    assert probability_of_improvement(KNOWN, KNOWN) == 0.5  # ties count half
    above = profile(KNOWN, np.array([-1.0, 0.0, 2.5, 10.0, 40.0])).tolist()
    assert above == [1, (3 / 4 + 1) / 2, (1 / 4 + 1) / 2, 3 / 8, 0]


@pytest.mark.parametrize("counts", [(1,), (3,), (4,), (5, 5), (5, 3, 2), (2, 2, 2, 2, 2)])
def test_iqm_is_the_trimmed_mean(counts):
    scores = random_scores(0, counts)
    assert iqm(scores) == pytest.approx(scipy.stats.trim_mean(np.concatenate(scores), 0.25))


@pytest.mark.parametrize(("counts", "others"), [((5, 5), (5, 5)), ((6, 3), (2, 5))])
def test_probability_is_that_of_mann_whitney(counts, others):
    """Every task counts the same, however many pairs it has."""
    x, y = random_scores(1, counts), random_scores(2, others)
    y[0][0] = x[0][0]  # a tie
    u = [scipy.stats.mannwhitneyu(a, b).statistic / (len(a) * len(b)) for a, b in zip(x, y)]
    assert probability_of_improvement(x, y) == pytest.approx(np.mean(u))


@pytest.mark.parametrize("counts", [(5, 5, 5), (5, 3, 2)])
def test_the_profile_is_the_empirical_distribution(counts):
    """Every task counts the same, however many seeds it has."""
    scores, taus = random_scores(3, counts), np.linspace(-3, 8, 50)
    below = np.mean([scipy.stats.ecdf(task).cdf.evaluate(taus) for task in scores], 0)
    assert profile(scores, taus) == pytest.approx(1 - below)
    area = np.trapezoid(profile([np.abs(task) for task in scores], fine := np.linspace(0, 20, 20001)), fine)
    assert area == pytest.approx(np.mean([np.abs(task).mean() for task in scores]), abs=2e-3)  # the area is the mean


@pytest.mark.parametrize("counts", [(5, 5, 5), (3, 5, 4, 6), (10,)])
def test_intervals_are_those_of_scipy(counts):
    """Both ends within five standard errors of a quantile of the bootstrap, estimated from repetitions."""
    scores, draws = random_scores(4, counts), 4000
    ours = np.array([interval(iqm, scores, draws=draws, seed=seed) for seed in range(12)])
    on_all = lambda *tasks, axis: scipy.stats.trim_mean(np.concatenate(tasks, axis), 0.25, axis=axis)
    theirs = []
    for seed in range(12):
        found = scipy.stats.bootstrap(
            scores,
            on_all,
            n_resamples=draws,
            method="percentile",
            vectorized=True,
            rng=np.random.default_rng(100 + seed),
        )
        theirs.append(found.confidence_interval)
    theirs = np.array(theirs)
    error = np.sqrt(ours.var(0, ddof=1) / 12 + theirs.var(0, ddof=1) / 12)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 5 * error + 1e-9).all()
    assert (ours[:, 1] > ours[:, 0]).all() and (np.abs(ours.mean(0)[1] - ours.mean(0)[0]) > 20 * error).all()


def test_the_interval_of_two_methods_is_that_of_scipy():
    x, y = random_scores(5, (5, 4)), random_scores(6, (4, 5))
    ours = np.array([interval(probability_of_improvement, x, y, draws=3000, seed=seed) for seed in range(8)])
    on_all = lambda a, b, c, d, axis: probability_of_improvement([a, b], [c, d])
    theirs = np.array(
        [
            scipy.stats.bootstrap(
                (*x, *y),
                on_all,
                n_resamples=3000,
                method="percentile",
                vectorized=True,
                rng=np.random.default_rng(seed),
            ).confidence_interval
            for seed in range(8)
        ]
    )
    assert ours.mean(0) == pytest.approx(theirs.mean(0), abs=0.02)


def test_an_interval_covers_the_mean_of_normal_scores():
    """With many seeds the 95% interval of a mean is that of the normal distribution: mean ± 1.96 standard errors."""
    scores = [np.random.default_rng(7).normal(size=400)]
    low, high = interval(lambda drawn: drawn[0].mean(-1), scores)
    assert [low, high] == pytest.approx(scores[0].mean() + np.array([-1.96, 1.96]) * scores[0].std() / 20, abs=0.01)


def test_the_seeds_of_two_methods_are_drawn_apart():
    """Drawn with the same indices, a method against itself would win exactly half of the pairs in every draw."""
    low, high = interval(probability_of_improvement, KNOWN, KNOWN)
    assert low < 0.4 and high > 0.6


def test_one_seed_has_an_interval_without_width():
    assert interval(iqm, [np.array([3.0]), np.array([5.0])]).tolist() == [4.0, 4.0]


# ---------------------------------------------------------------- in a report


def known_report(root) -> str:
    """Two instances with mean returns 10 and 100, two methods, four seeds."""
    for i, (quality, data) in enumerate((("medium", 10.0), ("expert", 100.0))):
        for seed in range(4):
            make_run(
                root, "comadice", seed, [KNOWN[i][seed] * data], data_return=data, quality=quality, eval_episodes=32
            )
            make_run(
                root, "bc", seed, [(KNOWN[i][seed] - 1) * data], data_return=data, quality=quality, eval_episodes=32
            )
    return report(root)[0]


def test_the_section_of_a_report(tmp_path):
    text = known_report(tmp_path)
    assert (
        "**mamujoco, return / mean return of the data**: 2 instances, 100 steps per stage, "
        "1 evaluations of 32 episodes." in text
    )
    rows = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith(("| bc |", "| comadice |"))}
    assert rows["| comadice"].startswith("| comadice | 8.8 [") and rows["| bc"].startswith("| bc | 7.8 [")
    assert rows["| bc"].endswith("|  |")
    # 10 of 16 pairs and 3 ties in the first task
    better = probability_of_improvement(KNOWN, [task - 1 for task in KNOWN])
    assert f"| {better:.2f} [" in rows["| comadice"]
    assert {path.name for path in (tmp_path / "report").iterdir()} >= {
        "intervals.png",
        "profiles.png",
        "seeds.csv",
        "marl_eval.json",
    }
    with open(tmp_path / "report/seeds.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    assert all(
        float(row["normalised"]) == pytest.approx(float(row["score"]) / float(row["data_return"])) for row in rows
    )
    scores = [float(row["score"]) for row in rows if row["method"] == "comadice" and row["quality"] == "medium"]
    assert scores == [0, 10, 20, 30]


def test_other_budgets_are_not_mixed(tmp_path):
    """An instance of 100 steps and one of 200 have a table each, and a file for marl-eval each."""
    for seed in range(2):
        for algo in ("bc", "comadice"):
            make_run(tmp_path, algo, seed, [1.0 + seed], quality="medium", eval_episodes=32)
            make_run(tmp_path, algo, seed, [5.0 + seed], quality="expert", eval_episodes=8, steps=200)
    text = report(tmp_path)[0]
    assert "There are runs of several budgets." in text and text.count("**mamujoco, return") == 2
    assert "1 instance, 100 steps per stage, 1 evaluations of 32 episodes" in text
    assert "1 instance, 200 steps per stage, 1 evaluations of 8 episodes" in text
    assert {path.name for path in (tmp_path / "report").glob("*.json")} == {
        "marl_eval_100_1_32.json",
        "marl_eval_200_1_8.json",
    }


def test_methods_are_compared_while_runs_are_extended(tmp_path):
    """Runs of 100 and of 200 steps on one instance: two tables, and each compares ComaDICE with BC."""
    for steps in (100, 200):
        for algo in ("bc", "comadice"):
            make_run(tmp_path / str(steps), algo, steps, [1.0], quality="medium", steps=steps)
    text = report(tmp_path)[0]
    assert text.count("| method | interquartile mean | better than bc |") == 2
    assert text.count("\n| comadice | ") == 2 and text.count("1 instance, ") == 2


def test_instances_that_are_not_shared_or_have_no_unit_are_named(tmp_path):
    for algo in ("bc", "comadice", "omiga"):
        for quality, data in (("medium", 10.0), ("expert", -1.0), ("medium-replay", 5.0), ("near-zero", 0.9)):
            if (algo, quality) != ("omiga", "medium-replay"):
                make_run(tmp_path, algo, 0, [3.0], quality=quality, data_return=data, data_std=10.0)
    text = report(tmp_path)[0]
    why = "the data's mean return is below 0.1 of its standard deviation"
    assert f"- left out, {why}: hopper expert, hopper near-zero" in text
    assert "- left out, not every method has runs: hopper medium-replay" in text
    assert "| method | interquartile mean | better than bc | better than omiga |" in text and "1 instance," in text


def test_methods_that_share_no_instance_are_named(tmp_path):
    make_run(tmp_path, "bc", 0, [3.0], quality="medium", eval_episodes=32)
    make_run(tmp_path, "comadice", 0, [3.0], quality="expert", eval_episodes=32)
    text = report(tmp_path)[0]
    said = "- mamujoco return, 100 steps per stage, 1 evaluations of 32 episodes: bc, comadice are not compared"
    assert said in text and "All instances together" not in text


def test_marl_eval_gets_the_seeds_that_all_methods_have(tmp_path):
    """Its tools need the same runs of each algorithm on each task."""
    for algo, seeds in (("bc", (0, 1)), ("comadice", (0, 1, 2))):
        for seed in seeds:
            make_run(tmp_path, algo, seed, [1.0], quality="medium", eval_episodes=32)
    text = report(tmp_path)[0]
    assert "not every method has them: mamujoco hopper medium seed 2" in text
    found = json.loads((tmp_path / "report/marl_eval.json").read_text())["mamujoco"]["hopper_medium"]
    assert {name: list(runs) for name, runs in found.items()} == {name: ["seed_0", "seed_1"] for name in found}


def test_the_exchange_format(tmp_path):
    """The structure that marl-eval's README asks for: env, task, algorithm, run, step_k with step_count.

    absolute_metrics comes last.
    """
    for seed in (0, 1):
        make_run(
            tmp_path,
            seed=seed,
            returns=[1.0, 2.0, 4.0 + seed],
            winrates=[0.1, 0.2, 0.4],
            env="smax",
            task="zerg_5_vs_5",
            quality="medium",
            steps=300,
        )
    report(tmp_path)
    found = json.loads((tmp_path / "report/marl_eval.json").read_text())
    assert found.keys() == {"smax"} and found["smax"].keys() == {"zerg_5_vs_5_medium"}
    assert found["smax"]["zerg_5_vs_5_medium"].keys() == {"comadice"}
    runs = found["smax"]["zerg_5_vs_5_medium"]["comadice"]
    assert list(runs) == ["seed_0", "seed_1"]
    assert list(runs["seed_1"]) == [
        "step_1",
        "step_2",
        "step_3",
        "absolute_metrics",
    ]
    assert runs["seed_1"]["step_3"] == {"step_count": 300, "return": [5.0], "win_rate": [pytest.approx(0.4)]}
    assert runs["seed_1"]["absolute_metrics"] == {"return": [3.5], "win_rate": [pytest.approx(0.3)]}
