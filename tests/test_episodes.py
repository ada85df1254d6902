"""The ratio between episodes: against a convex solver, what it draws, and its default."""

import math

import numpy as np
import pytest
import torch
from conftest import ROOT
from scipy.optimize import minimize
from tensordict import TensorDict

import comadice_bc
import comadice_train
from comadice_losses import DIVERGENCES, effective_sample_size, episode_ratio
from offline_data.dataset import episode_returns, open_dataset, policy_returns
from offline_data.facts import return_deviation
from offline_data.replay import episode_weights, make_replay, transition_rows
from support import ratio_picture
from support.runs import load_checkpoint

FEW_GOOD, DEMO = (ROOT / "data" / "mamujoco" / "hopper" / name for name in ("few-good", "demo"))


@pytest.mark.parametrize("name", ["soft_chi2", "chi2", "kl"])
@pytest.mark.parametrize("alpha", [0.3, 3.0])
def test_it_solves_the_convex_program(name, alpha):
    """max over w >= 0 with mean 1 of E[w R] - alpha E[f(w)], by SLSQP."""
    f, returns = DIVERGENCES[name], torch.tensor([0.0, 0.4, 1.0, 1.1, 2.5], dtype=torch.float64)
    w = episode_ratio(returns, alpha, f)

    def loss(x):
        x = torch.as_tensor(x)
        return float((alpha * f.f(x) - x * returns).mean())

    solved = minimize(
        loss,
        np.ones(5),
        method="SLSQP",
        bounds=[(1e-12, None)] * 5,
        options={"ftol": 1e-14, "maxiter": 500},
        constraints={"type": "eq", "fun": lambda x: x.mean() - 1},
    )
    assert w.mean().item() == pytest.approx(1, abs=1e-9)
    assert loss(w.numpy()) <= solved.fun + 1e-7
    np.testing.assert_allclose(w.numpy(), solved.x, atol=2e-3)


