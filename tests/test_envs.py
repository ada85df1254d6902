"""The environments against the plain single-agent Gymnasium ones that they are made of."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium_robotics import mamujoco_v1
from tensordict import TensorDict
from torchrl.envs.utils import check_env_specs

from comadice_eval import evaluate
from comadice_mixer import make_policy
from environments.checks import BadInput, NoSimulator
from environments.mamujoco import MAMUJOCO_TASKS, MaMuJoCoEnv
from environments.simulators import make_env

TASKS = list(MAMUJOCO_TASKS)
TABLE3 = {
    "hopper": (3, 14, 42, 1),
    "ant": (2, 113, 226, 4),
    "halfcheetah": (6, 23, 138, 1),
}  # agents, obs, state, action
# What the benchmark's MuJoCo 2.0 did: no contact forces in Ant, in observation and reward.
BENCHMARK_KWARGS = {"ant": {"include_cfrc_ext_in_observation": False, "contact_cost_weight": 0}}
# gymnasium-robotics' partitions: actuator j is driven by entry ORDER[j] of the agents' actions side by side.
ORDER = {"hopper": [0, 1, 2], "ant": [6, 7, 0, 1, 2, 3, 4, 5], "halfcheetah": [0, 1, 2, 3, 4, 5]}


@pytest.fixture
def make(request):
    """make_env that closes what it made."""
    made = []

    def build(task, *args, agent_obsk=None, **kwargs):
        interface = None if agent_obsk is None else f"agent_obsk={agent_obsk}"
        made.append(make_env("mamujoco", task, *args, interface=interface, **kwargs))
        return made[-1]

    yield build
    for env in made:
        env.close()


def sizes(env) -> tuple:
    n, O = env.observation_spec["agents", "observation"].shape[-2:]
    return n, O, env.observation_spec["state"].shape[-1], env.full_action_spec["agents", "action"].shape[-1]


def random_actions(env, steps: int, seed: int = 0) -> torch.Tensor:
    """[steps, B, n, A]; many go beyond [-1, 1], as the actions in the public datasets do."""
    return torch.randn(
        steps, *env.full_action_spec["agents", "action"].shape, generator=torch.Generator().manual_seed(seed)
    )


def play(env, td, actions, **flags):
    """Steps through `actions`; what came back at each step, and where the environments are then."""
    out = []
    for action in actions:
        td = td.select("state", ("agents", "observation")).update({k: v.clone() for k, v in flags.items()})
        td["agents", "action"] = action
        td = env.step(td)["next"].clone()
        out.append(td)
    return out, td


@pytest.mark.parametrize("agent_obsk", [None, 1])
@pytest.mark.parametrize("task", TASKS)
def test_torchrl_specs(make, task, agent_obsk):
    check_env_specs(make(task, 2, agent_obsk=agent_obsk))


@pytest.mark.parametrize("task", TASKS)
def test_sizes_of_table_3(make, task):
    assert sizes(make(task, 1)) == TABLE3[task]


def benchmark_view(raw: np.ndarray, task: str) -> np.ndarray:
    """The agents' observations [n, O], agent by agent as facts.md section 3 describes them."""
    if task == "ant":
        raw = np.concatenate([raw, np.zeros(84)])
    n = TABLE3[task][0]
    views = []
    for agent in range(n):
        one_hot = np.zeros(n)
        one_hot[agent] = 1
        view = np.concatenate([raw, one_hot])
        views.append((view - view.mean()) / view.std())
    return np.stack(views).astype(np.float32)


