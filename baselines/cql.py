"""CQL (Kumar et al. 2020, Conservative Q-Learning for Offline RL), CQL(H), on factorised values as in OMIGA's
experiments.

    python -m baselines.cql --env mamujoco --task hopper --quality medium-replay

Q-learning of q_tot = sum_i w_i(s) q_i(o_i, a_i) + b(s), plus cql_alpha times (log sum_a exp q_tot(s, a) - q_tot(s,
a_recorded)), Eq. 4. This pushes down the values of actions that are not in the data. The sum runs over joint actions.
For a linear mixer it splits exactly: log sum_a exp q_tot = b + sum_i log sum_a_i exp(w_i q_i(o_i, a_i)). So b cancels,
and every agent has its own log-sum-exp.

discrete actions: the log-sum-exp, the maximum in the target and the arg max that is played run over available actions;
    the policy is the arg max of q_i (w_i >= 0: local maxima are the team's). So the "policy" of a checkpoint holds all
    parameters, as BCQ's does.
continuous actions: the log-sum-exp is estimated by importance sampling (Kumar et al., Appendix F) with actions drawn
    uniformly and around the policy's (baselines/conservative.py); the policy is a Gaussian that maximises q_tot and its
    entropy, as in SAC, on which CQL is built.

Left out of Kumar et al.'s code: a second q and the minimum of both, the tanh of the policy, samples from the policy at
s', the multiplier that adapts the weight, and imitation in the first steps. The code behind OMIGA's experiments has
another policy loss: it maximises q_i times log pi_i of the recorded action.
"""

from dataclasses import dataclass

import environments.cpu  # noqa: F401 -- before torch

# isort: split
from baselines.run_args import RunArgs
from support.flags import parse


@dataclass
class Args(RunArgs):
    """Train CQL."""

    cql_alpha: float | None = None
    """weight of the conservative term beside the squared Bellman error, in units of the reward (default: 5 mean
    absolute rewards)"""
    cql_samples: int = 10
    """continuous actions: samples of each kind in the log-sum-exp (Kumar et al., Appendix F)"""
    mixer_hidden: int = 64
    """hidden units of the mixer's hyper-networks"""


if __name__ == "__main__":  # before the slow imports, so that --help and a mistyped flag answer at once
    ARGS = parse(Args)

# isort: split
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from baselines.common import BOX, KEYS, Method, check, frozen, train
from baselines.conservative import sample_noise, sampled_log_sum_exp, span_samples
from comadice_mixer import LinearMixer, Q, make_policy
from environments.checks import run_script


def defaults(card: dict, unit: float) -> dict[str, float]:
    """cql_alpha is 5 mean absolute rewards (`unit`), as ComaDICE's and OMIGA's alpha are.

    The Bellman error is a square of rewards, and the conservative term is a sum of q. So cql_alpha has the unit of a
    reward. OMIGA's experiments have 1 at unscaled rewards, whose mean is about 2 (Table 3: 0.7 to 3.7). That is 0.5
    mean absolute rewards. The scale of the rewards is also the temperature of the log-sum-exp and of the entropy.
    Eq. 4 has half of the squared Bellman error, td_loss has all of it. So cql_alpha is twice the alpha of Eq. 4.
    On the tuning's hopper replay 0.5 of them returned 387 (two seeds), and 328 with rewards of 2 on average, as in
    OMIGA's experiments. 5 of them returned 1560, and 1886 with rewards of 2 (one seed each; docs/tuning.csv).
    """
    return {"cql_alpha": 5 * unit}


# ------------------------------------------- the losses; w, q and log_prob are [B, n], reward, terminated and *_tot [B]


def td_loss(q_tot: Tensor, reward: Tensor, terminated: Tensor, q_tot_next: Tensor, gamma: float) -> Tensor:
    """E_D[(r + gamma q_tot(s', a') - q_tot(s, a))^2], a' the policy's action and q_tot(s', a') from target networks."""
    # Kumar et al. 2020, Eq. 4, Bellman error
    return (reward + gamma * q_tot_next.masked_fill(terminated, 0) - q_tot).square().mean()


def log_sum_exp(w: Tensor, q_all: Tensor, mask: Tensor) -> Tensor:
    """log sum_a exp(w_i q_i(o_i, a)) over available actions: q_all and mask [B, n, A] -> [B, n]."""
    return (w.unsqueeze(-1) * q_all).masked_fill(~mask, -torch.inf).logsumexp(-1)


def conservative_loss(log_sum_exp: Tensor, w: Tensor, q: Tensor) -> Tensor:
    """E_D[log sum_a exp q_tot(s, a) - q_tot(s, a_recorded)]; log_sum_exp [B, n] is each agent's log sum_a_i exp(w_i
    q_i)."""
    return (log_sum_exp - w * q).sum(-1).mean()  # Kumar et al. 2020, Eq. 4, what alpha multiplies


