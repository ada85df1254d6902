"""Makes an environment by its name: Multi-Agent MuJoCo (mamujoco.py), StarCraft II (starcraft.py) or SMAX (smax.py).

    env = make_env("mamujoco", "hopper", num_envs=32)          # 32 robots in this process
    env = make_env("mamujoco", "hopper", 16, workers=2)        # 2 processes with 16 robots each
    env = make_env("smax", "zerg_5_vs_5", 32)                  # 32 battles as one computation
    env = make_env("smacv2", "zerg_5_vs_5", 1, workers=8)      # 8 games of StarCraft II
    env.set_seed(0)
    td = env.reset()

Every environment uses the same TensorDict keys (n agents, B environments):

    ("agents", "observation")  [B, n, O]  float32
    ("agents", "action")       [B, n, A]  float32, or [B, n] int64 if actions are discrete
    ("agents", "action_mask")  [B, n, A]  bool, the available actions (discrete only)
    "state"                    [B, S]     float32, the global state that the mixers condition on
    "reward"                   [B, 1]     float32, one reward for the team
    "done", "terminated", "truncated"  [B, 1]  bool; truncated: the time limit; terminated: a fall or a decided battle
    "battle_won"               [B, 1]     bool (battles only)

`python -m environments` lists the tasks and their sizes.
"""

import importlib.metadata
import multiprocessing
import os
import re
from functools import partial

from torchrl.envs import EnvBase, ParallelEnv

from environments import mamujoco, smax, starcraft, stops
from environments.checks import BadInput, NoSimulator

# What agents see, by env; the first is the default.
INTERFACES = {
    "mamujoco": "benchmark|agent_obsk=[0-9]{1,2}",
    "smacv2": "benchmark",
    "smacv1": "benchmark|standard",
    "smax": "standard",
}


def check_task_name(env: str, task: str):
    """Raises NoSimulator for an unknown env or task, and for mamujoco also if it is not installed."""
    if env not in INTERFACES:
        raise NoSimulator(f"unknown env '{env}': there are {', '.join(INTERFACES)}")
    if env == "mamujoco":
        mamujoco.mamujoco_scenario(task)
    elif env == "smax":
        smax.check_task_name(task)
    else:
        starcraft.check_task(env, task)


def check_task(env: str, task: str):
    """Raises NoSimulator for an unknown env or task. For mamujoco and smax also if the simulator is not installed."""
    if env == "smax":
        smax.check_task(task)
    else:
        check_task_name(env, task)


def check_playable(env: str, task: str):
    """Raises NoSimulator if a task is unknown, or can't be played here, since something is not installed."""
    check_task(env, task)
    if env in ("smacv1", "smacv2"):
        starcraft.check_installed(starcraft.game_config(env, task)["map_name"])


def check_interface(env: str, interface: str | None) -> str:
    """The interface's name, the env's default for None. Raises BadInput for one that the env does not have."""
    if interface is None:
        return INTERFACES[env].split("|")[0]
    if not re.fullmatch(INTERFACES[env], interface):
        raise BadInput(
            f"{env} has no interface '{interface}': use "
            f"{INTERFACES[env].replace('|', ' or ').replace('[0-9]{1,2}', 'K (0 to 99)')}"
        )
    return interface


def in_processes(workers: int, make, device) -> ParallelEnv:
    """make() in each of `workers` processes. They ignore Ctrl-C and SIGTERM; this process handles both for them."""
    env = ParallelEnv(workers, partial(stops.in_worker, make, os.getpid()), device=device)
    with stops.not_for_children():
        env.start()
    return env


def make_env(
    env: str, task: str, num_envs: int, workers: int = 1, interface: str | None = None, device="cpu"
) -> EnvBase:
    """An environment of batch size [num_envs], or [workers, num_envs] in that many processes (TorchRL's ParallelEnv).

    StarCraft II plays one game in each worker's process, whatever num_envs says: batch size [workers].
    Raises NoSimulator for an env or a task that is unknown or not installed, BadInput for a partition or interface that
    does not exist.
    """
    check_playable(env, task)
    interface = check_interface(env, interface)
    if env in ("smacv1", "smacv2"):
        return in_processes(workers, partial(starcraft.StarCraftEnv, env, task, interface), device)
    if env == "smax":
        make = partial(smax.SMAXEnv, task, num_envs)
    else:
        obsk = None if interface == "benchmark" else int(interface.removeprefix("agent_obsk="))
        make = partial(mamujoco.MaMuJoCoEnv, task, num_envs, obsk)
    return make(device=device) if workers == 1 else in_processes(workers, make, device)


def close_env(env: EnvBase):
    """Closes an environment and ends its processes, even if it was stopped in the middle of a step."""
    workers = env.__dict__.get("_workers", [])  # of TorchRL's ParallelEnv
    try:
        if not env.is_closed:
            env.close(raise_if_closed=False)
    except (OSError, EOFError, RuntimeError, AttributeError):
        pass  # a worker has died, or is still busy with the step that was stopped: the next lines end it
    for worker in set(workers) & set(multiprocessing.active_children()):
        worker.kill()
        worker.join()


def check_sizes(env: EnvBase, card: dict):
    """Raises BadInput if an environment's sizes differ from those on a dataset's card."""
    n, O = env.observation_spec["agents", "observation"].shape[-2:]
    S = env.observation_spec["state"].shape[-1]
    action_key = ("agents", "action_mask" if card["discrete"] else "action")
    A = (env.observation_spec if card["discrete"] else env.full_action_spec)[action_key].shape[-1]
    for key, value in {"n_agents": n, "obs_dim": O, "state_dim": S, "action_dim": A}.items():
        if card[key] != value:
            raise BadInput(
                f"the dataset's {key} is {card[key]}, the simulator of {card['env']} {card['task']} has {value}: the "
                "dataset was made with another interface or version"
            )


def engine(env: str) -> str:
    """Name and versions of the simulator, for dataset cards."""
    if env == "smax":
        return smax.engine()
    if env in ("smacv1", "smacv2"):
        return starcraft.engine()
    return ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("mujoco", "gymnasium", "gymnasium-robotics"))