@pytest.mark.parametrize("agent_obsk", [None, 1])
@pytest.mark.parametrize("task", TASKS)
def test_replay_of_the_single_agent_simulator(make, task, agent_obsk):
    """The same joint actions give the plain environment's states, rewards and end, to the last bit of a float32."""
    env = make(task, 1, agent_obsk=agent_obsk)
    env.set_seed(7)
    seed = env.seeds[0]
    plain = gymnasium.make(
        MAMUJOCO_TASKS[task][0] + "-v5", **(BENCHMARK_KWARGS.get(task, {}) if agent_obsk is None else {})
    )
    td, (raw, _) = env.reset(), plain.reset(seed=seed)
    assert not any(td[flag].any() for flag in ("done", "terminated", "truncated"))
    # halfcheetah never falls: it runs into the time limit. A whole episode takes a second, so it is run once.
    # Small actions keep ant on its feet for a while.
    actions = random_actions(env, 1000 if (task, agent_obsk) == ("halfcheetah", None) else 200) * (
        0.5 if task == "ant" else 1
    )
    steps = 0
    for action in actions:
        if agent_obsk is None:
            wanted = benchmark_view(raw, task)
            np.testing.assert_array_equal(td["agents", "observation"][0].numpy(), wanted)
            np.testing.assert_array_equal(td["state"][0].numpy(), wanted.reshape(-1))
        else:
            np.testing.assert_array_equal(td["state"][0].numpy(), raw.astype(np.float32))
        joint = action[0].double().numpy().reshape(-1)
        raw, reward, terminated, truncated, _ = plain.step(joint if agent_obsk is None else joint[ORDER[task]])
        td["agents", "action"] = action
        td = env.step(td)["next"]
        steps += 1
        assert td["reward"].item() == np.float32(reward)
        assert (td["terminated"].item(), td["truncated"].item()) == (terminated, truncated)
        assert td["done"].item() == (terminated or truncated)
        if terminated or truncated:
            break
    if task == "hopper":
        assert terminated and not truncated and steps < 200
    if len(actions) == 1000:
        assert steps == 1000 and truncated and not terminated
    plain.close()


@pytest.mark.parametrize("task", TASKS)
def test_replay_of_gymnasium_robotics_local_observations(make, task):
    """agent_obsk=1 shows each agent what gymnasium-robotics' own environment shows it, then zeros."""
    env = make(task, 1, agent_obsk=1)
    env.set_seed(3)
    seed = env.seeds[0]
    other = mamujoco_v1.parallel_env(*MAMUJOCO_TASKS[task], 1)
    td, (local, _) = env.reset(), other.reset(seed=seed)
    width = td["agents", "observation"].shape[-1]
    assert width == max(len(o) for o in local.values())
    for action in random_actions(env, 20):
        for i, name in enumerate(other.possible_agents):
            wanted = np.pad(local[name], (0, width - len(local[name]))).astype(np.float32)
            np.testing.assert_array_equal(td["agents", "observation"][0, i].numpy(), wanted)
        td["agents", "action"] = action
        td = env.step(td)["next"]
        local, rewards, *_ = other.step({name: a.double().numpy() for name, a in zip(other.possible_agents, action[0])})
        assert td["reward"].item() == np.float32(rewards["agent_0"])
    other.close()


def test_ant_contact_forces_are_zero_before_they_are_standardised(make):
    """The 84 entries of MuJoCo 2.0's contact forces hold one number: minus the vector's mean over its deviation."""
    env = make("ant", 1)
    env.set_seed(0)
    td = play(env, env.reset(), random_actions(env, 30))[1]
    contact = td["agents", "observation"][0, :, 27:111]
    assert (contact == contact[:, :1]).all() and td["agents", "observation"][0, 0, :27].unique().numel() == 27


# ---------------------------------------------------------------- seeds


def rollout(env, seed: int, steps: int = 15):
    env.set_seed(seed)
    td = env.reset()
    return torch.stack([td["state"], *(td["state"] for td in play(env, td, random_actions(env, steps))[0])])


def test_seeds(make):
    env = make("hopper", 2)
    first = rollout(env, 0)
    assert torch.equal(first, rollout(env, 0)) and torch.equal(first, rollout(make("hopper", 2), 0))
    assert not torch.equal(first[0], rollout(env, 1)[0])
    assert not torch.equal(first[0, 0], first[0, 1]), "robots of one environment must not start alike"


