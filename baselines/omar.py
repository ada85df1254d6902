"""OMAR (Pan et al. 2022, Plan Better Amid Conservatism: Offline Multi-Agent RL with Actor Rectification).

Equations and hyperparameters are those of the version submitted to ICLR (openreview.net, 0EL4vLgYKRW).

    python -m baselines.omar --env mamujoco --task hopper --quality medium-replay

Independent learners without a mixer: each agent has twin values q_i(o_i, a_i) of the team's reward (TD3), made
conservative by CQL(H) (Kumar et al. 2020, Eq. 4). A conservative q has many local optima where a policy gradient gets
stuck. So the actor is rectified: a zeroth-order search looks for an action with a high q, and the policy is pulled
towards it while it climbs q.

continuous actions: as published. The policy is deterministic (the mean of a Gaussian whose standard deviation is not
    trained). The search samples actions from a Gaussian, which moves to their softmax-weighted mean. It takes the best
    of the last samples and the policy's own action. The numbers of steps and samples are the paper's for its particle
    environments.
discrete actions (OMAR is published for continuous ones only): the search tries all A actions, so it is exact: a_hat =
    arg max of q_i over available actions. The policy gradient climbs the exact expectation sum_a pi_i(a) q_i(a). The
    squared distance to a_hat becomes -log pi_i(a_hat). The target takes the target policy's most likely action.

Left out of the authors' code: the tanh of the policy, normalised inputs, a penalty on large actions, clipped gradients,
and networks of each agent's own. On halfcheetah their search takes 2 steps of 20 samples, each from the best 5, and
their log-sum-exp has samples around the policy's action at o_i', too. On particles it has uniform samples alone.
"""

from dataclasses import dataclass

import environments.cpu  # noqa: F401 -- before torch

# isort: split
from baselines.run_args import RunArgs
from support.flags import parse


@dataclass
class Args(RunArgs):
    """Train OMAR."""

    rectification: float | None = None
    """weight c of the distance to the search's action; q has the weight 1 - c (default: 0.5 for medium-replay, 0.7 for
    medium, 0.9 for expert, 0.5 otherwise)"""
    search_steps: int = 3
    """continuous actions: steps of the search (Pan et al.)"""
    search_samples: int = 10
    """continuous actions: samples in a step of the search (Pan et al.)"""
    search_std: float = 2.0
    """continuous actions: standard deviation at the start of the search (Pan et al.)"""
    cql_alpha: float | None = None
    """weight of the conservative term, in units of the reward (default: 5 mean absolute rewards, as CQL's)"""
    cql_samples: int = 10
    """continuous actions: samples of each kind in the log-sum-exp"""
    cql_std: float = 0.2
    """continuous actions: standard deviation of the samples around the policy's action"""


if __name__ == "__main__":  # before the slow imports, so that --help and a mistyped flag answer at once
    ARGS = parse(Args)

# isort: split
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from baselines.common import BOX, KEYS, Method, Twins, check, frozen, train
from baselines.conservative import sample_noise, sampled_log_sum_exp, span_samples
from comadice_mixer import Q, make_policy
from environments.checks import BadInput, run_script

# The weight c (Pan et al.'s tau) by quality of the data, as in the paper, and 0.5 for other qualities. Their code has
# the opposite order on halfcheetah: 0.9 on medium-replay, 0.7 on medium, 0.5 on expert.
RECTIFICATION = {"medium-replay": 0.5, "medium": 0.7, "expert": 0.9}


# --------------------------------------------- the losses; q_j and log_sum_exp are [2, B, n], reward and terminated [B]


def td_loss(q_j: Tensor, reward: Tensor, terminated: Tensor, q_next_j: Tensor, gamma: float) -> Tensor:
    """E_D[(r + gamma min_j q_j(o_i', a_i') - q_j(o_i, a_i))^2], summed over the twins; q_next_j [2, B, n] from target
    networks."""
    target = reward.unsqueeze(-1) + gamma * q_next_j.amin(0).masked_fill(terminated.unsqueeze(-1), 0)
    return (target - q_j).square().sum(0).mean()  # Pan et al. 2022, Eq. 1, the Bellman error, for TD3's twins


def conservative_loss(log_sum_exp: Tensor, q_j: Tensor) -> Tensor:
    """E_D[log sum_a exp q_j(o_i, a) - q_j(o_i, a_i)], summed over the twins."""
    return (log_sum_exp - q_j).sum(0).mean()  # Kumar et al. 2020, Eq. 4


def actor_loss(q: Tensor, action: Tensor, a_hat: Tensor, rectification: float) -> Tensor:
    """E_D[-(1 - c) q_i(o_i, pi_i(o_i)) + c |pi_i(o_i) - a_hat_i|^2 / A]: q [B, n] of the policy's action, action and
    a_hat [B, n, A]. The authors' code too has the mean over the action's A entries."""
    # Pan et al. 2022, Eq. 2
    return (-(1 - rectification) * q + rectification * (action - a_hat).square().mean(-1)).mean()


def discrete_actor_loss(q_all: Tensor, logits: Tensor, a_hat: Tensor, rectification: float) -> Tensor:
    """E_D[-(1 - c) sum_a pi_i(a) q_i(o_i, a) - c log pi_i(a_hat_i)]: q_all and logits [B, n, A], a_hat [B, n]."""
    log_pi = logits.log_softmax(-1)
    return (
        -(1 - rectification) * (logits.softmax(-1) * q_all).sum(-1)
        - rectification * log_pi.gather(-1, a_hat.unsqueeze(-1))[..., 0]
    ).mean()


