"""OMIGA (Wang et al. 2023, Offline Multi-Agent RL with Implicit Global-to-Local Value Regularization).

    python -m baselines.omiga --env mamujoco --task hopper --quality medium-replay

The team maximises its return minus alpha KL(pi_tot, mu_tot). With q_tot = sum_i w_i(s) q_i + b(s) and v_tot = sum_i
w_i(s) v_i + b(s) this splits into one problem per agent, at the temperature alpha / w_i. v_i(o_i) is the soft maximum
(alpha / w_i) log E_mu_i[exp(w_i q_i / alpha)], learned from recorded actions by a convex loss. pi_i is
mu_i exp(w_i (q_i - v_i) / alpha), extracted by weighted behavioural cloning. Only recorded actions are evaluated, so
only the policy needs the mask.

Left out: the authors' code also bounds the exponent from below, at -10, clips the norm of gradients at 1, and has a
tanh in its policy. It divides a batch's loss of v_i by exp of the batch's largest exponent. Beyond the upper bound that
loss no longer pulls v_i up (see v_loss).

It is the same for continuous and discrete actions, except for the heads of q_i and pi_i. make_policy makes the policy.
"""

from dataclasses import dataclass

import environments.cpu  # noqa: F401 -- before torch

# isort: split
from baselines.run_args import RunArgs
from support.flags import parse


@dataclass
class Args(RunArgs):
    """Train OMIGA."""

    alpha: float | None = None
    """weight of the KL divergence from the data, in units of the reward (default: 5 mean absolute rewards)"""
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
from comadice_mixer import LinearMixer, Nu, Q, make_policy
from environments.checks import run_script

Z_MAX = 10.0  # bound of the exponent, as in the authors' code


def defaults(card: dict, unit: float) -> dict[str, float]:
    """alpha is 5 mean absolute rewards (`unit`), the same number as ComaDICE's.

    The authors have 10 everywhere. In MaMuJoCo the mean reward is 0.7 to 3.7 (Table 3: return over length), so 10 is
    about 5 of them. In SMAX it is about 0.02, so 10 would be 500 of them, and the method would become plain BC. The
    number regularises more here than in ComaDICE: agent i's exponent w_i (q_i - v_i) / alpha is about A_tot / (n
    alpha), where ComaDICE gives every agent the ratio of A_tot / alpha. But less was not better on the tuning's hopper
    replay: 5 returned 1229 on average, 1.5 returned 1042 and 0.5 returned 292 (docs/tuning.csv).
    """
    return {"alpha": 5 * unit}


# ------------------------------------------------------------ the losses; w, q, v and log_prob are [B, n], the rest [B]


def q_loss(q_tot: Tensor, reward: Tensor, terminated: Tensor, v_tot_next: Tensor, gamma: float) -> Tensor:
    """E_D[(r + gamma v_tot(s') - q_tot(s, a))^2], v_tot(s') from target networks. Trains q and the mixer."""
    # Wang et al. 2023, the loss of Q_tot
    return (reward + gamma * v_tot_next.masked_fill(terminated, 0) - q_tot).square().mean()


def exponent(w: Tensor, q: Tensor, v: Tensor, alpha: float) -> Tensor:
    """z_i = w_i (q_i - v_i) / alpha, the logarithm of pi_i / mu_i."""
    return w * (q - v) / alpha


def v_loss(w: Tensor, q: Tensor, v: Tensor, alpha: float) -> Tensor:
    """E_D[exp(z_i) + w_i v_i / alpha], summed over agents; w_i and q_i are constants. Its minimum has E_mu_i[exp(z_i)]
    = 1.

    Beyond Z_MAX exp goes on as its tangent. So nothing overflows, and v_i is still pulled up if q_i is far above it.
    """
    z = exponent(w, q, v, alpha)
    exp_z = z.clamp(max=Z_MAX).exp() * (1 + (z - Z_MAX).relu())
    return (exp_z + w * v / alpha).sum(-1).mean()  # Wang et al. 2023, the loss of V_i


def policy_loss(w: Tensor, q: Tensor, v: Tensor, alpha: float, log_prob: Tensor) -> Tensor:
    """-E_D[exp(z_i) log pi_i(a_i | o_i)], summed over agents; the weight exp(z_i) = pi_i / mu_i is a constant."""
    # Wang et al. 2023, the loss of pi_i
    return -(exponent(w, q, v, alpha).clamp(max=Z_MAX).exp().detach() * log_prob).sum(-1).mean()


# ---------------------------------------------------------------- what one update minimises


class Networks(nn.Module):
    def __init__(self, card: dict, args: Args):
        super().__init__()
        n, O, S, A, discrete = (card[k] for k in ("n_agents", "obs_dim", "state_dim", "action_dim", "discrete"))
        self.q = Q(n, O, A, args.hidden, discrete, args.layer_norm)
        self.v = Nu(n, O, args.hidden, args.layer_norm)
        self.mixer = LinearMixer(n, S, args.mixer_hidden)
        self.policy = make_policy(n, O, A, discrete, args.hidden, args.action_scale)


def losses(networks: Networks, target: Networks, batch: TensorDict, args: Args) -> dict[str, Tensor]:
    """The three losses and their sum. No parameter gets a gradient from two of them."""
    obs, action, mask = (
        batch["agents", "observation"],
        batch["agents", "action"],
        batch["agents"].get("action_mask", None),
    )
    state, reward, terminated = batch["state"], batch["reward"][:, 0], batch["terminated"][:, 0]
    with torch.no_grad():
        v_tot_next = target.mixer(target.v(batch["next", "agents", "observation"]), batch["next", "state"])
        w, q = target.mixer.weights(state), target.q(obs, action)
    v, alpha = networks.v(obs), args.alpha * args.reward_scale  # scaled as the batch's rewards are
    L_q = q_loss(networks.mixer(networks.q(obs, action), state), reward, terminated, v_tot_next, args.gamma)
    L_v = v_loss(w, q, v, alpha)
    L_pi = policy_loss(w, q, v, alpha, networks.policy.log_prob(obs, action, mask))
    values = {"loss": L_q + L_v + L_pi, "q_loss": L_q, "v_loss": L_v, "policy_loss": L_pi}
    return values | {"mean_q": q.mean(), "mean_v": v.mean()}


# ---------------------------------------------------------------- the script


def main(args: Args):
    check(args, "alpha", "action_scale", "mixer_hidden")
    train(Method("omiga", Networks, losses, ["state", *KEYS], defaults=defaults), args)


if __name__ == "__main__":
    run_script(main, ARGS)
