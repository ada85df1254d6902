"""Converts the five formats of public datasets into the native one.

    python -m offline_data convert hopper.vlt/Medium --format vault --env mamujoco --task hopper --quality medium
    python -m offline_data convert half.hdf5 --format omiga --env mamujoco --task halfcheetah --quality expert
    python -m offline_data convert corridor.npz --format npz --env smacv1 --task corridor --quality good
    python -m offline_data convert episodes/ --format pymarl --env smacv2 --task zerg_5_vs_5 --quality mixed
    python -m offline_data convert mujoco/ant/expert-v0 --format minari --env mamujoco --task ant_4x2 --quality expert

The formats leave some things open. They are decided here, and each card says under "made" what was done:

- Rewards are as recorded. All agents must have the same reward: the team's. --return-to-go replaces it by the sum of
  the rewards still to come (on which the released ComaDICE trains SMAC) and marks the card.
- Actions are as recorded, also beyond [-1, 1] (see the card's bounds). They go to the actuators in the recorded order.
- Termination or time limit: some formats have one flag for both (vault, omiga, npz). Then an episode that ends at the
  step limit counts as truncated, and any other end as terminated. A fall or a victory on exactly that step can't be
  recognised. pymarl and minari have two flags.
- If the last observation was not recorded, the one before it is copied (the card counts these). If the episode
  terminated, nothing reads it, since there is no value beyond. If it was truncated, its last bootstrap is one step off.
- Row formats (vault, omiga), --last-row: is the row with the done flag a transition, or only the last observation? The
  benchmark has both. Its MuJoCo episodes have 1,001 rows for 1,000 steps, and Table 3 counts rows minus trajectories
  (2ant: 1,001,000 rows, 1000K samples). So there it is an observation. In StarCraft Table 3 counts every row as a
  sample, so there it is a transition. "auto" looks at the longest episode. With limit + 1 rows it ends with an
  observation, with exactly limit rows with a transition. With fewer rows this can't be told: then mamujoco is read like
  the benchmark's MuJoCo, and the rest like its StarCraft.
- The state: [S] per row is taken as it is. With an axis of agents it becomes the agents' vectors, concatenated, in
  MuJoCo (Table 3: 3 x 14 = 42), and the first agent's in StarCraft (as in OG-MARL's copies of the same data). In MuJoCo
  with the benchmark's interface, a state that is missing or has another size is replaced by the observations,
  concatenated, as that interface defines it.

Nothing is unpickled, and no link out of a file is followed. The C libraries under h5py and tensorstore can crash or
hang on damaged files. So the command (convert.py) runs this file in a separate process with limited memory, and stops
it if it writes nothing for long. The user sees one error line. BLOCK bounds the memory, whatever the size of a source.
Formats: Flashbax' flashbax/vault/vault.py, OG-MARL's og_marl/wrapped_environments and dataset cards, OMIGA's
datasets/offline_dataset.py, Minari's minari/dataset/_storages/hdf5_storage.py.
"""

import json
import os
import shutil
import sys
import threading
from contextlib import suppress
from pathlib import Path

from environments.checks import BadInput
from offline_data.card import partial_of, remove_partial


def end_with_the_parent(partial: Path):
    """Ends this process as soon as the one that started it is gone: the pipe to its input is closed then."""
    while os.read(0, 4096):  # waits; sys.stdin itself must not be busy when Python ends
        pass
    with suppress(BadInput, OSError):  # the other thread may still be writing
        remove_partial(partial)
    os._exit(1)


if __name__ == "__main__":  # the process that convert.py starts; before the slow imports
    if len(sys.argv) != 2 or not sys.argv[1].startswith("{"):
        sys.exit("use `python -m offline_data convert --help`: this file is started by that command")
    JOB = json.loads(sys.argv[1])
    partial = partial_of(JOB["out"])
    threading.Thread(target=end_with_the_parent, args=(partial,), daemon=True).start()

# isort: split
import importlib
import math
import resource
import zipfile
from collections.abc import Callable, Iterator

import numpy as np
import torch
from tensordict import TensorDict
from tqdm import tqdm

from environments.checks import run_script
from environments.mamujoco import benchmark_observation, mamujoco_team
from environments.simulators import check_interface, check_task_name
from offline_data.card import check_name, read_json, short
from offline_data.writer import DatasetWriter

BLOCK = 32 * 2**20  # bytes of a source that are read together
EPISODE = 2**28  # bytes of one episode, or of a chunk of HDF5; more is a damaged header
DENSEST = 1100  # bytes that one byte of a compressed file can stand for, at most (deflate: 1,032)
CHILD_MEMORY = 8 * 2**30  # bytes of memory for a conversion: a damaged header may ask for terabytes

