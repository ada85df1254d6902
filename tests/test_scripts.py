"""The scripts end to end at toy sizes: what they leave on disk, resuming after a kill, and input that can't be used."""

import csv
import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from conftest import ROOT, files_hash, hopper_card
from tensordict import TensorDict

import comadice_bc
import comadice_eval
import comadice_losses as losses
import comadice_train
import environments.checks
import offline_data.collect
import support.runs
import support.seeds
from baselines import bcq, cql, icq, omar, omiga
from comadice_mixer import make_policy
from environments.checks import BadInput
from environments.simulators import make_env
from offline_data.dataset import episodes, last_rows, open_dataset
from offline_data.replay import episode_weights
from offline_data.writer import DatasetWriter

TINY = {"device": "cpu", "steps": 20, "evals": 2, "eval_episodes": 2, "hidden": 16, "batch_size": 32}


def args(module, dataset, folder, /, **kwargs):
    return module.Args(**TINY | {"data": str(dataset), "out": str(folder)} | kwargs)


def folder(out: Path, algo: str, seed: int = 0) -> Path:
    return out / "mamujoco" / "hopper" / "random" / algo / f"seed{seed}"


def train(data, out: Path, module=comadice_train, algo: str | None = None, **kwargs) -> Path:
    module.main(args(module, data, out, **kwargs))
    return folder(out, algo or {comadice_train: "comadice", comadice_bc: "bc"}[module])


def checkpoint(run: Path) -> dict:
    return torch.load(run / "checkpoint.pt", weights_only=True)


def same_weights(a: dict, b: dict, part: str = "policy") -> bool:
    a, b = a[part], b[part]
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def table(run: Path) -> list[dict]:
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="session")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def run(hopper_data, out) -> Path:
    """A finished ComaDICE run. Tests that change it copy it first."""
    return train(hopper_data, out)


@pytest.fixture(scope="session")
def bc_run(hopper_data, out) -> Path:
    return train(hopper_data, out, comadice_bc)


@pytest.fixture(scope="session")
def nowhere(hopper_data, tmp_path_factory) -> Path:
    """A dataset of an env that no simulator exists for."""
    path = shutil.copytree(hopper_data, tmp_path_factory.mktemp("nowhere") / "data")
    return edit(path, env="nowhere")


def edit(path: Path, file: str = "card.json", **changes) -> Path:
    content = json.loads((path / file).read_text())
    (path / file).write_text(json.dumps(content | changes))
    return path


# ---------------------------------------------------------------- what a run leaves


@pytest.mark.parametrize("algo", ["comadice", "bc"])
def test_run_directory(run, bc_run, algo):
    path, module = (run, comadice_train) if algo == "comadice" else (bc_run, comadice_bc)
    picture = ["ratio.png"] if algo == "comadice" else []
    assert sorted(p.name for p in path.iterdir()) == [
        "checkpoint.pt",
        "config.json",
        "metrics.csv",
        *picture,
        "summary.json",
    ]
    config = json.loads((path / "config.json").read_text())
    # Every argument, less those that say where and how to put the result; "seed" is this run's of --seeds.
    wanted = {f.name for f in dataclasses.fields(module.Args)} - {"seeds", "out", "resume", "overwrite"}
    assert wanted | {"seed", "algo"} <= set(config)
    assert (config["steps"], config["hidden"], config["seed"]) == (20, 16, 0)
    assert (config["task"], config["quality"], config["algo"]) == ("hopper", "random", algo)


@pytest.mark.parametrize("algo", ["comadice", "bc"])
def test_summary(run, bc_run, algo, hopper_data):
    path = run if algo == "comadice" else bc_run
    summary = json.loads((path / "summary.json").read_text())
    card = json.loads((hopper_data / "card.json").read_text())
    wanted = {
        "env": "mamujoco",
        "task": "hopper",
        "quality": "random",
        "algo": algo,
        "seed": 0,
        "steps": 20,
        "winrate": None,
        "device": "cpu",
    }
    assert {k: summary[k] for k in wanted} == wanted
    assert summary["dataset_return"] == card["return_mean"] and summary["updates_per_second"] > 0
    assert f"gymnasium {importlib.metadata.version('gymnasium')}," in summary["engine"]
    assert 50 < summary["peak_rss_mb"] < 20_000
    last = table(path)[-1]
    assert (summary["return"], summary["evaluations"]) == (float(last["return"]), 1)  # the last half of two
    config = json.loads((path / "config.json").read_text())
    names = {"preset", "objective", "advantage", "alpha", "tau", "lr"} & set(config)
    assert len(names) == (6 if algo == "comadice" else 1)
    assert all(summary[name] == config[name] is not None for name in names)


def test_metrics_of_comadice(run):
    rows = table(run)
    stages = [(r["stage"], int(r["step"])) for r in rows]
    assert stages == [("critics", 10), ("critics", 20), ("policy", 10), ("policy", 20)]
    w = checkpoint(run)["w"]
    for row in rows[2:]:
        assert float(row["mean_w"]) == pytest.approx(w.mean().item())
        assert float(row["w_zero"]) == (w == 0).float().mean()
        assert float(row["ess"]) == pytest.approx((w.sum() ** 2 / (len(w) * (w**2).sum())).item(), rel=1e-5)
    assert all(math.isfinite(float(r[k])) for r in rows[:2] for k in ("q_loss", "nu_loss", "mean_nu", "mean_w", "ess"))
    assert all(r["return"] == "" for r in rows[:2]) and all(math.isfinite(float(r["return"])) for r in rows[2:])


@pytest.mark.parametrize("count, judged", [(0, 0), (1, 1), (2, 1), (3, 2), (6, 3), (19, 10), (20, 10), (100, 10)])
def test_a_run_is_judged_by_its_last_evaluations(count, judged):
    rows = [{"stage": "critics", "step": 9, "return": -1.0}] + [
        {"stage": "policy", "step": i, "return": float(i)} for i in range(count)
    ]
    assert [row["step"] for row in support.runs.last_evaluations(rows)] == list(range(count - judged, count))
    assert support.runs.last_evaluations([{"stage": "policy", "step": 1}]) == []  # rollouts were off


def test_metrics_of_bc(bc_run):
    assert [(r["stage"], int(r["step"])) for r in table(bc_run)] == [("policy", 10), ("policy", 20)]


@pytest.mark.parametrize("steps, evals, wanted", [(7, 3, [2, 5, 7]), (3, 10, [1, 2, 3]), (5, 1, [5])])
def test_last_step_is_evaluated(nowhere, tmp_path, steps, evals, wanted):
    comadice_bc.main(args(comadice_bc, nowhere, tmp_path, steps=steps, evals=evals))
    assert [int(r["step"]) for r in table(tmp_path / "nowhere/hopper/random/bc/seed0")] == wanted


def test_saved_ratio_is_the_formula_for_each_transition(run, hopper_data):
    """Sections 4.3 and 4.2, transition by transition, from the networks in the checkpoint."""
    state, (rows, card) = checkpoint(run), open_dataset(hopper_data)
    assert state["w"].shape == (card["samples"],)
    arguments = comadice_train.Args(**state["config"])
    critics = comadice_train.make_critics(card, arguments)
    critics.load_state_dict(state["target"])
    low, high, _ = comadice_train.data_facts(rows, arguments)
    w = []
    with torch.no_grad():
        for episode in episodes(rows):
            nu_tot = critics.mixer(critics.nu(episode["agents", "observation"]), episode["state"])
            for t in range(len(episode) - 1):
                after = 0 if episode["terminated"][t] else arguments.gamma * nu_tot[t + 1].clamp(low, high)
                A = arguments.reward_scale * episode["reward"][t, 0] + after - nu_tot[t]
                alpha = 0.5 * arguments.alpha * arguments.reward_scale  # --policy-alpha is 0.5 by default
                w.append(losses.occupancy_ratio(A, alpha, losses.DIVERGENCES[arguments.f]))
    torch.testing.assert_close(state["w"], torch.stack(w))
    assert state["w"].std() > 0


@pytest.mark.parametrize(
    "objective, mixer_layers", [("exact", 1), ("exact", 2), ("printed", 1), ("printed", 2), ("released_nu", 1)]
)
def test_objectives_train(nowhere, tmp_path, objective, mixer_layers):
    comadice_train.main(
        args(
            comadice_train,
            nowhere,
            tmp_path,
            steps=3,
            objective=objective,
            advantage="q",
            mixer_layers=mixer_layers,
            lambda_scale=1.0,
        )
    )
    state = checkpoint(tmp_path / "nowhere/hopper/random/comadice/seed0")
    assert state["w"].isfinite().all() and (state["w"] >= 0).all() and state["critics"]["lam"] != 0


@pytest.mark.parametrize("advantage", ["td", "q"])
def test_discrete_actions_train(discrete_data, tmp_path, advantage):
    """One seed alone, then two together, and the first seed's ratio in another policy."""
    comadice_train.main(args(comadice_train, discrete_data, tmp_path, advantage=advantage))
    path = tmp_path / "nowhere/game/random/comadice/seed0"
    comadice_bc.main(args(comadice_bc, discrete_data, tmp_path, checkpoint=str(path)))
    comadice_train.main(args(comadice_train, discrete_data, tmp_path / "both", advantage=advantage, seeds=[0, 1]))
    both = checkpoint(tmp_path / "both/nowhere/game/random/comadice/seed0")
    assert checkpoint(path)["w"].shape == both["w"].shape == (both["card"]["samples"],)
    torch.testing.assert_close(checkpoint(path)["w"], both["w"], rtol=0.05, atol=0.01)
    assert (path / "ratio.png").stat().st_size > 10_000
    for algo in ("comadice", "weighted-bc"):
        state = checkpoint(tmp_path / f"nowhere/game/random/{algo}/seed0")
        assert all(v.isfinite().all() for v in state["policy"].values())


