"""BCQ (Fujimoto et al. 2019a, Off-Policy Deep RL without Exploration; discrete actions: Fujimoto et al. 2019b,
Benchmarking Batch Deep RL).

    python -m baselines.bcq --env mamujoco --task hopper --quality medium-replay

Q-learning of q_tot = sum_i w_i(s) q_i(o_i, a_i) + b(s). The maximum runs over actions that are likely under a model of
the data. Since w_i >= 0, the team's maximum is the maximum of each agent.

continuous actions: a variational auto-encoder of the recorded actions proposes candidates. A perturbation of at most
    phi moves them towards a higher q_i. The candidate with the highest q_i is played. In training, new latents are
    drawn at each step. For playing they are drawn once (a buffer), so that an action depends only on the observation.
discrete actions: a behaviour-cloned policy G_i. An action is a candidate if it is available and G_i(a) > threshold
    max_b G_i(b). The authors' code also adds 0.01 times the squared logits of G_i to the loss; that is left out.

The policy is implicit: make_policy has no network for it. ContinuousBCQ and DiscreteBCQ have their own `act`, and the
"policy" of a checkpoint holds all of their parameters. `policy_of_run` builds the module for them.
"""

from dataclasses import dataclass

import environments.cpu  # noqa: F401 -- before torch

# isort: split
from baselines.run_args import RunArgs
from support.flags import parse


@dataclass
class Args(RunArgs):
    """Train BCQ."""

    phi: float = 0.05
    """continuous actions: bound of the perturbation (Fujimoto et al. 2019a)"""
    candidates: int = 100
    """continuous actions: number of candidates for the action that is played (Fujimoto et al. 2019a, code)"""
    target_candidates: int = 10
    """continuous actions: number of candidates for the maximum in the target (Fujimoto et al. 2019a)"""
    clip_lambda: float = 0.75
    """continuous actions: weight of the twins' minimum in the target (Fujimoto et al. 2019a)"""
    kl_weight: float = 0.5
    """continuous actions: weight of the auto-encoder's KL term (Fujimoto et al. 2019a, code)"""
    threshold: float = 0.3
    """discrete actions: least likelihood, relative to the likeliest action's (Fujimoto et al. 2019b)"""
    mixer_hidden: int = 64
    """hidden units of the mixer's hyper-networks"""


if __name__ == "__main__":  # before the slow imports, so that --help and a mistyped flag answer at once
    ARGS = parse(Args)

# isort: split
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss

from baselines.common import BOX, KEYS, Method, Twins, check, frozen, train
from comadice_mixer import LinearMixer, LocalMLP, Q, make_policy
from environments.checks import BadInput, run_script

# ---------------------------------------------------------------- the losses; reward, terminated and *_tot are [B]


def soft_clipped(q_j: Tensor, clip_lambda: float) -> Tensor:
    """lambda min_j q_j + (1 - lambda) max_j q_j of the twins [2, ...]."""
    return clip_lambda * q_j.amin(0) + (1 - clip_lambda) * q_j.amax(0)  # Fujimoto et al. 2019a, Eq. 13


def q_target(reward: Tensor, terminated: Tensor, q_tot_next: Tensor, gamma: float) -> Tensor:
    """r + gamma q_tot(s', a') [B], a' the best candidate, q_tot(s', a') from target networks.

    With continuous actions q_i(s', a') is soft_clipped.
    """
    return reward + gamma * q_tot_next.masked_fill(terminated, 0)  # Fujimoto et al. 2019a, Eq. 13


def q_loss(q_tot_j: Tensor, target: Tensor) -> Tensor:
    """E_D[(target - q_tot)^2], summed over the twins [2, B]."""
    return (target - q_tot_j).square().mean(-1).sum()


def huber_q_loss(q_tot: Tensor, target: Tensor) -> Tensor:
    """E_D[l(target - q_tot)], Huber's l: half the square up to 1, linear beyond. q_tot and target [B]."""
    return smooth_l1_loss(q_tot, target)  # Fujimoto et al. 2019b, the loss of discrete BCQ


