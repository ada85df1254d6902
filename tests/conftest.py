"""Tiny datasets and helpers that several test files share."""

import hashlib
import os
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what it runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["OMP_NUM_THREADS"] = "1"  # for the subprocesses that tests start; sums differ between thread counts
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # battles here are short: JAX takes longer to compile than to run

import pytest
import torch
from tensordict import TensorDict

from environments.simulators import engine, make_env
from offline_data.writer import DatasetWriter

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("no GPU here")


def files_hash(folder: Path) -> dict:
    """What every file below a directory holds, to see that nothing changed it."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file()
    }


@contextmanager
def small_disk(folder: Path, kib: int):
    """Within it the folder is an empty disk of so many KiB; the test is skipped where none may be mounted."""
    folder.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("a small tmpfs can't be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def remount(folder: Path, options: str):
    """Another size of a small_disk, "size=9m", or "ro"."""
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


def random_episode(env, generator: torch.Generator, limit: int) -> TensorDict:
    """T + 1 rows of random actions in one robot. After `limit` steps an episode ends as if by a time limit."""
    rows, td = [], env.reset()
    while True:
        td["agents", "action"] = torch.randn(
            td["agents", "observation"].shape[:-1] + env.full_action_spec["agents", "action"].shape[-1:],
            generator=generator,
        )
        after = env.step(td)["next"]
        row = td.select("state", ("agents", "observation"), ("agents", "action"))[0].clone()
        row["reward"], row["terminated"] = after["reward"][0], after["terminated"][0]
        row["done"] = after["done"][0] | (len(rows) == limit - 1)
        rows.append(row)
        if row["done"]:
            break
        td = after.select("state", ("agents", "observation"))
    last = rows[-1].clone()
    last["state"], last["agents", "observation"] = after["state"][0], after["agents", "observation"][0]
    return torch.stack([*rows, last])


def hopper_card() -> dict:
    made = {"by": "tests"}
    return {
        "env": "mamujoco",
        "task": "hopper",
        "quality": "random",
        "engine": engine("mamujoco"),
        "interface": "benchmark",
        "made": made,
    }


@pytest.fixture(scope="session")
def hopper_episodes() -> list[TensorDict]:
    """12 episodes, some of which end by falling and some by a limit of 20 steps."""
    env = make_env("mamujoco", "hopper", 1)
    env.set_seed(0)
    generator = torch.Generator().manual_seed(0)
    episodes = [random_episode(env, generator, 20) for _ in range(12)]
    env.close()
    return episodes


@pytest.fixture(scope="session")
def hopper_data(hopper_episodes, tmp_path_factory) -> Path:
    """A small hopper dataset. Tests that change it copy it first."""
    writer = DatasetWriter(tmp_path_factory.mktemp("data") / "hopper")
    for episode in hopper_episodes:
        writer.append(episode)
    return writer.close(hopper_card())


@pytest.fixture(scope="session")
def discrete_episodes() -> list[TensorDict]:
    """Episodes of a made-up game of 2 agents with 4 actions, some of them forbidden; the chosen ones are allowed."""
    generator = torch.Generator().manual_seed(1)
    episodes = []
    for T in (1, 5, 3, 8):
        mask = torch.rand(T + 1, 2, 4, generator=generator) < 0.6
        action = torch.randint(4, (T + 1, 2), generator=generator)
        mask.scatter_(-1, action.unsqueeze(-1), True)
        end = torch.zeros(T + 1, 1, dtype=torch.bool)
        end[T - 1] = True
        agents = {"observation": torch.randn(T + 1, 2, 3, generator=generator), "action": action, "action_mask": mask}
        team = {
            "state": torch.randn(T + 1, 5, generator=generator),
            "reward": torch.randn(T + 1, 1, generator=generator),
        }
        episodes.append(
            TensorDict(
                team | {"terminated": end, "done": end.clone(), "agents": TensorDict(agents, [T + 1, 2])}, [T + 1]
            )
        )
    return episodes


@pytest.fixture(scope="session")
def discrete_data(discrete_episodes, tmp_path_factory) -> Path:
    writer = DatasetWriter(tmp_path_factory.mktemp("data") / "game")
    for episode in discrete_episodes:
        writer.append(episode)
    return writer.close(
        {
            "env": "nowhere",
            "task": "game",
            "quality": "random",
            "engine": None,
            "interface": "benchmark",
            "made": {"by": "tests"},
        }
    )
