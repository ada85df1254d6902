"""Videos without a display: robots move, battles show who lives, recorded episodes are shown as they were recorded."""

import importlib.util
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from scipy import ndimage

import comadice_eval
from comadice_mixer import make_policy
from environments.checks import BadInput
from environments.simulators import make_env
from offline_data.dataset import open_dataset
from support import video

EPISODES = 3
SMAX_DEMO = ROOT / "data" / "smax" / "zerg_5_vs_5" / "demo"


@pytest.fixture(scope="session")
def opengl():
    try:
        video.choose_opengl()
    except BadInput as error:
        pytest.skip(str(error))


def pictures(file: Path) -> np.ndarray:
    """All frames of a GIF, [T, H, W, 3]."""
    with Image.open(file) as image:
        frames = []
        for i in range(image.n_frames):
            image.seek(i)
            frames.append(np.asarray(image.convert("RGB")))
    return np.stack(frames)


def player(env: str, task: str) -> tuple[dict, torch.nn.Module]:
    """A card with what a film needs of it, and an untrained policy."""
    world = make_env(env, task, 1)
    n, O = world.observation_spec["agents", "observation"].shape[-2:]
    discrete = env == "smax"
    A = (
        world.observation_spec["agents", "action_mask"] if discrete else world.full_action_spec["agents", "action"]
    ).shape[-1]
    world.close()
    torch.manual_seed(0)
    return {"env": env, "task": task, "interface": "standard" if discrete else "benchmark"}, make_policy(
        n, O, A, discrete, 8
    )


def short_env(env: str, task: str):
    """Its robots have a time limit of 60 steps."""
    world = make_env(env, task, EPISODES)
    for simulator in getattr(world, "simulators", []):
        simulator._max_episode_steps = 60
    return world


def film(file: Path, *shown):
    play = lambda policy, env: comadice_eval.evaluate(policy, env, EPISODES, 0)["returns"]
    video.film(str(file), list(shown), lambda card: short_env(card["env"], card["task"]), play)