def vae_loss(reconstruction: Tensor, action: Tensor, mean: Tensor, log_std: Tensor, kl_weight: float) -> Tensor:
    """Squared error of the reconstructed action, and the KL divergence of Normal(mean, std) from Normal(0, 1).

    Both are means over entries and weighted as in the authors' code; Algorithm 1 has their sums, equally weighted.
    """
    kl = 0.5 * (mean.square() + (2 * log_std).exp() - 1) - log_std
    return (reconstruction - action).square().mean() + kl_weight * kl.mean()  # Fujimoto et al. 2019a, Algorithm 1


def candidate_mask(log_pi: Tensor, threshold: float) -> Tensor:
    """G_i(a) > threshold max_b G_i(b), from log G_i [..., n, A] (-inf for unavailable actions)."""
    return (log_pi - log_pi.amax(-1, keepdim=True)).exp() > threshold  # Fujimoto et al. 2019b, the rule of the policy


# ---------------------------------------------------------------- networks, and what one update minimises

LATENT_BOX = 0.5  # latents of candidates are clipped to [-LATENT_BOX, LATENT_BOX], as in the authors' code


class ContinuousBCQ(nn.Module):
    """BCQ's networks for continuous actions: obs [..., n, O], actions [..., n, A] in the box, latents [..., n, 2 A]."""

    def __init__(self, card: dict, args: Args):
        super().__init__()
        n, O, S, A = (card[k] for k in ("n_agents", "obs_dim", "state_dim", "action_dim"))
        self.phi = args.phi
        self.encoder = LocalMLP(n, O + A, 4 * A, args.hidden)
        self.decoder = LocalMLP(n, O + 2 * A, A, args.hidden)
        self.perturbation = LocalMLP(n, O + A, A, args.hidden)
        self.q = Twins(Q(n, O, A, args.hidden, layer_norm=args.layer_norm) for _ in range(2))
        self.mixer = LinearMixer(n, S, args.mixer_hidden)
        self.register_buffer("latents", torch.randn(args.candidates, n, 2 * A).clamp(-LATENT_BOX, LATENT_BOX))

    def decode(self, obs: Tensor, latent: Tensor) -> Tensor:
        """The auto-encoder's action for a latent, [..., n, A]."""
        return BOX * self.decoder(torch.cat([obs, latent], -1)).tanh()

    def perturb(self, obs: Tensor, action: Tensor) -> Tensor:
        """The action, moved by at most phi per entry, [..., n, A]."""
        return (action + self.phi * BOX * self.perturbation(torch.cat([obs, action], -1)).tanh()).clamp(-BOX, BOX)

    def act(self, obs: Tensor, mask: Tensor | None = None) -> Tensor:
        """The candidate with the highest q_i [..., n, A]."""
        latents = self.latents.view(-1, *[1] * (obs.ndim - 2), *self.latents.shape[1:]).expand(-1, *obs.shape[:-1], -1)
        obs = obs.expand(len(latents), *obs.shape)
        actions = self.perturb(obs, self.decode(obs, latents))
        best = self.q[0](obs, actions).argmax(0, keepdim=True)
        return actions.gather(0, best.unsqueeze(-1).expand(1, *actions.shape[1:]))[0]  # Fujimoto et al. 2019a, Eq. 11

    def losses(self, target, batch: TensorDict, args: Args) -> dict[str, Tensor]:
        """The losses and their sum. frozen() keeps L_xi, which trains the perturbation, from training q."""
        obs, recorded, next_obs = (
            batch["agents", "observation"],
            batch["agents", "action"],
            batch["next", "agents", "observation"],
        )
        action = recorded.clamp(-BOX, BOX)  # the auto-encoder imitates what the simulator played
        mean, log_std = self.encoder(torch.cat([obs, action], -1)).chunk(2, -1)
        log_std = log_std.clamp(-4, 15)
        reconstruction = self.decode(obs, mean + log_std.exp() * batch["noise", "reconstruction"])
        with torch.no_grad():
            latents = batch["noise", "candidates"].movedim(1, 0).clamp(-LATENT_BOX, LATENT_BOX)
            next_obs, latent = next_obs.expand(len(latents), *next_obs.shape), latents[0]
            next_action = target.perturb(next_obs, self.decode(next_obs, latents))
            q_next = soft_clipped(target.q(next_obs, next_action), args.clip_lambda).amax(0)
            q_tot_next = target.mixer(q_next, batch["next", "state"])
            proposal = self.decode(obs, latent)
        q_tot = self.mixer(self.q(obs, recorded), batch["state"])  # [2, B]
        L_q = q_loss(q_tot, q_target(batch["reward"][:, 0], batch["terminated"][:, 0], q_tot_next, args.gamma))
        L_xi = -frozen(self.q[0])(obs, self.perturb(obs, proposal)).sum(-1).mean()  # Fujimoto et al. 2019a, Eq. 12
        L_vae = vae_loss(reconstruction, action, mean, log_std, args.kl_weight)
        return {"loss": L_q + L_xi + L_vae, "q_loss": L_q, "policy_loss": L_xi, "vae_loss": L_vae}