# Steps after which an episode is cut. SMAC: smac_maps.py of smac and smacv2; MuJoCo: gymnasium's registration and
# OMIGA's episode_limit.
LIMITS = {"mamujoco": 1000, "Reacher": 50, "Pusher": 100, "smacv2": 200}
LIMITS |= {"2c_vs_64zg": 400, "5m_vs_6m": 70, "6h_vs_8z": 150, "corridor": 400}

# ---------------------------------------------------------------- what all readers share


def need(package: str):
    """Imports an optional package. Raises BadInput with the command that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise BadInput(f"this format needs {package} ({error}): pip install {package}") from None


def per_step(x: np.ndarray, name: str) -> np.ndarray:
    """[T, ...] with one value per step, or per step and agent -> [T] float32.

    Raises BadInput if the agents' values differ.
    """
    x = np.asarray(x, np.float32).reshape(len(x), -1)
    if x.shape[1] == 0 or (x != x[:, :1]).any():
        raise BadInput(f"'{name}' differs between agents (or is not a number): the whole team must have one value")
    return x[:, 0]


def all_agents(x: np.ndarray, name: str) -> np.ndarray:
    """[T, ...] flags of 0 and 1 -> [T] bool, true where the flags of all agents are. (SMAC's agents are done one by
    one, as they die.)"""
    x = np.asarray(x).reshape(len(x), -1)
    if x.shape[1] == 0 or not np.isin(x, (0, 1)).all():
        raise BadInput(f"'{name}' has values other than 0 and 1")
    return x.astype(bool).all(1)


def team_state(state: np.ndarray | None, observation: np.ndarray, env: str, interface: str, made: dict) -> np.ndarray:
    """[T, ...] as recorded -> [T, S]; the module's docstring says how, and so does made["state"]."""
    T, n, O = observation.shape
    how = "as recorded"
    if state is not None and state.ndim == 3:
        if state.shape[1] != n:
            raise BadInput(f"the state has {state.shape[1]} agents, the observation has {n}")
        if env == "mamujoco" and state.shape[2] != n * O:
            state, how = state.reshape(T, -1), "the agents' vectors side by side"
        else:
            state, how = state[:, 0], "the first agent's"
    if env == "mamujoco" and interface == "benchmark" and (state is None or state.shape[1:] != (n * O,)):
        state, how = observation.reshape(T, -1), "the observations side by side"
    if state is None or state.ndim != 2:
        raise BadInput(
            f"the state is {'missing' if state is None else f'of shape {list(state.shape)}, not [time, entries]'}"
        )
    made["state"] = how
    return state


def team_episode(parts: dict, T: int, terminated: bool, env: str, interface: str, made: dict) -> TensorDict:
    """One episode of T transitions, [T + 1] rows.

    `parts` are arrays with time first: "observation" [T or more, n, O], "action" [T, n, A] or [T, n], "reward" [T], and
    optionally "state" and "mask" [T or more, n, A]. If row T, the last observation, was not recorded, row T - 1 is
    copied. Raises BadInput for shapes that do not fit, values that are not finite, and actions that do not exist or
    that the mask forbids.
    """
    observation = parts["observation"]
    if observation.ndim != 3 or 0 in observation.shape[1:]:
        raise BadInput(f"the observation is of shape {list(observation.shape)}, not [time, agents, entries]")
    if len(observation) < T:
        raise BadInput(f"an episode of {T} steps has {len(observation)} observations")
    n, action, mask = observation.shape[1], parts["action"], parts.get("mask")
    rows = np.minimum(np.arange(T + 1), len(observation) - 1)
    made["last_observations_copied"] = made.get("last_observations_copied", 0) + (len(observation) == T)
    state = team_state(parts.get("state"), observation, env, interface, made)
    if (
        len(state) != len(observation)
        or len(action) < T
        or len(parts["reward"]) < T
        or (mask is not None and len(mask) < len(observation))
    ):
        raise BadInput("observation, state, action, reward and mask differ in length")
    discrete = env != "mamujoco"
    if discrete:
        action = action[..., 0] if action.ndim == 3 and action.shape[2] == 1 else action
        if mask is None or mask.ndim != 3 or mask.shape[1] != n or action.shape[1:] != (n,):
            raise BadInput(
                f"actions {list(action.shape)} and masks {list(np.shape(mask))} are not [time, {n}] and [time, {n}, "
                "actions]"
            )
        if not np.isin(mask, (0, 1)).all():
            raise BadInput("an action mask has values other than 0 and 1")
        if not ((action[:T] == np.round(action[:T])) & (action[:T] >= 0) & (action[:T] < mask.shape[2])).all():
            raise BadInput(f"an action is not one of 0 to {mask.shape[2] - 1}")
    else:
        action = action[..., None] if action.ndim == 2 else action
        if action.ndim != 3 or action.shape[1] != n or not action.shape[2]:
            raise BadInput(
                f"actions of shape {list(action.shape)} for {n} agents: they must be [time, agents, entries]"
            )
    tensor = lambda x, dtype: torch.from_numpy(np.ascontiguousarray(x, dtype))
    # the last row's action and reward don't matter: DatasetWriter sets them to zero
    step = np.minimum(np.arange(T + 1), T - 1)
    agents = {
        "observation": tensor(observation[rows], np.float32),
        "action": tensor(action[step], np.int64 if discrete else np.float32),
    }
    if discrete:
        agents["action_mask"] = tensor(mask[rows], np.bool_)
        if not agents["action_mask"][:T].gather(-1, agents["action"][:T, :, None]).all():
            raise BadInput("an action is one that its mask forbids")
    end = torch.zeros(T + 1, 1, dtype=torch.bool)
    end[T - 1] = True
    team = {
        "state": tensor(state[rows], np.float32),
        "reward": tensor(parts["reward"][step, None], np.float32),
        "done": end,
        "terminated": end & terminated,
    }
    for name, value in [*team.items(), *agents.items()]:
        if not torch.isfinite(value).all():
            raise BadInput(
                f"the {name} is not finite at step "
                f"{int((~torch.isfinite(value)).reshape(T + 1, -1).any(-1).nonzero()[0])}"
            )
    return TensorDict(team | {"agents": TensorDict(agents, [T + 1, n])}, [T + 1])


