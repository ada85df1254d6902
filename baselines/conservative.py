"""The sampled log-sum-exp of CQL(H) with continuous actions, which CQL and OMAR share (Kumar et al. 2020, Appendix F).

log of the integral of exp(q(o, a)) over actions is estimated by importance sampling. Half of the samples are uniform,
the others are drawn around the policy's action.

The simulator clips actions to the box, but recorded actions are those of a Gaussian policy before clipping: on hopper a
third of their entries are outside. q sees them as they were recorded, since their cost in the reward is that of the
unclipped action. So the integral runs up to SPAN. If it ran over the box alone, recorded actions outside would raise q,
and nothing would push it down there. q would be highest at the edges of the box, and the policies would go there.
"""

import math

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.distributions import Normal

from baselines.common import BOX

SPAN = 2.0  # actions are integrated over [-SPAN, SPAN]; on hopper 95% of the recorded entries are inside


def sample_noise(card: dict, B: int, K: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The random numbers of span_samples, [B, K, n, A]."""
    shape, device = (B, K, card["n_agents"], card["action_dim"]), generator.device
    uniform = torch.empty(shape, device=device).uniform_(-SPAN, SPAN, generator=generator)
    return {"near": torch.randn(shape, generator=generator, device=device), "uniform": uniform}


@torch.no_grad()
def span_samples(mean: Tensor, std: Tensor, noise: TensorDict) -> tuple[Tensor, Tensor]:
    """K uniform actions and K from Normal(mean, std) [B, n, A], and the logarithm of their densities.

    A sample beyond SPAN gets log density inf, so it adds nothing to the integral. The mean is clipped to the box, so
    that samples around it stay in reach. -> (samples [2K, B, n, A], log densities [2K, B, n]).
    """
    near = Normal(mean.clamp(-BOX, BOX), std, validate_args=False)
    uniform, drawn = noise["uniform"].movedim(1, 0), near.loc + near.scale * noise["near"].movedim(1, 0)
    inside = (drawn.abs() <= SPAN).all(-1)
    log_near = near.log_prob(drawn).sum(-1).masked_fill(~inside, torch.inf)
    log_uniform = torch.full_like(log_near, -mean.shape[-1] * math.log(2 * SPAN))
    return torch.cat([uniform, drawn]), torch.cat([log_uniform, log_near])


def sampled_log_sum_exp(q: Tensor, log_density: Tensor) -> Tensor:
    """log of the mean of exp(q) / density over the samples: q [..., 2K, B, n], log_density [2K, B, n] -> [..., B, n].

    CQL's q are w_i q_i, OMAR's those of its twins, [2, 2K, B, n].
    """
    return (q - log_density).logsumexp(-3) - math.log(len(log_density))