def test_no_simulator_trains_without_evaluation(nowhere, tmp_path, capsys):
    comadice_train.main(args(comadice_train, nowhere, tmp_path))
    off = [line for line in capsys.readouterr().out.splitlines() if "rollouts are off" in line]
    assert len(off) == 1 and "nowhere" in off[0]
    path = tmp_path / "nowhere/hopper/random/comadice/seed0"
    assert json.loads((path / "summary.json").read_text())["return"] is None
    assert "return" not in table(path)[-1] and checkpoint(path)["step"] == 20


def nearly(a: dict, b: dict):
    """The same batches, and weights as near as float32 keeps them: an Adam step is at most about 1e-3 here."""
    assert torch.equal(a["generator"], b["generator"])
    for part in ("critics", "target", "eta", "policy"):
        for key, value in a[part].items():
            torch.testing.assert_close(value, b[part][key], rtol=0, atol=2e-3)


def test_several_seeds_differ_and_each_is_the_run_alone(hopper_data, run, tmp_path):
    comadice_train.main(args(comadice_train, hopper_data, tmp_path, seeds=[1, 0]))
    both = [checkpoint(folder(tmp_path, "comadice", seed)) for seed in (0, 1)]
    nearly(both[0], checkpoint(run))
    assert not torch.equal(both[0]["generator"], both[1]["generator"]) and not same_weights(both[0], both[1])
    torch.testing.assert_close(both[0]["w"], checkpoint(run)["w"], rtol=0.05, atol=0.01)
    assert [row["step"] for row in table(folder(tmp_path, "comadice", 1))] == [row["step"] for row in table(run)]
    summary = json.loads((folder(tmp_path, "comadice", 0) / "summary.json").read_text())
    assert summary["seed"] == 0 and summary["seeds_together"] == 2 and 0 < summary["update_share"] <= 1


@pytest.mark.parametrize("call", [1, 3, 6])
def test_seeds_that_were_stopped_between_their_checkpoints(call, hopper_data, run, tmp_path, monkeypatch):
    """Seed 0 has its checkpoint and seed 1 has not, so they are no longer at the same step.

    Both finish as they would have.
    """
    with monkeypatch.context() as patch:
        stop_at(patch, support.runs, "save_checkpoint", call, True)
        with pytest.raises(Stop):
            train(hopper_data, tmp_path, seeds=[0, 1])
    train(hopper_data, tmp_path, seeds=[0, 1], resume=True)
    nearly(checkpoint(folder(tmp_path, "comadice", 0)), checkpoint(run))
    alone = train(hopper_data, tmp_path / "alone", seeds=[1])
    nearly(checkpoint(folder(tmp_path, "comadice", 1)), checkpoint(alone.with_name("seed1")))
    assert [row["step"] for row in table(folder(tmp_path, "comadice", 1))] == [row["step"] for row in table(run)]


@pytest.mark.parametrize("module", [comadice_train, comadice_bc])
def test_same_seed_same_result(module, hopper_data, run, bc_run, tmp_path):
    again = train(hopper_data, tmp_path, module)
    first = run if module is comadice_train else bc_run
    assert same_weights(checkpoint(again), checkpoint(first))
    assert (again / "metrics.csv").read_bytes() == (first / "metrics.csv").read_bytes()


def test_demonstration(hopper_data, tmp_path, monkeypatch, capsys):
    """What `python comadice_train.py` runs, at a toy size: three methods, a table and a plot.

    The second time nothing is trained again.
    """
    demo = dataclasses.replace(
        comadice_train.DEMO,
        data=str(hopper_data),
        seeds=[0, 1],
        steps=4,
        evals=2,
        eval_episodes=2,
        hidden=16,
        device="cpu",
        out=str(tmp_path / "runs"),
    )
    runs = tmp_path / "runs/mamujoco/hopper/random"
    hashes = []
    for _ in range(2):
        comadice_train.main(demo, is_demo=True)
        printed = capsys.readouterr().out
        lines = {line.split("  ")[0]: line for line in printed.splitlines() if "±" in line}
        assert printed.startswith("preset comadice: objective semi, w* from td, ")
        hashes.append({k: v for k, v in files_hash(runs).items() if not k.endswith(".png")})
    assert hashes[0] == hashes[1]
    for algo, name in (("comadice", "ComaDICE"), ("bc", "BC"), ("bc-best10", "BC on the best 10%")):
        scores = np.array(
            [json.loads((runs / f"{algo}/seed{seed}/summary.json").read_text())["return"] for seed in (0, 1)]
        )
        assert f"{scores.mean():.2f} ± {scores.std(ddof=1):.2f}" in lines[name]
    assert "behaviour data" in lines and (runs / "demonstration.png").stat().st_size > 5000
    assert f"{runs}/ratio.png: correlation of episode weight and episode return: " in printed.splitlines()[-1]
    assert (runs / "ratio.png").read_bytes() == (runs / "comadice/seed0/ratio.png").read_bytes()


@pytest.mark.parametrize("flags, scale", [({}, 1), ({"objective": "exact"}, 1), ({"action_scale": 0.5}, 0.5)])
def test_the_demonstration_s_bcs_play_comadice_s_action_scale(flags, scale, hopper_data, tmp_path):
    size = {"seeds": [0], "steps": 2, "evals": 1, "eval_episodes": 1, "hidden": 16, "device": "cpu"}
    place = {"data": str(hopper_data), "out": str(tmp_path / "runs")}
    demo = comadice_train.demonstration(comadice_train.Args(**flags))
    comadice_train.main(dataclasses.replace(demo, **size | place | flags), is_demo=True)
    played = lambda algo: json.loads(
        (tmp_path / f"runs/mamujoco/hopper/random/{algo}/seed0/config.json").read_text()
    )["action_scale"]
    assert played("comadice") == played("bc") == played("bc-best10") == scale


def test_the_demonstration_has_an_episode_alpha_of_its_own_only_with_its_own_method():
    """Otherwise --preset paper would draw by episodes, which the paper does not."""

    def chosen(**flags):
        args = comadice_train.demonstration(comadice_train.Args(**flags))
        return args.episode_alpha, args.action_scale

    assert chosen() == chosen(steps=5) == (43.29, 1.0)
    assert chosen(preset="paper") == chosen(objective="exact") == chosen(alpha=1e6) == (None, 1.0)
    paper = comadice_train.demonstration(comadice_train.Args(preset="paper"))
    assert comadice_train.resolve(dataclasses.replace(paper, preset="paper"), 0.4).episode_alpha == 0


@pytest.mark.parametrize(
    "flags, demonstrated",
    [(("--overwrite",), True), (("--quality", "demo"), False)],
)
def test_the_demonstration_is_what_runs_without_a_task(flags, demonstrated, tmp_path):
    """Other flags change the demonstration and do not turn it into a run of an hour."""
    small = [
        "--steps", "2", "--evals", "1", "--eval-episodes", "1", "--hidden", "8", "--device", "cpu", "--seeds", "4",
        "--out", tmp_path,
    ]  # fmt: skip
    done = script("comadice_train.py", *small, *flags)
    assert done.returncode == 0, done.stderr
    quality = "few-good" if demonstrated else "demo"
    methods = {path.name for path in (tmp_path / "mamujoco/hopper" / quality).iterdir() if path.is_dir()}
    assert methods == ({"comadice", "bc", "bc-best10"} if demonstrated else {"comadice"})
    assert ("BC on the best 10%" in done.stdout) == demonstrated


# ---------------------------------------------------------------- weighted behavioural cloning


def test_weighted_bc_uses_the_ratio_of_the_run(hopper_data, run, bc_run, tmp_path):
    weighted = train(hopper_data, tmp_path, comadice_bc, "weighted-bc", checkpoint=str(run))
    state, w = checkpoint(weighted), checkpoint(run)["w"]
    assert torch.equal(state["w"], w) and not same_weights(state, checkpoint(bc_run))
    with pytest.raises(BadInput, match="holds no ratio"):  # it has w, but not the flags that say how to draw
        train(hopper_data, tmp_path / "third", comadice_bc, "weighted-bc", checkpoint=str(weighted))
    assert float(table(weighted)[-1]["mean_w"]) == pytest.approx(w.mean().item())
    # A constant ratio, whatever its size, is plain BC where no episode is drawn more often than another.
    source, old = shutil.copytree(run, tmp_path / "constant"), checkpoint(run)
    torch.save(
        old | {"w": torch.full_like(w, 4.0), "config": old["config"] | {"episode_alpha": 0.0}}, source / "checkpoint.pt"
    )
    constant = train(hopper_data, tmp_path / "again", comadice_bc, "weighted-bc", checkpoint=str(source))
    assert same_weights(checkpoint(constant), checkpoint(bc_run))


def test_weighted_bc_goes_on_with_the_same_ratio_alone(hopper_data, run, tmp_path, capsys):
    source = shutil.copytree(run, tmp_path / "source")
    weighted = functools.partial(train, hopper_data, tmp_path, comadice_bc, "weighted-bc", checkpoint=str(source))
    weighted()
    weighted(steps=40, evals=4, resume=True)
    state = checkpoint(source)
    torch.save(state | {"w": state["w"] * 1.01}, source / "checkpoint.pt")
    before = files_hash(tmp_path)
    more = args(comadice_bc, hopper_data, tmp_path, checkpoint=str(source), steps=80, evals=8, resume=True)
    refused(capsys, comadice_bc.main, more, "was begun with another ratio .*source has changed since")
    assert files_hash(tmp_path) == before


@pytest.mark.parametrize("value", [0.0, float("nan"), 3e38])
def test_weighted_bc_with_a_ratio_that_diverged(value, hopper_data, run, tmp_path, capsys):
    source, state = shutil.copytree(run, tmp_path / "source"), checkpoint(run)
    torch.save(state | {"w": torch.full_like(state["w"], value)}, source / "checkpoint.pt")
    bad = args(comadice_bc, hopper_data, tmp_path / "runs", checkpoint=str(source))
    refused(capsys, comadice_bc.main, bad, "its ratio .* can't be used, since its mean is")
    assert not (tmp_path / "runs").exists()


