"""Time of an update step and the shares of its parts.

    python benchmarks/speed.py                                   # hopper's shapes, random data
    python benchmarks/speed.py --n-agents 10 --obs-dim 170 --state-dim 306 --action-dim 17

Compare the shares and the ratios of one run; absolute speeds of a shared CPU mean little.
"""

import sys
import time
from collections import defaultdict
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import tyro
from tensordict import TensorDict
from torchrl.data import TensorDictReplayBuffer, TensorStorage

import comadice_train
from comadice_bc import POLICY_KEYS, with_ratio
from comadice_data import initial_rows, make_replay, minibatches, run_script
from comadice_losses import policy_loss
from comadice_mixer import make_policy
from comadice_runs import pick_device


@dataclass
class Args:
    n_agents: int = 3
    """agents"""
    obs_dim: int = 14
    """entries of an observation"""
    state_dim: int = 42
    """entries of the state"""
    action_dim: int = 1
    """entries of an action"""
    rows: int = 200_000
    """rows of the random dataset"""
    steps: int = 200
    """timed steps, after a tenth as many to warm up"""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    threads: int = 1
    """CPU threads"""
    train: comadice_train.Args = field(default_factory=comadice_train.Args)
    """the other arguments of comadice_train.py"""


def random_rows(args: Args) -> TensorDict:
    """Episodes of 100 transitions of noise, in the dataset's layout."""
    N, n = max(args.rows // 101, 1) * 101, args.n_agents
    t = torch.arange(N) % 101
    agents = TensorDict({"observation": torch.randn(N, n, args.obs_dim), "action": torch.randn(N, n, args.action_dim)}, [N, n])
    done = (t == 99)[:, None]
    flags = {"done": done, "terminated": done, "is_init": (t == 0)[:, None]}
    return TensorDict({"state": torch.randn(N, args.state_dim), "agents": agents, "reward": torch.randn(N, 1)} | flags, [N])


class Clock:
    """Adds up seconds by part; on a GPU each part is waited for."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.last = device, defaultdict(float), 0.0

    def start(self):
        self.last = self.now()

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def part(self, name: str):
        now = self.now()
        self.seconds[name] += now - self.last
        self.last = now

    def report(self, title: str, steps: int):
        total = sum(self.seconds.values())
        print(f"\n{title}: {1000 * total / steps:.2f} ms a step, {steps / total:.0f} steps/s")
        for name, seconds in self.seconds.items():
            print(f"  {name:<12}{1000 * seconds / steps:>8.3f} ms {100 * seconds / total:>6.1f} %")


def time_critics(rows: TensorDict, card: dict, args: Args, device: torch.device):
    critics = comadice_train.make_critics(card, args.train).to(device)
    target = deepcopy(critics)
    optimizer = comadice_train.make_optimizer(critics, args.train)
    replay = make_replay(rows, comadice_train.CRITIC_KEYS)
    initial = TensorDictReplayBuffer(storage=TensorStorage(initial_rows(rows), device=device))
    alpha = args.train.alpha * args.train.reward_scale
    for count in (args.steps // 10, args.steps):
        clock = Clock(device)
        clock.start()
        for _, batch, init in minibatches(0, {count}, (replay, args.train.batch_size), (initial, args.train.init_batch_size)):
            clock.part("sample")
            L_q, L_nu, _ = comadice_train.critic_losses(critics, target, batch, init, alpha, args.train)
            clock.part("losses")
            comadice_train.set_gradients(critics, L_q, L_nu, args.train)
            clock.part("gradients")
            optimizer.step()
            clock.part("optimiser")
            comadice_train.update_target(target, critics, args.train.tau)
            clock.part("targets")
    clock.report(f"critics ({args.train.objective})", args.steps)


def time_policy(rows: TensorDict, card: dict, args: Args, device: torch.device):
    policy = make_policy(card["n_agents"], card["obs_dim"], card["action_dim"], card["discrete"], args.train.hidden).to(device)
    optimizer = torch.optim.Adam(policy.parameters(), args.train.lr)
    replay = make_replay(with_ratio(rows, None), POLICY_KEYS, pairs=False)
    for count in (args.steps // 10, args.steps):
        clock = Clock(device)
        clock.start()
        for _, batch in minibatches(0, {count}, (replay, args.train.batch_size)):
            clock.part("sample")
            loss = policy_loss(batch["w"], policy.log_prob(batch["agents", "observation"], batch["agents", "action"]))
            clock.part("loss")
            optimizer.zero_grad()
            loss.backward()
            clock.part("gradient")
            optimizer.step()
            clock.part("optimiser")
    clock.report("policy", args.steps)


def main(args: Args):
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = pick_device(args.device)
    card = {k: getattr(args, k) for k in ("n_agents", "obs_dim", "state_dim", "action_dim")} | {"discrete": False}
    rows = random_rows(args).to(device)
    args.train = comadice_train.fill_in(args.train, rows)
    print(f"{card}, batch {args.train.batch_size}, {torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{args.threads} CPU threads'}")
    time_critics(rows, card, args, device)
    time_policy(rows, card, args, device)


if __name__ == "__main__":
    run_script(main, tyro.cli(Args))
