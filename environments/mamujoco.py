"""Multi-Agent MuJoCo as a TorchRL environment: robots whose joints are divided among agents.

simulators.py lists the keys of its TensorDicts.
"""

import warnings

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Binary, Bounded, Composite, Unbounded
from torchrl.envs import EnvBase

from environments.checks import BadInput, NoSimulator

# The paper's tasks (Section 6.1). Other tasks are named SCENARIO_PARTITION, for example "walker2d_2x3".
MAMUJOCO_TASKS = {"hopper": ("Hopper", "3x1"), "ant": ("Ant", "2x4"), "halfcheetah": ("HalfCheetah", "6x1")}

MOST_OBSK = 99  # more joints than any robot has. gymnasium-robotics tries each distance in turn, which takes time


def import_robotics():
    """Imports gymnasium-robotics without its notice about AdroitHand, which is not used here.

    The package farama_notifications prints it, if it has an entry for the installed version.
    """
    try:
        from farama_notifications import notifications
    except ImportError:
        notifications = {}
    notices = notifications.get("gymnasium_robotics", {})
    for version in [version for version, text in notices.items() if "AdroitHand" in text]:
        del notices[version]
    import gymnasium_robotics  # noqa: F401


def mamujoco_scenario(task: str) -> tuple[str, str]:
    """Splits a task's name into gymnasium-robotics' scenario and partition.

    Raises NoSimulator for a scenario that gymnasium-robotics does not have, or if it is not installed.
    """
    try:
        import_robotics()
        from gymnasium_robotics.envs.multiagent_mujoco import mujoco_multi
    except ImportError as error:
        raise NoSimulator(
            f"mamujoco needs gymnasium-robotics and mujoco ({error}): pip install -r requirements.txt"
        ) from None

    if task in MAMUJOCO_TASKS:
        return MAMUJOCO_TASKS[task]
    known = [*mujoco_multi._MUJOCO_GYM_ENVIROMENTS, "ManySegmentSwimmer", "ManySegmentAnt", "CoupledHalfCheetah"]
    name, _, partition = task.partition("_")
    for scenario in known:
        if scenario.lower() == name.lower() and partition:
            return scenario, partition
    raise NoSimulator(
        f"unknown mamujoco task '{task}': use one of {', '.join(MAMUJOCO_TASKS)}, "
        f"or SCENARIO_PARTITION such as walker2d_2x3 with a scenario of {', '.join(known)}"
    )


def mamujoco_team(task: str) -> tuple[str, str, int, int]:
    """(scenario, partition, number of agents, size of one agent's action) of a task.

    Raises NoSimulator as mamujoco_scenario does. Raises BadInput for a partition that does not exist, or whose agents
    differ in their number of actions.
    """
    scenario, partition = mamujoco_scenario(task)
    from gymnasium_robotics.envs.multiagent_mujoco.obsk import get_parts_and_edges

    try:
        parts, _, _ = get_parts_and_edges(scenario, partition)
    except Exception as error:  # this is what gymnasium-robotics raises for an unknown partition
        raise BadInput(
            f"mamujoco task '{task}': {scenario} has no partition '{partition}' in gymnasium-robotics"
        ) from error
    if any(len(part) != len(parts[0]) for part in parts):
        raise BadInput(f"mamujoco task '{task}': agents with {[len(p) for p in parts]} actions can't share one network")
    return scenario, partition, len(parts), len(parts[0])


def benchmark_observation(raw: np.ndarray, n: int) -> np.ndarray:
    """Single-agent observations [B, D] -> what the benchmark's n agents see, [B, n, D + n] float64.

    An agent sees the whole observation, followed by its one-hot id. This vector is standardised over its entries.
    """
    B = len(raw)
    obs = np.concatenate(
        [np.broadcast_to(raw[:, None], (B, n, raw.shape[1])), np.broadcast_to(np.eye(n), (B, n, n))],
        -1,
        dtype=np.float64,
    )
    return (obs - obs.mean(-1, keepdims=True)) / obs.std(-1, keepdims=True)