def test_weighted_bc_of_a_run_older_than_the_ratio_between_episodes(hopper_data, run, tmp_path):
    source, state = shutil.copytree(run, tmp_path / "source"), checkpoint(run)
    del state["config"]["episode_alpha"]
    torch.save(state, source / "checkpoint.pt")
    rows, card = open_dataset(hopper_data)
    w, weights = comadice_bc.load_ratio(str(source), rows, card)
    assert torch.equal(w, state["w"]) and weights is None


def test_ratios_lie_beside_their_transitions(hopper_data):
    rows, card = open_dataset(hopper_data)
    w = torch.rand(card["samples"], generator=torch.Generator().manual_seed(0))
    weighted = comadice_bc.with_ratios(rows, {0: w})["w"]
    last = last_rows(rows)
    torch.testing.assert_close(weighted[~last], w / w.mean())
    assert not weighted[last].any()
    assert torch.equal(comadice_bc.with_ratios(rows, {0: None})["w"], (~last).float())


# ---------------------------------------------------------------- evaluation


def wobbly_policy() -> torch.nn.Module:
    """A deterministic policy whose episodes in hopper have different lengths."""
    torch.manual_seed(0)
    policy = make_policy(3, 14, 1, False, 16)
    for parameter in policy.parameters():
        parameter.data *= 3
    return policy


@torch.no_grad()
def play(policy, seed: int) -> tuple[float, int]:
    """One episode in the plain Gymnasium environment, with the benchmark's observations."""
    env = gymnasium.make("Hopper-v5")
    obs, _ = env.reset(seed=seed)
    total, length, over = 0.0, 0, False
    while not over:
        views = np.concatenate([np.tile(obs, (3, 1)), np.eye(3)], -1)
        views = (views - views.mean(-1, keepdims=True)) / views.std(-1, keepdims=True)
        action = policy.act(torch.as_tensor(views[None], dtype=torch.float32))
        obs, reward, terminated, truncated, _ = env.step(action.numpy().astype(np.float64).reshape(-1).clip(-1, 1))
        total, length, over = total + reward, length + 1, terminated or truncated
    env.close()
    return total, length


def test_evaluate_plays_whole_episodes_of_the_plain_simulator():
    policy, env = wobbly_policy(), make_env("mamujoco", "hopper", 4)
    env.set_seed(5)
    alone = [play(policy, seed) for seed in env.seeds]
    assert len({length for _, length in alone}) > 1, "the test needs episodes of different lengths"
    random_state = torch.get_rng_state()
    result = comadice_eval.evaluate(policy, env, 4, 5)
    assert torch.equal(random_state, torch.get_rng_state())
    returns = np.array([total for total, _ in alone])
    np.testing.assert_allclose(result["returns"], returns, rtol=1e-5)
    assert result["return_mean"] == pytest.approx(returns.mean(), rel=1e-5)
    assert result["return_std"] == pytest.approx(returns.std(ddof=1), rel=1e-4)
    assert result["length"] == pytest.approx(np.mean([length for _, length in alone]))
    assert comadice_eval.evaluate(policy, env, 4, 5) == result and comadice_eval.evaluate(policy, env, 4, 6) != result
    env.close()


@pytest.mark.parametrize(
    "module, algo", [(comadice_train, "comadice"), (comadice_bc, "bc"), (icq, "icq"), (omiga, "omiga")]
)
def test_action_scale_reaches_the_simulator(module, algo, hopper_data, tmp_path):
    """The evaluations of a run, and later ones of its checkpoint, play --action-scale times the mean action."""
    run = train(hopper_data, tmp_path, module, algo, action_scale=0.4, lr=0.03, steps=10, evals=1)
    mean = make_policy(3, 14, 1, False, 16)
    mean.load_state_dict(checkpoint(run)["policy"])
    env = make_env("mamujoco", "hopper", 2)
    env.set_seed(int(np.random.SeedSequence((0, 10)).generate_state(1)[0]))
    scores = {}
    for scale in (0.4, 1.0):
        policy = SimpleNamespace(act=lambda obs: scale * mean.act(obs))
        scores[scale] = np.mean([play(policy, seed)[0] for seed in env.seeds])
    env.close()
    assert abs(scores[0.4] / scores[1.0] - 1) > 1e-3
    assert float(table(run)[-1]["return"]) == pytest.approx(scores[0.4], rel=1e-5)
    assert json.loads((run / "summary.json").read_text())["action_scale"] == 0.4
    obs = torch.randn(5, 3, 14)
    torch.testing.assert_close(comadice_eval.load_policy(run)[0].act(obs), 0.4 * mean.act(obs))
    state = checkpoint(run)
    del state["config"]["action_scale"]  # a run that was made before this flag played its mean
    torch.save(state, run / "checkpoint.pt")
    torch.testing.assert_close(comadice_eval.load_policy(run)[0].act(obs), mean.act(obs))
    torch.testing.assert_close(comadice_eval.load_policy(run, action_scale=0.4)[0].act(obs), 0.4 * mean.act(obs))
    config = json.loads((run / "config.json").read_text())
    del config["action_scale"]
    (run / "config.json").write_text(json.dumps(config))
    flags = {"lr": 0.03, "steps": 10, "evals": 1, "resume": True}
    train(hopper_data, tmp_path, module, algo, action_scale=1.0, **flags)
    with pytest.raises(BadInput, match=r"action_scale 1\.0, not 0\.4"):
        train(hopper_data, tmp_path, module, algo, action_scale=0.4, **flags)


def test_a_run_from_before_policy_alpha_goes_on(hopper_data, tmp_path):
    older = {"policy_alpha": 1.0, "neighbours": False, "critic_lr_decay": False}
    run = train(hopper_data, tmp_path, steps=10, evals=1, **older)
    config, state = json.loads((run / "config.json").read_text()), checkpoint(run)
    for flag in older:
        del config[flag], state["config"][flag]
    (run / "config.json").write_text(json.dumps(config))
    torch.save(state, run / "checkpoint.pt")
    assert support.runs.load_checkpoint(run)["config"]["neighbours"] is False
    rows, card = open_dataset(hopper_data)
    _, weights = comadice_bc.load_ratio(str(run), rows, card)
    torch.testing.assert_close(weights, episode_weights(rows, config["episode_alpha"], config["f"]))
    train(hopper_data, tmp_path, steps=20, evals=2, resume=True, **older)
    assert checkpoint(run)["step"] == 20
    with pytest.raises(BadInput, match=r"neighbours False, not True, policy_alpha 1\.0, not 0\.5"):
        train(hopper_data, tmp_path, steps=20, evals=2, resume=True)


@pytest.mark.parametrize("advantage", ["td", "q"])
def test_an_older_run_with_another_w_from_q_does_not_go_on(advantage, hopper_data, tmp_path):
    """Once --residual mixed q with the TD form. Its q learned from other transitions, whatever the flags."""
    run = train(hopper_data, tmp_path, steps=10, evals=1, advantage=advantage)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"residual": 0.3}))
    resume = lambda: train(hopper_data, tmp_path, steps=20, evals=2, resume=True, advantage=advantage)
    if advantage == "q":
        with pytest.raises(BadInput, match="whose --residual is gone"):
            resume()
    else:
        resume()
        assert checkpoint(run)["step"] == 20


@pytest.mark.parametrize("decay", [True, False])
def test_the_critics_learning_rate_falls_to_zero(decay, hopper_data, tmp_path):
    flags = {"objective": "exact", "lambda_scale": 0.5, "critic_lr": 1e-3, "critic_lr_decay": decay}
    run = train(hopper_data, tmp_path, steps=10, evals=1, **flags)
    networks, multiplier = checkpoint(run)["critic_optimizer"]["param_groups"]
    assert float(networks["lr"]) == pytest.approx(1e-4 if decay else 1e-3)
    assert float(multiplier["lr"]) == pytest.approx(5e-4)


def test_evaluate_more_episodes_than_robots():
    policy, env = wobbly_policy(), make_env("mamujoco", "hopper", 2)
    five = comadice_eval.evaluate(policy, env, 5, 5)
    assert len(five["returns"]) == 5 == len(set(five["returns"]))
    assert comadice_eval.evaluate(policy, env, 2, 5)["returns"] == five["returns"][:2]
    env.close()


def test_evaluate_in_worker_processes():
    """Robots that finish at different times in different processes."""
    policy = wobbly_policy()
    workers, one = make_env("mamujoco", "hopper", 2, workers=2), make_env("mamujoco", "hopper", 2)
    together = comadice_eval.evaluate(policy, workers, 4, 5)
    apart = [comadice_eval.evaluate(policy, one, 2, seed)["returns"] for seed in (5, one.set_seed(5))]
    assert len({round(r, 3) for r in together["returns"]}) > 1
    np.testing.assert_allclose(together["returns"], apart[0] + apart[1], rtol=1e-6)
    workers.close()
    one.close()


def test_no_more_workers_than_episodes(hopper_data):
    _, card = open_dataset(hopper_data)
    env = comadice_eval.eval_env(card, 2, workers=5)
    assert env.batch_size[:2] == (2, 1)  # two processes of one robot each
    env.close()


def test_evaluations_of_two_steps_start_from_different_states():
    """The start states are drawn from (seed, step), and an evaluation repeats for the same pair."""
    policy, env = wobbly_policy(), make_env("mamujoco", "hopper", 3)
    starts, original = [], env.reset
    env.reset = lambda: starts.append(original()) or starts[-1]
    results = {pair: comadice_eval.evaluation(policy, env, 3, *pair) for pair in ((0, 10), (0, 20), (1, 10), (10, 0))}
    first = [td["state"] for td in starts]
    assert len(first) == 4 and not any(torch.equal(first[i], first[j]) for i in range(4) for j in range(i))
    assert len({result["return"] for result in results.values()}) == 4
    assert comadice_eval.evaluation(policy, env, 3, 0, 10) == results[0, 10]
    assert torch.equal(starts[-1]["state"], first[0])
    assert set(results[0, 10]) == {"return", "return_std", "winrate", "replayed"}
    assert comadice_eval.evaluation(policy, None, 3, 0, 10) == {}
    env.close()