# ---------------------------------------------------------------- rows flat in time: vault, omiga


def row_episodes(
    read: dict[str, Callable], N: int, row_bytes: int, env: str, interface: str, limit: int, last_row: str, made: dict
) -> Iterator[TensorDict]:
    """Episodes of N rows. `read` has a function (start, stop) -> array for "observation", "action", "reward",
    "terminal", and optionally "truncation", "state" and "mask". Raises BadInput if no episode ends, or if one is longer
    than the limit allows.
    """
    B = max(BLOCK // row_bytes, 1)

    def flags(start: int) -> tuple[np.ndarray, np.ndarray]:
        terminal = all_agents(read["terminal"](start, min(start + B, N)), "terminal")
        truncation = (
            all_agents(read["truncation"](start, min(start + B, N)), "truncation")
            if "truncation" in read
            else np.zeros_like(terminal)
        )
        return terminal | truncation, terminal

    # First only the flags are read, since the length of the longest episode decides what last rows hold.
    end, longest, count = -1, 0, 0
    for start in range(0, N, B):
        ends = start + np.flatnonzero(flags(start)[0])
        if len(ends):
            longest, count, end = max(longest, int(np.diff(ends, prepend=end).max())), count + len(ends), int(ends[-1])
    if not count:
        raise BadInput("no row says that an episode is done")
    if max(longest, N - 1 - end) > limit + 1:
        raise BadInput(
            f"an episode has {max(longest, N - 1 - end)} rows, but a step limit of {limit} allows {limit + 1}: give "
            "the data's own --limit"
        )
    why = f"the longest episode has {longest} rows, the step limit is {limit}"
    if last_row == "auto" and longest >= limit:
        last_row = "observation" if longest > limit else "transition"
    elif last_row == "auto":
        last_row, why = (
            ("observation" if env == "mamujoco" else "transition"),
            f"as in the benchmark's data of this kind; {why}",
        )
    if last_row == "transition" and longest > limit:
        raise BadInput(
            f"an episode has {longest} transitions where the step limit is {limit}: give the data's own --limit, or "
            "--last-row observation"
        )
    made["last_row"] = f"{last_row} ({why})"
    made["rows"], made["rows_after_the_last_done_left_out"] = N, N - 1 - end
    left_out = []

    kept = {}
    for start in range(0, N, B):
        block = {
            key: get(start, min(start + B, N)) for key, get in read.items() if key not in ("terminal", "truncation")
        }
        block["done"], block["terminal"] = flags(start)
        block["reward"] = per_step(block["reward"], "reward")
        if kept:
            block = {key: np.concatenate([kept[key], value]) for key, value in block.items()}
        first = 0
        for last in np.flatnonzero(block["done"]):
            T = int(last) + (last_row == "transition") - first
            parts = {key: value[first : last + 1] for key, value in block.items()}
            if last_row == "observation":
                left_out.append(abs(float(parts["reward"][-1])))
            if T:
                yield team_episode(parts, T, bool(parts["terminal"][-1]) and T < limit, env, interface, made)
            first = int(last) + 1
        kept = {key: value[first:].copy() for key, value in block.items()}
    if last_row == "observation":
        made["rewards_beside_last_observations_left_out"] = {
            "rows": len(left_out),
            "mean_magnitude": float(np.mean(left_out)),
        }


def check_size(source, episode_bytes: int):
    """Raises BadInput for an episode of an absurd size."""
    if not 0 < episode_bytes <= EPISODE:
        raise BadInput(
            f"{source}: one episode or row would take {episode_bytes:,} bytes: the file is damaged or of another format"
        )


def read_vault(
    source: Path, env: str, task: str, interface: str, limit: int, last_row: str, made: dict
) -> Iterator[TensorDict]:
    """Flashbax' vault (tensorstore; no JAX): a folder NAME.vlt/UID with metadata.json and one zarr array per leaf in an
    ocdbt store.

    Leaves as OG-MARL has them, [1, time, ...]: observations [n, O], actions [n(, A)], rewards, terminals and
    truncations [n], infos.state, infos.legals [n, A] (discrete). "vault_index" says how many steps of the endless time
    axis are written.
    """
    ts = need("tensorstore")
    if not (source / "metadata.json").is_file() or not (source / "manifest.ocdbt").is_file():
        uids = sorted(path.parent.name for path in source.glob("*/metadata.json"))
        raise BadInput(
            f"{source} is no vault: give the folder with metadata.json and manifest.ocdbt"
            + (f", one of {', '.join(uids)}" if uids else "")
        )
    version = read_json(source / "metadata.json").get("version")
    if not isinstance(version, int | float) or not 0 <= version < 2:
        raise BadInput(f"{source}/metadata.json: vault version {short(version)} is not known here")
    base = {"driver": "file", "path": f"{source.resolve()}/"}
    context = ts.Context({"cache_pool": {"total_bytes_limit": BLOCK}})
    keys = ts.KvStore.open({"driver": "ocdbt", "base": base}).result().list().result()
    leaves = {key.decode().removesuffix("/.zarray") for key in keys if key.endswith(b"/.zarray")}

    def leaf(name: str, strict: bool = False):
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "ocdbt", "base": base, "path": name},
            "fill_missing_data_reads": not strict,
        }
        return ts.open(spec, open=True, read=True, context=context).result()

    names = {"observation": "observations.", "action": "actions.", "reward": "rewards.", "terminal": "terminals."}
    names |= {
        key: name
        for key, name in {"truncation": "truncations.", "state": "infos.state.", "mask": "infos.legals."}.items()
        if name in leaves
    }
    missing = sorted((set(names.values()) | {"vault_index"}) - leaves)
    if missing:
        raise BadInput(f"{source} has no {', '.join(missing)}: its leaves are {', '.join(sorted(leaves))}")
    arrays = {key: leaf(name) for key, name in names.items()}
    # tensorstore does not store chunks of zeros, and reads a missing chunk as zeros. An observation is never all zeros,
    # so a missing chunk of observations is an error.
    if arrays["observation"].chunk_layout.read_chunk.shape[-1] >= arrays["observation"].shape[-1]:
        arrays["observation"] = leaf(names["observation"], strict=True)
    N = int(leaf("vault_index").read().result()[0])
    for key, array in arrays.items():
        if array.rank < 2 or array.shape[0] != 1 or not 0 < N <= array.shape[1]:
            raise BadInput(f"{source}: {names[key]} is of shape {list(array.shape)}, not [1, {N} or more steps, ...]")
    row_bytes = sum(math.prod(array.shape[2:]) * array.dtype.numpy_dtype.itemsize for array in arrays.values())
    check_size(source, row_bytes)
    stored = sum(file.stat().st_size for file in source.rglob("*") if file.is_file())
    declared = N * math.prod(arrays["observation"].shape[2:]) * arrays["observation"].dtype.numpy_dtype.itemsize
    if declared > DENSEST * stored:
        raise BadInput(f"{source} declares {declared:,} bytes of observations and has {stored:,}: it is cut or damaged")
    made["vault"] = f"{source.parent.name}/{source.name}"
    read = {key: lambda start, stop, array=array: array[0, start:stop].read().result() for key, array in arrays.items()}
    yield from row_episodes(read, N, row_bytes, env, interface, limit, last_row, made)