class MaMuJoCoEnv(EnvBase):
    """`num_envs` robots of one MaMuJoCo task. This process steps them one after another.

    Two interfaces:
    - agent_obsk=None is the benchmark's, which the public datasets use. Every agent sees the whole single-agent
      observation, followed by its one-hot id. This vector is standardised over its entries. The state is the agents'
      vectors, concatenated. The agents' actions, concatenated, go to the actuators in that order.
    - agent_obsk=k is gymnasium-robotics' own. Every agent sees its joints and those within k joints of it, padded with
      zeros to one width, since agents share networks. The state is the single-agent observation. The partition says
      which actuator an action drives.

    Actions are passed to the simulator as they are. MuJoCo clips the controls. A control cost in the reward is computed
    from the unclipped action, exactly as in the single-agent environment.
    """

    batch_locked = True

    def __init__(self, task: str, num_envs: int, agent_obsk: int | None = None, device="cpu"):
        super().__init__(device=device, batch_size=torch.Size([num_envs]))
        if agent_obsk is not None and not 0 <= agent_obsk <= MOST_OBSK:
            raise BadInput(f"agent_obsk is {agent_obsk}: joints from 0 to {MOST_OBSK} away can be seen")
        scenario, partition, self.n, A = mamujoco_team(task)
        import mujoco
        from gymnasium_robotics import mamujoco_v1

        # MuJoCo repeats its warnings for every robot. As a Python warning, each text is shown once.
        mujoco.set_mju_user_warning(warnings.warn)
        self.agent_obsk = agent_obsk
        # The benchmark ran on MuJoCo 2.0, where Ant's contact forces stayed at zero, and so did their cost.
        no_contact = {"include_cfrc_ext_in_observation": False, "contact_cost_weight": 0.0}
        kwargs = no_contact if scenario == "Ant" and agent_obsk is None else {}
        try:
            self.robots = [mamujoco_v1.parallel_env(scenario, partition, agent_obsk, **kwargs) for _ in range(num_envs)]
        except (IndexError, ValueError) as error:  # this version of MuJoCo can't load the scenario's model
            raise BadInput(
                f"mamujoco task '{task}': gymnasium-robotics can't build it with this MuJoCo ({error})"
            ) from error
        if agent_obsk is not None and self.robots[0].observation_factorization is None:
            raise BadInput(
                f"gymnasium-robotics has no agent_obsk observations for {scenario}: use --interface benchmark"
            )
        self.simulators = [robot.single_agent_env for robot in self.robots]
        self.seeds = [None] * num_envs
        # Single-agent observations of all robots, before any scaling. In the benchmark's Ant, 84 entries for contact
        # forces stay zero.
        D = self.simulators[0].observation_space.shape[0]
        self.raw = np.zeros((num_envs, D + 84 if kwargs else D))
        self.D = D
        if agent_obsk is not None:
            # Local observation entries as indices into the raw observation; -1 is padding.
            maps = list(self.robots[0].observation_factorization.values())
            self.index = np.full((self.n, max(len(m) for m in maps)), -1)
            for i, m in enumerate(maps):
                self.index[i, : len(m)] = m

        view = self._view()
        n, O, S = self.n, view["agents", "observation"].shape[-1], view["state"].shape[-1]
        box = self.simulators[0].action_space
        low, high = float(box.low[0]), float(box.high[0])
        B = num_envs
        self.observation_spec = Composite(
            agents=Composite(observation=Unbounded((B, n, O), device=device), shape=(B, n), device=device),
            state=Unbounded((B, S), device=device),
            shape=(B,), device=device,
        )
        self.action_spec = Composite(
            agents=Composite(action=Bounded(low, high, (B, n, A), device=device), shape=(B, n), device=device),
            shape=(B,), device=device,
        )
        self.reward_spec = Unbounded((B, 1), device=device)
        flag = Binary(n=1, shape=(B, 1), dtype=torch.bool, device=device)
        self.done_spec = Composite(
            done=flag, terminated=flag.clone(), truncated=flag.clone(), shape=(B,), device=device
        )

    def _view(self) -> TensorDict:
        """The agents' observations and the state, computed from self.raw."""
        B = self.raw.shape[0]
        if self.agent_obsk is None:
            obs = benchmark_observation(self.raw, self.n)
            state = obs.reshape(B, -1)
        else:
            obs = np.where(self.index < 0, 0.0, self.raw[:, self.index])
            state = self.raw
        obs, state = (torch.as_tensor(np.ascontiguousarray(x), dtype=torch.float32) for x in (obs, state))
        # With device=, and not .to(): that would wait for all work of a GPU, the training's too, even on a CPU.
        agents = TensorDict({"observation": obs}, [B, self.n], device=self.device)
        return TensorDict({"agents": agents, "state": state}, [B], device=self.device)

    def _set_seed(self, seed: int | None):
        """Gives each robot its own seed, which takes effect at its next reset."""
        if seed is not None:
            self.seeds = [int(s.generate_state(1)[0]) for s in np.random.SeedSequence(seed).spawn(len(self.robots))]

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs) -> TensorDict:
        which = range(len(self.robots))
        if tensordict is not None and "_reset" in tensordict.keys():
            which = tensordict["_reset"].reshape(-1).nonzero()[:, 0].tolist()
        for i in which:
            self.raw[i, : self.D], _ = self.simulators[i].reset(seed=self.seeds[i])
            self.seeds[i] = None
        return self._view().update(self.full_done_spec.zero())

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        """Steps the robots that "_step" selects, or all. The others' entries repeat, with reward 0."""
        B = len(self.robots)
        actions = tensordict["agents", "action"].detach().cpu().numpy().astype(np.float64)
        stepping = tensordict.get("_step", None)
        stepping = np.ones(B, bool) if stepping is None else stepping.reshape(-1).cpu().numpy()
        reward, terminated, truncated = np.zeros((B, 1)), ~stepping[:, None], np.zeros((B, 1), bool)
        for i in np.flatnonzero(stepping):
            action = actions[i].reshape(-1)
            if self.agent_obsk is not None:
                robot = self.robots[i]
                action = robot.map_local_actions_to_global_action(dict(zip(robot.possible_agents, actions[i])))
            self.raw[i, : self.D], reward[i], terminated[i], truncated[i], _ = self.simulators[i].step(action)
        terminated, truncated = torch.as_tensor(terminated), torch.as_tensor(truncated)
        out = {
            "reward": torch.as_tensor(reward, dtype=torch.float32),
            "terminated": terminated,
            "truncated": truncated,
            "done": terminated | truncated,
        }
        return self._view().update(TensorDict(out, [B], device=self.device))

    def close(self, **kwargs):
        for robot in self.robots:
            robot.close()
        return super().close(**kwargs)