def test_later_resets_differ_and_repeat_for_a_seed(make):
    env = make("hopper", 1)
    env.set_seed(0)
    starts = [env.reset()["state"] for _ in range(3)]
    assert not torch.equal(starts[0], starts[1]) and not torch.equal(starts[1], starts[2])
    env.set_seed(0)
    assert all(torch.equal(a, env.reset()["state"]) for a in starts)


def test_parallel_workers_are_the_in_process_environments(make):
    """Two processes give what two environments give in this process, with the seeds that TorchRL hands out.

    So they repeat, too.
    """
    parallel, one, two = make("hopper", 2, workers=2), make("hopper", 2), make("hopper", 2)
    assert parallel.batch_size == (2, 2)
    parallel.set_seed(5)
    two.set_seed(one.set_seed(5))
    td = parallel.reset()
    alone = [one.reset(), two.reset()]
    actions = random_actions(parallel, 12)
    together = play(parallel, td, actions)[0]
    apart = [play(env, td, actions[:, w])[0] for w, (env, td) in enumerate(zip((one, two), alone))]
    for t, got in enumerate(together):
        for key in ("state", "reward", ("agents", "observation"), "done", "terminated"):
            assert torch.equal(got[key], torch.stack([apart[0][t][key], apart[1][t][key]]))


# ---------------------------------------------------------------- partial steps and resets


def test_partial_step_leaves_the_other_robots_where_they_are(make):
    env, twin = make("halfcheetah", 3), make("halfcheetah", 3)
    for e in (env, twin):
        e.set_seed(0)
    td, start = env.reset(), twin.reset()
    actions = random_actions(env, 10)
    held, td = play(env, td, actions[:6], _step=torch.tensor([True, False, True]))
    free, _ = play(twin, start, actions)
    for t in range(6):
        for robot in (0, 2):
            assert torch.equal(held[t]["state"][robot], free[t]["state"][robot])
            assert torch.equal(held[t]["reward"][robot], free[t]["reward"][robot])
        assert torch.equal(held[t]["state"][1], start["state"][1]) and held[t]["reward"][1] == 0
        assert torch.equal(held[t]["agents", "observation"][1], start["agents", "observation"][1])
    # The robot that stood still now goes through its first steps, as the twin's did.
    later, _ = play(env, td, actions[:4])
    for t in range(4):
        assert torch.equal(later[t]["state"][1], free[t]["state"][1])
        assert torch.equal(later[t]["reward"][1], free[t]["reward"][1])


def test_partial_reset_leaves_the_other_robots_where_they_are(make):
    env, twin = make("halfcheetah", 3), make("halfcheetah", 3)
    for e in (env, twin):
        e.set_seed(0)
    start = env.reset()
    actions = random_actions(env, 8)
    _, td = play(env, start, actions[:4])
    free, _ = play(twin, twin.reset(), actions)
    reset = env.reset(td.clone().set("_reset", torch.tensor([[False], [True], [False]])))
    for robot in (0, 2):
        assert torch.equal(reset["state"][robot], td["state"][robot])
    assert not torch.equal(reset["state"][1], td["state"][1]) and not torch.equal(reset["state"][1], start["state"][1])
    after, _ = play(env, reset, actions[4:])
    for t in range(4):
        for robot in (0, 2):
            assert torch.equal(after[t]["state"][robot], free[4 + t]["state"][robot])


