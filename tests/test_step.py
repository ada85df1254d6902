"""An update step waits for no value on the host and has no loop over agents."""

from copy import deepcopy

import pytest
import torch
from tensordict import TensorDict
from torch.utils._python_dispatch import TorchDispatchMode

import comadice_bc
import comadice_train
from comadice_mixer import make_policy
from comadice_train import DataFacts
from offline_data.replay import initial_rows, make_replay

DATA = DataFacts(-30.0, 30.0, 0.9)
# Operations whose result the host has to wait for, or whose shape depends on data.
SYNCS = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique_dim", "_unique2", "item"}


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        # An index that is a bool mask is a nonzero() in disguise.
        if self.names[-1] == "index" and any(i is not None and i.dtype is torch.bool for i in args[1]):
            self.names.append("nonzero")
        return function(*args, **(kwargs or {}))


def rows(n: int, discrete: bool) -> TensorDict:
    N, t = 303, torch.arange(303) % 101
    agents = {
        "observation": torch.randn(N, n, 5),
        "action": torch.randint(4, (N, n)) if discrete else torch.randn(N, n, 4),
    }
    if discrete:
        agents["action_mask"] = torch.ones(N, n, 4, dtype=torch.bool)
    done = (t == 99)[:, None]
    flags = {"done": done, "terminated": done, "is_init": (t == 0)[:, None]}
    return TensorDict(
        {"state": torch.randn(N, 7), "reward": torch.randn(N, 1), "agents": TensorDict(agents, [N, n])} | flags, [N]
    )


def step_args(objective: str, advantage: str) -> comadice_train.Args:
    return comadice_train.resolve(
        comadice_train.Args(objective=objective, advantage=advantage, hidden=8, batch_size=16), 1.0
    )


def critic_step(n: int, discrete: bool, args: comadice_train.Args) -> list[str]:
    torch.manual_seed(0)
    card = {"n_agents": n, "obs_dim": 5, "state_dim": 7, "action_dim": 4, "discrete": discrete}
    data = rows(n, discrete)
    critics = comadice_train.make_critics(card, args)
    target, optimizer = deepcopy(critics), comadice_train.make_optimizer(critics, args)
    replay, initial = (
        make_replay(data, comadice_train.CRITIC_KEYS),
        make_replay(data, comadice_train.INIT_KEYS, pairs=False, drawn_from=initial_rows(data)),
    )
    update = comadice_train.make_critic_update(critics, target, optimizer, args, DATA)
    with Recorder() as recorder:
        update(replay.sample(16), initial.sample(4))
    return recorder.names


def policy_step(n: int, discrete: bool) -> list[str]:
    policy = make_policy(n, 5, 4, discrete, 8)
    average, weight, optimizer = deepcopy(policy), torch.ones(()), torch.optim.Adam(policy.parameters())
    replay = make_replay(comadice_bc.with_ratios(rows(n, discrete), {0: None}), comadice_bc.POLICY_KEYS, pairs=False)
    update = comadice_bc.make_policy_update(policy, average, optimizer, weight)
    with Recorder() as recorder:
        update(replay.sample(16))
    return recorder.names


# Adam counts its steps in CPU tensors that it reads on the CPU: no device is waited for. Its reads are those of an
# optimiser on its own.
def adam_reads(parameters: int) -> int:
    leaves = [torch.zeros(2, requires_grad=True) for _ in range(parameters)]
    for leaf in leaves:
        leaf.grad = torch.ones(2)
    optimizer = torch.optim.Adam(leaves)
    with Recorder() as recorder:
        optimizer.step()
    return sum(name in SYNCS for name in recorder.names)


OBJECTIVES = pytest.mark.parametrize(
    "objective, advantage",
    [
        ("semi", "td"), ("semi", "q"), ("exact", "td"), ("exact", "q"), ("printed", "q"), ("released_nu", "q"),
    ],
)


@pytest.mark.parametrize("discrete", [False, True])
@OBJECTIVES
def test_critic_step_waits_for_nothing_and_has_no_agent_loop(objective, advantage, discrete):
    args = step_args(objective, advantage)
    few, many = critic_step(2, discrete, args), critic_step(10, discrete, args)
    assert len(few) > 50 and few == many
    trained = len(
        list(
            comadice_train.make_critics(
                {"n_agents": 2, "obs_dim": 5, "state_dim": 7, "action_dim": 4, "discrete": discrete}, args
            ).parameters()
        )
    )
    assert sum(name in SYNCS for name in few) <= adam_reads(trained)


@pytest.mark.parametrize("discrete", [False, True])
def test_policy_step_waits_for_nothing_and_has_no_agent_loop(discrete):
    few, many = policy_step(2, discrete), policy_step(10, discrete)
    assert len(few) > 20 and few == many
    assert sum(name in SYNCS for name in few) <= adam_reads(len(list(make_policy(2, 5, 4, discrete, 8).parameters())))


@pytest.mark.cuda
@OBJECTIVES
def test_critic_step_on_a_gpu_does_not_synchronise(objective, advantage):
    args = step_args(objective, advantage)
    card = {"n_agents": 3, "obs_dim": 5, "state_dim": 7, "action_dim": 4, "discrete": False}
    data = rows(3, False).to("cuda")
    critics = comadice_train.make_critics(card, args).to("cuda")
    target, optimizer = deepcopy(critics), comadice_train.make_optimizer(critics, args)
    replay, initial = (
        make_replay(data, comadice_train.CRITIC_KEYS),
        make_replay(data, comadice_train.INIT_KEYS, pairs=False, drawn_from=initial_rows(data)),
    )
    update = comadice_train.make_critic_update(critics, target, optimizer, args, DATA)
    draw = lambda: (replay.sample(16), initial.sample(4))
    update(*draw())
    torch.cuda.set_sync_debug_mode("error")
    try:
        update(*draw())
    finally:
        torch.cuda.set_sync_debug_mode("default")
