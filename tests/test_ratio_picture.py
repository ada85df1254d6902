"""ratio.png shows which episodes the method prefers.

Tested on made datasets whose good episodes are known, and on a real run.
"""

import math

import numpy as np
import pytest
import torch
from tensordict import TensorDict

import comadice_bc
import comadice_train
from environments.checks import BadInput
from offline_data.dataset import open_dataset
from offline_data.replay import episode_weights
from support import ratio_picture
from support.ratio_picture import correlation, share_of_best, verdict, weights_of
from support.report import RUN_FILES
from support.runs import load_checkpoint

LENGTHS, RETURNS = [4, 2, 6, 3, 5], [10.0, -2.0, 30.0, 4.0, 8.0]


def made_rows() -> TensorDict:
    """Five episodes of known returns; one good one of 6 transitions, the third."""
    reward, done, episode = [], [], []
    for e, (T, R) in enumerate(zip(LENGTHS, RETURNS)):
        reward += [R / T] * T + [0.0]
        done += [False] * (T - 1) + [True, False]
        episode += [e] * (T + 1)
    column = lambda x, dtype: torch.tensor(x, dtype=dtype)[:, None]
    keys = {
        "reward": column(reward, torch.float64),
        "done": column(done, torch.bool),
        "episode": column(episode, torch.int64),
    }
    return TensorDict(keys, [len(reward)])


def spread(per_episode: list[float]) -> torch.Tensor:
    return torch.cat([torch.full((T,), x) for T, x in zip(LENGTHS, per_episode)])


@pytest.mark.parametrize("per_episode, sign", [(RETURNS, 1), ([-r for r in RETURNS], -1)])
def test_the_correlation_is_that_of_known_weights(per_episode, sign):
    """A ratio that rises with the return is found as such, and one that falls."""
    w = spread([x + 40 for x in per_episode])
    weights = weights_of(w, made_rows(), 0.0, "chi2", False)
    assert correlation(weights) == pytest.approx(sign, abs=1e-6)
    assert f"return: {sign:.2f};" in verdict(weights)


def test_all_the_weight_on_the_good_episode():
    weights = weights_of(spread([0, 0, 1, 0, 0]), made_rows(), 0.0, "chi2", False)
    assert share_of_best(weights) == (1.0, pytest.approx(6 / 20))
    assert correlation(weights) == pytest.approx(np.corrcoef([0, 0, 1, 0, 0], RETURNS)[0, 1])
    assert "the best 10% of the episodes have 100% of the weight and 30% of the transitions" in verdict(weights)


def test_plain_cloning_prefers_none():
    weights = weights_of(spread([1.0] * 5), made_rows(), 0.0, "chi2", False)
    assert math.isnan(correlation(weights)) and "undefined" in verdict(weights)
    assert share_of_best(weights) == (pytest.approx(6 / 20), pytest.approx(6 / 20))


def test_both_factors_and_their_product():
    """The weight in Eq. 11 is what the policies' training uses: drawn by the episode's ratio, multiplied by w*."""
    rows, w = made_rows(), torch.rand(20, generator=torch.Generator().manual_seed(0))
    weights = weights_of(w, rows, 5.0, "soft_chi2", False)
    drawn = episode_weights(rows, 5.0, "soft_chi2")
    torch.testing.assert_close(weights.between, drawn / drawn.mean())
    torch.testing.assert_close(weights.step, w.double() / w.double().mean())
    torch.testing.assert_close(weights.total, drawn * w / (drawn * w).mean())
    torch.testing.assert_close(weights.of_episodes(weights.step)[2], weights.step[6:12].mean())
    assert correlation(weights) > 0.5


@pytest.mark.parametrize("w", [torch.zeros(20), torch.full((20,), math.nan)])
def test_a_ratio_that_is_no_weight(w):
    with pytest.raises(BadInput, match=r"w\* can't be drawn"):
        weights_of(w, made_rows(), 0.0, "chi2", False)