def noise(card: dict, args: Args, B: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The random numbers of one update with continuous actions, standard normal but for sample_noise's "uniform"."""
    shape = B, args.search_steps, args.search_samples, card["n_agents"], card["action_dim"]
    normal = torch.randn(shape, generator=generator, device=generator.device)
    return {"search": normal} | sample_noise(card, B, args.cql_samples, generator)


@torch.no_grad()
def search(q, obs: Tensor, action: Tensor, q_action: Tensor, noise: Tensor, std: float) -> Tensor:
    """a_hat [B, n, A], the best of the last sampled actions and the policy's own.

    action [B, n, A] is the policy's, q_action [B, n] its q. `noise` [steps, samples, B, n, A] are standard normal
    numbers. std is the standard deviation at the start.
    """
    mean, std = torch.zeros_like(action), torch.full_like(action, std)
    for normal in noise:
        samples = (mean + std * normal).clamp(-BOX, BOX)
        q_samples = q(obs.expand(len(samples), *obs.shape), samples)
        mean = (q_samples.softmax(0).unsqueeze(-1) * samples).sum(0)  # Pan et al. 2022, Eq. 3, with beta = 1
        std = (samples - mean).square().mean(0).sqrt()
    candidates = torch.cat([samples, action.unsqueeze(0)])
    best = torch.cat([q_samples, q_action.unsqueeze(0)]).argmax(0, keepdim=True)
    return candidates.gather(0, best.unsqueeze(-1).expand(1, *action.shape))[0]


# ---------------------------------------------------------------- what one update minimises


class Networks(nn.Module):
    def __init__(self, card: dict, args: Args):
        super().__init__()
        n, O, A, discrete = (card[k] for k in ("n_agents", "obs_dim", "action_dim", "discrete"))
        self.q = Twins(Q(n, O, A, args.hidden, discrete, args.layer_norm) for _ in range(2))
        self.policy = make_policy(n, O, A, discrete, args.hidden)


def losses(networks: Networks, target: Networks, batch: TensorDict, args: Args) -> dict[str, Tensor]:
    """The losses. "loss" is the sum of all: td_loss + cql_alpha conservative_loss trains the values, the rest
    trains the policy.

    frozen() keeps the policy's loss from training q.
    """
    obs, action, next_obs = (
        batch["agents", "observation"],
        batch["agents", "action"],
        batch["next", "agents", "observation"],
    )
    reward, terminated = batch["reward"][:, 0], batch["terminated"][:, 0]
    if networks.q[0].discrete:
        mask = batch["agents", "action_mask"]
        with torch.no_grad():
            q_next_j = target.q(next_obs, target.policy.act(next_obs, batch["next", "agents", "action_mask"]))
        q_all_j = torch.stack([q.net(obs) for q in networks.q])  # [2, B, n, A]
        q_j = q_all_j.gather(-1, action.expand(2, *action.shape).unsqueeze(-1))[..., 0]
        total = q_all_j.masked_fill(~mask, -torch.inf).logsumexp(-1)
        q_all = q_all_j[0].detach()
        L_pi = discrete_actor_loss(
            q_all,
            networks.policy.logits(obs, mask),
            q_all.masked_fill(~mask, -torch.inf).argmax(-1),
            args.rectification,
        )
    else:
        mean = networks.policy.act(obs)
        with torch.no_grad():
            q_next_j = target.q(next_obs, target.policy.act(next_obs).clamp(-BOX, BOX))
        std = torch.full_like(mean, args.cql_std)
        samples, log_density = span_samples(mean, std, batch["noise"])
        q_j = networks.q(obs, action)
        total = sampled_log_sum_exp(networks.q(obs.expand(len(samples), *obs.shape), samples), log_density)
        # clipped as in the simulator; a_hat pulls a mean outside of the box back
        clipped = mean.clamp(-BOX, BOX)
        q_pi, normal = frozen(networks.q[0])(obs, clipped), batch["noise", "search"].movedim(0, 2)
        a_hat = search(networks.q[0], obs, clipped.detach(), q_pi.detach(), normal, args.search_std)
        L_pi = actor_loss(q_pi, mean, a_hat, args.rectification)
    L_td, L_cql = td_loss(q_j, reward, terminated, q_next_j, args.gamma), conservative_loss(total, q_j)
    cql_alpha = args.cql_alpha * args.reward_scale  # scaled as the batch's rewards are
    values = {"loss": L_td + cql_alpha * L_cql + L_pi, "td_loss": L_td, "conservative_loss": L_cql}
    return values | {"policy_loss": L_pi, "mean_q": q_j.mean()}


# ---------------------------------------------------------------- the script


def defaults(card: dict, unit: float) -> dict[str, float]:
    """The coefficient of the data's quality, and CQL's weight, 5 mean absolute rewards (`unit`), see cql.py."""
    return {"rectification": RECTIFICATION.get(card["quality"], 0.5), "cql_alpha": 5 * unit}


def main(args: Args):
    check(args, "search_steps", "search_samples", "search_std", "cql_alpha", "cql_samples", "cql_std")
    if args.rectification is not None and not 0 <= args.rectification <= 1:
        raise BadInput("--rectification must be in [0, 1]")
    train(Method("omar", Networks, losses, KEYS, defaults=defaults, noise=noise), args)


if __name__ == "__main__":
    run_script(main, ARGS)