def inside(source, group, name: str):
    """An entry of an HDF5 group, or None. Raises BadInput for a link, which may lead to any file."""
    h5py = need("h5py")
    link = group.get(name, getlink=True)
    if link is not None and not isinstance(link, h5py.HardLink):
        raise BadInput(f"{source}: '{name}' is a link and is not followed: copy the data into its place")
    return None if link is None else group[name]


def hdf5_arrays(source: Path, file, names: list[str], optional: tuple = ()) -> dict:
    """The named datasets of an open HDF5 file.

    Raises BadInput for one that is missing, a link, not numeric, stored in absurd chunks or in other files, and for one
    that declares more than the file holds.
    """
    h5py = need("h5py")
    arrays = {name: inside(source, file, name) for name in names}
    missing = [name for name, array in arrays.items() if array is None and name not in optional]
    if missing:
        raise BadInput(f"{source} has no {', '.join(missing)}: it holds {', '.join(sorted(file)) or 'nothing'}")
    arrays = {name: array for name, array in arrays.items() if array is not None}
    for name, array in arrays.items():
        if not isinstance(array, h5py.Dataset) or array.dtype.kind not in "biuf" or not array.shape:
            raise BadInput(f"{source}: '{name}' is not an array of numbers")
        if array.external or array.is_virtual:  # would read other files
            raise BadInput(f"{source}: '{name}' lies in other files: copy it into one")
        if array.chunks:
            check_size(source, math.prod(array.chunks) * array.dtype.itemsize)
        # HDF5 reads zeros where nothing is stored, so a file of 2 kB can declare terabytes.
        declared, stored = math.prod(array.shape) * array.dtype.itemsize, array.id.get_storage_size()
        chunks = math.prod(math.ceil(n / c) for n, c in zip(array.shape, array.chunks)) if array.chunks else 0
        if declared > DENSEST * stored or (array.chunks and array.id.get_num_chunks() < chunks):
            raise BadInput(
                f"{source}: '{name}' declares {declared:,} bytes and {stored:,} are stored: it is cut or damaged"
            )
    return arrays