def test_rollout_resets_robots_that_fell(make):
    """TorchRL's own collection over many episodes: a row after a fall begins a new episode, near the initial pose."""
    env = make("hopper", 2, agent_obsk=1)  # the state is MuJoCo's: entry 0 is the height, about 1.25 at the start
    env.set_seed(0)
    torch.manual_seed(0)  # of the random actions: without it they depend on the tests before this one
    td = env.rollout(200, break_when_any_done=False)
    fallen = td["next", "done"][:, :-1, 0]
    assert fallen.sum() >= 4 and td["next", "terminated"][:, :-1, 0].equal(fallen)
    starts = td["state"][:, 1:][fallen]
    assert ((starts[:, 0] - 1.25).abs() < 0.01).all()
    assert not torch.allclose(td["next", "state"][:, :-1][fallen], starts)
    assert torch.equal(td["next", "state"][:, :-1][~fallen], td["state"][:, 1:][~fallen])


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("agent_obsk", [None, 0, 1])
def test_another_scenario(make, agent_obsk):
    env = make("walker2d_2x3", 2, agent_obsk=agent_obsk)
    check_env_specs(env)
    n, O, S, A = sizes(env)
    assert (n, A) == (2, 3) and (agent_obsk is not None or (O, S) == (17 + 2, 2 * (17 + 2)))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    "task, message",
    [
        ("hoper", "unknown mamujoco task 'hoper': use one of hopper, ant, halfcheetah"),
        ("walker2d", "SCENARIO_PARTITION such as walker2d_2x3"),
        ("nothing_2x3", "with a scenario of Ant"),
        ("hopper_9x9", "Hopper has no partition '9x9'"),
        ("humanoid_9|8", r"\[9, 8\] actions can't share one network"),
    ],
)
def test_unknown_tasks(task, message, workers):
    with pytest.raises(BadInput, match=message) as error:
        make_env("mamujoco", task, 1, workers)
    # Nobody simulates an unknown scenario: training from a dataset of it goes on without rollouts.
    # A wrong partition is a mistake.
    assert isinstance(error.value, NoSimulator) == ("unknown" in str(error.value)) and "\n" not in str(error.value)


def test_scenario_without_local_observations():
    with pytest.raises(BadInput, match="no agent_obsk observations for Reacher"):
        make_env("mamujoco", "reacher_2x1", 1, interface="agent_obsk=1")


@pytest.mark.parametrize("interface", ["standard", "agent_obsk=", "agent_obsk=x", "benchmark|agent_obsk=1"])
def test_unknown_interface(interface):
    with pytest.raises(BadInput, match=r"mamujoco has no interface '.*': use benchmark or agent_obsk=K \(0 to 99\)$"):
        make_env("mamujoco", "hopper", 1, interface=interface)


def test_unknown_env():
    with pytest.raises(NoSimulator, match="unknown env 'nowhere': there are mamujoco, smacv2, smacv1, smax"):
        make_env("nowhere", "hopper", 1)


@pytest.mark.parametrize(
    "interface",
    ["agent_obsk=100", "agent_obsk=99999999999", "agent_obsk=-1", "agent_obsk=٣", "agent_obsk=1\n", "agent_obsk="],
)
def test_interfaces_that_are_refused_at_once(interface):
    with pytest.raises(BadInput, match=r"use benchmark or agent_obsk=K \(0 to 99\)"):
        make_env("mamujoco", "hopper", 1, interface=interface)


@pytest.mark.parametrize("agent_obsk", [-1, 100, 99999999999])
def test_distances_that_no_robot_has_are_refused_at_building(agent_obsk):
    with pytest.raises(BadInput, match="joints from 0 to 99 away"):
        MaMuJoCoEnv("hopper", 1, agent_obsk)


def test_the_greatest_distance_is_all_joints(make):
    assert sizes(make("hopper", 1, agent_obsk=99)) == sizes(make("hopper", 1, agent_obsk=2))


def test_playing_does_not_wait_for_a_gpu(make, monkeypatch):
    """Evaluations run beside a GPU's updates. TensorDict's .to() would wait for these at every step, on a CPU too."""
    monkeypatch.setattr(TensorDict, "_sync_all", lambda self: pytest.fail("TensorDict waits for the GPU here"))
    env = make("hopper", 2)
    evaluate(make_policy(3, 14, 1, False, 8), env, 2, 0)
