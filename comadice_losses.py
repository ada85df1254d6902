"""ComaDICE's equations, one short function each. The numbers of equations are the paper's.

Not in the paper: semi_loss, episode_ratio, KL_CAP, and the mass of dual_loss, which are this project's. lam of
dual_loss is OptiDICE's, released_nu_* are the released code's, effective_sample_size is Kish's. f* is derived from
B.5's f.

This file needs only torch. It can be copied into another project as it is.

Everything works on tensors over a batch of transitions (s, a, r, s'), shapes [B], or [B, n] for values per agent.
Expectations over the dataset are batch means. With probabilities (`rho` over transitions, `p0` over initial states)
they are exact sums. tests/test_exact.py solves known models with these.

Scales: alpha has the unit of nu, which is that of a sum of rewards. Multiplying rewards and alpha by one factor
multiplies nu, q and the advantages by it and leaves w unchanged.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# ---------------------------------------------------------------- f-divergences (Section B.5)

# f_KL is cut to t <= exp(KL_CAP) = 22,026, so that w* can't overflow. exp(y) does in float32 from y = 89 on.
KL_CAP = 10.0


class Divergence(NamedTuple):
    """f on t >= 0, strictly convex with f(1) = f'(1) = 0, and the functions derived from it that Prop. 4.1 needs.

    All functions are element-wise.
    """

    f: Callable[[Tensor], Tensor]  # f(t)
    f_prime_inverse: Callable[[Tensor], Tensor]  # (f')^-1(y)
    f_star: Callable[[Tensor], Tensor]  # sup_{t >= 0} ty - f(t), so that f_star' = w_star

    def w_star(self, y: Tensor) -> Tensor:
        """max(0, (f')^-1(y)), the t >= 0 at which ty - f(t) is largest (Prop. 4.1)."""
        return self.f_prime_inverse(y).clamp(min=0)


def kl_f(t: Tensor) -> Tensor:
    """t log t - t + 1, and 1 at t = 0."""
    return torch.xlogy(t, t) - t + 1


def kl_f_prime_inverse(y: Tensor) -> Tensor:
    """exp(y), capped at exp(KL_CAP). (The paper prints exp(y - 1), which belongs to t log t.)"""
    return y.clamp(max=KL_CAP).exp()


def kl_f_star(y: Tensor) -> Tensor:
    """exp(y) - 1 up to y = KL_CAP, and its tangent beyond.

    This is the conjugate of f_KL with its domain cut to t <= exp(KL_CAP). So w_star is still its derivative.
    """
    return y.clamp(max=KL_CAP).expm1() + math.exp(KL_CAP) * (y - KL_CAP).relu()


def chi2_f(t: Tensor) -> Tensor:
    """(t - 1)^2 / 2."""
    return 0.5 * (t - 1) ** 2


def chi2_f_prime_inverse(y: Tensor) -> Tensor:
    """y + 1, negative below y = -1."""
    return y + 1


def chi2_f_star(y: Tensor) -> Tensor:
    """y + y^2/2 where w_star > 0, and -f(0) = -1/2 below y = -1."""
    y = y.clamp(min=-1)
    return y + 0.5 * y**2


def soft_chi2_f(t: Tensor) -> Tensor:
    """f_KL below t = 1, f_chi2 above."""
    return torch.where(t < 1, kl_f(t), chi2_f(t))


def soft_chi2_f_prime_inverse(y: Tensor) -> Tensor:
    """exp(y) below y = 0, y + 1 above: always positive, never exponentially large."""
    # torch.where computes both sides. Without the clamp, exp overflows for large y, and the gradient is nan.
    return torch.where(y < 0, y.clamp(max=0).exp(), y + 1)


def soft_chi2_f_star(y: Tensor) -> Tensor:
    """exp(y) - 1 below y = 0, y + y^2/2 above."""
    return torch.where(y < 0, y.clamp(max=0).expm1(), chi2_f_star(y))


DIVERGENCES = {
    "kl": Divergence(kl_f, kl_f_prime_inverse, kl_f_star),
    "chi2": Divergence(chi2_f, chi2_f_prime_inverse, chi2_f_star),
    "soft_chi2": Divergence(soft_chi2_f, soft_chi2_f_prime_inverse, soft_chi2_f_star),
}

# ---------------------------------------------------------------- Eq. 5 to Eq. 11


def expectation(x: Tensor, p: Tensor | None = None) -> Tensor:
    """E[x] over a batch of samples, or the exact sum with probabilities p."""
    return x.mean() if p is None else (p * x).sum()


def td_advantage(reward: Tensor, terminated: Tensor, nu_tot: Tensor, nu_tot_next: Tensor, gamma: float) -> Tensor:
    """A_tot(s, a) = r + gamma nu_tot(s') - nu_tot(s), the TD form. All inputs are [B]; terminated is bool, or 0 and 1.

    Only termination cuts the bootstrap, a time limit does not.
    """
    return reward + gamma * nu_tot_next * terminated.logical_not() - nu_tot  # Eq. 5, with q_tot written out


def q_loss(A_tot: Tensor, td: Tensor, rho: Tensor | None = None) -> Tensor:
    """The MSE between A_tot = M[q - nu] [B] and td = r + gamma nu_tot(s') - nu_tot(s) [B] of td_advantage -> scalar.

    td is held fixed here. The loss trains psi_q alone, if the caller holds nu and theta fixed in A_tot. The paper
    prints no brackets around td, but the residual is A_tot - td.
    """
    return expectation((A_tot - td.detach()) ** 2, rho)  # Eq. 9


def dual_loss(
    nu_tot_init: Tensor,
    A_tot: Tensor,
    alpha: float,
    f: Divergence,
    gamma: float,
    lam: float | Tensor = 0.0,
    mass: float = 1.0,
    p0: Tensor | None = None,
    rho: Tensor | None = None,
) -> Tensor:
    """L(nu, theta) = (1 - gamma) E_p0[nu_tot(s0)] + mass E_D[alpha f*(A_tot / alpha)], which Eq. 7 minimises.

    This is the minimax problem of Eq. 6 with its inner maximum over w in closed form (Prop. 4.1).

    Objective `exact`: A_tot is the TD form. The gradient flows through nu_tot(s) and nu_tot(s'), as Prop. 4.1 says.
    Objective `printed`: A_tot is M[q - nu], in which the caller holds q fixed, as Eq. 10 is printed. The gradient can
    only push nu up at states that are not initial, and nothing balances the mixer's bias. So this loss has no minimum.

    nu_tot_init is [B0], A_tot is [B], the loss is a scalar. With a multiplier lam it is
    (1 - gamma) E_p0[nu_tot(s0)] + mass E_D[alpha f*((A_tot - lam) / alpha)] + lam.

    mass is what rho^mu sums to, (1 - gamma) E[sum_t gamma^t] over episodes. It is 1 in the paper's MDP, which never
    ends, and less if episodes terminate. If such episodes were given mass 1, the policy would not tend to the behaviour
    policy as alpha grows.
    rho^mu counts a step at time t with gamma^t. comadice_train.py draws all recorded steps equally instead.
    lam is the multiplier of mass E_D[w] = 1, as in OptiDICE. That is our reading of Table 4's "lambda scale", which the
    paper does not explain. L is minimised over it too. Where episodes terminate, this constraint contradicts Eq. 3. So
    it is off by default.
    """
    data_term = mass * expectation(alpha * f.f_star((A_tot - lam) / alpha), rho)
    return (1 - gamma) * expectation(nu_tot_init, p0) + data_term + lam  # Eq. 10 (printed), Prop. 4.1 (exact)


def semi_loss(nu_tot: Tensor, A_tot: Tensor, alpha: float, f: Divergence, rho: Tensor | None = None) -> Tensor:
    """Objective `semi`: E_D[nu_tot(s) + alpha f*(A_tot / alpha)], with nu_tot(s') in A_tot held fixed.

    Its minimum has E[w | s] = 1: among the actions recorded in a state, some get more weight and others less.
    nu_tot [B], A_tot [B] -> scalar. The caller holds nu_tot(s') fixed, for instance by taking it from target networks.
    This function detaches nothing.

    Where it comes from: if D is rho^mu, Eq. 3 says (1 - gamma) E_p0[nu_tot] = E_D[nu_tot(s) - gamma nu_tot(s')]. The
    right side replaces the term of the initial states. nu_tot(s') is held fixed, so only E_D[nu_tot(s)] has a gradient.
    Recorded steps are drawn equally, so this is a motivation and no identity.

    What it does: the gradient in nu_tot(s) is 1 - E[w | s]. So E[w | s] = 1 at the minimum, with or without
    termination, if nu_tot(s) can take any value in every state. No normaliser is needed. The policy stays close to the
    behaviour policy in each state. Eq. 2-3 keep its occupancy close to the data's instead.

    Source: Mao et al. (2024) study semi-gradients of DICE losses. The unit weight on nu_tot(s) is this project's.
    """
    return expectation(nu_tot + alpha * f.f_star(A_tot / alpha), rho)


def released_nu_loss(
    nu_init: Tensor, A: Tensor, alpha: float, f: Divergence, gamma: float, lam: float | Tensor = 0.0
) -> Tensor:
    """Objective `released_nu`: how the authors' released code moves nu, for a given multiplier lam.

    nu_init [B, n] are local values nu_i(s0). A [B, n] are local advantages A_i = W_i (q_i - nu_i). The data term is
    w (A_i - lam) - alpha f(w), with w = w*(y) and y = (A_i - lam) / alpha. Only the first w has a gradient: (A_i - lam)
    and f(w) are constants. So the gradient in nu_i is -W_i w*'(y) y, an asymmetric regression of nu_i onto q_i. The
    last term, lam (1 - w), trains lam alone. The values of initial states are not mixed. docs/PAPER.md lists what else
    the released code does.
    """
    A = A - (lam.detach() if isinstance(lam, Tensor) else lam)
    w = f.w_star(A / alpha)
    constant_A, constant_w = A.detach(), w.detach()
    nu_term = (w * constant_A - alpha * f.f(constant_w)).mean()
    return (1 - gamma) * nu_init.mean() + nu_term + (lam * (1 - constant_w)).mean()


def occupancy_ratio(A_tot: Tensor, alpha: float, f: Divergence, lam: float | Tensor = 0.0) -> Tensor:
    """w_tot*(s, a) = max(0, (f')^-1((A_tot - lam) / alpha)), [B] -> [B].

    With `exact` it is rho^pi / rho^mu. With `semi` it is pi(a|s) / mu(a|s), since E[w | s] = 1; not so with another
    alpha than that of nu's loss, as with --policy-alpha. lam is 0 where --lambda-scale is 0, the default. (Section 5
    prints the argument negated.)
    """
    return f.w_star((A_tot - lam) / alpha)  # Prop. 4.1 and Section 4.3


def released_nu_ratio(A: Tensor, alpha: float, f: Divergence, lam: float | Tensor = 0.0) -> Tensor:
    """The weight that goes with `released_nu`: ratios of A_i = W_i (q_i - nu_i) [B, n], summed over agents -> [B]."""
    return f.w_star((A - lam) / alpha).sum(-1)


def episode_ratio(returns: Tensor, alpha: float, f: Divergence) -> Tensor:
    """w(e) = max(0, (f')^-1((R_e - lam) / alpha)) of each recorded episode, with lam such that its mean is 1.

    Not in the paper. It follows Eq. 2-3 over mixtures of recorded episodes: episodes take the place of (s, a). If the
    dynamics are nearly deterministic, what an episode visits is an occupancy that satisfies the Bellman flow of Eq. 3.
    Then every mixture of episodes with the same first states satisfies it, too. E[w] = 1 is the only constraint left;
    lam is its multiplier. If chance plays a large role, the ratio also prefers lucky episodes. returns R_e [E], not
    discounted -> w [E]. alpha > 0 is in units of the return. It is not the alpha of Eq. 2.
    """
    low, high = returns.min() - 100 * alpha, returns.max() + 100 * alpha
    for _ in range(100):  # bisection: the mean falls as lam grows
        lam = (low + high) / 2
        too_low = f.w_star((returns - lam) / alpha).mean() > 1
        low, high = torch.where(too_low, lam, low), torch.where(too_low, high, lam)
    return f.w_star((returns - lam) / alpha)


def policy_loss(w: Tensor, log_prob: Tensor) -> Tensor:
    """-E_D[w_tot*(s, a) log pi_i(a_i | o_i)], summed over agents: w [B], log_prob [B, n] -> scalar. Plain BC is w = 1.

    The sum is the team's weighted BC, Eq. 8, since pi_tot is the product of the pi_i. By Prop. 4.3 the local
    optima together solve Eq. 8.
    """
    return -(w * log_prob.sum(-1)).mean()  # Eq. 11


def effective_sample_size(w: Tensor) -> Tensor:
    """Kish's effective sample size over B, (sum w)^2 / (B sum w^2): w [B] >= 0 -> scalar.

    It is 1 for uniform weights, which is plain BC, 1/B if one sample has all the weight, and 0 if all w are 0.
    """
    tiny = torch.finfo(w.dtype).tiny
    w = w / w.amax().clamp(min=tiny)  # its scale cancels; so squares can't overflow
    return w.sum() ** 2 / (len(w) * (w**2).sum()).clamp(min=tiny)
