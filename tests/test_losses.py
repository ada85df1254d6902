"""The f-divergences against brute force, and the paper's propositions as properties of the losses."""

import math

import numpy as np
import pytest
import torch
from scipy.special import xlogy

import comadice_losses as losses
from comadice_losses import DIVERGENCES, KL_CAP
from comadice_mixer import MIXERS

FS = ["kl", "chi2", "soft_chi2"]
KL = lambda t: xlogy(t, t) - t + 1
CHI2 = lambda t: (t - 1) ** 2 / 2
NUMPY_F = {"kl": KL, "chi2": CHI2, "soft_chi2": lambda t: np.where(t < 1, KL(t), CHI2(t))}
# Values on both sides of every kink: -1 (chi2), 0 (soft_chi2), the cap (KL).
KINKS = [k + e for k in (-1.0, 0.0) for e in (-1e-3, -1e-9, 0.0, 1e-9, 1e-3)]
Y = {name: [-30.0, -4.0, -2.0, -0.5, 0.5, 1.0, 2.0, 5.0, *KINKS] for name in FS}
Y["kl"] += [KL_CAP - 1e-3, KL_CAP, KL_CAP + 1e-3, 12.0, 100.0]
Y["chi2"] += [100.0]
Y["soft_chi2"] += [100.0]


def grid(name):
    """t >= 0, dense near 0; f_KL's domain ends at exp(KL_CAP), which is what its cap means."""
    return np.linspace(0, math.sqrt(math.exp(KL_CAP) if name == "kl" else 200), 400_001) ** 2


@pytest.mark.parametrize("name", FS)
def test_conjugate_and_maximiser_by_brute_force(name):
    t = grid(name)
    f_of_t = NUMPY_F[name](t)
    np.testing.assert_allclose(DIVERGENCES[name].f(torch.tensor(t)), f_of_t, rtol=1e-12, atol=1e-12)
    for y in Y[name]:
        objective = t * y - f_of_t
        best = objective.argmax()
        # The grid misses the supremum by about (spacing)^2 f'' / 8, and its maximiser by at most a spacing.
        assert DIVERGENCES[name].f_star(torch.tensor(y, dtype=torch.float64)).item() == pytest.approx(
            objective[best], rel=1e-7, abs=1e-6
        )
        spacing = t[min(best + 1, len(t) - 1)] - t[max(best - 1, 0)]
        assert DIVERGENCES[name].w_star(torch.tensor(y, dtype=torch.float64)).item() == pytest.approx(
            t[best], abs=spacing
        )


@pytest.mark.parametrize("name", FS)
def test_derivative_of_the_conjugate_is_the_ratio(name):
    y = torch.cat([torch.tensor(Y[name]), torch.linspace(-12, 12, 1001)]).double().requires_grad_()
    gradient = torch.autograd.grad(DIVERGENCES[name].f_star(y).sum(), y)[0]
    torch.testing.assert_close(gradient, DIVERGENCES[name].w_star(y.detach()))
    assert (gradient >= 0).all()


@pytest.mark.parametrize("name", FS)
def test_f_and_its_derivative(name):
    f = DIVERGENCES[name]
    one = torch.ones((), dtype=torch.float64, requires_grad=True)
    value = f.f(one)
    assert value.item() == 0 and torch.autograd.grad(value, one)[0].item() == 0
    assert f.f(torch.zeros(())).item() == (0.5 if name == "chi2" else 1)

    t = torch.logspace(-6, 4, 200, dtype=torch.float64).requires_grad_()
    slope = torch.autograd.grad(f.f(t).sum(), t)[0]
    assert (slope.diff() > 0).all()  # strictly convex
    torch.testing.assert_close(f.f_prime_inverse(slope), t.detach())


def test_kl_stays_finite():
    y = torch.tensor([-1e6, 0.0, 50.0, 89.0, 1e6], requires_grad=True)
    value = DIVERGENCES["kl"].f_star(y)
    gradient = torch.autograd.grad(value.sum(), y)[0]
    ratio = DIVERGENCES["kl"].w_star(y)
    assert value.dtype == torch.float32
    for x in (value, gradient, ratio, torch.autograd.grad(ratio.sum(), y)[0]):
        assert torch.isfinite(x).all()
    torch.testing.assert_close(ratio, torch.tensor([0, 1, *3 * [math.exp(KL_CAP)]]))


# ---------------------------------------------------------------- Prop. 4.1


def random_transitions(B=64, S=5, seed=0):
    """reward [B], terminated [B], s, s' [B] and initial states [B], drawn with repeats."""
    g = torch.Generator().manual_seed(seed)
    s, s_next, s0 = torch.randint(S, (3, B), generator=g)
    return torch.randn(B, generator=g, dtype=torch.float64), torch.rand(B, generator=g) < 0.2, s, s_next, s0


