"""ComaDICE's networks: the local functions nu_i, q_i, pi_i and the mixers M_theta (Sections 4.2, 5, B.2 and B.6).

This file needs only torch. It can be copied into another project as it is.

    nu = Nu(n_agents, obs_dim)                     nu_i(o_i; psi_nu)         nu(obs)               -> [..., n]
    q = Q(n_agents, obs_dim, action_dim)           q_i(o_i, a_i; psi_q)      q(obs, action)        -> [..., n]
    mixer = LinearMixer(n_agents, state_dim)       M_theta^s                 mixer(x, state)       -> [...]
                                                   A_tot                     mixer.advantage(x, state)
    pi = GaussianPolicy(n_agents, obs_dim, action_dim)                       pi.log_prob(obs, action) -> [..., n]

Shapes: n agents, O observation entries, A actions or action entries, S state entries, any leading batch dimensions:
obs [..., n, O], state [..., S], action [..., n, A] float (continuous) or [..., n] int64 (discrete), mask [..., n, A]
bool.

All agents go through one call with shared parameters. A one-hot agent id next to the observation tells them apart.
Forward passes are pure (no buffers, no branches on data), so everything runs under torch.func.functional_call and
torch.vmap.
"""

import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn.functional import elu


class LocalMLP(nn.Module):
    """An MLP with two hidden layers that all agents share. Its input is the agent's input and one-hot id."""

    def __init__(self, n_agents: int, in_dim: int, out_dim: int, hidden: int = 256, layer_norm: bool = False):
        super().__init__()
        norm = lambda: nn.LayerNorm(hidden) if layer_norm else nn.Identity()
        self.layers = nn.Sequential(
            nn.Linear(in_dim + n_agents, hidden), norm(), nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden), norm(), nn.ReLU(inplace=True),
            nn.Linear(hidden, out_dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., n, in_dim] -> [..., n, out_dim]."""
        n = x.shape[-2]
        agent_id = torch.eye(n, dtype=x.dtype, device=x.device).expand(*x.shape[:-1], n)
        # Flattened to [B n, in]: otherwise a linear layer's result is a view, and in-place ReLU copies its gradient.
        return self.layers(torch.cat([x, agent_id], -1).flatten(0, -2)).unflatten(0, x.shape[:-1])


class Nu(nn.Module):
    """Local values nu_i(o_i; psi_nu). The mixer combines them into the Lagrange multiplier nu_tot."""

    def __init__(self, n_agents: int, obs_dim: int, hidden: int = 256, layer_norm: bool = False):
        super().__init__()
        self.net = LocalMLP(n_agents, obs_dim, 1, hidden, layer_norm)

    def forward(self, obs: Tensor) -> Tensor:
        """obs [..., n, O] -> nu_i [..., n]."""
        return self.net(obs)[..., 0]


class Q(nn.Module):
    """Local values q_i(o_i, a_i; psi_q). A continuous action is an input. Discrete actions have one output each."""

    def __init__(
        self,
        n_agents: int,
        obs_dim: int,
        action_dim: int,
        hidden: int = 256,
        discrete: bool = False,
        layer_norm: bool = False,
    ):
        super().__init__()
        self.discrete = discrete
        in_dim, out_dim = (obs_dim, action_dim) if discrete else (obs_dim + action_dim, 1)
        self.net = LocalMLP(n_agents, in_dim, out_dim, hidden, layer_norm)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """obs [..., n, O], action [..., n, A] or [..., n] int64 -> q_i [..., n]."""
        if self.discrete:
            return self.net(obs).gather(-1, action.unsqueeze(-1))[..., 0]
        return self.net(torch.cat([obs, action], -1))[..., 0]


def hypernet(state_dim: int, out_dim: int, hidden: int) -> nn.Sequential:
    """An MLP with one hidden layer: state [..., S] -> weights or biases of a mixer [..., out_dim]."""
    return nn.Sequential(nn.Linear(state_dim, hidden), nn.ReLU(), nn.Linear(hidden, out_dim))


class LinearMixer(nn.Module):
    """The 1-layer mixer of Section 5: M_theta^s[x] = x^T W_theta^s + b_theta^s, W >= 0 from hyper-networks of the
    state.

    To mix several values at one state, compute `at` = mixer.at(state) once, and pass it on.
    """

    def __init__(self, n_agents: int, state_dim: int, hidden: int = 64):
        super().__init__()
        self.W = hypernet(state_dim, n_agents, hidden)
        self.b = hypernet(state_dim, 1, hidden)

    def weights(self, state: Tensor) -> Tensor:
        """state [..., S] -> W_theta^s [..., n], non-negative."""
        return self.W(state).abs()

    def at(self, state: Tensor) -> tuple[Tensor, ...]:
        """state [..., S] -> (W_theta^s [..., n], b_theta^s [..., 1])."""
        return self.weights(state), self.b(state)

    def forward(self, x: Tensor, state: Tensor, at: tuple[Tensor, ...] | None = None) -> Tensor:
        """M[x] of local values x [..., n]: nu_tot = M[nu] -> [...]."""
        W, b = at or self.at(state)
        return (x * W).sum(-1) + b[..., 0]

    def advantage(self, x: Tensor, state: Tensor, at: tuple[Tensor, ...] | None = None) -> Tensor:
        """A_tot = M[x] - M[0] of local advantages x = q - nu [..., n] -> [...].

        A_tot has no bias: in Eq. 5, A_tot = q_tot - nu_tot = M[q] - M[nu] = W (q - nu), b cancels.
        """
        return (x * (at[0] if at else self.weights(state))).sum(-1)


class TwoLayerMixer(nn.Module):
    """A 2-layer mixer, as Section B.6 compares: M[x] = elu(x W_1 + b_1) W_2 + b_2, with W_1, W_2 >= 0 and biases from
    the state. B.6 prints no formula, and cites QMIX (Rashid et al. 2020), whose form this is.

    ELU is convex, as Theorem 4.2 requires, and non-decreasing, as the theorem's proof requires. The theorem is about
    M[q - nu]. The TD form contains -M[nu] instead, which is concave in nu. So its loss need not be convex with two
    layers; with one layer it is.
    """

    def __init__(self, n_agents: int, state_dim: int, hidden: int = 64):
        super().__init__()
        self.n_agents, self.hidden = n_agents, hidden
        self.W1, self.b1 = hypernet(state_dim, n_agents * hidden, hidden), hypernet(state_dim, hidden, hidden)
        self.W2, self.b2 = hypernet(state_dim, hidden, hidden), hypernet(state_dim, 1, hidden)

    def at(self, state: Tensor) -> tuple[Tensor, ...]:
        """state [..., S] -> (W_1 [..., n, hidden], b_1 [..., hidden], W_2 [..., hidden], b_2 [..., 1])."""
        W1 = self.W1(state).abs().unflatten(-1, (self.n_agents, self.hidden))
        return W1, self.b1(state), self.W2(state).abs(), self.b2(state)

    def forward(self, x: Tensor, state: Tensor, at: tuple[Tensor, ...] | None = None) -> Tensor:
        """M[x] of local values x [..., n]: nu_tot = M[nu] -> [...]."""
        W1, b1, W2, b2 = at or self.at(state)
        layer1 = elu((x.unsqueeze(-1) * W1).sum(-2) + b1)
        return (layer1 * W2).sum(-1) + b2[..., 0]

    def advantage(self, x: Tensor, state: Tensor, at: tuple[Tensor, ...] | None = None) -> Tensor:
        """A_tot = M[x] - M[0] of local advantages x = q - nu [..., n] -> [...].

        With two layers M[q] - M[nu] and M[q - nu] differ. This A_tot is convex in nu, as Theorem 4.2 needs: M[0] does
        not depend on nu. And it is zero if every agent's advantage is zero, as in Eq. 5 with one layer.
        """
        at = at or self.at(state)
        return self(x, state, at) - self(torch.zeros_like(x), state, at)


MIXERS = {1: LinearMixer, 2: TwoLayerMixer}


class GaussianPolicy(nn.Module):
    """pi_i(a_i | o_i; eta) = Normal(mean(o_i), std(o_i)) with independent entries, for continuous actions (Section
    B.2).

    The mean is not squashed: recorded actions may exceed the simulator's bounds. The simulator clips them. What is
    played is `action_scale` times the mean. It is not in the paper: comadice_train.py plays 0.8 times the mean on
    robots (docs/PAPER.md).
    """

    def __init__(self, n_agents: int, obs_dim: int, action_dim: int, hidden: int = 256, action_scale: float = 1.0):
        super().__init__()
        self.net = LocalMLP(n_agents, obs_dim, 2 * action_dim, hidden)
        self.action_scale = action_scale

    def distribution(self, obs: Tensor) -> Normal:
        """obs [..., n, O] -> a normal distribution of each entry of the actions [..., n, A]."""
        mean, log_std = self.net(obs).chunk(2, -1)
        return Normal(mean, log_std.clamp(-5, 2).exp(), validate_args=False)

    def log_prob(self, obs: Tensor, action: Tensor, mask: Tensor | None = None) -> Tensor:
        """log pi_i(a_i | o_i) -> [..., n]; only the discrete policy uses the mask."""
        return self.distribution(obs).log_prob(action).sum(-1)

    def act(self, obs: Tensor, mask: Tensor | None = None) -> Tensor:
        """action_scale times the mean, [..., n, A]. Evaluations clip it to the simulator's box before it is played."""
        return self.action_scale * self.net(obs).chunk(2, -1)[0]