def read_omiga(
    source: Path, env: str, task: str, interface: str, limit: int, last_row: str, made: dict
) -> Iterator[TensorDict]:
    """OMIGA's HDF5 (h5py): o [N, n, O], s [N, n, S] or [N, S], a [N, n, A], r and d [N(, 1 or n)] over all steps; d
    ends an episode.

    It has no action masks, so it can't hold StarCraft.
    """
    h5py = need("h5py")
    if env != "mamujoco":
        raise BadInput(
            f"OMIGA's HDF5 has no action masks, which {env} needs: use OG-MARL's copy (python -m offline_data download)"
        )
    with h5py.File(source, "r") as file:
        arrays = hdf5_arrays(source, file, ["o", "s", "a", "r", "d"], optional=("s",))
        N = len(arrays["o"])
        if not N or any(len(array) != N for array in arrays.values()):
            raise BadInput(f"{source}: the arrays have {', '.join(f'{len(a)} ({k})' for k, a in arrays.items())} steps")
        row_bytes = sum(math.prod(array.shape[1:]) * array.dtype.itemsize for array in arrays.values())
        check_size(source, row_bytes)
        names = {"o": "observation", "s": "state", "a": "action", "r": "reward", "d": "terminal"}
        read = {names[key]: lambda start, stop, array=array: array[start:stop] for key, array in arrays.items()}
        yield from row_episodes(read, N, row_bytes, env, interface, limit, last_row, made)


# ---------------------------------------------------------------- episodes side by side: npz, pymarl


def npy_header(file, name: str, source) -> tuple[tuple, bool, np.dtype]:
    """Reads the header of an open .npy: (shape, whether in Fortran order, dtype).

    Raises BadInput for pickled objects, and if there is no header.
    """
    try:
        version = np.lib.format.read_magic(file)
        shape, fortran, dtype = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )(file)
    except Exception as error:  # a damaged header is evaluated as a Python literal, which fails in many ways
        raise BadInput(f"{source}: '{name}' has no .npy header ({' '.join(str(error).split())[:100]})") from None
    if dtype.hasobject:
        raise BadInput(
            f"{source}: '{name}' holds pickled Python objects, which could run any code and are never read: save it as "
            "an array of numbers"
        )
    return shape, fortran, dtype


def episode_array(file, name: str, source) -> tuple[tuple, np.dtype]:
    """npy_header of an array [episode, time, ...] that can be read an episode at a time: (shape, dtype)."""
    shape, fortran, dtype = npy_header(file, name, source)
    if dtype.kind not in "biuf" or len(shape) < 2 or 0 in shape or fortran:
        raise BadInput(
            f"{source}: '{name}' is {dtype} {list(shape)}{' in Fortran order' if fortran else ''}, not numbers "
            "[episode, time, ...] in C order"
        )
    return shape, dtype