def seed_of(seed: int, step: int) -> int:
    """The simulator's seed at an evaluation, for comadice_eval.py --seed."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1)[0])


def test_eval_script_gives_the_return_of_the_run(run, bc_run, tmp_path, capsys):
    arguments = comadice_eval.Args(
        run=[str(run), str(bc_run)], episodes=2, device="cpu", out=str(tmp_path / "result.json"), seed=seed_of(0, 20)
    )
    comadice_eval.main(arguments)
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "result.json").read_text())
    for path, result in zip((run, bc_run), results):
        last = table(path)[-1]
        assert (result["run"], result["episodes"]) == (str(path), 2)
        assert (result["return_mean"], result["return_std"]) == (float(last["return"]), float(last["return_std"]))
        assert f"{result['return_mean']:.2f} ± {result['return_std']:.2f}" in printed
    assert "over runs" not in printed  # ComaDICE and BC have no common mean


def test_eval_script_averages_over_seeds(bc_run, tmp_path, capsys):
    state = torch.load(bc_run / "checkpoint.pt", weights_only=True)
    state["policy"] = {name: 1.5 * value for name, value in state["policy"].items()}
    torch.save(state, tmp_path / "checkpoint.pt")
    comadice_eval.main(
        comadice_eval.Args(
            run=[str(bc_run), str(tmp_path)], episodes=2, device="cpu", out=str(tmp_path / "result.json")
        )
    )
    means = np.array([r["return_mean"] for r in json.loads((tmp_path / "result.json").read_text())])
    assert means.std() > 0
    assert f"{means.mean():.2f} ± {means.std(ddof=1):.2f}" in capsys.readouterr().out.splitlines()[-1]
    for other in (bc_run, tmp_path):  # the same run twice, a run of other arguments
        comadice_eval.main(comadice_eval.Args(run=[str(bc_run), str(other)], episodes=2, device="cpu"))
        assert "over runs" not in capsys.readouterr().out
        torch.save(state | {"config": state["config"] | {"lr": 1.0}}, tmp_path / "checkpoint.pt")


def test_eval_script_averages_runs_that_are_played_alike(bc_run, tmp_path, capsys):
    """A run from before --action-scale has a common mean with another run where both play the same multiple."""
    state = checkpoint(bc_run)
    del state["config"]["action_scale"]
    torch.save(state, tmp_path / "checkpoint.pt")
    for scale in (None, 0.85):
        comadice_eval.main(
            comadice_eval.Args(run=[str(bc_run), str(tmp_path)], episodes=2, device="cpu", action_scale=scale)
        )
        assert ("over runs" in capsys.readouterr().out) == (scale == 0.85)


# ---------------------------------------------------------------- killed runs


class Stop(KeyboardInterrupt):
    """What a test raises where a run is to be cut off."""


def stop_at(monkeypatch, module, name: str, call: int, after: bool = False):
    """Lets the call-th call of module.name raise Stop, before or after its work."""
    original, calls = getattr(module, name), []

    def stopping(*a, **k):
        calls.append(1)
        if len(calls) == call and not after:
            raise Stop
        result = original(*a, **k)
        if len(calls) == call:
            raise Stop
        return result

    monkeypatch.setattr(module, name, stopping)


# The run has 20 steps a stage and 2 evaluations in each.
# So calls 1 and 2 of save_checkpoint are in stage one, 3 and 4 in stage two.
CUTS = {
    "before any checkpoint": (comadice_train, "critic_losses", 7, False),
    "at the first checkpoint": (support.runs, "save_checkpoint", 1, True),
    "in stage one": (comadice_train, "critic_losses", 14, False),
    "at the end of stage one": (support.runs, "save_checkpoint", 2, True),
    "at the start of stage two": (comadice_bc, "policy_losses", 3, False),
    "at the first checkpoint of stage two": (support.runs, "save_checkpoint", 3, True),
    "in stage two": (comadice_bc, "policy_losses", 13, False),
    "in the last evaluation": (comadice_bc, "evaluation", 2, True),
    "at the last checkpoint": (support.runs, "save_checkpoint", 4, True),
    "between checkpoint and table": (csv, "DictWriter", 3, False),
    "between last checkpoint and table": (csv, "DictWriter", 4, False),
    "before the summary": (comadice_train, "finish_run", 1, False),
}


@pytest.mark.parametrize("cut", CUTS)
def test_stopped_comadice_run_goes_on_to_the_same_result(cut, hopper_data, run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, *CUTS[cut])
        with pytest.raises(Stop):
            train(hopper_data, tmp_path)
    stopped = folder(tmp_path, "comadice")
    assert not (stopped / "summary.json").exists()
    torch.manual_seed(1234)  # a new process has another random state
    train(hopper_data, tmp_path, resume=True)
    resumed, whole = checkpoint(stopped), checkpoint(run)
    for part in ("critics", "target", "eta", "policy"):
        assert same_weights(resumed, whole, part), part
    assert torch.equal(resumed["w"], whole["w"])
    assert (stopped / "metrics.csv").read_text() == (run / "metrics.csv").read_text()
    ours, theirs = (json.loads((p / "summary.json").read_text()) for p in (stopped, run))
    assert all(ours[k] == theirs[k] for k in theirs if k not in ("updates_per_second", "update_share", "peak_rss_mb"))
    assert sorted(p.name for p in stopped.iterdir()) == sorted(p.name for p in run.iterdir())


@pytest.mark.parametrize(
    "cut",
    [
        (comadice_bc, "policy_losses", 7, False),
        (comadice_bc, "policy_losses", 14, False),
        (support.runs, "save_checkpoint", 1, True),
        (support.runs, "save_checkpoint", 2, True),
    ],
)
def test_stopped_bc_run_goes_on_to_the_same_result(cut, hopper_data, bc_run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, *cut)
        with pytest.raises(Stop):
            train(hopper_data, tmp_path, comadice_bc)
    torch.manual_seed(1234)
    resumed = train(hopper_data, tmp_path, comadice_bc, resume=True)
    assert same_weights(checkpoint(resumed), checkpoint(bc_run))
    assert (resumed / "metrics.csv").read_text() == (bc_run / "metrics.csv").read_text()


LONG = {"steps": 160, "evals": 16, "eval_episodes": 1}


@pytest.fixture(scope="session")
def long_run(hopper_data, tmp_path_factory) -> Path:
    return train(hopper_data, tmp_path_factory.mktemp("long"), **LONG)


@pytest.mark.parametrize("stage", ["critics", "policy"])
def test_killed_process_goes_on_to_the_same_result(stage, hopper_data, long_run, tmp_path):
    """A real SIGKILL, as soon as a checkpoint of the stage is there (the one of its first row, once it has two)."""
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in (TINY | LONG).items()]
    process = subprocess.Popen(
        [sys.executable, ROOT / "comadice_train.py", "--data", hopper_data, "--out", tmp_path, *flags],
        stderr=subprocess.DEVNULL,
    )
    stopped = folder(tmp_path, "comadice")
    deadline = time.monotonic() + 120
    while not ((stopped / "metrics.csv").exists() and (stopped / "metrics.csv").read_text().count(f"\n{stage},") >= 2):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended or hung before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    state = checkpoint(stopped)
    assert state["critic_step"] < LONG["steps"] if stage == "critics" else 0 < state["step"] < LONG["steps"]
    train(hopper_data, tmp_path, resume=True, **LONG)
    assert same_weights(checkpoint(stopped), checkpoint(long_run))
    assert (stopped / "metrics.csv").read_text() == (long_run / "metrics.csv").read_text()


# ---------------------------------------------------------------- input that can't be used


def refused(capsys, main, arguments, match: str):
    """Exit code 2, and one line on stderr that says what is wrong."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        environments.checks.run_script(main, arguments)
    lines = capsys.readouterr().err.strip().splitlines()
    assert error.value.code == 2
    assert lines[-1].startswith("error: ") and re.search(match, lines[-1]), lines[-1]
    assert not any("Traceback" in line for line in lines) and sum(line.startswith("error: ") for line in lines) == 1


@pytest.mark.parametrize("module", [comadice_train, comadice_bc])
def test_finished_run_is_kept(module, hopper_data, run, bc_run, tmp_path, capsys):
    source = run if module is comadice_train else bc_run
    shutil.copytree(source, folder(tmp_path, source.parent.name))
    before = files_hash(tmp_path)
    refused(
        capsys,
        module.main,
        args(module, hopper_data, tmp_path),
        "already holds a run: --resume goes on with it, --overwrite replaces it",
    )
    assert files_hash(tmp_path) == before
    train(hopper_data, tmp_path, module, resume=True)
    after = files_hash(tmp_path)
    after = {
        k: v for k, v in after.items() if k in before or not k.endswith(".png")
    }  # the learning curve is drawn again
    assert after == before
    # Resuming with other arguments would mix two runs.
    refused(
        capsys,
        module.main,
        args(module, hopper_data, tmp_path, resume=True, lr=1.0),
        "was started with other arguments .lr 0.001",
    )
    replaced = train(hopper_data, tmp_path, module, overwrite=True, steps=4)
    assert checkpoint(replaced)["step"] == 4 and len(table(replaced)) == 2 * (2 if module is comadice_train else 1)


@pytest.mark.parametrize("module", [comadice_train, comadice_bc])
def test_run_of_another_device_is_not_gone_on_with(module, hopper_data, tmp_path, capsys):
    """A GPU's random numbers are others, so the weights would be others too."""
    path = train(hopper_data, tmp_path, module, steps=4)
    state = checkpoint(path)
    assert state["where"] == "cpu with the data on cpu"
    torch.save(state | {"where": "cuda with the data on cpu"}, path / "checkpoint.pt")
    before = files_hash(tmp_path)
    refused(
        capsys,
        module.main,
        args(module, hopper_data, tmp_path, steps=4, resume=True),
        "was trained on cuda with the data on cpu, .*--device",
    )
    assert files_hash(tmp_path) == before


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), 3e38])  # the last one's mean overflows
def test_ratio_of_diverged_critics_is_refused(value, hopper_data):
    rows, card = open_dataset(hopper_data)
    with pytest.raises(BadInput, match=r"seed 3: .*critics diverged"):
        comadice_bc.with_ratios(rows, {3: torch.full((card["samples"],), value)})