@pytest.mark.parametrize("alpha", [0.3, 3.0])
@pytest.mark.parametrize("name", FS)
def test_gradient_of_prop_4_1(name, alpha):
    """(1 - gamma) E_p0[grad nu] + E_D[w* grad A], and the multiplier's 1 - E_D[w*], by hand from numpy's w*."""
    reward, terminated, s, s_next, s0 = random_transitions()
    gamma, S, B = 0.9, 5, len(reward)
    for seed in range(5):
        nu = torch.randn(S, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()
        lam = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        A = losses.td_advantage(reward, terminated, nu[s], nu[s_next], gamma)
        loss = losses.dual_loss(nu[s0], A, alpha, DIVERGENCES[name], gamma, lam)
        gradient, gradient_lam = torch.autograd.grad(loss, (nu, lam))

        visit = lambda index: np.eye(S)[index]
        y = (A.detach().numpy() - 0.3) / alpha
        w = {
            "kl": np.exp(np.minimum(y, KL_CAP)),
            "chi2": np.maximum(y + 1, 0),
            "soft_chi2": np.where(y < 0, np.exp(np.minimum(y, 0)), y + 1),
        }[name]
        grad_A = gamma * ~terminated.numpy()[:, None] * visit(s_next) - visit(s)
        np.testing.assert_allclose(gradient, (1 - gamma) * visit(s0).mean(0) + w @ grad_A / B, rtol=1e-10, atol=1e-12)
        assert gradient_lam.item() == pytest.approx(1 - w.mean())


@pytest.mark.parametrize("name", FS)
def test_semi_and_released_nu_gradients(name):
    """semi: 1 - w at nu_tot(s). released_nu: r'(y) y / (B n) at A, with y = (A - lambda) / alpha.

    The value of f has no part in it.
    """
    g = torch.Generator().manual_seed(0)
    A, nu, nu_init = (torch.randn(7, 3, generator=g, dtype=torch.float64).requires_grad_() for _ in range(3))
    alpha, lam, f = 0.7, 0.2, DIVERGENCES[name]
    gradient = torch.autograd.grad(losses.semi_loss(nu, A - nu, alpha, f), nu)[0]
    torch.testing.assert_close(gradient, (1 - f.w_star((A - nu).detach() / alpha)) / nu.numel())

    at_init, at_A = torch.autograd.grad(losses.released_nu_loss(nu_init, A, alpha, f, 0.9, lam), (nu_init, A))
    y = ((A.detach() - lam) / alpha).numpy()
    slope = {"kl": np.exp(y), "chi2": (y > -1) * 1.0, "soft_chi2": np.exp(np.minimum(y, 0))}[name]
    np.testing.assert_allclose(at_A, slope * y / A.numel(), rtol=1e-10)
    np.testing.assert_allclose(at_init, np.full((7, 3), 0.1 / 21))


@pytest.mark.parametrize("name", FS)
def test_reward_scale(name):
    """With rewards and alpha times c, nu is times c and w stays the same.

    This is an identity of every loss, and it holds for the minimiser of the dual.
    """
    reward, terminated, s, s_next, s0 = random_transitions()
    f, gamma, c, alpha = DIVERGENCES[name], 0.9, 0.1, 2.0
    nu = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def terms(nu, c):
        A = losses.td_advantage(c * reward, terminated, nu[s], nu[s_next], gamma)
        value = torch.stack(
            [
                losses.dual_loss(nu[s0], A, c * alpha, f, gamma, c * 0.2),
                losses.semi_loss(nu[s], A, c * alpha, f),
                losses.released_nu_loss(nu[s0][:, None], A[:, None], c * alpha, f, gamma, c * 0.2),
            ]
        )
        w = torch.stack(
            [
                losses.occupancy_ratio(A, c * alpha, f, c * 0.2),
                losses.released_nu_ratio(A[:, None], c * alpha, f, c * 0.2),
            ]
        )
        return value, w

    for one, scaled, factor in zip(terms(nu, 1), terms(c * nu, c), (c, 1)):
        torch.testing.assert_close(scaled, factor * one)

    def solve(c):
        nu = torch.zeros(5, dtype=torch.float64, requires_grad=True)
        advantage = lambda: losses.td_advantage(c * reward, terminated, nu[s], nu[s_next], gamma)
        optimizer = torch.optim.LBFGS(
            [nu], max_iter=500, tolerance_grad=1e-11, tolerance_change=1e-18, line_search_fn="strong_wolfe"
        )

        def closure():
            optimizer.zero_grad()
            loss = losses.dual_loss(nu[s0], advantage(), c * alpha, f, gamma)
            loss.backward()
            return loss

        optimizer.step(closure)
        return nu.detach(), losses.occupancy_ratio(advantage().detach(), c * alpha, f)

    (nu, w), (nu_c, w_c) = solve(1), solve(c)
    torch.testing.assert_close(nu_c, c * nu, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(w_c, w, rtol=1e-4, atol=1e-5)
    assert w.std() > 0.1 and nu.abs().max() > 0.1


# ---------------------------------------------------------------- Theorem 4.2


def midpoint_gaps(layers, name, form, pairs=500):
    """(L(nu1) + L(nu2)) / 2 - L((nu1 + nu2) / 2) for random pairs of nu [S, n]; a convex loss has no negative gap."""
    torch.manual_seed(0)
    S, n, B, gamma, alpha = 5, 3, 40, 0.9, 1.0
    reward, terminated, s, s_next, s0 = random_transitions(B, S)
    state, q = torch.randn(S, 4).double(), 3 * torch.randn(B, n).double()
    fixed_next = 3 * torch.randn(B).double()
    mixer = MIXERS[layers](n, 4, hidden=16).double()

    def loss(nu):
        if form == "M[q - nu]":
            A = mixer.advantage(q - nu[s], state[s])
        elif form == "Eq. 10":  # with the mixer's bias
            A = mixer(q - nu[s], state[s])
        elif form == "semi":
            A = losses.td_advantage(reward, terminated, mixer(nu[s], state[s]), fixed_next, gamma)
            return losses.semi_loss(mixer(nu[s], state[s]), A, alpha, DIVERGENCES[name])
        else:
            A = losses.td_advantage(reward, terminated, mixer(nu[s], state[s]), mixer(nu[s_next], state[s_next]), gamma)
        return losses.dual_loss(mixer(nu[s0], state[s0]), A, alpha, DIVERGENCES[name], gamma)

    with torch.no_grad():
        one, two = 5 * torch.randn(2, pairs, S, n).double()
        L = torch.vmap(loss)
        return (L(one) + L(two)) / 2 - L((one + two) / 2)


@pytest.mark.parametrize(
    "layers, form", [(1, "M[q - nu]"), (2, "M[q - nu]"), (1, "Eq. 10"), (2, "Eq. 10"), (1, "TD"), (1, "semi")]
)
@pytest.mark.parametrize("name", FS)
def test_loss_is_convex_in_nu(layers, form, name):
    gaps = midpoint_gaps(layers, name, form)
    assert gaps.min() > -1e-9 and gaps.max() > 1e-3


@pytest.mark.parametrize("name", FS)
@pytest.mark.parametrize("form", ["TD", "semi"])
def test_td_form_is_not_convex_with_two_layers(form, name):
    """Theorem 4.2 speaks of M[q - nu]. Here nu_tot(s) enters with a minus sign.

    So a mixer that is convex and not linear breaks convexity.
    """
    gaps = midpoint_gaps(2, name, form)
    failed = (gaps < -1e-6).sum().item()
    print(f"{form}, {name}: {failed} of {len(gaps)} midpoint checks fail")
    assert failed >= 1


# ---------------------------------------------------------------- Prop. 4.3 and Eq. 11


def test_local_optima_are_globally_optimal():
    """Weighted counts, agent by agent, minimise policy_loss over all agents (Eq. 8 over product policies, Eq. 11)."""
    rng = np.random.default_rng(0)
    B, n, O, A = 200, 2, 2, 3
    obs, w = rng.integers(O, size=(B, n)), torch.tensor(rng.exponential(size=B))
    joint = rng.integers(A, size=B)  # the agents' actions depend on each other
    action = np.stack([joint, (joint + rng.integers(2, size=B)) % A], -1)

    def loss(log_pi):  # log_pi [n, O, A]
        return losses.policy_loss(w, torch.stack([log_pi[i][obs[:, i], action[:, i]] for i in range(n)], -1))

    count = np.zeros((n, O, A))
    for b in range(B):
        for i in range(n):
            count[i, obs[b, i], action[b, i]] += w[b]
    closed = torch.tensor(count / count.sum(-1, keepdims=True))
    # Its value by hand: minus the weighted mean of log pi_tot, the sum over agents of log pi_i.
    assert loss(closed.log()).item() == pytest.approx(
        -sum((count[i] * np.log(closed[i].numpy())).sum() for i in range(n)) / B
    )

    others = torch.tensor(rng.dirichlet(np.ones(A), size=(500, n, O)))
    nearby = closed * torch.tensor(np.exp(0.01 * rng.normal(size=(500, n, O, A))))
    for policy in torch.cat([others, nearby / nearby.sum(-1, keepdim=True)]):
        assert loss(policy.log()) > loss(closed.log())

    logits = torch.zeros(n, O, A, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss(logits.log_softmax(-1))
        value.backward()
        return value

    optimizer.step(closure)
    torch.testing.assert_close(logits.detach().softmax(-1), closed, atol=1e-5, rtol=0)
    # The scale of w moves the loss and not its minimiser; w = 1 moves the minimiser.
    plain = np.stack([[np.bincount(action[obs[:, i] == o, i], minlength=A) for o in range(O)] for i in range(n)])
    assert abs(closed.numpy() - plain / plain.sum(-1, keepdims=True)).max() > 0.02


# ---------------------------------------------------------------- small parts


def test_expectation_with_probabilities():
    x, repeats = torch.tensor([1.0, -2.0, 5.0]), torch.tensor([3, 1, 4])
    p = repeats / repeats.sum()
    assert losses.expectation(x, p).item() == pytest.approx(losses.expectation(x.repeat_interleave(repeats)).item())
    assert losses.expectation(x, p).item() == pytest.approx(21 / 8)
    A, nu0, f = torch.tensor([0.3, -1.5, 2.0]), torch.tensor([1.0, 2.0, 3.0]), DIVERGENCES["soft_chi2"]
    sampled = losses.dual_loss(nu0.repeat_interleave(repeats), A.repeat_interleave(repeats), 0.5, f, 0.9, 0.1)
    torch.testing.assert_close(losses.dual_loss(nu0, A, 0.5, f, 0.9, 0.1, p0=p, rho=p), sampled)
    torch.testing.assert_close(
        losses.semi_loss(nu0, A, 0.5, f, p),
        losses.semi_loss(nu0.repeat_interleave(repeats), A.repeat_interleave(repeats), 0.5, f),
    )


def test_termination_cuts_the_bootstrap_and_nothing_else():
    reward, nu_tot = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0], requires_grad=True)
    nu_tot_next = torch.tensor([100.0, 200.0], requires_grad=True)
    A = losses.td_advantage(reward, torch.tensor([True, False]), nu_tot, nu_tot_next, 0.5)
    torch.testing.assert_close(A, torch.tensor([1.0 - 10, 2 + 0.5 * 200 - 20]))
    for kind in (torch.uint8, torch.int64, torch.float32):  # ~ of a number would be another number
        same = losses.td_advantage(reward, torch.tensor([1, 0], dtype=kind), nu_tot, nu_tot_next, 0.5)
        torch.testing.assert_close(same, A)
    at_s, at_next = torch.autograd.grad(A.sum(), (nu_tot, nu_tot_next))
    torch.testing.assert_close(at_s, -torch.ones(2))
    torch.testing.assert_close(at_next, torch.tensor([0, 0.5]))
    # q_loss regresses onto just that.
    loss = losses.q_loss(torch.tensor([3.0, 4.0]), A.detach())
    assert loss.item() == pytest.approx(((3 + 9) ** 2 + (4 - 82) ** 2) / 2)


def test_effective_sample_size():
    one_hot = torch.zeros(50)
    one_hot[7] = 3.0
    assert losses.effective_sample_size(one_hot).item() == pytest.approx(1 / 50)
    assert losses.effective_sample_size(torch.full((50,), 0.2)).item() == pytest.approx(1)
    assert losses.effective_sample_size(torch.tensor([1.0, 3.0])).item() == pytest.approx(16 / 20)
    assert losses.effective_sample_size(torch.zeros(50)).item() == 0
    assert losses.effective_sample_size(torch.tensor([1e30, 3e30])).item() == pytest.approx(16 / 20)


def test_released_multiplier_holds_the_mean_ratio_at_one():
    A, f = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)), DIVERGENCES["soft_chi2"]
    lam = torch.tensor(0.3, requires_grad=True)
    (gradient,) = torch.autograd.grad(losses.released_nu_loss(torch.zeros(4, 3), A, 0.7, f, 0.9, lam), lam)
    torch.testing.assert_close(gradient, 1 - f.w_star((A - 0.3) / 0.7).mean())


def test_released_ratio_sums_over_agents():
    A, f = torch.tensor([[0.0, 1.0, -5.0], [3.0, 4.0, -0.5]]), DIVERGENCES["chi2"]
    torch.testing.assert_close(losses.released_nu_ratio(A, 1.0, f), torch.tensor([1.0 + 2 + 0, 4 + 5 + 0.5]))