def actor_loss(w: Tensor, q: Tensor, log_prob: Tensor, temperature: Tensor, action: Tensor) -> Tensor:
    """E[temperature log pi_i(a_i) - w_i q_i(o_i, a_i)] of the policy's own actions [B, n, A], summed over agents.

    q is given actions clipped to the box, as the simulator clips them. So outside of the box q has no gradient. The
    last term pulls such actions back.
    """
    outside = (action - action.clamp(-BOX, BOX)).square().sum(-1)
    # SAC's policy improvement, which Kumar et al. keep
    return (temperature * log_prob - w * q + outside).sum(-1).mean()


def temperature_loss(log_temperature: Tensor, log_prob: Tensor, action_dim: int) -> Tensor:
    """Keeps the policy's entropy near -action_dim, as in SAC."""
    return -(log_temperature * (log_prob - action_dim)).mean()


# ---------------------------------------------------------------- what one update minimises


class Networks(nn.Module):
    def __init__(self, card: dict, args: Args):
        super().__init__()
        n, O, S, A, discrete = (card[k] for k in ("n_agents", "obs_dim", "state_dim", "action_dim", "discrete"))
        self.q = Q(n, O, A, args.hidden, discrete, args.layer_norm)
        self.mixer = LinearMixer(n, S, args.mixer_hidden)
        if not discrete:
            self.policy = make_policy(n, O, A, discrete, args.hidden)
            self.log_temperature = nn.Parameter(torch.zeros(()))

    def act(self, obs: Tensor, mask: Tensor) -> Tensor:
        """Discrete actions: the available action with the highest q_i [..., n]."""
        return self.q.net(obs).masked_fill(~mask, -torch.inf).argmax(-1)


def policy_of_run(card: dict, config: dict) -> nn.Module:
    """The module for the "policy" of a checkpoint with this card and config."""
    networks = Networks(card, Args(**config))
    return networks if card["discrete"] else networks.policy


def noise(card: dict, args: Args, B: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The random numbers of one update with continuous actions, standard normal but for sample_noise's "uniform"."""
    shape = B, card["n_agents"], card["action_dim"]
    normal = lambda: torch.randn(shape, generator=generator, device=generator.device)
    return {"next_action": normal(), "new_action": normal()} | sample_noise(card, B, args.cql_samples, generator)


def losses(networks: Networks, target: Networks, batch: TensorDict, args: Args) -> dict[str, Tensor]:
    """The losses. "loss" is the sum of all: td_loss + cql_alpha conservative_loss trains the values, the rest
    trains the policy and the temperature.

    frozen() keeps the policy's loss from training q.
    """
    obs, action, next_obs = (
        batch["agents", "observation"],
        batch["agents", "action"],
        batch["next", "agents", "observation"],
    )
    state, reward, terminated = batch["state"], batch["reward"][:, 0], batch["terminated"][:, 0]
    w, b = networks.mixer.at(state)
    if networks.q.discrete:
        q_all = networks.q.net(obs)
        q = q_all.gather(-1, action.unsqueeze(-1))[..., 0]
        with torch.no_grad():
            q_next = target.q.net(next_obs).masked_fill(~batch["next", "agents", "action_mask"], -torch.inf).amax(-1)
        total = log_sum_exp(w, q_all, batch["agents", "action_mask"])
    else:
        q = networks.q(obs, action)
        pi = networks.policy.distribution(obs)
        with torch.no_grad():
            next_pi = networks.policy.distribution(next_obs)
            next_action = next_pi.loc + next_pi.scale * batch["noise", "next_action"]
            q_next = target.q(next_obs, next_action.clamp(-BOX, BOX))
        samples, log_density = span_samples(pi.loc, pi.scale, batch["noise"])
        total = sampled_log_sum_exp(w * networks.q(obs.expand(len(samples), *obs.shape), samples), log_density)
        new_action = pi.loc + pi.scale * batch["noise", "new_action"]
        log_prob = pi.log_prob(new_action).sum(-1)
        q_pi = frozen(networks.q)(obs, new_action.clamp(-BOX, BOX))
        L_pi = actor_loss(w.detach(), q_pi, log_prob, networks.log_temperature.detach().exp(), new_action)
        L_t = temperature_loss(networks.log_temperature, log_prob.detach(), action.shape[-1])
    with torch.no_grad():
        q_tot_next = target.mixer(q_next, batch["next", "state"])
    L_td = td_loss(networks.mixer(q, state, (w, b)), reward, terminated, q_tot_next, args.gamma)
    L_cql = conservative_loss(total, w, q)
    cql_alpha = args.cql_alpha * args.reward_scale  # scaled as the batch's rewards are
    values = {"loss": L_td + cql_alpha * L_cql, "td_loss": L_td, "conservative_loss": L_cql, "mean_q": q.mean()}
    if not networks.q.discrete:
        values |= {"loss": values["loss"] + L_pi + L_t, "policy_loss": L_pi, "entropy": -log_prob.mean()}
    return values


# ---------------------------------------------------------------- the script


def main(args: Args):
    check(args, "cql_alpha", "cql_samples", "mixer_hidden")
    train(Method("cql", Networks, losses, ["state", *KEYS], defaults=defaults, noise=noise), args)


if __name__ == "__main__":
    run_script(main, ARGS)