@pytest.mark.parametrize("task, seconds", [("hopper", 0.24), ("halfcheetah", 1.5)])
def test_robots_move(task, seconds, opengl, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(video, "FPS", {".gif": 2 / seconds})  # few pictures: they are slow without a GPU
    monkeypatch.setattr(video, "GIF_SECONDS", seconds)
    card, policy = player("mamujoco", task)
    film(tmp_path / "robot.gif", ("untrained", card, policy))
    frames = pictures(tmp_path / "robot.gif")
    assert frames.shape[1:] == (video.SIDE + video.CAPTION, video.SIDE, 3)
    assert len(frames) == 2, "it is cut after so many seconds"
    robot = frames[:, : video.SIDE].astype(int)
    moved = abs(np.diff(robot, axis=0)).max(-1) > 40
    assert (moved.mean((1, 2)) > 0.002).all(), "each picture differs from the one before"
    assert robot[0].std() > 20, "something is to be seen"
    returns = comadice_eval.evaluate(policy, short_env("mamujoco", task), EPISODES, 0)["returns"]
    assert len(set(returns)) == EPISODES
    assert f"untrained: return {sorted(returns)[1]:.2f} in " in capsys.readouterr().out, (
        "the median of what evaluate plays"
    )


def test_recorded_poses_are_the_simulators(hopper_data, opengl, monkeypatch):
    """An episode is recorded from a simulator. The poses that are drawn from its rows are the simulator's own."""
    env = make_env("mamujoco", "hopper", 1)
    env.set_seed(3)
    simulator, poses, raws = env.simulators[0].unwrapped, [], []
    td, rows = env.reset(), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        poses.append(simulator.data.qpos.copy())
        raws.append(env.raw[0].copy())
        td["agents", "action"] = torch.rand(1, 3, 1, generator=generator) * 2 - 1
        after = env.step(td)["next"]
        rows.append(td.select("state", ("agents", "observation"))[0].clone().set("reward", after["reward"][0]))
        td = after.select("state", ("agents", "observation"))
    rows, (_, card) = torch.stack(rows), open_dataset(hopper_data)
    np.testing.assert_allclose(video.raw_observations(rows, card), raws, atol=2e-5)
    drawn = []
    monkeypatch.setattr(video, "robot_camera", lambda env, number: lambda: drawn.append(simulator.data.qpos.copy()))
    frames = video.recorded_frames(rows, card, env, 1)
    np.testing.assert_allclose(np.array(drawn)[:, 1:], np.array(poses)[:, 1:], atol=2e-5)
    along = np.array(drawn)[:, 0] - (np.array(poses)[:, 0] - poses[0][0])
    assert abs(along).max() < 0.1 * max(abs(np.ptp(np.array(poses)[:, 0])), 0.05), "the place is the sum of velocities"
    np.testing.assert_allclose([f[2] for f in frames], np.cumsum([0, *rows["reward"][:-1, 0].tolist()]), rtol=1e-5)


def test_recorded_robots(hopper_data, opengl, tmp_path, capsys):
    rows, card = open_dataset(hopper_data)
    film(tmp_path / "data.gif", ("data", card, rows))
    median = sorted(float(video.episode_returns(rows)[i]) for i in range(card["trajectories"]))[
        (card["trajectories"] - 1) // 2
    ]
    assert f"data: return {median:.2f} in " in capsys.readouterr().out
    assert len(pictures(tmp_path / "data.gif")) >= 2


def battle(health: list[float], cooldown: float = 0.0) -> np.ndarray:
    """A state of zerg_5_vs_5, all units apart from each other."""
    units = [[h, 0.1 + 0.2 * (i % 5), 0.25 + 0.5 * (i // 5), cooldown, 1.0, 0.0] for i, h in enumerate(health)]
    return np.concatenate([np.ravel(units), [0] * 5 + [1] * 5, [0] * 10]).astype(np.float32)


def count(picture: np.ndarray, color: tuple) -> int:
    return ndimage.label(ndimage.binary_closing((picture == color).all(-1), np.ones((9, 9))))[1]


def test_battles_show_who_lives():
    health = [1.0, 0.5, 0.0, 0.2, 0.0, 1.0, 0.0, 0.0, 0.0, 0.7]
    picture = video.draw_battle(battle(health), "zerg_5_vs_5")
    assert (count(picture, video.ALLY), count(picture, video.ENEMY), count(picture, video.MARK)) == (3, 2, 0)
    assert count(video.draw_battle(battle(health, cooldown=0.3), "zerg_5_vs_5"), video.MARK) == 5
    up = np.argwhere((picture == video.ENEMY).all(-1))[:, 0].mean()
    assert up < video.SIDE / 2 < np.argwhere((picture == video.ALLY).all(-1))[:, 0].mean(), "y points up"
    whole, half = ((picture == (60, 150, 60)).all(-1)[video.SIDE // 2 :, x - 8 : x + 8].sum() for x in (24, 72))
    assert half == pytest.approx(whole / 2, abs=2) and whole > 20


def test_a_recorded_battle_from_the_command_line(tmp_path, capsys):
    """It needs neither JAX nor OpenGL; two panels; what is over stands still."""
    file = tmp_path / "battle.gif"
    comadice_eval.main(comadice_eval.Args(run=[str(SMAX_DEMO)] * 2, video=str(file)))
    rows, _ = open_dataset(SMAX_DEMO)
    steps = len(video.median_episode(rows)) - 1
    frames = pictures(file)
    assert frames.shape == (steps + 1, video.SIDE + video.CAPTION, 2 * video.SIDE, 3)
    assert (frames[1:] != frames[:-1]).any((1, 2, 3)).all()
    said = capsys.readouterr().out.splitlines()
    assert said[0] == said[1] and f" in {steps} steps" in said[0] and said[2] == f"video: {file}"
    with pytest.raises(BadInput, match="already there"):
        comadice_eval.main(comadice_eval.Args(run=[str(SMAX_DEMO)], video=str(file)))


def test_an_episode_that_is_over_fades():
    dark, light = np.zeros((video.SIDE, video.SIDE, 3), np.uint8), np.full((video.SIDE, video.SIDE, 3), 200, np.uint8)
    whole = video.compose([("a", [(dark, 0, 0.0)]), ("b", [(light, 0, 0.0), (dark, 1, 2.5)])])
    assert [w[100, 100, 0] for w in whole] == [0, 127] and [w[100, 100 + video.SIDE, 0] for w in whole] == [200, 0]


def test_smax_battles_are_played(tmp_path):
    if importlib.util.find_spec("jaxmarl") is None:
        pytest.skip("jaxmarl is not installed")
    film(tmp_path / "smax.gif", ("untrained", *player("smax", "zerg_5_vs_5")))
    frames = pictures(tmp_path / "smax.gif")
    assert 5 <= len(frames) <= 102 and (frames[1:] != frames[:-1]).any((1, 2, 3)).all()
    assert count(frames[0][: video.SIDE], tuple(frames[0][frames[0][..., 2] > 150][0])) >= 1


def test_mp4(tmp_path):
    if importlib.util.find_spec("imageio_ffmpeg") is None:
        pytest.skip("imageio-ffmpeg is not installed")
    import imageio_ffmpeg

    rows, card = open_dataset(SMAX_DEMO)
    film(tmp_path / "battle.mp4", ("data", card, rows))
    frames, seconds = imageio_ffmpeg.count_frames_and_secs(str(tmp_path / "battle.mp4"))
    assert frames == len(video.median_episode(rows)) and seconds == pytest.approx(frames * video.BATTLE_STEP, abs=0.1)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"video": "a.avi"}, "ends in .gif or .mp4"),
        ({"video": "no/folder/a.gif"}, "its folder does not exist"),
        ({"video": "a.gif", "out": "results.json"}, "leave out --out and --workers"),
        ({"video": "a.gif", "workers": 2}, "leave out --out and --workers"),
    ],
)
def test_flags_that_can_not_be(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=message):
        comadice_eval.main(comadice_eval.Args(run=[str(SMAX_DEMO)], **flags))
    assert list(tmp_path.iterdir()) == []


def test_what_can_not_be_drawn(hopper_data, tmp_path, monkeypatch):
    rows, card = open_dataset(hopper_data)
    with pytest.raises(BadInput, match="runs of one task"):
        film(tmp_path / "a.gif", ("a", card, rows), ("b", card | {"task": "ant"}, rows))
    with pytest.raises(BadInput, match="StarCraft II records replays itself"):
        film(tmp_path / "a.gif", ("a", card | {"env": "smacv2"}, rows))
    if os.sys.platform == "linux":
        monkeypatch.delenv("MUJOCO_GL", raising=False)
        monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: subprocess.CompletedProcess(args, 1))
        with pytest.raises(BadInput, match=r"neither EGL nor OSMesa.*libosmesa6.*libegl1"):
            film(tmp_path / "a.gif", ("a", card, rows))
    assert list(tmp_path.iterdir()) == []
