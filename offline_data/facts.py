"""What the losses and the default flags need to know about a whole dataset. It is computed once, before training."""

import math
from typing import NamedTuple

import torch
from tensordict import TensorDict

from offline_data.dataset import clipped, last_rows, preferred_by


class DataFacts(NamedTuple):
    """What the losses need to know about the whole dataset."""

    low: float  # smallest discounted return from a recorded step to the end of its record, in scaled rewards
    high: float  # largest one; a time limit ends the record too
    mass: float  # total weight of rho^mu, see comadice_losses.dual_loss; episodes cut by a time limit count as endless


def data_facts(rows: TensorDict, args) -> DataFacts:
    """DataFacts for args.gamma and args.reward_scale. low and high are infinite without args.bound: no clipping."""
    keep = ~last_rows(rows)
    reward, done, terminated = (rows[key][keep, 0].cpu() for key in ("reward", "done", "terminated"))
    # Backwards in time, in plain Python: TorchRL's reward2go asks for 52 GB of memory for 350,000 transitions.
    returns, value = [], 0.0
    for r, end in zip(reversed(reward.tolist()), reversed(done.tolist())):
        value = r if end else r + args.gamma * value
        returns.append(args.reward_scale * value)
    ends = done.nonzero()[:, 0]
    lengths = torch.diff(ends, prepend=torch.tensor([-1])).double()
    mass = (1 - args.gamma**lengths).where(terminated[ends], 1.0).mean().item()  # (1 - gamma) sum_t gamma^t
    return DataFacts(min(returns), max(returns), mass) if args.bound else DataFacts(-math.inf, math.inf, mass)


def mean_abs_reward(rows: TensorDict) -> float:
    """The mean absolute reward of the transitions, or 1 where all rewards are 0. It is the unit of several defaults."""
    return rows["reward"][~last_rows(rows)].double().abs().mean().item() or 1.0


def return_deviation(rows: TensorDict, neighbours: bool = False) -> float:
    """The mean absolute deviation of the episodes' returns from their mean, the unit of --episode-alpha's default.

    Returns are first clipped to their 10th and 90th percentile. A few episodes far from all others, such as ant's very
    poor ones, would otherwise decide it. With `neighbours` it is half of the deviation of policy_returns, if these tell
    anything: there is little luck in them, so they can be followed more closely.
    """
    returns, of_policies = preferred_by(rows, neighbours)
    returns = clipped(returns)
    deviation = (returns - returns.mean()).abs().mean().item()
    return deviation / 2 if of_policies else deviation