@pytest.fixture(scope="module")
def run(hopper_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("ratio")
    comadice_train.main(
        comadice_train.Args(
            data=str(hopper_data),
            out=str(out),
            steps=4,
            evals=2,
            eval_episodes=2,
            hidden=8,
            quiet=True,
            device="cpu",
            seeds=[0, 1],
        )
    )
    return out / "mamujoco/hopper/random/comadice/seed1"


def test_every_run_has_the_picture_and_it_is_drawn_again(run, capsys, tmp_path):
    first = (run / "ratio.png").read_bytes()
    (run / "ratio.png").unlink()
    ratio_picture.main(ratio_picture.Args(str(run)))
    assert (run / "ratio.png").read_bytes() == first and first[:4] == b"\x89PNG"
    assert capsys.readouterr().out.startswith(f"{run}/ratio.png: correlation of episode weight and episode return: ")
    ratio_picture.main(ratio_picture.Args(str(run), out=str(tmp_path / "again.png")))
    assert (tmp_path / "again.png").read_bytes() == first


def test_a_run_stopped_while_it_is_drawn_is_not_finished(hopper_data, tmp_path, monkeypatch):
    """A kill may leave a part of the picture. --resume draws it again, since summary.json comes after the picture."""

    def killed(path, figure, dpi, shared):
        path.with_name("ratio.png.partial").write_bytes(b"half")
        raise KeyboardInterrupt

    args = {"data": str(hopper_data), "out": str(tmp_path), "steps": 4, "evals": 1, "eval_episodes": 1, "hidden": 8}
    args |= {"quiet": True, "device": "cpu", "seeds": [0]}
    with monkeypatch.context() as patch:
        patch.setattr(ratio_picture, "write_figure", killed)
        with pytest.raises(KeyboardInterrupt):
            comadice_train.main(comadice_train.Args(**args))
    folder = tmp_path / "mamujoco/hopper/random/comadice/seed0"
    assert (folder / "ratio.png.partial").exists() and not (folder / "summary.json").exists()
    comadice_train.main(comadice_train.Args(**args, resume=True))
    assert {path.name for path in folder.iterdir()} == RUN_FILES | {"ratio.png"}


def test_nu_at_the_initial_states_is_recorded(run, hopper_data):
    """metrics.csv's nu_init is the mean of nu_tot of the target networks over the dataset's initial states."""
    state = load_checkpoint(run)
    rows, card = open_dataset(hopper_data)
    args = comadice_train.Args(**state["config"])
    critics = comadice_train.make_critics(card, args)
    critics.load_state_dict(state["target"])
    starts = rows[rows["is_init"][:, 0]]
    wanted = comadice_train.nu_tot(critics, starts).mean().item() / args.reward_scale
    last = [row for row in state["metrics"] if row["stage"] == "critics"][-1]
    assert last["nu_init"] == pytest.approx(wanted, rel=1e-5)


def test_what_has_no_ratio(run, hopper_data, tmp_path):
    comadice_bc.main(
        comadice_bc.Args(
            data=str(hopper_data),
            out=str(tmp_path),
            steps=2,
            evals=1,
            eval_episodes=1,
            hidden=8,
            quiet=True,
            device="cpu",
        )
    )
    with pytest.raises(BadInput, match="holds no ratio"):
        ratio_picture.main(ratio_picture.Args(str(tmp_path / "mamujoco/hopper/random/bc/seed0")))
    with pytest.raises(BadInput, match="no dataset at"):
        ratio_picture.main(ratio_picture.Args(str(run), data=str(tmp_path / "gone")))
    (tmp_path / "mine.png").write_text("mine")
    with pytest.raises(BadInput, match="is already there"):
        ratio_picture.main(ratio_picture.Args(str(run), out=str(tmp_path / "mine.png")))
    assert (tmp_path / "mine.png").read_text() == "mine"
    with pytest.raises(BadInput, match="can't write"):
        ratio_picture.main(ratio_picture.Args(str(run), out=str(tmp_path / "no" / "a.png")))