class CategoricalPolicy(nn.Module):
    """pi_i(a_i | o_i; eta) = Categorical over the available actions, unavailable ones at probability exactly 0 (Section
    B.2).

    Every agent must have an available action (a dead one has its no-op).
    """

    def __init__(self, n_agents: int, obs_dim: int, action_dim: int, hidden: int = 256):
        super().__init__()
        self.net = LocalMLP(n_agents, obs_dim, action_dim, hidden)

    def logits(self, obs: Tensor, mask: Tensor) -> Tensor:
        """obs [..., n, O], mask [..., n, A] -> logits [..., n, A], -inf for unavailable actions."""
        return self.net(obs).masked_fill(~mask, -torch.inf)

    def log_prob(self, obs: Tensor, action: Tensor, mask: Tensor) -> Tensor:
        """log pi_i(a_i | o_i) -> [..., n]; -inf for an unavailable action."""
        return self.logits(obs, mask).log_softmax(-1).gather(-1, action.unsqueeze(-1))[..., 0]

    def act(self, obs: Tensor, mask: Tensor) -> Tensor:
        """The most likely available action [..., n], as played in evaluations."""
        return self.logits(obs, mask).argmax(-1)


class Critics(nn.Module):
    """psi_nu, psi_q and theta together: what lines 3 to 8 of Algorithm 1 train.

    nu(obs [..., n, O]) and q(obs, action) give local values [..., n], and mixer(values, state [..., S]) mixes them ->
    [...]. Without `with_q` there is no q. lam is a scalar.
    """

    def __init__(
        self, n_agents, obs_dim, state_dim, action_dim, discrete, hidden=256, mixer_hidden=64, mixer_layers=1,
        layer_norm=False, with_q=True,
    ):  # fmt: skip
        super().__init__()
        self.nu = Nu(n_agents, obs_dim, hidden, layer_norm)
        if with_q:
            self.q = Q(n_agents, obs_dim, action_dim, hidden, discrete, layer_norm)
        self.mixer = MIXERS[mixer_layers](n_agents, state_dim, mixer_hidden)
        # The multiplier lam of comadice_losses.dual_loss. It stays at 0 where --lambda-scale is 0, the default.
        self.lam = nn.Parameter(torch.zeros(()))


def make_policy(
    n_agents: int, obs_dim: int, action_dim: int, discrete: bool, hidden: int = 256, action_scale: float = 1.0
) -> nn.Module:
    """The local policies pi_i(a_i | o_i; eta): act(obs [..., n, O], mask [..., n, A] or None) -> actions.

    Only continuous actions have a scale.
    """
    if discrete:
        return CategoricalPolicy(n_agents, obs_dim, action_dim, hidden)
    return GaussianPolicy(n_agents, obs_dim, action_dim, hidden, action_scale)