def test_normaliser_with_semi(hopper_data, tmp_path, capsys):
    """`semi` needs no multiplier, so its gradient does not reach lambda."""
    refused(
        capsys,
        comadice_train.main,
        args(comadice_train, hopper_data, tmp_path / "runs", objective="semi", lambda_scale=1.0),
        "--lambda-scale",
    )
    assert not (tmp_path / "runs").exists()


FLAGS = [
    ({"steps": -5}, "--steps is -5: give a positive number"),
    ({"steps": 0}, "--steps is 0"),
    ({"batch_size": 0}, "--batch-size is 0"),
    ({"hidden": -1}, "--hidden is -1"),
    ({"evals": 0}, "--evals is 0"),
    ({"eval_episodes": 0}, "--eval-episodes is 0"),
    ({"workers": 0}, "--workers is 0"),
    ({"seeds": []}, "--seeds"),
    ({"seeds": [1, 1]}, "--seeds"),
    ({"device": "nonsense"}, "--device nonsense"),
    ({"device": "cuda:99"}, "--device cuda:99: .*; use --device auto"),
    ({"task": "ant"}, "is a dataset of task 'hopper', not 'ant'"),
    ({"data": "/nothing/there"}, "no dataset at /nothing/there"),
    ({"data": None, "task": "hoper"}, "unknown mamujoco task 'hoper'"),
    ({"data": None, "env": "nowhere"}, "unknown env 'nowhere'"),
    (
        {"data": None, "task": "ant", "quality": "nothing"},
        "no dataset at .*/ant/nothing: make it with `python -m offline_data collect",
    ),
    ({"lr": -1.0}, "--lr"),
]
TRAIN_FLAGS = [
    ({"alpha": 0.0}, "--alpha"),
    ({"alpha": -1.0}, "--alpha"),
    ({"alpha": 1e200}, "--alpha"),
    ({"gamma": 1.5}, "--gamma"),
    ({"tau": 2.0}, "--tau"),
    ({"reward_scale": 0.0}, "--reward-scale"),
    ({"mixer_hidden": 0}, "--mixer-hidden"),
    ({"objective": "exact", "lambda_scale": -1.0}, "--lambda-scale"),
    ({"objective": "released_nu", "mixer_layers": 2}, "--mixer-layers"),
    ({"objective": "printed", "advantage": "td"}, "--advantage q"),
    ({"policy_alpha": 0.0}, "--policy-alpha"),
    ({"objective": "released_nu", "advantage": "td"}, "--advantage q"),
    ({"critic_lr": 0.0}, "--critic-lr"),
    ({"action_scale": 0.0}, "--action-scale"),
    ({"ema": 1.0}, "--ema"),
]
BC_FLAGS = [
    ({"ema": -0.1}, "--ema"),
    ({"action_scale": math.inf}, "--action-scale"),
    ({"best": 0.0}, "--best"),
    ({"best": 1.1}, "--best"),
    ({"best": 0.5, "checkpoint": "runs"}, "--best and --checkpoint"),
]


@pytest.mark.parametrize(
    "module, flags, match",
    [(comadice_bc, *f) for f in FLAGS + BC_FLAGS] + [(comadice_train, *f) for f in FLAGS + TRAIN_FLAGS],
)
def test_bad_flags(module, flags, match, hopper_data, tmp_path, capsys):
    before = files_hash(hopper_data)
    refused(capsys, module.main, args(module, hopper_data, tmp_path / "runs", **flags), match)
    assert not (tmp_path / "runs").exists() and files_hash(hopper_data) == before


def cut_file(path):
    file = path / "agents" / "observation.memmap"
    file.write_bytes(file.read_bytes()[: -(4 * 14 * 3)])


def nan_reward(path):
    data = np.fromfile(path / "reward.memmap", np.float32)
    data[3] = np.nan
    data.tofile(path / "reward.memmap")


DAMAGE = {
    "cut": (cut_file, "observation.memmap has .* bytes, .* are needed"),
    "NaN": (nan_reward, "reward is not finite at row 3"),
    "dims": (lambda path: edit(path, obs_dim=15), "meta.json does not describe agents/observation"),
    "no card": (lambda path: (path / "card.json").unlink(), "card.json is missing"),
}


@pytest.mark.parametrize("module", [comadice_train, comadice_bc])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_dataset(module, damage, hopper_data, tmp_path, capsys):
    path = shutil.copytree(hopper_data, tmp_path / "data")
    DAMAGE[damage][0](path)
    before = files_hash(path)
    refused(capsys, module.main, args(module, path, tmp_path / "runs"), DAMAGE[damage][1])
    assert files_hash(path) == before and not (tmp_path / "runs").exists()