def read_npz(
    source: Path, env: str, task: str, interface: str, limit: int, last_row: str, made: dict
) -> Iterator[TensorDict]:
    """The authors' .npz: states, obs [E, T + 1, n, ...], actions, rewards, dones [E, T, n, ...], avails [E, T + 1, n,
    A] (discrete).

    An episode ends with the first step on which all agents are done. What follows is padding. If there is no such step,
    the steps at the end that do not change the state are padding (as in the released loader), and the episode counts as
    truncated. `actives` (who is alive) is not needed. The zip's members are read one episode at a time.
    """
    names = {"obs": "observation", "actions": "action", "rewards": "reward", "dones": "done", "states": "state"}
    names |= {"avails": "mask"} if env != "mamujoco" else {}
    with zipfile.ZipFile(source) as archive:
        members = sorted(archive.namelist())
        for member in members:  # the unused ones too, so that a pickle in any of them is reported
            npy_header(archive.open(member), member.removesuffix(".npy"), source)
        missing = [name for name in names if f"{name}.npy" not in members]
        if missing:
            raise BadInput(f"{source} has no {', '.join(missing)}: it holds {', '.join(members) or 'nothing'}")
        size = sum(archive.getinfo(f"{name}.npy").file_size for name in names)
        if size > DENSEST * source.stat().st_size:
            raise BadInput(f"{source} declares {size:,} bytes, more than its {source.stat().st_size:,} can hold")
        files = {name: archive.open(f"{name}.npy") for name in names}
        headers = {name: episode_array(file, name, source) for name, file in files.items()}
        E, L = headers["obs"][0][:2]
        steps = headers["rewards"][0][1]
        for name, (shape, dtype) in headers.items():
            long = name in ("obs", "states", "avails")
            if shape[0] != E or shape[1] != (L if long else steps) or L not in (steps, steps + 1):
                raise BadInput(
                    f"{source}: '{name}' is {list(shape)}, the observations are of {E} episodes and {L} steps and the "
                    f"rewards of {steps}"
                )
            check_size(source, math.prod(shape[1:]) * dtype.itemsize)
            held = archive.getinfo(f"{name}.npy").file_size - files[name].tell()
            if held != math.prod(shape) * dtype.itemsize:
                what = "ends before" if held < math.prod(shape) * dtype.itemsize else "goes on after"
                raise BadInput(f"{source}: '{name}' {what} its {E} episodes do: the file was cut or is damaged")
        for _ in range(E):
            parts = {}
            for name, (shape, dtype) in headers.items():
                wanted = math.prod(shape[1:]) * dtype.itemsize
                data = files[name].read(wanted)
                if len(data) != wanted:
                    raise BadInput(f"{source}: '{name}' ends before its {E} episodes do: the file was cut")
                parts[names[name]] = np.frombuffer(data, dtype).reshape(shape[1:])
            ends = np.flatnonzero(all_agents(parts["done"], "dones"))
            if len(ends):
                T = int(ends[0]) + 1
            else:
                moved = (parts["state"][1:] != parts["state"][:-1]).reshape(L - 1, -1).any(1).nonzero()[0]
                T = min(int(moved[-1]) + 1, steps) if len(moved) else 0
            if T > limit:
                raise BadInput(
                    f"{source}: an episode has {T} steps, but the step limit is {limit}: give the data's own --limit"
                )
            parts["reward"] = per_step(parts["reward"][:T], "rewards")
            parts = {key: value[: T + 1] for key, value in parts.items()}
            if T:
                yield team_episode(parts, T, bool(len(ends)) and T < limit, env, interface, made)
        for name, file in files.items():
            if file.read(1):
                raise BadInput(f"{source}: '{name}' goes on after its {E} episodes: the file is damaged")