class DiscreteBCQ(nn.Module):
    """BCQ's networks for discrete actions; obs [..., n, O], mask [..., n, A], actions [..., n]."""

    def __init__(self, card: dict, args: Args):
        super().__init__()
        n, O, S, A = (card[k] for k in ("n_agents", "obs_dim", "state_dim", "action_dim"))
        self.threshold = args.threshold
        self.q = Q(n, O, A, args.hidden, discrete=True, layer_norm=args.layer_norm)
        self.mixer = LinearMixer(n, S, args.mixer_hidden)
        self.behaviour = make_policy(n, O, A, True, args.hidden)

    def act(self, obs: Tensor, mask: Tensor) -> Tensor:
        """The candidate with the highest q_i [..., n]."""
        candidates = candidate_mask(self.behaviour.logits(obs, mask).log_softmax(-1), self.threshold)
        return self.q.net(obs).masked_fill(~candidates, -torch.inf).argmax(-1)

    def losses(self, target, batch: TensorDict, args: Args) -> dict[str, Tensor]:
        """Both losses and their sum. They share no parameter."""
        obs, action, next_obs = (
            batch["agents", "observation"],
            batch["agents", "action"],
            batch["next", "agents", "observation"],
        )
        with torch.no_grad():  # the networks choose a', the target networks evaluate it
            next_action = self.act(next_obs, batch["next", "agents", "action_mask"])
            q_tot_next = target.mixer(target.q(next_obs, next_action), batch["next", "state"])
        q_tot = self.mixer(self.q(obs, action), batch["state"])
        L_q = huber_q_loss(q_tot, q_target(batch["reward"][:, 0], batch["terminated"][:, 0], q_tot_next, args.gamma))
        L_bc = -self.behaviour.log_prob(obs, action, batch["agents", "action_mask"]).sum(-1).mean()
        return {"loss": L_q + L_bc, "q_loss": L_q, "policy_loss": L_bc}


def make_networks(card: dict, args: Args) -> nn.Module:
    return (DiscreteBCQ if card["discrete"] else ContinuousBCQ)(card, args)


def policy_of_run(card: dict, config: dict) -> nn.Module:
    """The module for the "policy" of a checkpoint with this card and config."""
    return make_networks(card, Args(**config))


def noise(card: dict, args: Args, B: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The random numbers of one update with continuous actions: standard normal ones, for latents of 2 A entries."""
    n, A = card["n_agents"], card["action_dim"]
    normal = lambda *shape: torch.randn(B, *shape, n, 2 * A, generator=generator, device=generator.device)
    return {"reconstruction": normal(), "candidates": normal(args.target_candidates)}


def losses(networks: nn.Module, target: nn.Module, batch: TensorDict, args: Args) -> dict[str, Tensor]:
    """The losses of the networks for these actions, and their sum."""
    return networks.losses(target, batch, args)


# ---------------------------------------------------------------- the script


def main(args: Args):
    check(args, "phi", "candidates", "target_candidates", "kl_weight", "mixer_hidden")
    if not 0 <= args.clip_lambda <= 1 or not 0 <= args.threshold < 1:
        raise BadInput("--clip-lambda must be in [0, 1] and --threshold in [0, 1)")
    train(Method("bcq", make_networks, losses, ["state", *KEYS], noise=noise), args)


if __name__ == "__main__":
    run_script(main, ARGS)
