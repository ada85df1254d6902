"""Conversion and download.

What the formats' own libraries write is read back exactly. What is damaged is refused in one line.
"""

import http.server
import json
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, files_hash, small_disk

import offline_data.convert
import offline_data.download
import offline_data.published
import offline_data.writer
from environments.checks import BadInput, run_script
from offline_data import formats
from offline_data.dataset import episodes, open_dataset

h5py = pytest.importorskip("h5py")
LIMIT = 7  # the step limit of the recordings below


def record(
    discrete: bool, lengths: list[int], seed: int = 0, n: int = 3, O: int = 14, A: int = 1, S: int = 42
) -> list[dict]:
    """Made-up episodes of T transitions. An episode of LIMIT steps is cut, any other is terminated.

    observation, state and mask are [T + 1, ...], action and reward are [T, ...].
    """
    generator, recorded = np.random.default_rng(seed), []
    for T in lengths:
        e = {
            "observation": generator.normal(size=(T + 1, n, O)).astype("f4"),
            "state": generator.normal(size=(T + 1, S)).astype("f4"),
        }
        e |= {"reward": generator.normal(size=T).astype("f4"), "terminated": T < LIMIT}
        if discrete:
            e["mask"] = generator.random((T + 1, n, A)) < 0.5
            e["action"] = generator.integers(A, size=(T, n))
            np.put_along_axis(e["mask"][:T], e["action"][..., None], True, -1)
        else:
            e["action"] = generator.normal(size=(T, n, A)).astype("f4") * 2  # beyond [-1, 1], and kept
        recorded.append(e)
    return recorded


def robots(lengths=(3, LIMIT, 1, 5)) -> list[dict]:
    return record(False, list(lengths))


def battles(lengths=(3, LIMIT, 1, 5)) -> list[dict]:
    return record(True, list(lengths), n=2, O=6, A=4, S=5)


def read_back(path, recorded: list[dict], last_observation: bool, rewards=None):
    """The dataset at `path` holds exactly these episodes.

    Without `last_observation` the last row of each is a copy of the row before.
    """
    rows, card = open_dataset(path)
    read = list(episodes(rows))
    assert [len(e) - 1 for e in read] == [len(e["reward"]) for e in recorded]
    for i, (ours, theirs) in enumerate(zip(read, recorded)):
        T = len(theirs["reward"])
        seen = {"state": theirs["state"], ("agents", "observation"): theirs["observation"]}
        if "mask" in theirs:
            seen["agents", "action_mask"] = theirs["mask"]
        for key, value in seen.items():
            value = value if last_observation else np.concatenate([value[:T], value[T - 1 : T]])
            assert np.array_equal(ours[key].numpy(), value), (i, key)
        assert np.array_equal(ours["agents", "action"][:T].numpy(), theirs["action"]), i
        assert np.array_equal(ours["reward"][:T, 0].numpy(), theirs["reward"] if rewards is None else rewards[i]), i
        assert ours["done"][:, 0].tolist() == [False] * (T - 1) + [True, False]
        assert ours["terminated"][:, 0].tolist() == [False] * (T - 1) + [theirs["terminated"], False]
    assert card["made"]["last_observations_copied"] == (0 if last_observation else len(recorded))
    assert card["made"]["truncated_episodes"] == sum(not e["terminated"] for e in recorded)
    return card


def flat(recorded: list[dict], last_row: str) -> dict[str, np.ndarray]:
    """The episodes one after another with a done flag.

    With last_row "observation" each has T + 1 rows, and the last one is done.
    """
    extra = last_row == "observation"
    out = {key: [] for key in recorded[0] if key != "terminated"} | {"done": []}
    for e in recorded:
        T = len(e["reward"])
        for key in out:
            if key == "done":
                out[key].append(np.arange(T + extra) == T + extra - 1)
            elif key in ("action", "reward"):
                out[key].append(np.concatenate([e[key], np.zeros_like(e[key][:1])]) if extra else e[key])
            else:
                out[key].append(e[key][: T + extra])
    return {key: np.concatenate(value) for key, value in out.items()}


def padded(recorded: list[dict], steps: int) -> dict[str, np.ndarray]:
    """[E, steps (+ 1), ...] arrays, zeros behind each episode."""
    out = {}
    for key in recorded[0]:
        if key != "terminated":
            long = key in ("observation", "state", "mask")
            out[key] = np.zeros((len(recorded), steps + long, *recorded[0][key].shape[1:]), recorded[0][key].dtype)
            for i, e in enumerate(recorded):
                out[key][i, : len(e[key])] = e[key]
    return out


def omiga_arrays(recorded, last_row="observation") -> dict:
    rows, n = flat(recorded, last_row), recorded[0]["observation"].shape[1]
    out = {
        "o": rows["observation"],
        "s": rows["state"],
        "a": rows["action"],
        "r": np.repeat(rows["reward"][:, None], n, 1)[..., None],
    }
    return out | {"d": np.repeat(rows["done"][:, None], n, 1).astype("f4")}


def npz_arrays(recorded) -> dict:
    arrays, n = padded(recorded, LIMIT), recorded[0]["observation"].shape[1]
    done = np.zeros((len(recorded), LIMIT), bool)
    for i, e in enumerate(recorded):
        done[i, len(e["reward"]) - 1] = True
    each = lambda x: np.repeat(x[:, :, None], n, 2)[..., None]
    out = {
        "obs": arrays["observation"],
        "actions": arrays["action"],
        "rewards": each(arrays["reward"]),
        "dones": each(done)[..., 0],
    }
    out |= {
        "states": np.repeat(arrays["state"][:, :, None], n, 2),
        "actives": np.ones((len(recorded), LIMIT + 1, n, 1), "f4"),
    }
    return out | (
        {"avails": arrays["mask"].astype("f4"), "actions": arrays["action"][..., None]} if "mask" in arrays else {}
    )


def pymarl_arrays(recorded) -> dict:
    """EpisodeBatch of PyMARL: one length for all. `terminated` is false on a time limit.

    The last step is filled and not played.
    """
    arrays = padded(recorded, LIMIT)
    longer = lambda x: np.concatenate([x, np.zeros_like(x[:, :1])], 1)
    terminated, filled = np.zeros((len(recorded), LIMIT + 1, 1), "u1"), np.zeros((len(recorded), LIMIT + 1, 1), "i8")
    for i, e in enumerate(recorded):
        T = len(e["reward"])
        terminated[i, T - 1], filled[i, : T + 1] = e["terminated"], 1
    out = {
        "obs": arrays["observation"],
        "state": arrays["state"],
        "actions": longer(arrays["action"]),
        "reward": longer(arrays["reward"])[..., None],
    }
    out |= {"terminated": terminated, "filled": filled}
    return out | (
        {"avail_actions": arrays["mask"].astype("i4"), "actions": longer(arrays["action"])[..., None]}
        if "mask" in arrays
        else {}
    )


def vault_arrays(recorded, last_row="observation") -> dict:
    """OG-MARL's experience, [1, rows, ...]; names as flashbax flattens them."""
    rows, n = flat(recorded, last_row), recorded[0]["observation"].shape[1]
    each = lambda x: np.repeat(x[None, :, None].astype("f4"), n, 2)
    out = {
        "observations.": rows["observation"][None],
        "actions.": rows["action"][None].astype("i4" if "mask" in rows else "f4"),
    }
    out |= {
        "rewards.": each(rows["reward"]),
        "terminals.": each(rows["done"]),
        "truncations.": each(np.zeros_like(rows["done"])),
    }
    return (
        out
        | {"infos.state.": rows["state"][None]}
        | ({"infos.legals.": rows["mask"][None].astype("f4")} if "mask" in rows else {})
    )