def batch_episodes(
    arrays: dict, names: dict, source: Path, env: str, interface: str, made: dict
) -> Iterator[TensorDict]:
    """Episodes of PyMARL's arrays, read a few at a time."""
    if any(len(array.shape) < 2 for array in arrays.values()):
        raise BadInput(f"{source}: not every array is [episode, time, ...]")
    E, L = arrays["obs"].shape[:2]
    for name, array in arrays.items():
        lengths = (L,) if name in ("obs", "state", "avail_actions") else (L, L - 1)
        if array.shape[0] != E or array.shape[1] not in lengths:
            raise BadInput(
                f"{source}: '{name}' is {list(array.shape)}, the observations are of {E} episodes and {L} steps"
            )
    episode_bytes = sum(math.prod(array.shape[1:]) * array.dtype.itemsize for array in arrays.values())
    check_size(source, episode_bytes)
    B = max(BLOCK // episode_bytes, 1)
    for start in range(0, E, B):
        block = {names[name]: np.asarray(array[start : start + B]) for name, array in arrays.items()}
        for i in range(len(block["filled"])):
            parts = {key: value[i] for key, value in block.items()}
            filled, terminated = all_agents(parts["filled"], "filled"), all_agents(parts["terminated"], "terminated")
            F = int(filled.sum())
            ends = np.flatnonzero(terminated[:F])
            if not filled[:F].all():
                raise BadInput(f"{source}: the filled steps of episode {start + i} are not its first ones")
            observations = F + (len(filled) < L)  # if `filled` is shorter than obs, it counts transitions
            T = int(ends[0]) + 1 if len(ends) else observations - 1
            if len(ends) and observations > T + 1:
                raise BadInput(f"{source}: episode {start + i} goes on after it terminated")
            if T > 0:
                parts["reward"] = per_step(parts["reward"][:T], "reward")
                long = {
                    key: parts[key][: min(T + 1, observations)]
                    for key in ("observation", "state", "mask")
                    if key in parts
                }
                yield team_episode(
                    parts | long | {"action": parts["action"][:T]}, T, bool(len(ends)), env, interface, made
                )


def read_pymarl(
    source: Path, env: str, task: str, interface: str, limit: int, last_row: str, made: dict
) -> Iterator[TensorDict]:
    """PyMARL's episode batches, an HDF5 (h5py) or a folder of .npy: obs [E, L, n, O], state [E, L, S], actions [E, L,
    n, 1], avail_actions [E, L, n, A], reward, terminated and filled [E, L, 1]; the arrays of steps may be one shorter
    than obs.

    `filled` marks the steps that were played, the one with the last observation among them. `terminated` is PyMARL's:
    false on a time limit, so an episode without it was truncated at its last filled step. If the step of the
    termination is the last filled one, the last observation was not recorded.
    """
    names = {
        "obs": "observation",
        "state": "state",
        "actions": "action",
        "reward": "reward",
        "terminated": "terminated",
        "filled": "filled",
    }
    names |= {"avail_actions": "mask"} if env != "mamujoco" else {}
    optional = ("state",) if env == "mamujoco" else ()
    if source.is_dir():
        arrays = {}
        for name in names:
            path = source / f"{name}.npy"
            if path.is_file():
                with open(path, "rb") as file:
                    shape, dtype = episode_array(file, name, source)
                    if path.stat().st_size != file.tell() + math.prod(shape) * dtype.itemsize:
                        raise BadInput(
                            f"{path} has {path.stat().st_size} bytes, which is not what its header says: it was cut or "
                            "damaged"
                        )
                arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
            elif name not in optional:
                raise BadInput(f"{source} has no {name}.npy")
        yield from batch_episodes(arrays, names, source, env, interface, made)
    else:
        with need("h5py").File(source, "r") as file:
            yield from batch_episodes(
                hdf5_arrays(source, file, list(names), optional), names, source, env, interface, made
            )


# ---------------------------------------------------------------- Minari


def read_minari(
    source: Path, env: str, task: str, interface: str, limit: int, last_row: str, made: dict
) -> Iterator[TensorDict]:
    """Minari's single-agent MuJoCo datasets (h5py), split into a MaMuJoCo partition under the benchmark's interface.

    The source is a folder with data/main_data.hdf5, or its data folder. The file has groups episode_0, ... with
    observations [T + 1, D], actions [T, A], rewards, terminations and truncations [T]. Agents see what
    environments.mamujoco.benchmark_observation returns. The state is the agents' vectors, concatenated. The actions are
    split in order. Ant's contact forces are zero in the benchmark, so they are set to zero here (its reward keeps their
    cost). An episode that ends without either flag was cut by its recorder and counts as truncated.
    """
    h5py = need("h5py")
    if env != "mamujoco" or interface != "benchmark":
        raise BadInput("Minari's datasets are converted only for --env mamujoco and --interface benchmark")
    scenario, _, n, A = mamujoco_team(task)
    folder = source / "data" if (source / "data").is_dir() else source
    meta = read_json(folder / "metadata.json")
    if meta.get("data_format", "hdf5") != "hdf5":
        raise BadInput(f"{source} is in Minari's format {short(meta['data_format'])}: only hdf5 is read")
    E, spec = meta.get("total_episodes"), meta.get("env_spec")
    if type(E) is not int or E < 1:
        raise BadInput(f"{folder}/metadata.json: 'total_episodes' is {short(E)}, not a positive count")
    recorded = json.loads(spec).get("id") if isinstance(spec, str) else None
    if isinstance(recorded, str) and recorded.split("/")[-1].split("-")[0] != scenario:
        raise BadInput(f"{source} was recorded in {short(recorded)}, not in {scenario}: give its own --task")
    made["recorded_in"] = recorded
    with h5py.File(folder / "main_data.hdf5", "r") as file:
        if len(file) != E:
            raise BadInput(f"{folder}: metadata.json counts {E} episodes, main_data.hdf5 has {len(file)}")
        for number in range(E):
            name = f"episode_{number}"
            group = inside(source, file, name)
            if not isinstance(group, h5py.Group):
                raise BadInput(f"{folder}/main_data.hdf5 has no {name}")
            arrays = hdf5_arrays(
                f"{source} {name}", group, ["observations", "actions", "rewards", "terminations", "truncations"]
            )
            check_size(source, 1 + sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays.values()))
            raw, action, reward, terminations, truncations = (array[:] for array in arrays.values())
            T = len(reward)
            if not T:
                continue
            if (
                raw.ndim != 2
                or len(raw) != T + 1
                or any(len(x) != T for x in (action, terminations, truncations))
                or action.shape[1:] != (n * A,)
            ):
                raise BadInput(
                    f"{source} {name}: observations {list(raw.shape)} and actions {list(action.shape)} of {T} steps, "
                    f"{task} has {n} x {A} actions"
                )
            ends = np.flatnonzero(all_agents(terminations, "terminations") | all_agents(truncations, "truncations"))
            if len(ends) and ends[0] < T - 1:
                raise BadInput(f"{source} {name} goes on after it ended at step {ends[0]}")
            if scenario == "Ant" and raw.shape[1] in (105, 111):
                raw = np.concatenate([raw[:, :27], np.zeros((T + 1, 84))], 1)
                made["contact_forces"] = "set to zero"
            elif scenario == "Ant" and raw.shape[1] == 27:
                raw = np.concatenate([raw, np.zeros((T + 1, 84))], 1)
            parts = {
                "observation": benchmark_observation(raw, n),
                "action": action.reshape(T, n, A),
                "reward": per_step(reward, "rewards"),
            }
            yield team_episode(parts, T, bool(terminations[-1]), env, interface, made)


