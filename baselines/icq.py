"""ICQ-MA (Yang et al. 2021, Believe What You See: Implicit Constraint Approach for Offline Multi-Agent RL).

    python -m baselines.icq --env mamujoco --task hopper --quality medium-replay

Both steps use only recorded actions. The constrained optimum is pi = mu exp(q / alpha) / Z. So an expectation under pi
is one under the data, with the weight exp(q / alpha) / Z. q_tot = sum_i w_i(s) q_i + b(s) is backed up from the action
recorded at s', times this weight. Since q_tot is a weighted sum, pi splits into pi_i = mu_i exp(w_i q_i / alpha) / Z_i.
Weighted behavioural cloning extracts these. Z is the sum over the batch: both weights are a softmax over the batch. In
the authors' code a batch has whole episodes, and Z sums over the episodes, for each time step by itself.

discrete actions: the exponent of pi_i is q_i minus its mean sum_a pi_i(a) q_i(a) over available actions (ICQ-MA's code
    on StarCraft). With an exact Z, subtracting a function of the observation would change nothing. With the sum over
    a batch, it makes different observations comparable.
continuous actions: the exponent is w_i q_i itself, as in OMIGA's experiments.

Here w_i is inside the exponent, as derived. ICQ-MA's code on StarCraft multiplies the weight exp(A_i / alpha) / Z by
w_i instead.

On robots the default temperatures make it almost BC with a value beside it: on halfcheetah medium-replay the policies'
weights have an effective sample size of 0.99.

The paper's TD(lambda) needs trajectories. With single transitions, as here, lambda is 0. In ICQ-MA's code the mixing
weights w_i sum to 1 and there is no b, the policies are recurrent, gradients are clipped, RMSprop is the optimiser, and
target networks are copied every 600 steps. OMIGA's experiments take the minimum of two q.
"""

from dataclasses import dataclass

import environments.cpu  # noqa: F401 -- before torch

# isort: split
from baselines.run_args import RunArgs
from support.flags import parse


@dataclass
class Args(RunArgs):
    """Train ICQ-MA."""

    alpha: float | None = None
    """temperature of the policies' weights, in units of the reward (default: 0.4 mean absolute rewards for discrete
    actions, 50 for continuous ones)"""
    alpha_q: float | None = None
    """temperature of the weights in q's target, in units of the reward (default: 4000 mean absolute rewards)"""
    action_scale: float = 0.85
    """robots' policies play this multiple of their mean action, as in comadice_bc.py; 1: the mean"""
    mixer_hidden: int = 64
    """hidden units of the mixer's hyper-networks"""


if __name__ == "__main__":  # before the slow imports, so that --help and a mistyped flag answer at once
    ARGS = parse(Args)

# isort: split
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from baselines.common import KEYS, Method, check, train
from comadice_mixer import LinearMixer, Q, make_policy
from environments.checks import run_script


def defaults(card: dict, unit: float) -> dict[str, float]:
    """The published values, rescaled from the mean reward of a step in their experiments to that of these data, `unit`.

    ICQ-MA on StarCraft has alpha 0.1, and its code has alpha_q 1000. We take 0.25 for a step's reward there: it is 0.2
    to 0.5 in the paper's SMACv2 data (Table 3). OMIGA's experiments with ICQ on MaMuJoCo have alpha 100. A step's
    reward is about 2 there (Table 3: 0.7 to 3.7).
    """
    return {"alpha": (0.1 / 0.25 if card["discrete"] else 100 / 2) * unit, "alpha_q": 1000 / 0.25 * unit}


def with_next_action(rows: TensorDict) -> TensorDict:
    """The dataset with two more row keys: the action recorded at the next row, and whether there is one.

    At an episode's end there is no next action. After a termination none is needed. After a time limit there is a next
    state, but no recorded action. So q can't be backed up there, and q's loss leaves such a transition out.
    """
    rows = rows.clone(recurse=False).unlock_()
    rows["next_action"] = rows["agents", "action"].roll(-1, 0)
    rows["has_next"] = ~rows["done"]
    return rows.lock_()


# --------------------------------------------------------------- the losses; w, q and log_prob are [B, n], the rest [B]