def minari_arrays(recorded) -> dict:
    """Hopper: 11 numbers and 3 actions. Names are paths in the file."""
    out = {}
    for i, e in enumerate(recorded):
        end = np.arange(len(e["reward"])) == len(e["reward"]) - 1
        arrays = {
            "observations": e["observation"][:, 0, :11].astype("f8"),
            "actions": e["action"][..., 0],
            "rewards": e["reward"],
        }
        arrays |= {"terminations": end & e["terminated"], "truncations": end & (not e["terminated"])}
        out |= {f"episode_{i}/{name}": array for name, array in arrays.items()}
    return out


def write_hdf5(path, arrays, **kwargs):
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, **kwargs)
    return path


def write_npz(path, arrays):
    np.savez_compressed(path, **arrays)
    return path


def write_npy(path, arrays):
    path.mkdir()
    for name, array in arrays.items():
        np.save(path / f"{name}.npy", array)
    return path


def write_vault(path, arrays):
    """A vault as flashbax lays it out, written with tensorstore alone.

    test_vault_written_by_flashbax has the library's own.
    """
    ts = pytest.importorskip("tensorstore")
    path.mkdir(parents=True)
    arrays = {"vault_index": np.array([next(iter(arrays.values())).shape[1]], "i4")} | arrays
    for name, value in arrays.items():
        spec, shape = (
            {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": f"file://{path}", "path": name}},
            value.shape,
        )
        if name != "vault_index":
            spec["metadata"], shape = {"compressor": {"id": "gzip", "level": 5}}, (shape[0], 10**13, *shape[2:])
        array = ts.open(spec, shape=shape, dtype=value.dtype.name, create=True).result()
        (array if name == "vault_index" else array[:, : value.shape[1]]).write(value).result()
    (path / "metadata.json").write_text(json.dumps({"version": 1.2, "structure_shape": {}, "structure_dtype": {}}))
    return path


def write_minari(path, arrays):
    (path / "data").mkdir(parents=True)
    count = len({name.split("/")[0] for name in arrays})
    meta = {"total_episodes": count, "data_format": "hdf5", "env_spec": json.dumps({"id": "Hopper-v5"})}
    (path / "data" / "metadata.json").write_text(json.dumps(meta))
    write_hdf5(path / "data" / "main_data.hdf5", arrays)
    return path


def write_omiga(path, recorded, last_row="observation"):
    return write_hdf5(path, omiga_arrays(recorded, last_row))


def convert(source, format, out, env="mamujoco", task="hopper", quality="x", limit=LIMIT, **kwargs):
    return formats.convert_here(str(source), format, env, task, quality, str(out), limit=limit, **kwargs)


# ---------------------------------------------------------------- each format read back


def test_omiga(tmp_path):
    recorded = robots()
    card = read_back(convert(write_omiga(tmp_path / "a.hdf5", recorded), "omiga", tmp_path / "out"), recorded, True)
    assert card["made"]["last_row"].startswith("observation")
    assert card["made"]["rewards_beside_last_observations_left_out"]["rows"] == 4
    sizes = [card[name] for name in ("n_agents", "obs_dim", "state_dim", "action_dim", "discrete")]
    assert sizes == [3, 14, 42, 1, False]
    assert card["action_high"] > 1 and card["action_low"] < -1
    card = read_back(
        convert(write_omiga(tmp_path / "b.hdf5", recorded, "transition"), "omiga", tmp_path / "b"), recorded, False
    )
    assert card["made"]["last_row"].startswith("transition")


def test_last_row_where_the_longest_episode_does_not_say(tmp_path):
    recorded = robots([3, 5, 1])
    assert read_back(convert(write_omiga(tmp_path / "a", recorded), "omiga", tmp_path / "out"), recorded, True)
    path = write_omiga(tmp_path / "b", recorded, "transition")
    assert read_back(convert(path, "omiga", tmp_path / "b-out", last_row="transition"), recorded, False)
    with pytest.raises(BadInput, match="8 transitions where the step limit is 7"):
        convert(write_omiga(tmp_path / "c", robots()), "omiga", tmp_path / "c-out", last_row="transition")
    with pytest.raises(BadInput, match="give the data's own --limit"):
        convert(tmp_path / "c", "omiga", tmp_path / "c-out", limit=4)


def test_rows_are_read_in_small_blocks(tmp_path, monkeypatch):
    recorded = robots([3, LIMIT, 1, 5] * 5)
    path = write_omiga(tmp_path / "a.hdf5", recorded)
    for rows in (1, 4, 9):
        monkeypatch.setattr(formats, "BLOCK", rows * 500)
        read_back(convert(path, "omiga", tmp_path / f"out-{rows}"), recorded, True)


def test_rows_after_the_last_done_are_left_out(tmp_path):
    recorded = robots()
    path = write_omiga(tmp_path / "a.hdf5", recorded)
    with h5py.File(path, "a") as file:
        file["d"][-1] = 0
    card = read_back(convert(path, "omiga", tmp_path / "out"), recorded[:-1], True)
    assert card["made"]["rows_after_the_last_done_left_out"] == 6


def test_what_the_state_is(tmp_path):
    recorded = robots()
    side_by_side = [e | {"state": e["observation"].reshape(-1, 42)} for e in recorded]
    for name, change in (("agents", lambda e: e["observation"]), ("other", lambda e: e["state"][:, :11])):
        path = write_omiga(tmp_path / name, [e | {"state": change(e)} for e in recorded])
        card = read_back(convert(path, "omiga", tmp_path / f"{name}-out"), side_by_side, True)
        assert "side by side" in card["made"]["state"]
    game = battles()
    arrays = npz_arrays(game)
    arrays["states"][:, :, 1] = 7  # the first agent's counts
    np.savez(tmp_path / "game.npz", **arrays)
    converted = convert(tmp_path / "game.npz", "npz", tmp_path / "game", "smacv1", "corridor")
    assert read_back(converted, game, True)["made"]["state"] == "the first agent's"


@pytest.mark.parametrize("kind", ["robots", "battles"])
@pytest.mark.parametrize("format", ["npz", "pymarl", "npy"])
def test_episode_formats(kind, format, tmp_path):
    recorded = robots() if kind == "robots" else battles()
    if format == "npz":
        path = write_npz(tmp_path / "a.npz", npz_arrays(recorded))
    elif format == "pymarl":
        path = write_hdf5(tmp_path / "a.h5", pymarl_arrays(recorded), compression="gzip")
    else:
        path = write_npy(tmp_path / "a", pymarl_arrays(recorded))
    task = {"env": "mamujoco", "task": "hopper"} if kind == "robots" else {"env": "smacv2", "task": "zerg_5_vs_5"}
    before = files_hash(tmp_path)
    card = read_back(convert(path, "npz" if format == "npz" else "pymarl", tmp_path / "out", **task), recorded, True)
    assert card["discrete"] == (kind == "battles") and card["interface"] == "benchmark"
    shutil.rmtree(tmp_path / "out")
    assert files_hash(tmp_path) == before


def test_npz_without_a_done_ends_where_the_state_stands_still(tmp_path):
    recorded = battles()
    arrays = npz_arrays(recorded)
    for i, e in enumerate(recorded):
        T = len(e["reward"])
        arrays["states"][i, T:] = arrays["states"][i, T]
    arrays["dones"][:] = False
    np.savez(tmp_path / "a.npz", **arrays)
    truncated = [e | {"terminated": False} for e in recorded]
    read_back(convert(tmp_path / "a.npz", "npz", tmp_path / "out", "smacv1", "corridor"), truncated, True)


def test_pymarl_without_the_last_observation(tmp_path):
    recorded = battles([3, 1, 5])
    arrays = {name: array[:, :LIMIT] for name, array in pymarl_arrays(recorded).items()}
    for i, e in enumerate(recorded):
        arrays["filled"][i, len(e["reward"])] = 0
    write_npy(tmp_path / "a", arrays)
    card = read_back(convert(tmp_path / "a", "pymarl", tmp_path / "out", "smacv1", "corridor"), recorded, False)
    assert card["interface"] == "standard"


def test_pymarl_with_steps_one_shorter_than_observations(tmp_path):
    recorded = battles()
    arrays = pymarl_arrays(recorded)
    for name in ("actions", "reward", "terminated", "filled"):
        arrays[name] = arrays[name][:, 1:] if name == "filled" else arrays[name][:, :-1]
    write_npy(tmp_path / "a", arrays)
    read_back(convert(tmp_path / "a", "pymarl", tmp_path / "out", "smacv1", "corridor"), recorded, True)


@pytest.mark.parametrize("kind", ["robots", "battles"])
@pytest.mark.parametrize("last_row", ["observation", "transition"])
def test_vault_written_by_flashbax(kind, last_row, tmp_path):
    jnp = pytest.importorskip("jax.numpy")
    vault = pytest.importorskip("flashbax.vault")
    buffers = pytest.importorskip("flashbax.buffers.trajectory_buffer")
    recorded = robots() if kind == "robots" else battles()
    leaves = {"infos": {}}
    for name, array in vault_arrays(recorded, last_row).items():
        (leaves["infos"] if name.startswith("infos.") else leaves)[name.split(".")[-2]] = jnp.asarray(array)
    N = leaves["rewards"].shape[1]
    written = vault.Vault("3hopper.vlt", leaves, rel_dir=str(tmp_path), vault_uid="Medium")
    for interval in ((0, 10), (10, N)):
        state = buffers.TrajectoryBufferState(experience=leaves, current_index=jnp.array(N), is_full=jnp.array(False))
        written.write(state, source_interval=interval)
    source, before = tmp_path / "3hopper.vlt" / "Medium", files_hash(tmp_path)
    task = {"env": "mamujoco", "task": "hopper"} if kind == "robots" else {"env": "smacv1", "task": "corridor"}
    card = read_back(convert(source, "vault", tmp_path / "out", **task), recorded, last_row == "observation")
    assert card["made"]["vault"] == "3hopper.vlt/Medium" and card["made"]["rows"] == N
    shutil.rmtree(tmp_path / "out")
    assert files_hash(tmp_path) == before
    with pytest.raises(BadInput, match="one of Medium"):
        convert(source.parent, "vault", tmp_path / "out", **task)


def test_vault_truncations_and_agents_that_die_one_by_one(tmp_path):
    recorded = battles([4, 5, 3])
    arrays = vault_arrays(recorded, "transition")
    arrays["terminals."][0, 1, 0] = 1  # one agent died: no end
    arrays["terminals."][0, 8] = 0
    arrays["truncations."][0, 8] = 1
    path = write_vault(tmp_path / "v" / "Good", arrays).rename(tmp_path / "v" / "an odd#name%41?")
    read_back(
        convert(path, "vault", tmp_path / "out", "smacv1", "corridor"),
        [e | {"terminated": i != 1} for i, e in enumerate(recorded)],
        False,
    )


@pytest.mark.parametrize(
    "scenario, task, n, D",
    [("Hopper", "hopper", 3, 11), ("HalfCheetah", "halfcheetah_2x3", 2, 17), ("Ant", "ant_4x2", 4, 105)],
)
def test_minari_written_by_minari(scenario, task, n, D, tmp_path, monkeypatch):
    """What Minari records of a simulator is what environments shows of the same simulator."""
    minari = pytest.importorskip("minari")
    gymnasium = pytest.importorskip("gymnasium")
    from environments.simulators import make_env

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env = minari.DataCollector(gymnasium.make(f"{scenario}-v5", max_episode_steps=LIMIT), record_infos=False)
    env.action_space.seed(0)
    recorded = []
    for seed in range(4):
        first, _ = env.reset(seed=seed)
        e, over = {"raw": [first], "action": [], "reward": []}, False
        while not over:
            action = env.action_space.sample() * 1.5 if scenario == "Hopper" else env.action_space.sample()
            after, reward, terminated, truncated, _ = env.step(action)
            over = terminated or truncated
            e["raw"].append(after), e["action"].append(action), e["reward"].append(reward)
        recorded.append(e | {"terminated": terminated})
    env.create_dataset("mujoco/test-v0", eval_env=f"{scenario}-v5")
    env.close()
    source = tmp_path / "mujoco" / "test-v0"
    before = files_hash(source)
    path = convert(source, "minari", tmp_path / "out", task=task)
    assert files_hash(source) == before
    ours = make_env("mamujoco", task, 1)
    expected = []
    for e in recorded:
        views = []
        for raw in e["raw"]:
            ours.raw[0] = 0
            width = 27 if scenario == "Ant" else D
            ours.raw[0, :width] = raw[:width]
            views.append(ours._view())
        action = np.stack(e["action"]).astype("f4").reshape(len(e["action"]), n, -1)
        expected.append(
            {
                "observation": torch.cat([v["agents", "observation"] for v in views]).numpy(),
                "state": torch.cat([v["state"] for v in views]).numpy(),
                "action": action,
                "reward": np.array(e["reward"], "f4"),
                "terminated": e["terminated"],
            }
        )
    ours.close()
    card = read_back(path, expected, True)
    assert card["made"]["recorded_in"] == f"{scenario}-v5"
    for wrong, message in (("walker2d_2x3", "was recorded in"), (f"{scenario.lower()}_7x9", "no partition")):
        with pytest.raises(BadInput, match=message):
            convert(source, "minari", tmp_path / "no", task=wrong)


def test_return_to_go(tmp_path):
    recorded = robots()
    togo = [np.cumsum(e["reward"][::-1], dtype="f8")[::-1].astype("f4") for e in recorded]
    path = convert(write_omiga(tmp_path / "a.hdf5", recorded), "omiga", tmp_path / "out", return_to_go=True)
    assert read_back(path, recorded, True, togo)["made"]["reward"].startswith("return-to-go")


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", ["obs", "actives", "spare"])
def test_npz_with_pickled_objects(name, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pickle was run"),)

    arrays = npz_arrays(robots())
    arrays[name] = np.array([[Trap()]], dtype=object)
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(BadInput, match=f"'{name}' holds pickled Python objects"):
        convert(tmp_path / "a.npz", "npz", tmp_path / "out")
    folder = write_npy(tmp_path / "npy", pymarl_arrays(robots()))
    np.save(folder / "reward.npy", arrays[name], allow_pickle=True)
    with pytest.raises(BadInput, match="'reward' holds pickled Python objects"):
        convert(folder, "pymarl", tmp_path / "out")
    assert not (tmp_path / "pickle was run").exists()


def test_no_unpickling_anywhere():
    for name in ("formats.py", "download.py", "dataset.py", "writer.py", "replay.py"):
        file = ROOT / "offline_data" / name
        source = file.read_text()
        assert "import pickle" not in source and "allow_pickle=True" not in source and "torch.load(" not in source, file
        assert source.count("np.load(") == source.count("allow_pickle=False)")


def change_npz(tmp_path, **changes):
    arrays = npz_arrays(battles())
    for name, change in changes.items():
        arrays[name] = change(arrays[name])
    np.savez(tmp_path / "a.npz", **arrays)
    return tmp_path / "a.npz"


def put(index, value):
    def change(array):
        array = array.copy()
        array[index] = value
        return array

    return change


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"obs": put((0, 2, 1, 0), np.nan)}, "observation is not finite at step 2"),
        ({"rewards": put((1, 0, 1, 0), 9)}, "'rewards' differs between agents"),
        ({"actions": put((0, 0, 0, 0), 4)}, "not one of 0 to 3"),
        ({"avails": lambda x: 0 * x}, "its mask forbids"),
        ({"avails": put((0, 0, 0, 0), 3)}, "other than 0 and 1"),
        ({"dones": lambda x: x[:, :-1]}, "'dones' is"),
        ({"obs": np.asfortranarray}, "in Fortran order"),
        ({"states": lambda x: x[:, :, :1]}, "the state has 1 agents"),
        ({"obs": lambda x: x[..., None]}, "not \\[time, agents, entries\\]"),
    ],
)
def test_values_and_shapes_that_are_refused(changes, message, tmp_path):
    with pytest.raises(BadInput, match=message):
        convert(change_npz(tmp_path, **changes), "npz", tmp_path / "out", "smacv1", "corridor")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz"]