READERS = {"vault": read_vault, "omiga": read_omiga, "npz": read_npz, "pymarl": read_pymarl, "minari": read_minari}


# ---------------------------------------------------------------- conversion


def readable(source: Path, format: str, episodes: Iterator[TensorDict]) -> Iterator[TensorDict]:
    """Passes episodes on. Whatever a library raises for a damaged file becomes one line."""
    try:
        yield from episodes
    except BadInput:
        raise
    except Exception as error:
        what = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadInput(f"{source} can't be read as {format} ({what}): it is damaged or of another format") from error


def convert_here(
    source: str,
    format: str,
    env: str,
    task: str,
    quality: str,
    out: str,
    interface: str | None = None,
    limit: int | None = None,
    last_row: str = "auto",
    return_to_go: bool = False,
    overwrite: bool = False,
) -> Path:
    """Converts in this process (convert.py starts one for it). `out` appears after the last episode is written.

    Raises BadInput for a source that can't be converted.
    """
    path = Path(source)
    if format not in READERS:
        raise BadInput(f"unknown format '{format}': use one of {', '.join(READERS)}")
    if not path.exists():
        raise BadInput(f"there is no {source}")
    for what, name in (("--task", task), ("--quality", quality)):
        check_name(what, name)
    if env != "smacv1":  # there every map will do, whether smacv2 is installed or not
        check_task_name(env, task)
    scenario = mamujoco_team(task)[0] if env == "mamujoco" else None
    if interface is None and (env, format) == ("smacv1", "pymarl"):  # PyMARL records SMAC's own observations
        interface = "standard"
    interface = check_interface(env, interface)
    if limit is None:
        limit = LIMITS.get(scenario or task, LIMITS.get(env))
    if limit is not None and limit < 1:
        raise BadInput(f"--limit is {limit}: give a positive number of steps")
    if limit is None:
        raise BadInput(f"the step limit of {env} {task} is not known here: give it with --limit")
    made = {"by": "python -m offline_data convert", "format": format, "source": path.name, "step_limit": limit}
    made["reward"] = (
        "return-to-go: the sum of the rewards from each step on, undiscounted" if return_to_go else "as recorded"
    )
    writer, shapes = DatasetWriter(out, overwrite), None
    truncated = 0
    try:
        episodes = readable(path, format, READERS[format](path, env, task, interface, limit, last_row, made))
        for episode in tqdm(episodes, desc=f"converting {path.name}", unit=" episodes", mininterval=1, file=sys.stdout):
            sizes = {key: value.shape[1:] for key, value in episode.items(True, True)}
            if shapes not in (None, sizes):
                raise BadInput(f"{source}: episodes differ in their sizes")
            shapes = sizes
            if return_to_go:
                episode["reward"][-1] = 0
                episode["reward"] = episode["reward"].double().flip(0).cumsum(0).flip(0).float()
            truncated += not episode["terminated"].any()
            writer.append(episode)
        if shapes is None:
            raise BadInput(f"{source} holds no transition")
        made["truncated_episodes"] = truncated
        card = {"env": env, "task": task, "quality": quality, "engine": "as the source was recorded"}
        card |= {"interface": interface, "made": made}
        return writer.close(card)
    finally:
        shutil.rmtree(writer.partial, ignore_errors=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (CHILD_MEMORY, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    run_script(lambda: convert_here(**JOB))