def softmax_weights(x: Tensor, keep: Tensor) -> Tensor:
    """exp(x) / Z over the kept entries of the batch (dimension 0), times their number: a mean of 1, and 0 elsewhere."""
    return keep.sum(0) * x.masked_fill(~keep, torch.finfo(x.dtype).min).softmax(0).masked_fill(~keep, 0)


def q_loss(
    q_tot: Tensor,
    reward: Tensor,
    terminated: Tensor,
    has_next: Tensor,
    q_tot_next: Tensor,
    alpha_q: float,
    gamma: float,
) -> Tensor:
    """E_D[(r + gamma exp(q_tot(s', a') / alpha_q) / Z q_tot(s', a') - q_tot(s, a))^2], a' recorded, q_tot(s', a') from
    target networks."""
    backup = softmax_weights(q_tot_next / alpha_q, has_next) * q_tot_next.masked_fill(~has_next, 0)
    known = has_next | terminated
    error = (reward + gamma * backup - q_tot).square()  # Yang et al. 2021, the ICQ-MA loss of q
    return error.masked_fill(~known, 0).sum() / known.sum().clamp(min=1)


def advantage(q_all: Tensor, q: Tensor, logits: Tensor) -> Tensor:
    """q_i(o_i, a_i) - sum_a pi_i(a) q_i(o_i, a): q_all and logits [B, n, A], logits -inf for unavailable actions -> [B,
    n]."""
    return q - (logits.softmax(-1) * q_all).sum(-1)


def policy_loss(w: Tensor, advantage: Tensor, alpha: float, log_prob: Tensor) -> Tensor:
    """-E_D[exp(w_i A_i / alpha) / Z_i log pi_i(a_i | o_i)], summed over agents; w_i and A_i are constants."""
    weight = softmax_weights(w * advantage / alpha, torch.ones_like(w, dtype=torch.bool))
    return -(weight.detach() * log_prob).sum(-1).mean()  # Yang et al. 2021, the ICQ-MA loss of pi


# ---------------------------------------------------------------- what one update minimises


class Networks(nn.Module):
    def __init__(self, card: dict, args: Args):
        super().__init__()
        n, O, S, A, discrete = (card[k] for k in ("n_agents", "obs_dim", "state_dim", "action_dim", "discrete"))
        self.q = Q(n, O, A, args.hidden, discrete, args.layer_norm)
        self.mixer = LinearMixer(n, S, args.mixer_hidden)
        self.policy = make_policy(n, O, A, discrete, args.hidden, args.action_scale)


def losses(networks: Networks, target: Networks, batch: TensorDict, args: Args) -> dict[str, Tensor]:
    """Both losses and their sum. No parameter gets a gradient from both."""
    obs, action, mask = (
        batch["agents", "observation"],
        batch["agents", "action"],
        batch["agents"].get("action_mask", None),
    )
    state, reward, terminated = batch["state"], batch["reward"][:, 0], batch["terminated"][:, 0]
    W, b = networks.mixer.at(state)
    if networks.q.discrete:
        q_all = networks.q.net(obs)
        q = q_all.gather(-1, action.unsqueeze(-1))[..., 0]
    else:
        q = networks.q(obs, action)
    with torch.no_grad():
        q_tot_next = target.mixer(
            target.q(batch["next", "agents", "observation"], batch["next_action"]), batch["next", "state"]
        )
        A = advantage(q_all, q, networks.policy.logits(obs, mask)) if networks.q.discrete else q
    # the batch's rewards are scaled, so the temperatures are scaled too
    alpha, alpha_q = args.alpha * args.reward_scale, args.alpha_q * args.reward_scale
    q_tot, has_next = networks.mixer(q, state, (W, b)), batch["has_next"][:, 0]
    L_q = q_loss(q_tot, reward, terminated, has_next, q_tot_next, alpha_q, args.gamma)
    L_pi = policy_loss(W, A, alpha, networks.policy.log_prob(obs, action, mask))
    return {"loss": L_q + L_pi, "q_loss": L_q, "policy_loss": L_pi, "mean_q": q.mean()}


# ---------------------------------------------------------------- the script


def main(args: Args):
    check(args, "alpha", "alpha_q", "action_scale", "mixer_hidden")
    keys = ["state", *KEYS, "next_action", "has_next"]
    train(Method("icq", Networks, losses, keys, with_next_action, defaults), args)


if __name__ == "__main__":
    run_script(main, ARGS)