def test_dataset_whose_sizes_are_not_the_simulators(hopper_episodes, tmp_path, capsys):
    """A dataset that is sound in itself, but was made with another observation."""
    writer = DatasetWriter(tmp_path / "data")
    agents = hopper_episodes[0]["agents"]
    short = (
        hopper_episodes[0]
        .clone()
        .set(
            "agents",
            TensorDict({"observation": agents["observation"][..., :9], "action": agents["action"]}, agents.shape),
        )
    )
    writer.append(short)
    path = writer.close(hopper_card())
    refused(
        capsys,
        comadice_train.main,
        args(comadice_train, path, tmp_path / "runs"),
        "the dataset's obs_dim is 9, the simulator of mamujoco hopper has 14",
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("module", [comadice_train, comadice_bc])
def test_unwritable_out(module, hopper_data, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    refused(
        capsys, module.main, args(module, hopper_data, tmp_path / "file" / "runs"), "can't write .*: Not a directory"
    )
    assert (tmp_path / "file").read_text() == "kept"


def bad_checkpoint(kind: str, run: Path, path: Path) -> str:
    """Makes a run directory whose checkpoint can't be used; what the message must say."""
    shutil.copytree(run, path)
    file, state = path / "checkpoint.pt", checkpoint(run)
    if kind == "missing":
        file.unlink()
        return "no checkpoint at"
    if kind == "cut":
        file.write_bytes(file.read_bytes()[:2000])
        return "is not a checkpoint that can be read"
    if kind == "text":
        file.write_text("not a checkpoint\n" * 50)
        return "is not a checkpoint that can be read"
    if kind == "code":
        torch.save({**state, "policy": Path("objects are not loaded")}, file)
        return "is not a checkpoint that can be read"
    if kind == "a list":
        torch.save([1, 2], file)
        return "is not a checkpoint of this project"
    if kind == "parts":
        torch.save({"policy": state["policy"]}, file)
        return "is not a checkpoint of this project"
    raise ValueError(kind)


KINDS = ["missing", "cut", "text", "code", "a list", "parts"]


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_that_cannot_be_read(kind, run, hopper_data, tmp_path, capsys):
    match = bad_checkpoint(kind, run, tmp_path / "run")
    refused(
        capsys,
        comadice_eval.main,
        comadice_eval.Args(run=[str(run), str(tmp_path / "run")], episodes=1, device="cpu"),
        match,
    )
    refused(
        capsys,
        comadice_bc.main,
        args(comadice_bc, hopper_data, tmp_path / "runs", checkpoint=str(tmp_path / "run")),
        match,
    )
    assert not (tmp_path / "runs").exists()
    if kind != "missing":
        resumed = folder(tmp_path / "resumed", "comadice")
        shutil.copytree(tmp_path / "run", resumed)
        before = files_hash(resumed)
        refused(
            capsys, comadice_train.main, args(comadice_train, hopper_data, tmp_path / "resumed", resume=True), match
        )
        assert files_hash(resumed) == before


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_resume_with_a_damaged_config(content, run, hopper_data, tmp_path, capsys):
    path = folder(tmp_path, "comadice")
    shutil.copytree(run, path)
    (path / "config.json").write_text(content)
    refused(capsys, comadice_train.main, args(comadice_train, hopper_data, tmp_path, resume=True), "config.json")


def test_checkpoint_of_another_task(run, hopper_data, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "ant")
    state = checkpoint(run)
    torch.save(state | {"card": state["card"] | {"task": "ant"}}, tmp_path / "ant" / "checkpoint.pt")
    refused(
        capsys,
        comadice_bc.main,
        args(comadice_bc, hopper_data, tmp_path / "runs", checkpoint=str(tmp_path / "ant")),
        "task is 'ant', here it is 'hopper'",
    )
    assert not (tmp_path / "runs").exists()


def test_checkpoint_of_another_dataset_of_the_task(run, hopper_episodes, tmp_path, capsys):
    """Its ratio would have another number of entries, or belong to other transitions."""
    writer = DatasetWriter(tmp_path / "data")
    writer.append(hopper_episodes[0])
    data = writer.close(hopper_card())
    refused(
        capsys,
        comadice_bc.main,
        args(comadice_bc, data, tmp_path / "runs", checkpoint=str(run)),
        "the checkpoint's samples is 194, here it is 16",
    )
    assert not (tmp_path / "runs").exists()


def test_plain_bc_run_as_source_of_a_ratio(bc_run, hopper_data, tmp_path, capsys):
    refused(
        capsys,
        comadice_bc.main,
        args(comadice_bc, hopper_data, tmp_path / "runs", checkpoint=str(bc_run)),
        "holds no ratio",
    )


def test_run_without_a_policy_yet(hopper_data, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(patch, support.runs, "save_checkpoint", 1, True)
        with pytest.raises(Stop):
            train(hopper_data, tmp_path)
    run = str(folder(tmp_path, "comadice"))
    refused(capsys, comadice_eval.main, comadice_eval.Args(run=[run], episodes=1, device="cpu"), "no policy yet")
    refused(
        capsys, comadice_bc.main, args(comadice_bc, hopper_data, tmp_path / "runs", checkpoint=run), "holds no ratio"
    )


@pytest.mark.parametrize(
    "flags, match",
    [
        ({"run": []}, "--run"),
        ({"run": ["/nothing"]}, "no checkpoint at /nothing"),
        ({"episodes": 0}, "--episodes"),
        ({"action_scale": 0.0}, "--action-scale"),
        ({"workers": 0}, "--workers"),
        ({"device": "nonsense"}, "--device nonsense"),
        ({"out": "FILE/result.json"}, "--out"),
        ({"out": "FILE"}, "is already there"),
        ({"video": "new.gif", "episodes": 51}, "at most 50 episodes"),
    ],
)
def test_bad_flags_of_eval(flags, match, run, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    flags = {k: v.replace("FILE", str(tmp_path / "file")) if k == "out" else v for k, v in flags.items()}
    refused(
        capsys,
        comadice_eval.main,
        comadice_eval.Args(**{"run": [str(run)], "episodes": 1, "device": "cpu"} | flags),
        match,
    )


def test_eval_without_a_simulator(nowhere, run, tmp_path, capsys, monkeypatch):
    """It says so before the first rollout, so that no other run is played in vain."""
    comadice_bc.main(args(comadice_bc, nowhere, tmp_path))
    runs = [str(run), str(tmp_path / "nowhere/hopper/random/bc/seed0")]
    monkeypatch.setattr(comadice_eval, "evaluate", lambda *_: pytest.fail("it was played"))
    refused(capsys, comadice_eval.main, comadice_eval.Args(run=runs, episodes=1, device="cpu"), "unknown env 'nowhere'")


def script(name: str, *flags, cwd=ROOT) -> subprocess.CompletedProcess:
    """A script of the top level by its file, a folder's by `-m`."""
    command = [ROOT / name] if name.endswith(".py") else ["-m", *name.split()]
    return subprocess.run(
        [sys.executable, *command, *map(str, flags)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize(
    "name, flags, match",
    [
        ("comadice_train.py", ["--steps", "-5"], "^error: --steps is -5"),
        ("comadice_bc.py", ["--no-such-flag", "3"], "no-such-flag"),
        ("comadice_eval.py", ["--run", "/nothing"], "^error: no checkpoint at /nothing"),
        ("offline_data collect", ["--task", "hoper", "--out", "OUT"], "^error: unknown mamujoco task 'hoper'"),
        ("baselines.omiga", ["--no-such-flag", "3"], "no-such-flag(.|\n)*python -m baselines.omiga --help"),
        ("benchmarks.paper", ["--no-such-flag", "3"], "no-such-flag(.|\n)*python -m benchmarks.paper --help"),
        ("benchmarks.paper", ["status"], "^error: give the folder of the runs: python -m benchmarks.paper status"),
        ("benchmarks.paper", ["report", "/nothing"], "^error: no folder at /nothing"),
        ("benchmarks.paper", ["--index", "5", "--seeds", "0", "--only", "hopper/expert", "--methods", "bc"], "0 to 0"),
        ("comadice_train.py", ["--steps", "10", "--out", ""], "^error: --out is empty"),
    ],
)
def test_exit_codes_of_processes(name, flags, match, tmp_path):
    done = script(name, *(f.replace("OUT", str(tmp_path / "out")) for f in flags), cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(match, done.stderr if "flag" in match else done.stderr.strip().splitlines()[-1])
    assert not list(tmp_path.iterdir()), "nothing may be half-written"


def test_too_little_memory_is_one_line(tmp_path):
    done = script("comadice_train.py", "--steps", "10", "--hidden", "1000000000", "--quiet", "--out", tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: not enough memory: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "command, code, match",
    [
        ("list | true", 1, "^$"),
        ("list > /dev/full", 2, "^error: No space left on device: free some space"),
        (f"info {'a' * 300}", 2, "^error: File name too long: a"),
    ],
    ids=["closed pipe", "full disk", "long name"],
)
def test_what_the_system_refuses_is_at_most_one_line(command, code, match, tmp_path):
    script = f"set -o pipefail; {sys.executable} -m offline_data {command}"
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert done.returncode == code and re.search(match, done.stderr) and len(done.stderr.splitlines()) <= 1, done.stderr


# ---------------------------------------------------------------- collecting


COLLECT = {
    "steps": 8192,
    "samples": 500,
    "demo_samples": 300,
    "num_envs": 4,
    "horizon": 128,
    "checkpoints": 4,
    "minibatch": 128,
    "epochs": 1,
}
QUALITIES = ["demo", "expert", "medium", "medium-expert", "medium-replay"]


@pytest.fixture(scope="session")
def collected(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("collected")
    offline_data.collect.main(offline_data.collect.Args(out=str(out), **COLLECT))
    return out / "mamujoco" / "hopper"


def curve(collected: Path) -> list[dict]:
    with open(collected / "behaviour" / "curve.csv", newline="") as file:
        return [{"step": int(r["step"]), "return": float(r["return"])} for r in csv.DictReader(file)]


def chosen(points: list[dict]) -> tuple[int, int]:
    """(expert, medium) by the protocol in the script's docstring."""
    returns = [p["return"] for p in points]
    expert = returns.index(max(returns))
    return expert, min(i for i, r in enumerate(returns) if r >= returns[expert] / 3)


def all_rows(path: Path) -> TensorDict:
    return open_dataset(path, "mamujoco", "hopper")[0]


def same_rows(a: TensorDict, b: TensorDict) -> bool:
    keys = [k for k in a.keys(True, True) if k != "episode"]
    return len(a) == len(b) and all(torch.equal(a[k], b[k]) for k in keys)


def test_collect_makes_the_datasets(collected):
    assert sorted(p.name for p in collected.iterdir()) == ["behaviour", *QUALITIES]
    assert [p["step"] for p in curve(collected)] == [2048, 4096, 6144, 8192]
    for quality in QUALITIES:
        rows, card = open_dataset(collected / quality, "mamujoco", "hopper")
        assert card["quality"] == quality and card["interface"] == "benchmark" and "mujoco" in card["engine"]
        sizes = [card[name] for name in ("n_agents", "obs_dim", "state_dim", "action_dim", "discrete")]
        assert sizes == [3, 14, 42, 1, False]
        # Hopper is far from the time limit here: every episode ended by a fall.
        assert torch.equal(rows["terminated"], rows["done"])
    for quality in ("expert", "medium"):
        _, card = open_dataset(collected / quality)
        assert 500 <= card["samples"] < 600


def test_cards_say_how_the_data_were_made(collected):
    points = curve(collected)
    expert, medium = chosen(points)
    arguments = dataclasses.asdict(offline_data.collect.fill_in(offline_data.collect.Args(**COLLECT)))
    del arguments["out"], arguments["overwrite"]  # where it lies is no part of what it is
    for quality in QUALITIES:
        made = open_dataset(collected / quality)[1]["made"]
        assert made["by"] == "python -m offline_data collect" and made["arguments"] == arguments
        if quality in ("expert", "medium"):
            number = expert if quality == "expert" else medium
            assert made["checkpoint"] == number and made["step"] == points[number]["step"]
            assert made["return"] == pytest.approx(points[number]["return"])


def test_medium_replay_is_training_up_to_the_medium_checkpoint(collected):
    _, medium = chosen(curve(collected))
    shards = sorted((collected / "behaviour").glob("episodes-*"))
    assert [s.name for s in shards] == [f"episodes-{i:03d}" for i in range(4)]
    assert same_rows(all_rows(collected / "medium-replay"), torch.cat([all_rows(s) for s in shards[: medium + 1]]))


def test_medium_expert_is_both(collected):
    both = torch.cat([all_rows(collected / "medium"), all_rows(collected / "expert")])
    assert same_rows(all_rows(collected / "medium-expert"), both)


def test_demo_is_an_even_part_of_medium_replay(collected):
    replay = list(episodes(all_rows(collected / "medium-replay")))
    every = sum(len(e) - 1 for e in replay) // 300
    assert every > 1, "the test needs more than a demo's transitions"
    assert same_rows(all_rows(collected / "demo"), torch.cat(replay[::every]))


def test_training_episodes_hold_all_finished_steps(collected):
    """Nothing of training is lost but the 4 episodes that were still going on. The curve is the last 100's mean."""
    shards = sorted((collected / "behaviour").glob("episodes-*"))
    returns, samples = [], 0
    for point, shard in zip(curve(collected), shards):
        rows, card = open_dataset(shard)
        samples += card["samples"]
        returns += [e["reward"].sum().item() for e in episodes(rows)]
        assert point["step"] - 4 * 1000 < samples <= point["step"]
        assert point["return"] == pytest.approx(np.mean(returns[-100:]), rel=1e-4)
    assert 8192 - 4 * 150 < samples


def test_recorded_episodes_replay_in_the_plain_simulator(collected):
    """The first robot's first two episodes, from the recording's seed.

    The recorded actions give the recorded observations and rewards.
    """
    rows, card = open_dataset(collected / "expert")
    env = make_env("mamujoco", "hopper", COLLECT["num_envs"])
    env.set_seed(1 + card["made"]["checkpoint"])  # offline_data.collect.record's
    plain = gymnasium.make("Hopper-v5")
    seed = env.seeds[0]
    for _, episode in zip(range(2), episodes(rows)):
        obs, _ = plain.reset(seed=seed)
        seed = None
        for t in range(len(episode)):
            views = np.concatenate([np.tile(obs, (3, 1)), np.eye(3)], -1)
            views = (views - views.mean(-1, keepdims=True)) / views.std(-1, keepdims=True)
            np.testing.assert_array_equal(episode["agents", "observation"][t].numpy(), views.astype(np.float32))
            if t < len(episode) - 1:
                obs, reward, terminated, *_ = plain.step(episode["agents", "action"][t].double().numpy().reshape(-1))
                assert episode["reward"][t].item() == np.float32(reward)
                assert episode["terminated"][t].item() == terminated
    plain.close()
    env.close()


def test_collect_again_remakes_what_is_missing(collected):
    """Training is not repeated, and recording is seeded: everything is as before."""
    before = files_hash(collected)
    shutil.rmtree(collected / "expert")
    offline_data.collect.main(offline_data.collect.Args(out=str(collected.parent.parent), **COLLECT))
    assert files_hash(collected) == before


def test_stopped_collection_goes_on(tmp_path, monkeypatch):
    arguments = offline_data.collect.Args(
        out=str(tmp_path), **COLLECT | {"steps": 3072, "samples": 100, "checkpoints": 3}
    )
    with monkeypatch.context() as patch:
        stop_at(patch, offline_data.collect, "update", 3, True)  # in the middle of the second of three checkpoints
        with pytest.raises(Stop):
            offline_data.collect.main(arguments)
    folder = tmp_path / "mamujoco" / "hopper"
    assert len(curve(folder)) == 1 and sorted(p.name for p in folder.iterdir()) == ["behaviour"]
    first = files_hash(folder / "behaviour" / "episodes-000")
    offline_data.collect.main(arguments)
    assert [p["step"] for p in curve(folder)] == [1024, 2048, 3072]
    assert files_hash(folder / "behaviour" / "episodes-000") == first
    assert sorted(p.name for p in folder.iterdir()) == ["behaviour", *QUALITIES]
    assert not list(folder.rglob("*.partial"))


def test_a_checkpoint_keeps_an_episode_and_two_qualities_of_one_differ(tmp_path):
    """Of a training that records every 10,000th episode, with one checkpoint for medium and for expert."""
    flags = COLLECT | {"steps": 2048, "checkpoints": 1, "record_every": 10_000, "demo_samples": 0}
    offline_data.collect.main(offline_data.collect.Args(out=str(tmp_path), **flags))
    folder = tmp_path / "mamujoco" / "hopper"
    assert open_dataset(folder / "medium-replay")[1]["trajectories"] == 1
    medium, expert = (open_dataset(folder / name) for name in ("medium", "expert"))
    assert medium[1]["made"]["checkpoint"] == expert[1]["made"]["checkpoint"] == 0
    assert medium[0]["state"][0].ne(expert[0]["state"][0]).any()


def test_collection_with_other_settings_is_kept(collected, capsys):
    before = files_hash(collected)
    arguments = offline_data.collect.Args(out=str(collected.parent.parent), **COLLECT | {"lr": 1e-3})
    refused(capsys, offline_data.collect.main, arguments, "holds a run with other settings")
    assert files_hash(collected) == before


def test_returns_below_zero_have_no_medium_checkpoint(tmp_path, monkeypatch, capsys):
    """HalfCheetah starts there: a third of a negative return is a higher bar than the return itself."""
    points = [{"step": step, "return": r, "winrate": None} for step, r in enumerate((-90.0, -60.0, -70.0))]
    monkeypatch.setattr(offline_data.collect, "train", lambda args, root: points)
    refused(
        capsys,
        offline_data.collect.main,
        offline_data.collect.Args(out=str(tmp_path)),
        "the best return of hopper is -60.0.*train for more --steps",
    )


@pytest.mark.parametrize(
    "flags, match",
    [
        ({"task": "hoper"}, "unknown mamujoco task 'hoper'"),
        ({"task": "hopper_9x9"}, "no partition '9x9'"),
        ({"env": "nowhere"}, "unknown env 'nowhere'"),
        ({"steps": -5}, "--steps is -5"),
        ({"samples": 0}, "--samples is 0"),
        ({"env": "smacv2", "task": "zerg_5_vs_5", "replay_trajectories": 0}, "--replay-trajectories is 0"),
        ({"device": "nonsense"}, "--device nonsense"),
        ({"max_grad_norm": -1.0}, "--max-grad-norm is -1"),
        ({"entropy": math.nan}, "--entropy must be at least 0"),
        ({"horizon": 2**40}, "--horizon is .*below 2147483648"),
        ({"seed": 2**40}, "--seed from 0 to"),
    ],
)
def test_bad_flags_of_collect(flags, match, tmp_path, capsys):
    refused(
        capsys,
        offline_data.collect.main,
        offline_data.collect.Args(**COLLECT | {"out": str(tmp_path / "out")} | flags),
        match,
    )
    assert not (tmp_path / "out").exists()


def test_a_behaviour_policy_that_diverges_ends_with_one_line(tmp_path, capsys):
    refused(
        capsys,
        offline_data.collect.main,
        offline_data.collect.Args(**COLLECT | {"out": str(tmp_path), "lr": 1e30}),
        "MAPPO diverged after .* steps: give a lower --lr, and --overwrite",
    )


def test_unwritable_out_of_collect(tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    refused(
        capsys,
        offline_data.collect.main,
        offline_data.collect.Args(out=str(tmp_path / "file" / "data"), **COLLECT),
        "can't write .*: Not a directory",
    )


# ---------------------------------------------------------------- defaults


def test_defaults_follow_the_data(run, hopper_data):
    """alpha and the scale of rewards are those of the transitions alone: the empty last rows are not counted."""
    rows, card = open_dataset(hopper_data)
    size = rows["reward"].abs().sum().item() / card["samples"]
    config = json.loads((run / "config.json").read_text())
    assert (config["alpha"], config["reward_scale"]) == pytest.approx((5 * size, 0.2 / size), rel=1e-3)


# An objective given alone brings its own advantage, alpha (in mean absolute rewards), tau and bound.
BRINGS = {
    "semi": ("td", 5.0, 0.05, True),
    "exact": ("td", 0.5, 0.005, False),
    "printed": ("q", 5.0, 0.005, False),
    "released_nu": ("q", 5.0, 0.005, False),
}


@pytest.mark.parametrize("objective", BRINGS)
def test_an_objective_brings_its_own_values(objective):
    size = 2.0
    args = comadice_train.resolve(comadice_train.Args(objective=objective), size)
    advantage, alpha, tau, bound = BRINGS[objective]
    assert (args.preset, args.objective) == ("comadice", objective)
    assert (args.advantage, args.tau, args.bound) == (advantage, tau, bound)
    assert (args.alpha, args.reward_scale) == (alpha * size, 0.2 / size)
    assert (args.lambda_scale, args.lr, args.ema, args.layer_norm, args.lr_decay) == (0.0, 1e-3, 0.999, True, True)
    # What was tuned with semi is semi's.
    tuned = args.policy_alpha, args.neighbours, args.critic_lr, args.critic_lr_decay, args.action_scale
    assert tuned == ((0.5, True, 1e-3, True, 0.8) if objective == "semi" else (1.0, False, 3e-4, False, 0.85))
    # The ratio between episodes is semi's. Its alpha grows with the square of --alpha, and does not shrink with it.
    episode_alpha = lambda **flags: (
        comadice_train.resolve(comadice_train.Args(objective=objective, **flags), size, 30.0).episode_alpha
    )
    assert objective != "semi" or episode_alpha(alpha=1.0) == 30
    resolved = lambda **flags: comadice_train.resolve(
        comadice_train.Args(objective=objective, **flags), size, 30.0, 8.0
    )  # 8 is the deviation of the neighbours' mean returns
    assert (resolved().episode_alpha, resolved(neighbours=False).episode_alpha) == (
        (8, 30) if objective == "semi" else (0, 0)
    )
    assert (episode_alpha(), episode_alpha(alpha=100.0), episode_alpha(episode_alpha=7.0)) == (
        (30, 3000, 7.0) if objective == "semi" else (0.0, 0.0, 7.0)
    )
    given = comadice_train.resolve(
        comadice_train.Args(objective=objective, advantage="q", reward_scale=3.0, alpha=7.0, tau=0.5), size
    )
    assert (given.advantage, given.reward_scale, given.alpha, given.tau, given.bound) == ("q", 3.0, 7.0, 0.5, bound)


def test_the_default_is_semi():
    default, semi = (
        comadice_train.resolve(comadice_train.Args(objective=objective), 1.5) for objective in (None, "semi")
    )
    assert default == semi
    assert None not in (
        getattr(default, f.name)
        for f in dataclasses.fields(default)
        if f.name not in ("env", "task", "quality", "data")
    )


def test_preset_paper_is_table_4():
    args = comadice_train.resolve(comadice_train.Args(preset="paper"), 2.0, 30.0)
    assert (args.lr, args.critic_lr) == (1e-4, 1e-4)  # of the policies, and of q and nu
    assert (args.tau, args.gamma, args.batch_size) == (0.005, 0.99, 128)
    assert (args.hidden, args.mixer_hidden, args.mixer_layers) == (256, 64, 1)
    assert (args.eval_episodes, args.evals) == (32, 100)
    assert (args.lambda_scale, args.alpha, args.f, args.episode_alpha) == (1.0, 10.0, "soft_chi2", 0.0)
    # Eq. 10 as it is printed, and nothing that the paper does not have.
    assert (args.objective, args.advantage, args.bound) == ("printed", "q", False)
    assert (args.reward_scale, args.layer_norm, args.lr_decay, args.ema) == (1.0, False, False, 0.0)
    assert args.action_scale == args.policy_alpha == 1
    assert comadice_train.resolve(comadice_train.Args(preset="paper", objective="printed"), 2.0) == args
    # Other flags override it. Another objective brings its own values, what is left of Table 4 stays.
    assert comadice_train.resolve(comadice_train.Args(preset="paper", tau=0.5), 2.0) == dataclasses.replace(
        args, tau=0.5
    )
    other = comadice_train.resolve(comadice_train.Args(preset="paper", objective="semi"), 2.0)
    changed = {"objective": "semi", "advantage": "td", "alpha": 10.0, "tau": 0.05, "bound": True, "lambda_scale": 0.0,
               "policy_alpha": 0.5, "neighbours": True, "critic_lr": 1e-3, "critic_lr_decay": True,
               "action_scale": 0.8}  # fmt: skip
    assert other == dataclasses.replace(args, **changed)


def test_preset_paper_trains(hopper_data, tmp_path, capsys):
    run = train(hopper_data, tmp_path, preset="paper")
    assert capsys.readouterr().out.startswith(
        "preset paper: objective printed, w* from q, alpha 10, episode alpha 0, tau 0.005"
    )
    state, summary = checkpoint(run), json.loads((run / "summary.json").read_text())
    assert summary["preset"] == "paper" and math.isfinite(summary["return"])
    assert state["w"].isfinite().all() and state["critics"]["lam"] != 0
    assert any(key.startswith("q.") for key in state["critics"])
    # A_tot has the mixer's bias: with q = nu it is b(s).
    rows, card = open_dataset(hopper_data)
    arguments = comadice_train.Args(**state["config"])
    critics = comadice_train.make_critics(card, arguments)
    for parameter in critics.nu.parameters():
        parameter.data.zero_()
    b, q = critics.mixer.b(rows["state"])[:, 0], torch.zeros(len(rows), card["n_agents"])
    torch.testing.assert_close(comadice_train.q_form(critics, rows, q, arguments, trains_q=True), b)
    exact = dataclasses.replace(arguments, objective="exact")
    assert not comadice_train.q_form(critics, rows, q, exact, trains_q=True).any()


# ---------------------------------------------------------------- what the losses know of the data


@pytest.mark.parametrize("gamma", [0.0, 0.9, 0.99])
def test_data_facts_are_those_of_a_plain_loop(gamma, hopper_data, discrete_data):
    for data in (hopper_data, discrete_data):
        rows, _ = open_dataset(data)
        args = comadice_train.Args(gamma=gamma, reward_scale=0.3, bound=True)
        returns, masses = [], []
        for episode in episodes(rows):
            value = 0.0
            for reward in reversed(episode["reward"][:-1, 0].tolist()):
                value = 0.3 * reward + gamma * value
                returns.append(value)
            T = len(episode) - 1
            masses.append(1 - gamma**T if episode["terminated"][T - 1] else 1.0)
        assert comadice_train.data_facts(rows, args) == pytest.approx((min(returns), max(returns), np.mean(masses)))
        args.bound = False
        assert comadice_train.data_facts(rows, args) == pytest.approx((-math.inf, math.inf, np.mean(masses)))


def test_data_facts_of_a_large_dataset_fit_into_memory():
    """400 episodes of 1,000 steps: what is needed grows with the rows alone."""
    t = torch.arange(400 * 1001) % 1001
    done = (t == 999)[:, None]
    rows = TensorDict(
        {"reward": torch.ones(len(t), 1), "done": done, "terminated": done, "is_init": (t == 0)[:, None]}, [len(t)]
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    low, high, mass = comadice_train.data_facts(rows, comadice_train.Args(reward_scale=1.0, bound=True))
    assert (low, high) == pytest.approx((1, (1 - 0.99**1000) / 0.01)) and mass == pytest.approx(1 - 0.99**1000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


@pytest.mark.parametrize("factor", [0.1, 1.0, 10.0])
def test_no_alpha_diverges(factor, tmp_path):
    """On the demonstration's data nu_tot stays near the returns that the data show.

    It does at a tenth of the default alpha and at ten times the default.
    """
    rows, card = open_dataset(ROOT / "data/mamujoco/hopper/demo")
    size = rows["reward"].abs().sum().item() / card["samples"]
    args = comadice_train.resolve(
        comadice_train.Args(hidden=32, alpha=factor * 5 * size, critic_lr=3e-3, steps=600, evals=1), size
    )
    data = comadice_train.data_facts(rows, args)
    run = support.runs.Run(0, tmp_path, {"critic_step": 0, "critic_seconds": 0.0}, [], False)
    comadice_train.train_critics(rows, card, args, [run], data, None)
    critics = comadice_train.make_critics(card, args)
    critics.load_state_dict(run.state["critics"])
    with torch.no_grad():
        nu = comadice_train.nu_tot(critics, rows)
    # E[w | s] is 1 at the minimum with nu's own alpha, so --policy-alpha is 1 here.
    w = comadice_train.dataset_ratio(critics, rows, dataclasses.replace(args, policy_alpha=1.0), data)
    # of r + gamma nu_tot(s')
    largest = args.reward_scale * rows["reward"].abs().max().item() + args.gamma * max(abs(data.low), data.high)
    print(
        f"alpha {args.alpha:.3g}: nu_tot from {nu.min():.3g} to {nu.max():.3g}, "
        f"returns from {data.low:.3g} to {data.high:.3g}, E[w] {w.mean():.3f}"
    )
    assert nu.isfinite().all() and nu.abs().max() < 1.2 * largest
    assert data.low < nu[rows["is_init"][:, 0]].mean() < data.high
    assert w.isfinite().all() and 0.3 < w.mean() < 4


# ---------------------------------------------------------------- the policies' stage


def test_bc_on_the_best_episodes_draws_from_them_alone(hopper_data, tmp_path, monkeypatch):
    rows, _ = open_dataset(hopper_data)
    every = sorted(episodes(rows), key=lambda e: -e["reward"].sum().item())
    allowed = {
        tuple(obs.tolist()) for e in every[:3] for obs in e["agents", "observation"][:-1].flatten(1)
    }  # a quarter of 12
    drawn, original = [], comadice_bc.policy_losses

    def recording(policy, batch):
        drawn.extend(tuple(obs.tolist()) for obs in batch["agents", "observation"].flatten(1))
        assert (batch["w"] == 1).all()
        return original(policy, batch)

    monkeypatch.setattr(comadice_bc, "policy_losses", recording)
    path = train(hopper_data, tmp_path, comadice_bc, "bc-best25", best=0.25)
    assert len(drawn) == 20 * 32 and set(drawn) <= allowed and len(set(drawn)) > 0.9 * len(allowed)
    assert json.loads((path / "summary.json").read_text())["algo"] == "bc-best25"
    lengths = sorted(len(e) - 1 for e in every[:1])
    assert len(comadice_bc.best_transitions(rows, 0.01)) == lengths[0]  # at least one episode
    assert len(comadice_bc.best_transitions(rows, 1.0)) == len(rows) - 12


def test_the_played_policy_is_the_average_of_the_trained_one(monkeypatch):
    """By hand: the average moves by 1 - ema, but by more early on, when it covers a tenth of the steps so far.

    The learning rate falls linearly.
    """
    torch.manual_seed(0)
    policy = torch.nn.Linear(2, 1)
    average, weight = torch.nn.Linear(2, 1), torch.ones(())
    args = comadice_bc.Args(lr=0.5, steps=4, ema=0.9)
    optimizer = support.seeds.adam(list(policy.parameters()), args.lr, torch.device("cpu"))
    monkeypatch.setattr(comadice_bc, "policy_losses", lambda policy, batch: ((policy(batch["x"]) ** 2).mean(),))
    update = comadice_bc.make_policy_update(policy, average, optimizer, weight)
    mean = None
    for step in range(1, 5):
        comadice_bc.set_schedule(optimizer, weight, step, args)
        assert optimizer.param_groups[0]["lr"].item() == pytest.approx(0.5 * (5 - step) / 4)
        update(TensorDict({"x": torch.randn(3, 2)}, [3]))
        eta = policy.weight.detach().clone()
        share = max(0.1, 1 / (0.1 * (step - 1) + 1))
        mean = eta if mean is None else (1 - share) * mean + share * eta
        torch.testing.assert_close(average.weight, mean)
    assert not torch.equal(average.weight, policy.weight)
    comadice_bc.set_schedule(optimizer, weight, 100, args)
    assert weight.item() == pytest.approx(0.1)  # from the 91st step on --ema alone counts
    args.lr_decay, args.ema = False, 0.0
    comadice_bc.set_schedule(optimizer, weight, 4, args)
    assert optimizer.param_groups[0]["lr"].item() == 0.5 and weight.item() == 1


@pytest.mark.parametrize("ema", [0.0, 0.999])
def test_checkpoints_hold_the_trained_and_the_played_policy(ema, hopper_data, tmp_path):
    path = train(hopper_data, tmp_path, comadice_bc, ema=ema)
    state = checkpoint(path)
    assert all(torch.equal(state["eta"][k], state["policy"][k]) for k in state["eta"]) == (ema == 0)
    played, _ = comadice_eval.load_policy(path)
    assert all(torch.equal(v, state["policy"][k]) for k, v in played.state_dict().items())


# ---------------------------------------------------------------- a GPU

METHODS = {
    "comadice": comadice_train,
    "bc": comadice_bc,
    "bcq": bcq,
    "cql": cql,
    "icq": icq,
    "omar": omar,
    "omiga": omiga,
}


@pytest.mark.cuda
@pytest.mark.parametrize("fits", [0.7, 0.0], ids=["in GPU memory", "streamed"])
@pytest.mark.parametrize("algo", METHODS)
def test_scripts_on_a_gpu(algo, fits, hopper_data, tmp_path, monkeypatch):
    """Each script trains two seeds on the GPU, is stopped and goes on, and its policy is evaluated there."""
    monkeypatch.setattr(support.runs, "FITS", fits)
    module, flags = METHODS[algo], {"device": "cuda:0", "seeds": [0, 1], "steps": 40, "evals": 4}
    whole = train(hopper_data, tmp_path / "whole", module, algo, **flags)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_at(patch, support.runs, "save_checkpoint", 3)
        train(hopper_data, tmp_path / "stopped", module, algo, **flags)
    stopped = train(hopper_data, tmp_path / "stopped", module, algo, resume=True, **flags)
    for key, value in checkpoint(whole)["policy"].items():
        torch.testing.assert_close(checkpoint(stopped)["policy"][key], value, rtol=1e-3, atol=1e-4)
    assert json.loads((whole / "summary.json").read_text())["device"] == torch.cuda.get_device_name(0)
    comadice_eval.main(comadice_eval.Args(run=[str(whole)], episodes=2, device="cuda:0"))


@pytest.mark.cuda
@pytest.mark.parametrize("seeds", [[0], [0, 1]], ids=len)
def test_compiled_run_on_a_gpu(seeds, hopper_data, tmp_path):
    """torch.compile and the graph together give what neither gives."""
    flags = {"device": "cuda", "seeds": seeds}
    plain = train(hopper_data, tmp_path / "plain", graph=False, **flags)
    compiled = train(hopper_data, tmp_path / "compiled", compile=True, **flags)
    for key, value in checkpoint(plain)["critics"].items():
        torch.testing.assert_close(checkpoint(compiled)["critics"][key], value, rtol=1e-3, atol=1e-4)