def test_other_input_that_is_refused(tmp_path, monkeypatch):
    recorded = robots()
    good = write_omiga(tmp_path / "a.hdf5", recorded)
    for kwargs, message in (
        ({"env": "smacv2", "task": "zerg_5_vs_5"}, "no action masks"),
        ({"env": "atari"}, "unknown env"),
        ({"task": "hoper"}, "unknown mamujoco task 'hoper'"),
        ({"task": "hopper_9x9"}, "Hopper has no partition '9x9'"),
        ({"env": "smacv2", "task": "zerg_5"}, "unknown smacv2 task 'zerg_5'"),
        ({"env": "smax", "task": "zerg_5"}, "unknown smax task 'zerg_5'"),
        ({"env": "smacv1", "task": "3m", "limit": None}, "give it with --limit"),
    ):
        with pytest.raises(BadInput, match=message):
            convert(good, "omiga", tmp_path / "out", **kwargs)
    for source, format, message in (
        (tmp_path / "none", "omiga", "there is no"),
        (good, "zarr", "unknown format"),
        (good, "npz", "of another format"),
        (good, "pymarl", "has no obs"),
        (tmp_path, "vault", "is no vault"),
        (tmp_path, "minari", "json is missing"),
    ):
        with pytest.raises(BadInput, match=message):
            convert(source, format, tmp_path / "out")
    for interface in ("mine", "standard"):
        with pytest.raises(BadInput, match=f"mamujoco has no interface '{interface}'"):
            convert(good, "omiga", tmp_path / "out", interface=interface)
    (tmp_path / "mine").mkdir()
    with pytest.raises(BadInput, match="is no dataset and is left alone"):
        offline_data.convert.convert(
            str(good), "omiga", "mamujoco", "hopper", "x", str(tmp_path / "mine"), overwrite=True
        )
    (tmp_path / "mine").rmdir()
    with h5py.File(good, "a") as file:
        file["d"][:] = 0
    with pytest.raises(BadInput, match="no row says that an episode is done"):
        convert(good, "omiga", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(BadInput, match="pip install h5py"):
        convert(good, "omiga", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.hdf5"]


def change_hdf5(path, change):
    """OMIGA's file with something of it replaced; the links and the holes lead to data that are sound."""
    recorded = robots()
    write_omiga(path, recorded)
    arrays = omiga_arrays(recorded)
    with h5py.File(path.with_name("other.hdf5"), "w") as other:
        other["o"] = arrays["o"]
    arrays["o"].tofile(path.with_name("raw"))
    with h5py.File(path, "a") as file:
        del file["o"]
        if change == "external link":
            file["o"] = h5py.ExternalLink(str(path.with_name("other.hdf5")), "/o")
        elif change == "external link to a file that is not there":
            file["o"] = h5py.ExternalLink("/etc/hostname", "/o")
        elif change == "soft link":
            file["elsewhere"], file["o"] = arrays["o"], h5py.SoftLink("/elsewhere")
        elif change == "soft link that leads outside":
            file["elsewhere"], file["o"] = (
                h5py.ExternalLink(str(path.with_name("other.hdf5")), "/"),
                h5py.SoftLink("/elsewhere/o"),
            )
        elif change == "soft link to nothing":
            file["o"] = h5py.SoftLink("/nothing")
        elif change == "external storage":
            file.create_dataset(
                "o", arrays["o"].shape, "f4", external=[(str(path.with_name("raw")), 0, h5py.h5f.UNLIMITED)]
            )
        elif change == "virtual":
            layout = h5py.VirtualLayout(arrays["o"].shape, "f4")
            layout[:] = h5py.VirtualSource(str(path.with_name("other.hdf5")), "o", shape=arrays["o"].shape)
            file.create_virtual_dataset("o", layout)
        elif change == "group":
            file.create_group("o")
    return path


@pytest.mark.parametrize(
    "change, message",
    [
        ("external link", "'o' is a link"),
        ("external link to a file that is not there", "'o' is a link"),
        ("soft link", "'o' is a link"),
        ("soft link that leads outside", "'o' is a link"),
        ("soft link to nothing", "'o' is a link"),
        ("external storage", "lies in other files"),
        ("virtual", "lies in other files"),
        ("group", "is not an array"),
    ],
)
def test_hdf5_that_leads_elsewhere(change, message, tmp_path):
    with pytest.raises(BadInput, match=message):
        convert(change_hdf5(tmp_path / "a.hdf5", change), "omiga", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_conversion_on_disks_of_20_sizes(tmp_path):
    """A whole dataset, or one line and nothing."""
    source, disk, outcomes = write_omiga(tmp_path / "a.hdf5", robots()), tmp_path / "disk", []
    for kib in range(4, 84, 4):
        with small_disk(disk, kib):
            try:
                open_dataset(convert(source, "omiga", disk / "set"))
                outcomes.append("written")
            except BadInput as error:
                assert str(error).startswith(f"no space left on {disk}; free some and run the command again"), error
                assert list(disk.iterdir()) == []
                outcomes.append("no space")
    assert set(outcomes) == {"written", "no space"} and outcomes == sorted(outcomes), outcomes


HOSTILE = [
    "../x", "/tmp/x", "a/../../x", "..", "a\\..\\x", "C:/x", "\x1b[2J", "a\nerror: b", "a\rb", "\u202ex", "a\x07b",
    "\x7f", "\u2028", "x" * 3000,
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_hostile_names_in_files(name, tmp_path, capsys):
    """Whatever names a file holds, the answer is one printable line, and nothing is written."""
    recorded, out = robots(), tmp_path / "out"
    write_omiga(tmp_path / "a.hdf5", recorded)
    with h5py.File(tmp_path / "a.hdf5", "a") as file:
        file.move("r", "hidden")
        file[name.replace("/", "|") if set(name) & set("/.") else name] = 1
    arrays = npz_arrays(battles())
    write_npz(tmp_path / "a.npz", {(name if key == "obs" else key): value for key, value in arrays.items()})
    for source, format, env, task in (
        ("a.hdf5", "omiga", "mamujoco", "hopper"),
        ("a.npz", "npz", "smacv1", "corridor"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run_script(convert, tmp_path / source, format, out, env, task)
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and said[:-1].isprintable(), said
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        member = zipfile.ZipInfo()
        member.filename = name + "/metadata.json"
        archive.writestr(member, "{}")
    with pytest.raises(SystemExit, match="2"):
        run_script(offline_data.download.extract, tmp_path / "a.zip", "Medium", out)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and said[:-1].isprintable(), said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.hdf5", "a.npz", "a.zip"]


@pytest.mark.parametrize("name", "osard")
@pytest.mark.parametrize(
    "link",
    [
        h5py.SoftLink("/hidden"),
        h5py.SoftLink("/"),
        h5py.ExternalLink("/etc/hostname", "/o"),
        h5py.ExternalLink("../../a", "/o"),
    ],
    ids=range(4),
)
def test_every_array_may_be_a_link(name, link, tmp_path):
    write_omiga(tmp_path / "a.hdf5", robots())
    with h5py.File(tmp_path / "a.hdf5", "a") as file:
        file.move(name, "hidden")
        file[name] = link
    with pytest.raises(BadInput, match=f"'{name}' is a link"):
        convert(tmp_path / "a.hdf5", "omiga", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.hdf5"]


def test_minari_episode_that_is_a_link(tmp_path):
    source = write_minari(tmp_path / "m", minari_arrays(robots()))
    with h5py.File(source / "data" / "main_data.hdf5", "a") as file:
        file.move("episode_1", "episode_0/hidden")
        file["episode_1"] = h5py.SoftLink("/episode_0/hidden")
    with pytest.raises(BadInput, match="'episode_1' is a link"):
        convert(source, "minari", tmp_path / "out")


@pytest.mark.parametrize("storage", [{"chunks": (1000, 3, 14)}, {"chunks": (1000, 3, 14), "compression": "gzip"}, {}])
def test_hdf5_that_declares_what_it_does_not_hold(storage, tmp_path):
    """A file of a few kB with 38 million rows of zeros, which HDF5 makes up when they are read."""
    N, path = 38_000_000, tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        for name, shape in {"o": (N, 3, 14), "s": (N, 42), "a": (N, 3, 1), "r": (N, 3, 1), "d": (N, 3)}.items():
            file.create_dataset(name, shape, "f4", **(storage | {"chunks": (1000, *shape[1:])} if storage else {}))
        if storage:
            file["o"][:1000] = 1
    assert path.stat().st_size < 200_000
    with pytest.raises(BadInput, match="declares 6,384,000,000 bytes and"):
        convert(path, "omiga", tmp_path / "out", limit=1000)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.hdf5"]


def test_compressed_hdf5_of_zeros_is_read(tmp_path):
    """What is sound and dense is not refused: rewards of zero, compressed."""
    recorded = robots()
    for e in recorded:
        e["reward"][:] = 0
    read_back(
        convert(
            write_hdf5(tmp_path / "a.hdf5", omiga_arrays(recorded), compression="gzip", chunks=True),
            "omiga",
            tmp_path / "out",
        ),
        recorded,
        True,
    )


def test_npz_that_declares_what_it_does_not_hold(tmp_path):
    arrays = npz_arrays(battles())
    write_npz(tmp_path / "a.npz", arrays)
    for name in ("obs", "states", "rewards", "avails"):
        with (
            zipfile.ZipFile(tmp_path / "a.npz") as good,
            zipfile.ZipFile(tmp_path / "b.npz", "w", zipfile.ZIP_DEFLATED) as bad,
        ):
            for member in good.namelist():
                data = good.read(member)
                if member == f"{name}.npy":
                    length = data.index(b"\n") + 1
                    header = {
                        "descr": np.lib.format.dtype_to_descr(arrays[name].dtype),
                        "fortran_order": False,
                        "shape": (10**8, *arrays[name].shape[1:]),
                    }
                    with open(tmp_path / "h", "wb") as file:
                        np.lib.format.write_array_header_1_0(file, header)
                    data = (tmp_path / "h").read_bytes() + data[length:]
                bad.writestr(member, data)
        with pytest.raises(BadInput, match=r"ends before|are of"):
            convert(tmp_path / "b.npz", "npz", tmp_path / "out", "smacv1", "corridor")
        assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    "task, quality",
    [("../../x", "good"), ("corridor", "../x"), ("/tmp/x", "good"), ("corridor", ""), ("corridor", "a\x1b[2J")],
)
def test_names_that_are_paths(task, quality, tmp_path):
    with pytest.raises(BadInput, match="not a name of letters"):
        convert(
            write_npz(tmp_path / "a.npz", npz_arrays(battles())) or tmp_path / "a.npz",
            "npz",
            tmp_path / "out",
            "smacv1",
            task,
            quality,
        )
    with pytest.raises(BadInput, match="not a name of letters"):
        offline_data.convert.convert(str(tmp_path / "a.npz"), "npz", "smacv1", task, quality)


def reader_of(pid: int) -> list[int]:
    """The processes that a process has started and that still live."""
    found = []
    for folder in os.listdir("/proc"):
        if folder.isdigit():
            try:
                state, parent = open(f"/proc/{folder}/stat").read().rsplit(") ", 1)[1].split()[:2]
            except OSError:
                continue
            if int(parent) == pid and state != "Z":
                found.append(int(folder))
    return found


def alive(pid: int) -> bool:
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(") ", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks into /proc")
@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_killed_conversion_leaves_no_reader(number, code, tmp_path):
    """The reader hangs at a named pipe that nobody writes to; it goes when the command is gone."""
    os.mkfifo(tmp_path / "pipe")
    args = [
        "--format", "npz", "--env", "smacv1", "--task", "corridor", "--quality", "good",
        "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    command = subprocess.Popen(
        [sys.executable, "-m", "offline_data", "convert", str(tmp_path / "pipe"), *args],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        end = time.monotonic() + 120
        while not (tmp_path / "out.partial").exists():  # now the reader reads
            assert time.monotonic() < end and command.poll() is None
            time.sleep(0.1)
        readers = reader_of(command.pid)
        assert len(readers) == 1
        command.send_signal(number)
        said = command.communicate(timeout=60)[1]
    finally:
        command.kill()
    while alive(readers[0]) and time.monotonic() < end:
        time.sleep(0.1)
    assert command.returncode == code and not alive(readers[0])
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    if number != signal.SIGKILL:
        assert said.strip().splitlines()[-1].startswith("stopped by ") and "Traceback" not in said


def test_a_reader_whose_command_is_gone_ends_before_its_slow_imports(tmp_path):
    job = json.dumps({"out": str(tmp_path / "x")})
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "offline_data.formats", job],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 1 and "threading" in done.stderr and " torch\n" not in done.stderr


# ---------------------------------------------------------------- command line


def command(*args) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "offline_data", *map(str, args)], capture_output=True, text=True, timeout=240, cwd=ROOT
    )


def test_command_line(tmp_path):
    recorded = robots()
    source = write_omiga(tmp_path / "a.hdf5", recorded)
    args = [
        "--format", "omiga", "--env", "mamujoco", "--task", "hopper", "--quality", "expert", "--limit", LIMIT,
        "--out", tmp_path / "out",
    ]  # fmt: skip
    done = command("convert", source, *args)
    assert done.returncode == 0, done.stderr
    read_back(tmp_path / "out", recorded, True)
    assert "| Table 3 | expert | 1.5K | 999K |" in done.stdout
    assert "published: DIFFERS in trajectories: 4, OG-MARL 1481" in done.stdout
    again = command("convert", source, *args)
    assert again.returncode == 2
    assert again.stderr == f"error: {tmp_path / 'out'} is already there: give another --out or --overwrite\n"
    before = files_hash(tmp_path / "out")
    source.write_bytes(source.read_bytes()[:3000])
    with pytest.raises(BadInput, match="can't be read as omiga"):
        offline_data.convert.convert(
            str(source), "omiga", "mamujoco", "hopper", "expert", str(tmp_path / "out"), limit=LIMIT, overwrite=True
        )
    assert files_hash(tmp_path / "out") == before and not (tmp_path / "out.partial").exists()


def test_plot(tmp_path, capsys):
    path = convert(write_omiga(tmp_path / "a.hdf5", robots()), "omiga", tmp_path / "out")
    offline_data.published.plot(str(path))
    assert (path / "returns.png").read_bytes()[:4] == b"\x89PNG"
    assert str(path / "returns.png") in capsys.readouterr().out
    offline_data.published.plot(str(path), str(tmp_path / "elsewhere.png"))
    assert (tmp_path / "elsewhere.png").read_bytes() == (path / "returns.png").read_bytes()
    read_back(path, robots(), True)
    with pytest.raises(BadInput, match="can't write"):
        offline_data.published.plot(str(path), str(tmp_path / "no" / "returns.png"))


@pytest.mark.parametrize(
    "body, message",
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "the reader crashed"),
        ("import time; time.sleep(60)", "did nothing for 2 seconds"),
        ("raise KeyError('a bug')", "the reader crashed"),
    ],
)
def test_a_reader_that_crashes_or_hangs(body, message, tmp_path, monkeypatch):
    (tmp_path / "child.py").write_text(body)
    monkeypatch.setattr(offline_data.convert, "CHILD_COMMAND", (sys.executable, str(tmp_path / "child.py")))
    monkeypatch.setattr(offline_data.convert, "STALL", 2)
    with pytest.raises(BadInput, match=message):
        offline_data.convert.convert(
            str(tmp_path / "child.py"), "omiga", "mamujoco", "hopper", "x", str(tmp_path / "out")
        )


def test_published_numbers_agree_with_each_other():
    """Table 3 is what one gets by rounding OG-MARL's statistics, once rows are read as formats.py says."""
    for (env, task, quality), (sizes, paper, vault) in offline_data.published.published().items():
        if not paper or not vault:
            continue
        mean, std, low, high, rows, trajectories = map(float, vault)
        samples = rows - trajectories if env == "mamujoco" else rows
        card = {
            "env": env,
            "task": task,
            "quality": quality,
            "samples": int(samples),
            "trajectories": int(trajectories),
        }
        card |= {"return_mean": mean, "return_std": std, "return_min": low, "return_max": high}
        card |= dict(zip(("n_agents", "state_dim", "obs_dim", "action_dim"), map(int, sizes)))
        shown, wrong = offline_data.published.differences(card)
        assert len(shown) == 2 and not wrong, (env, task, quality, wrong)
        assert offline_data.published.differences(card | {"return_mean": mean + 1})[1]
        assert offline_data.published.differences(card | {"obs_dim": 1})[1]
    assert len(offline_data.published.published()) == 39 + 4


# ---------------------------------------------------------------- damaged files

KINDS = ["vault", "omiga", "npz", "pymarl", "npy", "minari", "native"]
COPIES = 75  # of each kind
JSONS = [
    "", "{", "[]", "null", "{}", '{"version": "x"}', '{"total_episodes": 1e9}',
    '{"total_episodes": 2, "env_spec": "5"}', "[" * 100000, '{"a": ' * 50000,
]  # fmt: skip


def write_small(kind: str, path, arrays=None):
    """A small source of each format, or of what became of its arrays."""
    recorded = robots() if kind in ("omiga", "minari") else battles()
    if kind == "native":
        convert(write_omiga(path.with_name("source.hdf5"), robots()), "omiga", path)
        path.with_name("source.hdf5").unlink()
        card = json.loads((path / "card.json").read_text())
        del card["sha256"]  # as an older version wrote it: with checksums every copy would be refused
        (path / "card.json").write_text(json.dumps(card))
        return path, None
    make = {
        "vault": vault_arrays,
        "omiga": omiga_arrays,
        "npz": npz_arrays,
        "pymarl": pymarl_arrays,
        "npy": pymarl_arrays,
        "minari": minari_arrays,
    }[kind]
    write = {
        "vault": write_vault,
        "omiga": write_hdf5,
        "npz": write_npz,
        "pymarl": write_hdf5,
        "npy": write_npy,
        "minari": write_minari,
    }[kind]
    arrays = make(recorded) if arrays is None else arrays
    path = path.with_suffix(".npz") if kind == "npz" else path
    return write(path, arrays), arrays


def mutate(kind: str, good, arrays, folder, i: int):
    """The i-th damaged copy of a source."""
    rng = random.Random(i)
    copy = folder / f"copy-{i}"
    if arrays is not None and i % 3 == 0:  # the file is sound, what it holds is not
        arrays = {name: array.copy() for name, array in arrays.items()}
        one, two = rng.sample(sorted(arrays), 2)
        floats = [name for name in sorted(arrays) if arrays[name].dtype.kind == "f"]
        change = rng.choice(["nan", "inf", "swap", "drop", "shorter", "wider", "flat", "text", "minus", "empty"])
        if change in ("nan", "inf"):
            arrays[rng.choice(floats)].flat[0] = np.nan if change == "nan" else np.inf
        elif change == "swap":
            arrays[one], arrays[two] = arrays[two], arrays[one]
        elif change == "drop":
            del arrays[one]
        elif change == "text" and kind not in ("vault",):
            arrays[one] = np.full(arrays[one].shape, b"x")
        else:
            x = arrays[one]
            shapes = {
                "shorter": x[:, :-1] if x.ndim > 1 else x[:-1],
                "wider": np.concatenate([x, x], -1),
                "flat": x.reshape(len(x), -1),
            }
            shapes |= {"minus": -1 - x * 1.0, "empty": x[:, :0] if kind == "vault" else x[:0]}
            arrays[one] = shapes.get(change, x.astype("f8"))
        try:
            return write_small(kind, copy, arrays)[0]
        except (ValueError, IndexError, StopIteration):  # tensorstore does not write every such array
            shutil.rmtree(copy, ignore_errors=True)
    if good.is_dir():
        shutil.copytree(good, copy)
        files = sorted(p for p in copy.rglob("*") if p.is_file())
    else:
        copy = copy.with_suffix(good.suffix)
        shutil.copy(good, copy)
        files = [copy]
    file = rng.choice(files)
    data = bytearray(file.read_bytes())
    change = rng.choice(["flip", "flip", "flip", "cut", "zero", "grow", "json", "delete"])
    if change == "flip" and data:
        for _ in range(rng.choice([1, 4, 40])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif change == "cut":
        data = data[: rng.randrange(len(data) + 1)]
    elif change == "zero":
        start = rng.randrange(len(data) + 1)
        data[start : start + 64] = bytes(len(data[start : start + 64]))
    elif change == "grow":
        data += rng.randbytes(100)
    elif change == "json":
        jsons = [p for p in files if p.suffix == ".json"]
        file = rng.choice(jsons) if jsons else file
        data = rng.choice(JSONS).encode()
    file.write_bytes(data)
    if change == "delete" and good.is_dir():
        file.unlink()
    return copy


def attempt(kind: str, source, out) -> str:
    """Reads one damaged copy: "read", "refused", or what went wrong."""
    before = files_hash(source) if source.is_dir() else source.read_bytes()
    task = (
        {"env": "mamujoco", "task": "hopper"}
        if kind in ("omiga", "minari", "native")
        else {"env": "smacv1", "task": "corridor"}
    )
    try:
        if kind == "native":
            open_dataset(source)
        else:
            open_dataset(convert(source, {"npy": "pymarl"}.get(kind, kind), out, **task))
        said = "read"
    except BadInput as error:
        said = "refused" if "\n" not in str(error) and 10 < len(str(error)) < 1000 else f"not one line: {error}"
    except Exception as error:
        said = f"raised {type(error).__name__}: {error}".replace("\n", " ")
    if before != (files_hash(source) if source.is_dir() else source.read_bytes()):
        said = "the source was changed"
    if out.with_name(out.name + ".partial").exists() or (out.exists() and said != "read"):
        said += ", and something was left behind"
    shutil.rmtree(out, ignore_errors=True)
    return said


def fuzz(folder, first: int):
    """Reads the copies from number `first` on and prints two lines for each.

    It runs in a process of its own, since a C library may crash on a copy.
    """
    resource.setrlimit(resource.RLIMIT_DATA, (formats.CHILD_MEMORY, formats.CHILD_MEMORY))
    for k, kind in enumerate(KINDS):
        (folder / kind).mkdir(exist_ok=True)
        good, arrays = write_small(kind, folder / kind / f"good-{first}")
        for i in range(max(first - k * COPIES, 0), COPIES):
            copy = mutate(kind, good, arrays, folder / kind, i)
            print(f"copy {k * COPIES + i} {copy}", flush=True)
            print(f"said {k * COPIES + i} {attempt(kind, copy, folder / 'out')}", flush=True)


def test_damaged_copies(tmp_path):
    """Each copy is read or refused in one line.

    If a copy crashes or hangs a library, `convert` must refuse it in one line, too.
    """
    pytest.importorskip("tensorstore")
    said, first, crashes = {}, 0, 0
    while first < len(KINDS) * COPIES:
        code = (
            f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]; "
            "import test_formats as t; from pathlib import Path; "
        )
        done = subprocess.run(
            [sys.executable, "-c", code + f"t.fuzz(Path({str(tmp_path)!r}), {first})"],
            capture_output=True,
            text=True,
            timeout=300,
        )
        lines = [
            line.split(" ", 2)
            for line in done.stdout.replace("\r", "\n").splitlines()
            if line.startswith(("copy ", "said "))
        ]
        copies = {int(i): path for word, i, path in lines if word == "copy"}
        said |= {int(i): what for word, i, what in lines if word == "said"}
        last = max(copies, default=-1)
        if done.returncode == 0:
            break
        assert last >= first and last not in said, done.stderr[-2000:]  # the process died in the middle of this copy
        kind = KINDS[last // COPIES]
        task = ("mamujoco", "hopper") if kind in ("omiga", "minari") else ("smacv1", "corridor")
        with pytest.raises(BadInput, match="the reader crashed"):
            offline_data.convert.convert(
                copies[last], {"npy": "pymarl"}.get(kind, kind), *task, "x", str(tmp_path / "out"), limit=LIMIT
            )
        said[last], first, crashes = "refused", last + 1, crashes + 1
    for k, kind in enumerate(KINDS):
        counts = [list(said.values())[k * COPIES : (k + 1) * COPIES].count(what) for what in ("read", "refused")]
        print(f"{kind}: {counts[0]} read, {counts[1]} refused")
        assert counts[0] > 3 and counts[1] > 30, kind
    print("crashes:", crashes)
    assert len(said) == len(KINDS) * COPIES >= 500
    assert not {i: what for i, what in said.items() if what not in ("read", "refused")}


# ---------------------------------------------------------------- download


@pytest.fixture
def vault_zip(tmp_path):
    """OG-MARL's zip of 3hopper: two vaults of a few rows."""
    for name, lengths in (("Medium", (3, 5)), ("Medium-Replay", (2, 4, 6))):
        write_vault(tmp_path / "make" / "3hopper.vlt" / name, vault_arrays(robots(lengths)))
    path = tmp_path / "served" / "prior_work" / "omiga" / "mamujoco" / "3hopper.zip"
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted((tmp_path / "make").rglob("*")):
            archive.write(file, file.relative_to(tmp_path / "make"))
    return path


@pytest.fixture
def server(tmp_path):
    """Serves tmp_path/served on loopback. Yields (base URL, requests, cuts).

    `cuts` are the numbers of bytes after which the next answers break off, or "busy" for an answer 503.
    """
    requests, cuts = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers.get("Range")
            requests.append((self.path, wanted))
            path = tmp_path / "served" / self.path.lstrip("/")
            if not path.is_file():
                return self.send_error(404)
            if cuts[:1] == ["busy"]:
                cuts.pop(0)
                return self.send_error(503)
            data = path.read_bytes()
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
            if wanted and start >= len(data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(206 if wanted else 200)
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            self.wfile.write(data[start : start + cuts.pop(0)] if cuts else data[start:])

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", requests, cuts
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def download(server, tmp_path, monkeypatch):
    """download() of hopper from the server. It converts in this process, with the made-up recording's --limit."""
    pytest.importorskip("tensorstore")
    monkeypatch.setattr(offline_data.download, "WAIT", 0)
    monkeypatch.setitem(formats.LIMITS, "mamujoco", LIMIT)

    def here(*args, **kwargs):
        return formats.convert_here(*args, **kwargs)

    monkeypatch.setattr(offline_data.download, "convert", here)
    return lambda quality="medium", **kwargs: offline_data.download.download(
        "mamujoco",
        "hopper",
        quality,
        out=str(tmp_path / "out" / quality),
        downloads=str(tmp_path / "zips"),
        **{"base_url": server[0]} | kwargs,
    )


def left(tmp_path) -> list[str]:
    """The files that a download left."""
    folders = [tmp_path / "zips", tmp_path / "out"]
    return sorted(
        str(p.relative_to(tmp_path)) for folder in folders if folder.exists() for p in folder.rglob("*") if p.is_file()
    )


def test_download(vault_zip, server, download, tmp_path):
    download()
    read_back(tmp_path / "out" / "medium", robots((3, 5)), True)
    assert server[1] == [("/prior_work/omiga/mamujoco/3hopper.zip", None)]
    download("medium-replay")  # from the same zip
    read_back(tmp_path / "out" / "medium-replay", robots((2, 4, 6)), True)
    assert len(server[1]) == 1 and sorted(p.name for p in (tmp_path / "out").iterdir()) == ["medium", "medium-replay"]
    with pytest.raises(BadInput, match="is already there"):
        download()
    with pytest.raises(BadInput, match="has no vault 'Expert': it has Medium, Medium-Replay"):
        download("expert")


def test_download_leaves_what_is_not_its_own_and_clears_what_a_killed_one_left(vault_zip, download, tmp_path):
    folder = tmp_path / "out" / "medium.vault.partial"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("precious")
    with pytest.raises(BadInput, match=r"medium\.vault\.partial is in the way and is left alone"):
        download()
    assert (folder / "notes.txt").read_text() == "precious"
    (folder / "notes.txt").unlink()
    with zipfile.ZipFile(vault_zip) as archive:
        half = next(name for name in archive.namelist() if "/Medium/" in name and not name.endswith("/"))
    (folder / half).parent.mkdir(parents=True)
    (folder / half).write_bytes(b"half")
    download()
    read_back(tmp_path / "out" / "medium", robots((3, 5)), True)
    assert not folder.exists()


def test_download_command_line(vault_zip, server, tmp_path):
    args = ["--env", "mamujoco", "--task", "hopper", "--quality", "medium", "--base-url", server[0]]
    done = command("download", *args, "--out", tmp_path / "out" / "medium", "--downloads", tmp_path / "zips")
    assert done.returncode == 0, done.stderr
    read_back(tmp_path / "out" / "medium", robots((3, 5)), True)
    assert "| OG-MARL | medium | 4000 | 919391 rows |" in done.stdout
    assert "DIFFERS in rows: 10, OG-MARL 919391" in done.stdout
    assert left(tmp_path)[-1] == "zips/mamujoco/3hopper.zip"
    assert not (tmp_path / "out" / "medium.vault.partial").exists()


def test_download_that_breaks_off_is_resumed(vault_zip, server, download, tmp_path):
    size = vault_zip.stat().st_size
    server[2][:] = [1000, 500, 0]
    download()
    read_back(tmp_path / "out" / "medium", robots((3, 5)), True)
    assert [r for _, r in server[1]] == [None, "bytes=1000-", "bytes=1500-", "bytes=1500-"]
    assert (tmp_path / "zips" / "mamujoco" / "3hopper.zip").read_bytes() == vault_zip.read_bytes() and size > 2000


def test_download_from_a_busy_server(vault_zip, server, download, tmp_path):
    server[2][:] = ["busy", 1000, "busy"]
    download()
    read_back(tmp_path / "out" / "medium", robots((3, 5)), True)
    assert [r for _, r in server[1]] == [None, None, "bytes=1000-", "bytes=1000-"]
    server[2][:] = ["busy"] * offline_data.download.TRIES
    (tmp_path / "zips" / "mamujoco" / "3hopper.zip").unlink()
    with pytest.raises(BadInput, match=r"can't be reached \(the server answered 503\): check the network"):
        download("medium-replay")


def test_download_that_stays_broken_is_resumed_by_the_next_call(vault_zip, server, download, tmp_path):
    server[2][:] = [1000] + [0] * (offline_data.download.TRIES - 1)
    with pytest.raises(BadInput, match=r"broke off: 1,000 of [\d,]+ bytes are here; run the command again"):
        download()
    assert left(tmp_path) == ["zips/mamujoco/3hopper.zip.partial"]
    download()
    assert server[1][-1][1] == "bytes=1000-" and left(tmp_path)[-1] == "zips/mamujoco/3hopper.zip"


def test_download_with_everything_but_the_check_done(vault_zip, server, download, tmp_path):
    (tmp_path / "zips" / "mamujoco").mkdir(parents=True)
    shutil.copy(vault_zip, tmp_path / "zips" / "mamujoco" / "3hopper.zip.partial")
    download()
    assert [r for _, r in server[1]] == [f"bytes={vault_zip.stat().st_size}-"]


def test_download_after_a_longer_file_starts_again(vault_zip, server, download, tmp_path):
    (tmp_path / "zips" / "mamujoco").mkdir(parents=True)
    (tmp_path / "zips" / "mamujoco" / "3hopper.zip.partial").write_bytes(bytes(vault_zip.stat().st_size + 1))
    download()
    assert server[1][-1][1] is None and (tmp_path / "out" / "medium" / "card.json").exists()


def test_download_from_a_damaged_zip_of_before(vault_zip, download, tmp_path):
    """The first bytes of a member's compressed data are changed in a zip that lies in --downloads."""
    archive = tmp_path / "zips" / "mamujoco" / "3hopper.zip"
    archive.parent.mkdir(parents=True)
    with zipfile.ZipFile(vault_zip) as source, zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in source.namelist():
            packed.writestr(name, source.read(name))
        member = next(m for m in packed.infolist() if m.filename.endswith("/Medium/metadata.json"))
    sound = archive.read_bytes()
    at = member.header_offset + 30 + len(member.filename)
    archive.write_bytes(sound[:at] + b"\xff" * 4 + sound[at + 4 :])
    with pytest.raises(BadInput, match=r"3hopper.zip is damaged \(Error -3 while decompressing.*: delete it and run"):
        download()
    assert left(tmp_path) == ["zips/mamujoco/3hopper.zip"]
    archive.write_bytes(sound)
    download()
    read_back(tmp_path / "out" / "medium", robots((3, 5)), True)


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]


@pytest.mark.parametrize(
    "content",
    [lambda z: z[:-300], lambda z: b"<!DOCTYPE html>", lambda z: b"", flip],
    ids=["truncated", "a page", "empty", "flipped"],
)
def test_download_of_wrong_content(content, vault_zip, download, tmp_path):
    vault_zip.write_bytes(content(vault_zip.read_bytes()))
    with pytest.raises(BadInput, match=r"did not give a sound zip .*: what came was deleted, run the command again"):
        download()
    assert left(tmp_path) == []


def test_download_from_a_server_that_refuses_or_is_not_there(server, download, tmp_path):
    with pytest.raises(BadInput, match="the server answered 404"):
        download()
    with pytest.raises(BadInput, match=r"can't be reached .*refused.*: check the network and run"):
        download(base_url="http://127.0.0.1:9")
    for base_url in ("file:///etc", "http://[::1", "http://a..b"):
        with pytest.raises(BadInput, match="is not an http address"):
            download(base_url=base_url)
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    "name, mode",
    [
        ("../escaped", 0),
        ("/tmp/escaped", 0),
        ("a/../../escaped", 0),
        ("C:/escaped", 0),
        ("a\\..\\escaped", 0),
        ("3hopper.vlt/Medium/link", stat.S_IFLNK | 0o777),
        ("3hopper.vlt/Medium/pipe", stat.S_IFIFO | 0o644),
    ],
)
def test_download_of_a_zip_that_tries_to_escape(name, mode, vault_zip, download, tmp_path):
    with zipfile.ZipFile(vault_zip, "a") as archive:
        member = zipfile.ZipInfo(name)
        member.filename, member.external_attr = name, mode << 16
        archive.writestr(member, "../../../escaped")
    with pytest.raises(BadInput, match="unsafe member"):
        download()
    assert left(tmp_path) == ["zips/mamujoco/3hopper.zip"] and not list(tmp_path.rglob("*escaped*"))


def test_download_of_a_zip_that_expands_absurdly_or_repeats_itself(vault_zip, download, tmp_path):
    good = vault_zip.read_bytes()
    with zipfile.ZipFile(vault_zip, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("3hopper.vlt/Medium/zeros", bytes(200 * len(good)))
    with pytest.raises(BadInput, match="would unpack to"):
        download()
    shutil.rmtree(tmp_path / "zips")
    vault_zip.write_bytes(good)
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(vault_zip, "a") as archive:
        archive.writestr("3hopper.vlt/Medium/metadata.json", "{}")
    with pytest.raises(BadInput, match="two members of one name"):
        download()
    assert left(tmp_path) == ["zips/mamujoco/3hopper.zip"]


def test_download_without_disk_space(vault_zip, server, download, tmp_path, monkeypatch):
    full = lambda folder: shutil._ntuple_diskusage(10**9, 10**9 - 100, 100)
    with monkeypatch.context() as patch:
        patch.setattr(offline_data.download.shutil, "disk_usage", full)
        with pytest.raises(BadInput, match=r"no space in .*zips.* make room"):
            download()
    assert left(tmp_path) == []

    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(offline_data.download, "tqdm", no_space)  # stands for a write that fails
        with pytest.raises(BadInput, match=r"no space left on /.*; free some and run the command again"):
            download()
    with monkeypatch.context() as patch:
        patch.setattr(offline_data.download.shutil, "copyfileobj", no_space)
        with pytest.raises(BadInput, match=r"no space left on /.*; free some and run the command again"):
            download()
    assert left(tmp_path) == ["zips/mamujoco/3hopper.zip"]
    with monkeypatch.context() as patch:
        patch.setattr(offline_data.writer, "open", no_space, raising=False)
        with pytest.raises(BadInput, match=r"no space left on /.*; free some and run the command again"):
            download()
    assert left(tmp_path) == ["zips/mamujoco/3hopper.zip"]
    download()
    assert (tmp_path / "out" / "medium" / "card.json").exists() and len(server[1]) == 3


def test_what_nobody_published():
    for env, task, quality, message in (
        ("smacv2", "zerg_20_vs_23", "medium", "python -m offline_data collect --env smacv2 --task zerg_20_vs_23"),
        (
            "smacv2",
            "zerg_5_vs_5",
            "medium",
            "was published as replay, not as 'medium'.*offline_data collect --env smacv2 --task zerg_5_vs_5",
        ),
        ("smacv1", "3m", "good", "nobody published data of smacv1 3m"),
        ("mamujoco", "hopper", "good", "was published as expert, medium, medium-replay, medium-expert"),
    ):
        with pytest.raises(BadInput, match=message):
            offline_data.download.vault_url(env, task, quality)
    urls = {
        offline_data.download.vault_url(*name) for name, parts in offline_data.published.published().items() if parts[2]
    }
    assert len(urls) == 10
    assert (
        offline_data.download.vault_url("mamujoco", "ant_4x2", "replay")
        == f"{offline_data.download.BASE_URL}/core/gymnasium_mamujoco/4ant.zip"
    )
    assert {offline_data.download.vault_url(*name) for name in offline_data.published.downloadable()} > urls
    for part in (
        "core/smac_v2/terran_10_vs_10.zip",
        "prior_work/omiga/mamujoco/6halfcheetah.zip",
        "prior_work/omiga/smac_v1/corridor.zip",
    ):
        assert f"{offline_data.download.BASE_URL}/{part}" in urls