def test_limits_of_alpha():
    f, returns = DIVERGENCES["soft_chi2"], torch.tensor([1.0, 2.0, 5.0, 5.0], dtype=torch.float64)
    torch.testing.assert_close(episode_ratio(returns, 1e6, f), torch.ones(4, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(episode_ratio(returns, 1e-3, f), torch.tensor([0.0, 0.0, 2.0, 2.0], dtype=torch.float64))
    torch.testing.assert_close(episode_ratio(torch.full((3,), 7.0), 0.5, f), torch.ones(3))


def test_neither_shift_nor_scale_of_the_returns_matters():
    f, returns = (
        DIVERGENCES["soft_chi2"],
        torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    )
    torch.testing.assert_close(episode_ratio(100 * returns - 7, 30.0, f), episode_ratio(returns, 0.3, f))


def test_transitions_are_drawn_in_proportion_to_their_episode_s_ratio():
    rows, card = open_dataset(FEW_GOOD)
    w = episode_ratio(episode_returns(rows), 0.2 * card["return_std"], DIVERGENCES["soft_chi2"])
    weights = episode_weights(rows, 0.2 * card["return_std"], "soft_chi2")
    assert len(weights) == card["samples"] and episode_weights(rows, 0.0, "soft_chi2") is None
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    replay = make_replay(rows, ["episode", "done"], pairs=False, generators=generators, weights=weights)
    drawn = replay.sample(200_000)["episode"][..., 0]
    length = torch.bincount(rows["episode"][transition_rows(rows), 0])
    expected = (w * length / (w * length).sum()).float()
    for own in drawn:
        share = torch.bincount(own, minlength=len(w)) / len(own)
        assert (share - expected).abs().max() < 6 * math.sqrt(0.25 / len(own))
        assert (share[w == 0] == 0).all()
    assert not torch.equal(*drawn), "each seed draws its own"


def test_return_deviation():
    """The mean absolute deviation of the returns, clipped to their percentiles, as numpy has it."""
    rows, _ = open_dataset(FEW_GOOD)
    returns = [0.0] * (int(rows["episode"].max()) + 1)
    for number, reward in zip(rows["episode"][:, 0].tolist(), rows["reward"][:, 0].tolist()):
        returns[number] += reward
    clipped = np.clip(returns, *np.percentile(returns, [10, 90]))
    assert return_deviation(rows) == pytest.approx(np.abs(clipped - clipped.mean()).mean(), rel=1e-5)


def test_a_few_very_poor_episodes_do_not_change_the_deviation():
    def deviation(returns):
        rows = {"reward": torch.tensor(returns)[:, None], "episode": torch.arange(len(returns))[:, None]}
        return return_deviation(TensorDict(rows, [len(returns)]))

    usual = [float(r) for r in range(96)]
    assert deviation(usual + [-1e6] * 4) == pytest.approx(deviation(usual + [0.0] * 4))
    assert deviation(usual) == pytest.approx(24, rel=0.1), "a quarter of the range"
    assert deviation([2.0] * 95 + [0.0] * 5) == 0, "nearly all are equal: no episode is preferred"


def played_by_better_and_better_policies(count: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """(what each episode's policy returns on average, the returns), with as much luck as there is progress."""
    expected = np.linspace(0, 10, count)
    return expected, expected + np.random.default_rng(0).normal(0, 3, count)


def test_policy_returns_are_means_over_neighbours():
    expected, returns = played_by_better_and_better_policies()
    estimate = policy_returns(torch.tensor(returns)).numpy()
    for i in (0, 1, 40, 250, 498, 499):
        neighbours = [returns[j] for j in range(max(i - 32, 0), min(i + 33, 500)) if j != i]
        assert estimate[i] == pytest.approx(np.mean(neighbours))
    assert np.abs(estimate - expected)[32:-32].mean() < 0.2 * np.abs(returns - expected).mean()
    luck = (returns - expected)[32:-32]
    assert abs(np.corrcoef(luck, estimate[32:-32])[0, 1]) < 0.1, "an episode's own luck does not count"


def test_neighbours_that_tell_nothing():
    _, returns = played_by_better_and_better_policies()
    rng = np.random.default_rng(1)
    for other in (rng.permutation(returns), rng.normal(size=500), np.ones(500), returns[:64]):
        assert policy_returns(torch.tensor(other)) is None
    assert policy_returns(torch.tensor(returns[:65] * np.arange(65))) is not None


def recorded(returns: np.ndarray) -> TensorDict:
    """A dataset of episodes of one transition each."""
    last = torch.arange(2 * len(returns))[:, None] % 2 == 1
    reward = torch.tensor(returns).repeat_interleave(2)[:, None].where(~last, 0.0)
    episode = torch.arange(len(returns)).repeat_interleave(2)[:, None]
    return TensorDict({"reward": reward, "episode": episode, "done": ~last, "is_init": ~last}, [len(last)])


def test_neighbours_decide_which_episodes_are_preferred():
    _, returns = played_by_better_and_better_policies()
    rows = recorded(returns)
    estimate = policy_returns(torch.tensor(returns))
    clipped = np.clip(estimate, *np.percentile(estimate, [10, 90]))
    half = np.abs(clipped - clipped.mean()).mean() / 2
    assert return_deviation(rows, neighbours=True) == pytest.approx(half)
    expected = episode_ratio(estimate, half, DIVERGENCES["soft_chi2"])
    torch.testing.assert_close(episode_weights(rows, half, "soft_chi2", neighbours=True), expected)
    # Where neighbours tell nothing, each episode's own return counts, as without them.
    shuffled = recorded(np.random.default_rng(1).permutation(returns))
    assert return_deviation(shuffled, neighbours=True) == return_deviation(shuffled)
    torch.testing.assert_close(
        episode_weights(shuffled, 2.0, "soft_chi2", neighbours=True), episode_weights(shuffled, 2.0, "soft_chi2")
    )


def test_the_default_prefers_the_good_episodes_and_tends_to_all_of_them():
    rows, _ = open_dataset(FEW_GOOD)
    deviation = return_deviation(rows)
    assert deviation == return_deviation(rows, neighbours=True)  # the good episodes lie among poor ones
    args = comadice_train.resolve(comadice_train.Args(), 2.0, deviation)
    assert args.episode_alpha == pytest.approx(deviation, rel=1e-3)
    w = episode_ratio(episode_returns(rows), args.episode_alpha, DIVERGENCES[args.f])
    good = episode_returns(rows).topk(3).indices
    assert w[good].sum() > 0.3 * w.sum(), "3 of 153 episodes have 30% of the weight"
    assert effective_sample_size(w) < 0.2
    demonstrated = comadice_train.DEMO.episode_alpha
    returns = episode_returns(rows)
    assert demonstrated == pytest.approx(0.25 * (returns - returns.mean()).abs().mean().item(), rel=1e-3)
    w = episode_ratio(episode_returns(rows), demonstrated, DIVERGENCES[args.f])
    assert w[good].sum() > 0.99 * w.sum() and effective_sample_size(w) < 0.05
    imitation = comadice_train.resolve(comadice_train.Args(alpha=1000 * args.alpha), 2.0, deviation)
    w = episode_ratio(episode_returns(rows), imitation.episode_alpha, DIVERGENCES[args.f])
    assert (w - 1).abs().max() < 1e-4
    for given in (comadice_train.Args(preset="paper"), comadice_train.Args(objective="exact")):
        assert comadice_train.resolve(given, 2.0, deviation).episode_alpha == 0
    assert comadice_train.resolve(comadice_train.Args(episode_alpha=0.0), 2.0, deviation).episode_alpha == 0


@pytest.mark.parametrize("advantage", ["td", "q"])
@pytest.mark.parametrize("neighbours", [False, True])
def test_critics_and_policies_both_draw_by_the_ratio(neighbours, advantage, tmp_path, monkeypatch):
    """What both stages hand to make_replay: the ratio for transitions, nothing for initial states."""
    drawn = {}

    def watch(module, real):
        def make(rows, keys, **how):
            drawn.setdefault((module.__name__, how["pairs"]), []).append(how.get("weights"))
            return real(rows, keys, **how)

        monkeypatch.setattr(module, "make_replay", make)

    for module in (comadice_train, comadice_bc):
        watch(module, module.make_replay)
    short = {"data": str(DEMO), "out": str(tmp_path), "steps": 1, "evals": 1, "eval_episodes": 1, "hidden": 8}
    method = {"episode_alpha": 50.0, "advantage": advantage, "neighbours": neighbours}
    comadice_train.main(comadice_train.Args(**method, **short))
    rows, card = open_dataset(DEMO)
    expected = episode_weights(rows, 50.0, "soft_chi2", neighbours)
    assert (expected - episode_weights(rows, 50.0, "soft_chi2")).abs().max() > 0.1 or not neighbours
    for weights in (*drawn["comadice_train", True], *drawn["comadice_bc", False]):
        torch.testing.assert_close(weights, expected)
    assert drawn["comadice_train", False] == [None] and len(drawn) == 3
    run = tmp_path / "mamujoco" / "hopper" / "demo" / "comadice" / "seed0"
    torch.testing.assert_close(comadice_bc.load_ratio(str(run), rows, card)[1], expected)
    of_checkpoint = []
    monkeypatch.setattr(ratio_picture, "episode_weights", lambda *flags: of_checkpoint.append(flags[1:]))
    ratio_picture.draw(load_checkpoint(run), rows, [], tmp_path / "ratio.png")
    assert of_checkpoint == [(50.0, "soft_chi2", neighbours)]
    drawn.clear()
    comadice_bc.main(comadice_bc.Args(**short))
    assert drawn == {("comadice_bc", False): [None]}, "plain BC draws equally"
