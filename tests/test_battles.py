"""Battles from collection to training to winrates, in SMAX."""

import csv
import json
import re

import numpy as np
import pytest
import torch

pytest.importorskip("jaxmarl")

import comadice_bc
import comadice_eval
import comadice_train
import offline_data.collect
from comadice_eval import eval_env, evaluate, load_policy
from environments.checks import BadInput
from offline_data.dataset import episode_returns, episodes, open_dataset

COLLECT = {
    "env": "smax",
    "steps": 6144,
    "checkpoints": 3,
    "num_envs": 16,
    "horizon": 64,
    "epochs": 1,
    "trajectories": 20,
    "hidden": 16,
    "record_every": 2,
}


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """A race's task and a SMACv1 map's, collected for a few thousand steps."""
    out = tmp_path_factory.mktemp("battles")
    for task in ("zerg_5_vs_5", "3m"):
        offline_data.collect.main(offline_data.collect.Args(task=task, out=str(out), replay_trajectories=60, **COLLECT))
    return out / "smax"


def test_medium_is_so_many_battles_of_the_first_policy_that_wins_enough(collected):
    rows, card = open_dataset(collected / "zerg_5_vs_5" / "medium", "smax", "zerg_5_vs_5")
    assert card["trajectories"] == 20 and card["discrete"] and card["engine"].startswith("SMAX (jaxmarl")
    assert card["interface"] == "standard"
    with open(collected / "zerg_5_vs_5" / "behaviour" / "curve.csv", newline="") as file:
        curve = list(csv.DictReader(file))
    rates = [float(point["winrate"]) for point in curve]
    enough = [i for i, rate in enumerate(rates) if rate >= 0.4]
    assert len(curve) == 3
    assert card["made"]["checkpoint"] == (enough[0] if enough else rates.index(max(rates)))
    assert all(0 <= rate <= 1 for rate in rates)
    assert (collected / "zerg_5_vs_5" / "behaviour" / "curve.png").is_file()
    assert 0 <= card["return_min"] and card["return_max"] <= 2 + 1e-4  # the enemies' health and 1 for the victory
    # The time limit is the one end that is no termination.
    for episode in episodes(rows):
        assert bool(episode["terminated"][-2]) == (len(episode) - 1 < 101)


def test_medium_replay_is_training_thinned(collected):
    folder = collected / "zerg_5_vs_5"
    _, card = open_dataset(folder / "medium-replay")
    checkpoint = card["made"]["up to checkpoint"]
    kept = [open_dataset(folder / "behaviour" / f"episodes-{i:03d}")[1]["trajectories"] for i in range(checkpoint + 1)]
    assert card["trajectories"] == min(sum(kept), 60)


def test_smacv1_maps_are_cut_into_qualities_by_return(collected):
    found = {quality: (collected / "3m" / quality).is_dir() for quality in ("poor", "medium", "good")}
    assert found["poor"] and (collected / "3m" / "medium-replay").is_dir()
    for quality, low, high in (("poor", -1, 1), ("medium", 1, 1.5), ("good", 1.5, 3)):
        if found[quality]:
            returns = episode_returns(open_dataset(collected / "3m" / quality)[0])
            assert ((low < returns) & (returns <= high)).all() and len(returns) < 40


def test_training_reports_winrates_that_evaluation_repeats(collected, tmp_path, capsys):
    data = str(collected / "zerg_5_vs_5" / "medium")
    common = {
        "data": data,
        "out": str(tmp_path),
        "steps": 4,
        "evals": 2,
        "eval_episodes": 6,
        "hidden": 16,
        "device": "cpu",
    }
    comadice_train.main(comadice_train.Args(**common))
    printed = capsys.readouterr().out
    assert re.search(r"ComaDICE .*\d% won", printed) and "SMAX" in printed
    run = tmp_path / "smax" / "zerg_5_vs_5" / "medium" / "comadice" / "seed0"
    summary = json.loads((run / "summary.json").read_text())
    policy, state = load_policy(run)
    # of run 0's evaluation after step 4, the last half of two
    seed = int(np.random.SeedSequence((0, 4)).generate_state(1)[0])
    again = evaluate(policy, eval_env(state["card"], 6), 6, seed)
    assert (summary["winrate"], summary["return"]) == (again["winrate"], again["return_mean"])
    assert again["replayed"] == 0
    comadice_eval.main(comadice_eval.Args(run=[str(run)], episodes=6, device="cpu", seed=seed))
    with pytest.raises(BadInput, match="--action-scale"):
        load_policy(run, action_scale=0.9)
    assert f"{100 * again['winrate']:.1f}%" in capsys.readouterr().out
    comadice_bc.main(comadice_bc.Args(**common))


def test_a_winrate_counts_won_battles(collected):
    """Against the returns: only a victory pays 1, and the enemies' health pays up to 1 more."""
    card = open_dataset(collected / "zerg_5_vs_5" / "medium")[1]

    class Attack(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.empty = torch.nn.Parameter(torch.zeros(1))

        def act(self, obs, mask):
            """The last action available: an attack where there is a target, else stop."""
            return mask.shape[-1] - 1 - mask.flip(-1).int().argmax(-1)

    result = evaluate(Attack(), eval_env(card, 50), 50, 0)
    won = sum(r > 1.5 for r in result["returns"])  # all of the enemies' health is gone in a battle won
    assert result["winrate"] == pytest.approx(won / 50) and 0 < won < 50


def test_a_dataset_of_another_task_is_refused(collected):
    with pytest.raises(BadInput, match="is a dataset of task 'zerg_5_vs_5', not 'zerg_10_vs_10'"):
        comadice_train.main(
            comadice_train.Args(data=str(collected / "zerg_5_vs_5" / "medium"), env="smax", task="zerg_10_vs_10")
        )
