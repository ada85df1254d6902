"""The project's losses against the exact solution of Eq. 2-3 of known multi-agent MDPs.

The exact solution comes from a primal interior-point method in numpy. It shares nothing with comadice_losses: f and its
derivatives are written out again below, and it works on rho and not on nu. It certifies itself (flow constraint,
duality gap). Agents observe the state and the local functions are tables. So nothing but the method stands between the
project's answer and the exact one.

Run with `pytest tests/test_exact.py -s` to see the numbers that the tests measure.
"""

import copy
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.special import xlogy
from tensordict import TensorDict
from torch import nn

import comadice_losses as losses
import comadice_train
from comadice_mixer import Critics
from comadice_train import DataFacts
from offline_data.facts import return_deviation
from offline_data.replay import as_transition, episode_weights, transition_rows

FS = ["kl", "chi2", "soft_chi2"]
ALPHAS = [0.1, 1.0, 10.0]


@dataclass
class F:
    """An f-divergence in numpy: f, f', f'' on t > 0; f*, w* = f*' and r' = w*' of y."""

    f: callable
    d1: callable
    d2: callable
    star: callable
    w: callable
    dw: callable


def neg(y):
    return np.minimum(y, 0)


NUMPY_F = {
    "kl": F(lambda t: xlogy(t, t) - t + 1, np.log, lambda t: 1 / t, lambda y: np.exp(y) - 1, np.exp, np.exp),
    "chi2": F(
        lambda t: (t - 1) ** 2 / 2,
        lambda t: t - 1,
        np.ones_like,
        lambda y: np.where(y > -1, y + y**2 / 2, -0.5),
        lambda y: np.where(y > -1, y + 1, 0),
        lambda y: np.where(y > -1, 1.0, 0),
    ),
    "soft_chi2": F(
        lambda t: np.where(t < 1, xlogy(t, t) - t + 1, (t - 1) ** 2 / 2),
        lambda t: np.where(t < 1, np.log(t), t - 1),
        lambda t: np.where(t < 1, 1 / t, 1),
        lambda y: np.where(y < 0, np.exp(neg(y)) - 1, y + y**2 / 2),
        lambda y: np.where(y < 0, np.exp(neg(y)), y + 1),
        lambda y: np.where(y < 0, np.exp(neg(y)), 1.0),
    ),
}

# ---------------------------------------------------------------- models and their exact solution


@dataclass
class Model:
    """A known multi-agent MDP of n agents with two actions each, S states and A = 2^n joint actions.

    Termination is what P's rows lack to 1, and the pairs in `terminated`, whose rows of P are not to be used.
    d [S, A] is the behaviour policy's discounted occupancy (1 - gamma) sum_t gamma^t P(s_t, a_t, not over yet). Its
    mass m is 1 where nothing terminates and less than 1 elsewhere.

    Normalisation. A loss takes batch means, that is expectations under a probability distribution D. Here D = d / m.
    With w = rho / D and L(nu) = (1 - gamma) E_p0[nu] + E_D[alpha f*(A / alpha)], L is the dual of

        max_{rho >= 0}  sum rho r - alpha sum D f(rho / D)
        s.t.            sum_a rho(s, a) = (1 - gamma) p0(s) + gamma sum rho P(s | ., .)

    for any D. This is Eq. 2-3 with rho^mu = D in the divergence and (1 - gamma) p0 unscaled in the flow. So E_D[w] is
    the mass of rho, the optimal policy's discounted lifetime, at most 1. The behaviour itself has w = m everywhere.
    """

    P: np.ndarray
    terminated: np.ndarray
    r: np.ndarray
    p0: np.ndarray
    d: np.ndarray
    D: np.ndarray
    gamma: float
    n: int

    def __post_init__(self):
        S, A = self.r.shape
        self.S, self.A = S, A
        self.P_alive = self.P * ~self.terminated[..., None]
        self.actions = np.stack(np.unravel_index(range(A), (2,) * self.n), -1)  # [A, n]
        # What the project's functions are fed with. P is not cut at terminated pairs: td_advantage has to do that.
        eye = torch.eye(S, dtype=torch.float64)
        self.t = SimpleNamespace(**{k: torch.as_tensor(getattr(self, k)) for k in ("P", "terminated", "r", "p0", "D")})
        self.t.state, self.t.obs = eye, eye[:, None].expand(-1, self.n, -1)  # [S, S], [S, n, S]
        self.t.sa_obs = self.t.obs[:, None].expand(-1, A, -1, -1)  # [S, A, n, S]
        self.t.sa_action = torch.as_tensor(self.actions).expand(S, -1, -1)  # [S, A, n]


def occupancy(P_alive, p0, mu, gamma):
    flow = np.eye(len(p0)) - gamma * np.einsum("sa,sat->ts", mu, P_alive)
    return np.linalg.solve(flow, (1 - gamma) * p0)[:, None] * mu


def random_model(seed, n=2, S=6, gamma=0.95, termination="none", p0=None, deterministic=False, additive=False):
    rng = np.random.default_rng(seed)
    A = 2**n
    P = rng.dirichlet(np.full(S, 0.5), (S, A))
    r = rng.normal(size=(S, A))
    p0 = rng.dirichlet(np.ones(S)) if p0 is None else np.asarray(p0, float)
    mu = 0.9 * rng.dirichlet(np.ones(A), S) + 0.1 / A  # full support
    if deterministic:
        P = np.eye(S)[rng.integers(S, size=(S, A))]
    if additive:
        # rewards add up over agents and nobody's action moves the state, so A(s, a) = sum_i c_i(s, a_i) + const(s)
        P = np.repeat(P[:, :1], A, 1)
        r = sum(rng.normal(size=(S, 2))[:, a_i] for a_i in np.unravel_index(range(A), (2,) * n))
    terminated = np.zeros((S, A), bool)
    if termination == "constant":
        P = 0.9 * P
    if termination == "random":  # 0 to 0.2, a mean of 0.1, and three pairs that end the episode for sure
        P = P * (1 - 0.2 * rng.uniform(size=(S, A, 1)))
        terminated.flat[rng.choice(S * A, 3, replace=False)] = True
    d = occupancy(P * ~terminated[..., None], p0, mu, gamma)
    return Model(P, terminated, r, p0, d, d / d.sum(), gamma, n)


def exact_solution(m, name, alpha):
    """w* [S, A], nu* [S] and the optimal value of Eq. 2-3, by Newton's method on rho with a log barrier for rho >= 0.

    Every iterate satisfies the flow constraint, from the behaviour's occupancy on; nu is the constraint's multiplier.
    """
    f = NUMPY_F[name]
    K = np.repeat(np.eye(m.S), m.A, 1) - m.gamma * m.P_alive.reshape(-1, m.S).T  # Eq. 3 is K rho = (1 - gamma) p0
    r, D, rho = m.r.ravel(), m.D.ravel(), m.d.ravel().copy()
    for barrier in 10.0 ** np.arange(-1, -13, -1):
        cost = lambda x: -r @ x + alpha * D @ f.f(x / D) - barrier * np.log(x).sum()
        for _ in range(100):
            g = -r + alpha * f.d1(rho / D) - barrier / rho
            h = alpha * f.d2(rho / D) / D + barrier / rho**2
            nu = np.linalg.solve(K / h @ K.T, -K / h @ g)
            step = -(g + K.T @ nu) / h
            decrement = -g @ step
            if decrement < 1e-13:
                break
            t = min(1, 0.99 / max((-step / rho).max(), 1e-9))
            while cost(rho + t * step) > cost(rho) - 1e-4 * t * decrement and t > 1e-10:
                t /= 2
            rho = rho + t * step
    primal = r @ rho - alpha * D @ f.f(rho / D)
    dual = (1 - m.gamma) * m.p0 @ nu + alpha * D @ f.star((r - K.T @ nu) / alpha)
    assert (rho > 0).all() and abs(K @ rho - (1 - m.gamma) * m.p0).max() <= 1e-6
    assert abs(dual - primal) <= 1e-6  # weak duality: nothing feasible is better by more
    return SimpleNamespace(w=(rho / D).reshape(m.S, m.A), rho=rho.reshape(m.S, m.A), nu=nu, value=primal)


# ---------------------------------------------------------------- the project's side


class TabularNu(nn.Module):
    def __init__(self, n, O):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(n, O, dtype=torch.float64))

    def forward(self, obs):
        return (obs * self.table).sum(-1)


class TabularQ(nn.Module):
    def __init__(self, n, O, A=2):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(n, O, A, dtype=torch.float64))

    def forward(self, obs, action):
        return (obs.unsqueeze(-1) * self.table).sum(-2).gather(-1, action.unsqueeze(-1))[..., 0]


def tabular_critics(n, O, S, A=2, seed=0):
    """The networks that training assembles, in float64 and with tables of one-hot observations for nu and q."""
    torch.manual_seed(seed)
    critics = Critics(n, O, S, A, discrete=True).double()
    critics.nu, critics.q = TabularNu(n, O), TabularQ(n, O, A)
    return critics


def minimise(loss, parameters, max_iter=4000):
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=max_iter,
        tolerance_grad=1e-9,
        tolerance_change=1e-15,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    return loss().item()


def td_form(critics, m):
    """nu_tot [S] and the TD form of A_tot [S, A] with the exact expectation over s'."""
    nu_tot = critics.mixer(critics.nu(m.t.obs), m.t.state)
    return nu_tot, losses.td_advantage(m.t.r, m.t.terminated, nu_tot[:, None], m.t.P @ nu_tot, m.gamma)


def train_exact(m, name, alpha, trained=("nu", "mixer"), lam=False, mass=1.0):
    """Minimises the objective `exact`. Returns (critics, w [S, A], the minimum).

    `mass` is that of the data's occupancy (see Model).
    """
    f, critics = losses.DIVERGENCES[name], tabular_critics(m.n, m.S, m.S)
    parameters = [p for module in trained for p in getattr(critics, module).parameters()] + [critics.lam] * lam

    def loss():
        nu_tot, A = td_form(critics, m)
        return losses.dual_loss(nu_tot, A, alpha, f, m.gamma, critics.lam if lam else 0.0, mass, p0=m.t.p0, rho=m.t.D)

    # with lambda there is a flat direction to walk along for ever
    value = minimise(loss, parameters, max_iter=50 if lam else 4000)
    with torch.no_grad():
        w = losses.occupancy_ratio(td_form(critics, m)[1], alpha, f, critics.lam if lam else 0.0).numpy()
    return critics, w, value


def q_advantage(critics, m):
    """M[q - nu] [S, A] with nu fixed."""
    x = critics.q(m.t.sa_obs, m.t.sa_action) - critics.nu(m.t.obs).detach()[:, None]
    return critics.mixer.advantage(x, m.t.state[:, None])


def fit_q(critics, m):
    """Minimises Eq. 9 over psi_q with the exact expectation over s'; returns M[q - nu] [S, A]."""
    td = td_form(critics, m)[1].detach()
    minimise(lambda: losses.q_loss(q_advantage(critics, m), td, rho=m.t.D), list(critics.q.parameters()))
    return q_advantage(critics, m).detach()


def train_sampled(m, name, alpha):
    """Minimises the dual with E_{s'} outside of f*. Returns (w [S, A, S'], the minimum).

    This is what one sampled s' per transition estimates.
    """
    f, critics = losses.DIVERGENCES[name], tabular_critics(m.n, m.S, m.S)
    rho = m.t.D[..., None] * m.t.P

    def advantage():
        nu_tot = critics.mixer(critics.nu(m.t.obs), m.t.state)
        return nu_tot, losses.td_advantage(
            m.t.r[..., None], m.t.terminated[..., None], nu_tot[:, None, None], nu_tot, m.gamma
        )

    def loss():
        nu_tot, A = advantage()
        return losses.dual_loss(nu_tot, A, alpha, f, m.gamma, p0=m.t.p0, rho=rho)

    value = minimise(loss, [*critics.nu.parameters(), *critics.mixer.parameters()])
    with torch.no_grad():
        return losses.occupancy_ratio(advantage()[1], alpha, f).numpy(), value


# ---------------------------------------------------------------- Prop. 4.1: the objective `exact`


@pytest.mark.parametrize("trained", [("nu", "mixer"), ("nu",)], ids=["psi_nu+theta", "psi_nu"])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("name", FS)
@pytest.mark.parametrize("n", [2, 3])
def test_exact_objective_reaches_the_solution(n, name, alpha, trained):
    m = random_model(n, n)
    solution = exact_solution(m, name, alpha)
    assert abs(solution.w - 1).max() > 0.1  # the solution is not the behaviour
    _, w, value = train_exact(m, name, alpha, trained)
    assert abs(w - solution.w).max() <= 1e-3
    assert abs(value - solution.value) <= 1e-5
    assert (m.D * w).sum() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("termination", ["constant", "random"])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("name", FS)
def test_exact_objective_with_termination(name, alpha, termination):
    """Where termination cuts the bootstrap the solution has E_D[w] < 1 (see Model), and so has the project's."""
    for n in (2, 3):
        m = random_model(n, n, termination=termination)
        solution = exact_solution(m, name, alpha)
        _, w, value = train_exact(m, name, alpha)
        assert abs(w - solution.w).max() <= 1e-3
        assert abs(value - solution.value) <= 1e-5
        mass = (m.D * w).sum()
        assert mass == pytest.approx(solution.rho.sum(), abs=1e-4)
        assert mass < 0.6
        if termination == "constant":  # every policy lives equally long: (1 - gamma) sum_t (gamma 0.9)^t
            assert mass == pytest.approx((1 - m.gamma) / (1 - 0.9 * m.gamma), abs=1e-4)
        print(
            f"{termination} termination, n={n} {name} alpha={alpha:g}: E_D[w] = {mass:.4f}, behaviour {m.d.sum():.4f}"
        )


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("name", FS)
def test_exact_objective_with_the_data_s_mass(name, alpha):
    """Eq. 2-3 with rho^mu the discounted occupancy itself, whose mass is below 1 where episodes terminate."""
    m = random_model(2, termination="random")
    mass = m.d.sum()
    assert mass < 0.6
    solution = exact_solution(replace(m, D=m.d), name, alpha)
    _, w, value = train_exact(m, name, alpha, mass=mass)
    assert abs(w - solution.w).max() <= 1e-3  # both are rho / d
    assert abs(value - solution.value) <= 1e-5


@pytest.mark.parametrize("name", FS)
def test_multiplier_of_the_mean_ratio(name):
    """Minimising over lambda too changes nothing where Eq. 3 has E_D[w] = 1 in it already."""
    m = random_model(2)
    solution = exact_solution(m, name, 1.0)
    _, w, value = train_exact(m, name, 1.0, lam=True)
    assert abs(w - solution.w).max() <= 1e-3 and abs(value - solution.value) <= 1e-5


# ---------------------------------------------------------------- Eq. 9: w read through q, and sampled next states


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("name", FS)
@pytest.mark.parametrize("n", [2, 3])
def test_w_through_q_is_exact_where_advantages_add_up(n, name, alpha):
    m = random_model(n, n, additive=True)
    solution = exact_solution(m, name, alpha)
    critics, w, _ = train_exact(m, name, alpha)
    w_q = losses.occupancy_ratio(fit_q(critics, m), alpha, losses.DIVERGENCES[name]).numpy()
    assert abs(w - solution.w).max() <= 1e-3
    assert abs(w_q - solution.w).max() <= 1e-3


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("name", FS)
@pytest.mark.parametrize("n", [2, 3])
def test_q_is_the_best_additive_advantage(n, name, alpha):
    m = random_model(n, n)
    solution = exact_solution(m, name, alpha)
    critics, _, _ = train_exact(m, name, alpha)
    A = m.r + m.gamma * m.P_alive @ solution.nu - solution.nu[:, None]
    X = np.concatenate([np.eye(2)[m.actions[:, i]] for i in range(n)], 1)  # [A, 2n]: who takes which action
    best = np.empty_like(A)
    for s in range(m.S):
        root = np.sqrt(m.D[s])
        best[s] = X @ np.linalg.lstsq(X * root[:, None], A[s] * root, rcond=None)[0]
    assert abs(best - A).max() > 0.1  # not additive
    assert abs(fit_q(critics, m).numpy() - best).max() <= 1e-4


@pytest.mark.parametrize("name", FS)
def test_gap_of_q_and_bias_of_sampled_next_states(name):
    """On random MMDPs neither way to read w is exact with samples. q averages over s' but is additive, TD is biased.

    Errors are means of |w - w*| under D over eight models. Beside them stands E_D|w* - 1|, how far w* is from plain BC.
    Both errors go to zero as alpha grows, like w* - 1 itself does. So the ratios to it say what part of w* is lost.
    """
    models = [random_model(seed, n) for n in (2, 3) for seed in range(4)]
    means = []
    for alpha in ALPHAS:
        rows = []
        for m in models:
            solution = exact_solution(m, name, alpha)
            error = lambda w: (m.D * abs(w - solution.w)).sum()
            critics, _, value = train_exact(m, name, alpha)
            w_q = losses.occupancy_ratio(fit_q(critics, m), alpha, losses.DIVERGENCES[name]).numpy()
            w_sampled, value_sampled = train_sampled(m, name, alpha)
            assert value_sampled > value  # Jensen: f* is convex, so the sampled objective bounds the dual from above
            averaged = error((m.P * w_sampled).sum(-1))  # weighted BC sees a pair's transitions together
            single = (m.D[..., None] * m.P * abs(w_sampled - solution.w[..., None])).sum()
            rows.append([error(w_q), averaged, single, (m.D * abs(solution.w - 1)).sum()])
            assert averaged <= single + 1e-12
        means.append(np.mean(rows, 0))
        q, averaged, single, signal = means[-1]
        print(
            f"{name} alpha={alpha:g}: w through q misses by {q:.3f}, double sampling by {averaged:.3f} "
            f"({single:.3f} a transition), E|w* - 1| is {signal:.3f}"
        )
    low, middle, high = means
    assert (low > 2 * middle).all() and (middle > 4 * high).all()
    assert (high[:2] > 1e-3).all()  # they shrink, they don't vanish


@pytest.mark.parametrize("alpha", ALPHAS)
def test_sampled_next_states_cost_nothing_where_dynamics_are_deterministic(alpha):
    m = random_model(0, deterministic=True)
    solution = exact_solution(m, "soft_chi2", alpha)
    w, value = train_sampled(m, "soft_chi2", alpha)
    assert abs((m.P * w).sum(-1) - solution.w).max() <= 1e-3
    assert abs(value - solution.value) <= 1e-5


# ---------------------------------------------------------------- Eq. 10 as printed


def train_algorithm_1(critics, m, objective, alpha, trained, steps, lr):
    """Adam on Eq. 9 over psi_q and on L(nu, theta) over `trained`, as Algorithm 1 alternates them.

    Returns (w [S, A], loss, nu_tot [S]).
    """
    f = losses.DIVERGENCES["soft_chi2"]
    psi_q, nu_theta = (
        list(critics.q.parameters()),
        [p for module in trained for p in getattr(critics, module).parameters()],
    )
    optimizer = torch.optim.Adam(psi_q + nu_theta, lr)
    for _ in range(steps):
        nu_tot, A = td_form(critics, m)
        q_loss = losses.q_loss(q_advantage(critics, m), A.detach(), m.t.D)
        if objective == "printed":
            q = critics.q(m.t.sa_obs, m.t.sa_action).detach()
            A = critics.mixer.advantage(q - critics.nu(m.t.obs)[:, None], m.t.state[:, None])
        loss = losses.dual_loss(nu_tot, A, alpha, f, m.gamma, p0=m.t.p0, rho=m.t.D)
        for parameters, value in ((psi_q, q_loss), (nu_theta, loss)):
            for parameter, gradient in zip(parameters, torch.autograd.grad(value, parameters, retain_graph=True)):
                parameter.grad = gradient
        optimizer.step()
    return losses.occupancy_ratio(A.detach(), alpha, f).numpy(), loss.item(), nu_tot.detach().numpy()


@pytest.mark.parametrize("alpha", [1.0, 10.0])
@pytest.mark.parametrize("n", [2, 3])
def test_printed_objective_misses_the_solution(n, alpha):
    """500 steps of Algorithm 1 from one initialisation: A_tot = M[q - nu] at fixed q runs away, `exact` arrives.

    The mixer's bias enters the initial term with nothing to balance it, so the printed loss falls below the primal's
    optimum, which no value of the dual can.
    """
    m = random_model(n, n, p0=np.eye(6)[0])
    solution = exact_solution(m, "soft_chi2", alpha)
    error, mass, loss, nu_tot = {}, {}, {}, {}
    for objective in ("printed", "exact"):
        w, loss[objective], nu_tot[objective] = train_algorithm_1(
            tabular_critics(n, m.S, m.S), m, objective, alpha, ("nu", "mixer"), 500, 0.01
        )
        error[objective], mass[objective] = (m.D * abs(w - solution.w)).sum(), (m.D * w).sum()
        print(
            f"{objective}, n={n} alpha={alpha:g}: E_D[w] {mass[objective]:.3f} "
            f"({(m.D * w)[1:].sum() / m.D[1:].sum():.4f} off the initial state), "
            f"mean |w - w*| {error[objective]:.3f}, loss {loss[objective]:.3f}, nu_tot(s0) {nu_tot[objective][0]:.1f}"
        )
    signal = (m.D * abs(solution.w - 1)).sum()
    print(f"the solution: E_D|w* - 1| {signal:.3f}, optimum {solution.value:.3f}, nu*(s0) {solution.nu[0]:.2f}")
    assert error["exact"] < 0.01 and abs(mass["exact"] - 1) < 0.01 and loss["exact"] > solution.value - 1e-6
    assert mass["printed"] < 0.5
    assert error["printed"] > signal  # plain BC's w = 1 would be closer
    assert loss["printed"] < solution.value - 100 and nu_tot["printed"][0] < -1000


@pytest.mark.parametrize("alpha", [1.0, 10.0])
def test_printed_objective_leaves_the_solution(alpha):
    """Started at the exact nu, q and theta, with theta fixed, it goes away.

    At fixed q, Eq. 3 lacks its inflow gamma sum rho* P. So nu's gradient at the solution is minus the inflow. nu rises
    and w falls.
    """
    m = random_model(2, additive=True)
    solution = exact_solution(m, "soft_chi2", alpha)
    critics, _, _ = train_exact(m, "soft_chi2", alpha, trained=("nu",))
    fit_q(critics, m)
    exact = copy.deepcopy(critics)
    train_algorithm_1(critics, m, "printed", alpha, ("nu",), 1, 0.0)
    inflow = m.gamma * np.einsum("sa,sat->t", solution.rho, m.P)
    W = critics.mixer.weights(m.t.state).detach().numpy().T  # [n, S]
    np.testing.assert_allclose(critics.nu.table.grad, -W * inflow, atol=1e-5)

    masses, rise = {}, {}
    for objective in ("printed", "exact"):
        w, _, nu_tot = train_algorithm_1(copy.deepcopy(exact), m, objective, alpha, ("nu",), 500, 0.05)
        masses[objective], rise[objective] = (m.D * w).sum(), (nu_tot - solution.nu).mean()
        print(
            f"{objective} from the solution, alpha={alpha:g}: E_D[w] 1 -> {masses[objective]:.3f}, "
            f"mean |w - w*| {(m.D * abs(w - solution.w)).sum():.3f}, "
            f"nu_tot moved by {rise[objective]:.1f}"
        )
    assert abs(masses["exact"] - 1) < 0.01 and abs(rise["exact"]) < 0.1
    assert rise["printed"] > 3
    assert masses["printed"] < (0.8 if alpha == 1 else 0.97)


# ---------------------------------------------------------------- the objective `semi`


@pytest.mark.parametrize("termination", ["none", "random"])
@pytest.mark.parametrize("name", FS)
def test_semi_objective_has_mean_ratio_one_in_every_state(name, termination):
    """Its fixed point (target = the current nu) against value iteration in numpy.

    V(s) solves E_mu[w((r + gamma V' - V(s)) / alpha)] = 1.
    """
    alpha, m = 1.0, random_model(2, gamma=0.9, deterministic=True, termination=termination)
    f, critics = losses.DIVERGENCES[name], tabular_critics(m.n, m.S, m.S)

    def advantage(target):
        nu_tot = critics.mixer(critics.nu(m.t.obs), m.t.state)
        return nu_tot, losses.td_advantage(m.t.r, m.t.terminated, nu_tot[:, None], m.t.P @ target, m.gamma)

    def loss():
        nu_tot, A = advantage(target)
        return losses.semi_loss(nu_tot[:, None], A, alpha, f, rho=m.t.D)

    change = np.inf
    for _ in range(200):
        target = advantage(torch.zeros(m.S, dtype=torch.float64))[0].detach()
        minimise(loss, [*critics.nu.parameters(), *critics.mixer.parameters()])
        change = (advantage(target)[0] - target).abs().max()
        if change < 1e-6:
            break
    nu_tot, _ = advantage(target)
    w = losses.occupancy_ratio(advantage(nu_tot)[1].detach(), alpha, f).numpy()
    mu = m.D / m.D.sum(1, keepdims=True)
    assert change < 1e-6
    assert abs((mu * w).sum(1) - 1).max() <= 1e-4

    V = np.zeros(m.S)
    for _ in range(250):
        Q = m.r + m.gamma * m.P_alive @ V
        V = np.array(
            [
                brentq(lambda v: mu[s] @ NUMPY_F[name].w((Q[s] - v) / alpha) - 1, Q[s].min() - 1, Q[s].max() + 1)
                for s in range(m.S)
            ]
        )
    assert abs(nu_tot.detach().numpy() - V).max() <= 1e-4
    solution = exact_solution(m, name, alpha)
    policy = lambda w: m.D * w / (m.D * w).sum(1, keepdims=True)
    far = lambda w: 0.5 * (m.D.sum(1) @ abs(policy(w) - policy(solution.w)).sum(1))
    print(
        f"semi, {name}, {termination} termination: E_D[w] {(m.D * w).sum():.4f} "
        f"(the solution's {solution.rho.sum():.4f}), mean |w - w*| {(m.D * abs(w - solution.w)).sum():.3f}; "
        f"total variation of policies to the solution's: {far(w):.3f}, of the behaviour's {far(w * 0 + 1):.3f}"
    )


# ---------------------------------------------------------------- large alphas


def variation(weights, count) -> float:
    """Mean total variation between the weighted policy and the behaviour's, over the data's states.

    weights and count are [S, A].
    """
    share = count.sum(1) / count.sum()
    weighted = count * weights
    return 0.5 * share @ abs(weighted / weighted.sum(1, keepdims=True) - count / count.sum(1, keepdims=True)).sum(1)


@pytest.mark.parametrize("termination", ["none", "constant", "random"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_policy_of_exact_tends_to_the_behaviour(seed, termination):
    """As alpha grows it does where the data term has the occupancy's mass. With mass 1 and termination it does not.

    Then the flow of rho has less mass than D, so that w = 1 is not feasible, however dear the divergence is.
    """
    m = random_model(seed, termination=termination)
    far = {
        (mass, alpha): variation(train_exact(m, "soft_chi2", alpha, mass=mass)[1], m.D)
        for mass in (m.d.sum(), 1.0)
        for alpha in (1.0, 1000.0)
    }
    right = {alpha: far[m.d.sum(), alpha] for alpha in (1.0, 1000.0)}
    print(
        f"exact, seed {seed}, {termination} termination: total variation {right[1.0]:.4f} at alpha 1, "
        f"{right[1000.0]:.5f} at 1000; "
        f"with mass 1 {far[1.0, 1000.0]:.4f} at 1000"
    )
    assert right[1000.0] < 1e-3 < 0.05 < right[1.0]
    assert (far[1.0, 1000.0] > 0.1) == (termination == "random")


def sampled_dataset(m, episodes, seed=0):
    """Rows of a dataset that the behaviour policy recorded in the model, and (s, a) of each transition.

    An episode has at most 60 transitions.
    """
    rng = np.random.default_rng(seed)
    mu, steps = m.d / m.d.sum(1, keepdims=True), []
    for _ in range(episodes):
        s, begins = rng.choice(m.S, p=m.p0), True
        for t in range(60):
            a = rng.choice(m.A, p=mu[s])
            alive = m.P_alive[s, a]
            following = rng.choice(m.S + 1, p=[*alive, max(1 - alive.sum(), 0)])
            ended = following == m.S
            steps.append((s, a, m.r[s, a], ended, ended or t == 59, begins))
            s, begins = (0 if ended else following), False
            if steps[-1][4]:
                steps.append((s, 0, 0.0, False, False, False))  # the last row: what is seen at the end
                break
    s, a, r, terminated, done, first = map(np.array, zip(*steps))
    column = lambda x: torch.as_tensor(x)[:, None]
    rows = TensorDict(
        {
            "state": m.t.state[s],
            "reward": column(r),
            "terminated": column(terminated),
            "done": column(done),
            "is_init": column(first),
        },
        [len(s)],
    )
    rows["episode"] = column(first).cumsum(0) - 1
    rows["agents"] = TensorDict({"observation": m.t.obs[s], "action": torch.as_tensor(m.actions)[a]}, [len(s), m.n])
    keep = transition_rows(rows).numpy()
    return rows, s[keep], a[keep]


@pytest.mark.parametrize("advantage", ["td", "q"])
@pytest.mark.parametrize(
    "seed, termination",
    [(0, "random"), (1, "random"), (2, "random"), (0, "none")],  # endless games take far longer
)
def test_policy_of_the_default_tends_to_the_behaviour(seed, termination, advantage):
    """Through the code that trains: data of a random MMDP, updates of tabular critics, and w* of the whole dataset.

    For tabular policies of the team, Eq. 11's optimum is the weighted share of each action. It is compared with the
    plain share.
    """
    m = random_model(seed, termination=termination)
    rows, s, a = sampled_dataset(m, 60)
    alone, both = {}, {}
    pairs = torch.stack([transition_rows(rows), transition_rows(rows) + 1], -1)
    batch, init = as_transition(rows[pairs]), rows[rows["is_init"][:, 0]]
    for alpha in (0.5, 1000.0, 10_000.0):
        given = comadice_train.Args(alpha=alpha, advantage=advantage, gamma=m.gamma, critic_lr=0.02)
        deviations = return_deviation(rows), return_deviation(rows, neighbours=True)
        args = comadice_train.resolve(given, rows["reward"].abs().mean().item(), *deviations)
        assert args.objective == "semi" and args.bound
        critics = tabular_critics(m.n, m.S, m.S)
        if advantage == "td":
            del critics.q
        target, optimizer = copy.deepcopy(critics), torch.optim.Adam(critics.parameters(), args.critic_lr)
        data = comadice_train.data_facts(rows, args)
        update = comadice_train.make_critic_update(critics, target, optimizer, args, data)
        for _ in range(300):
            update(batch, init)
        w = comadice_train.dataset_ratio(target, rows, args, data).numpy()
        # how often Eq. 11 draws a transition
        draws = episode_weights(rows, args.episode_alpha, args.f, args.neighbours).numpy()
        for far, factor in ((alone, 1), (both, draws)):
            plain, weighted = np.zeros((m.S, a.max() + 1)), np.zeros((m.S, a.max() + 1))
            np.add.at(plain, (s, a), 1)
            np.add.at(weighted, (s, a), w * factor)
            far[alpha] = variation(weighted / plain.clip(1), plain)
        mean_w = w.mean()
    show = lambda far: ", ".join(f"{value:.5f} at alpha {alpha:g}" for alpha, value in far.items())
    print(
        f"semi, seed {seed}, {termination} termination, w* from {advantage}: total variation {show(alone)}; "
        f"with the episodes' ratio {show(both)}; "
        f"E[w] {mean_w:.4f}"
    )
    assert alone[1000.0] < 1e-3 < 0.05 < alone[0.5]
    assert both[1000.0] < 1e-3 and both[10_000.0] < 0.2 * both[1000.0]
    assert mean_w == pytest.approx(1, abs=0.02)


# ---------------------------------------------------------------- what training assembles: comadice_train

B, B0, N_AGENTS, N_OBS, N_STATES, N_ACTIONS = 11, 5, 3, 4, 5, 3
GAMMA, SCALE, ALPHA = 0.9, 0.1, 0.4  # ALPHA in units of the scaled reward, as critic_losses has it
FREE = DataFacts(-np.inf, np.inf, 1.0)  # nothing is clipped, nothing terminates


def random_setting(seed=0, lam=0.2):
    """Random tables, a target that differs from the critics, and batches.

    States are one-hot. Local observations are one-hot, too, and independent of the states.
    """
    g = torch.Generator().manual_seed(seed)
    one_hot = lambda high, *shape: torch.eye(high, dtype=torch.float64)[torch.randint(high, shape, generator=g)]
    critics = tabular_critics(N_AGENTS, N_OBS, N_STATES, N_ACTIONS, seed)
    target = tabular_critics(N_AGENTS, N_OBS, N_STATES, N_ACTIONS, seed + 1)
    for module in (critics, target):
        for table in (module.nu.table, module.q.table):
            nn.init.normal_(table, generator=g)
        nn.init.constant_(module.lam, lam)
    seen = lambda size: {"state": one_hot(N_STATES, size), "agents": {"observation": one_hot(N_OBS, size, N_AGENTS)}}
    batch = TensorDict(seen(B) | {"next": seen(B), "terminated": (torch.arange(B) % 3 == 0)[:, None]}, [B])
    batch["reward"] = 5 * torch.randn(B, 1, generator=g).double()
    batch["agents", "action"] = torch.randint(N_ACTIONS, (B, N_AGENTS), generator=g)
    return critics, target.requires_grad_(False), batch, TensorDict(seen(B0), [B0])


def by_hand(critics, target, batch, init, objective, name, lam, data=FREE):
    """L_q, L_nu, w and their gradients in numpy, for tables and the 1-layer mixer, with q (--advantage q)."""
    f = NUMPY_F[name]
    array = lambda x: x.detach().numpy()

    def mixer(module, state):  # W [., n], sign of its hyper-network's output, b [.]
        layers = lambda net: (
            np.maximum(state @ array(net[0].weight).T + array(net[0].bias), 0) @ array(net[2].weight).T
            + array(net[2].bias)
        )
        return abs(layers(module.W)), np.sign(layers(module.W)), layers(module.b)[:, 0]

    obs, next_obs, init_obs = (array(b["agents", "observation"]) for b in (batch, batch["next"], init))
    (W, sign, b), (W1, sign1, b1), (W0, sign0, b0) = (
        mixer(critics.mixer, array(x["state"])) for x in (batch, batch["next"], init)
    )
    Wt, _, bt = mixer(target.mixer, array(batch["next"]["state"]))
    taken = np.eye(N_ACTIONS)[batch["agents", "action"]]
    nu_of = lambda module, o: np.einsum("bio,io->bi", o, array(module.nu.table))
    nu, nu1, nu0 = nu_of(critics, obs), nu_of(critics, next_obs), nu_of(critics, init_obs)
    q = np.einsum("bio,bia,ioa->bi", obs, taken, array(critics.q.table))
    r, alive = SCALE * array(batch["reward"])[:, 0], 1.0 - array(batch["terminated"])[:, 0]
    tot, tot1, tot0 = (nu * W).sum(1) + b, (nu1 * W1).sum(1) + b1, (nu0 * W0).sum(1) + b0
    target_next = ((nu_of(target, next_obs) * Wt).sum(1) + bt).clip(data.low, data.high)
    td_of_target = r + GAMMA * alive * target_next - tot  # what q is fitted to
    td = r + GAMMA * alive * tot1.clip(data.low, data.high) - tot if objective == "exact" else td_of_target
    mass = data.mass if objective == "exact" else 1.0

    if objective == "released_nu":
        residual = (W * q).sum(1) + b - r - GAMMA * alive * target_next
        y = (W * (q - nu) - lam) / ALPHA
        L_nu = (1 - GAMMA) * nu0.mean() + (ALPHA * f.star(y)).mean() + lam * (1 - f.w(y)).mean()
        w = f.w(y).sum(1)
        at_nu, at_next, at_init = -W * f.dw(y) * y / (B * N_AGENTS), 0 * W, 0 * W0 + (1 - GAMMA) / (B0 * N_AGENTS)
        theta = {"b": 2 * residual.mean(), "W": 2 * (residual[:, None] * q * sign).mean(0)}
    else:
        A_q = (W * (q - nu)).sum(1) + (b if objective == "printed" else 0)  # Eq. 10 has the mixer's bias
        residual = A_q - td_of_target
        A = A_q if objective == "printed" else td
        w = f.w((A - lam) / ALPHA)
        L_nu = mass * (ALPHA * f.star((A - lam) / ALPHA)).mean() + (
            tot.mean() if objective == "semi" else (1 - GAMMA) * tot0.mean() + lam
        )
        g = mass * w[:, None]
        init_b, init_W = (0, 0) if objective == "semi" else (1 - GAMMA, (1 - GAMMA) * (nu0 * sign0).mean(0))
        # How L_nu depends on nu_tot(s) and nu_tot(s') (through w, Prop. 4.1), and the same for theta's last biases.
        down = (1 - g) if objective == "semi" else -g
        inside = (data.low < tot1) & (tot1 < data.high)
        up = GAMMA * (alive * inside)[:, None] * g if objective == "exact" else 0 * g
        at_nu, at_next = down * W / B, up * W1 / B
        at_init = 0 * W0 if objective == "semi" else (1 - GAMMA) * W0 / B0
        if objective == "printed":
            theta = {"b": init_b + g.mean(), "W": init_W + (g * (q - nu) * sign).mean(0)}
        else:
            theta = {"b": init_b + (down + up).mean(), "W": init_W + (down * nu * sign + up * nu1 * sign1).mean(0)}
    psi_nu = sum(np.einsum("bi,bio->io", x, o) for x, o in ((at_nu, obs), (at_next, next_obs), (at_init, init_obs)))
    psi_q = np.einsum("b,bi,bio,bia->ioa", 2 * residual / B, W, obs, taken)
    return SimpleNamespace(L_q=(residual**2).mean(), L_nu=L_nu, w=w, psi_nu=psi_nu, psi_q=psi_q, theta=theta)


# The multiplier is no part of semi_loss, so `semi` is tried without it.
SETTINGS = [
    (o, lam) for o in ("exact", "printed", "semi", "released_nu") for lam in (0.0, 0.5) if not (o == "semi" and lam)
]


@pytest.mark.parametrize("name", FS)
@pytest.mark.parametrize("data", [FREE, DataFacts(-0.2, 0.3, 0.6)], ids=["free", "clipped, mass 0.6"])
@pytest.mark.parametrize("objective, lambda_scale", SETTINGS)
def test_critic_losses_and_gradients_by_hand(objective, lambda_scale, data, name):
    lam = 0.2 if lambda_scale else 0.0
    critics, target, batch, init = random_setting(lam=lam)
    args = comadice_train.Args(
        objective=objective,
        advantage="q",
        f=name,
        gamma=GAMMA,
        alpha=ALPHA / SCALE,
        reward_scale=SCALE,
        lambda_scale=lambda_scale,
        tau=0.005,
    )
    hand = by_hand(critics, target, batch, init, objective, name, lam, data)
    if data is not FREE:  # the clip matters to what is compared
        assert hand.L_q != by_hand(critics, target, batch, init, objective, name, lam).L_q
    L_q, L_nu, w, nu_tot = comadice_train.critic_losses(critics, target, batch, init, args, data)
    np.testing.assert_allclose([L_q.item(), L_nu.item()], [hand.L_q, hand.L_nu], rtol=1e-9)
    np.testing.assert_allclose(w, hand.w, rtol=1e-9)
    metrics = comadice_train.critic_metrics(L_q, L_nu, w, nu_tot, args)
    np.testing.assert_allclose(
        [metrics["mean_w"], metrics["mean_nu"]], [hand.w.mean(), nu_tot.mean() / SCALE], rtol=1e-9
    )
    np.testing.assert_allclose(
        [metrics["w_zero"], metrics["ess"]],
        [(hand.w == 0).mean(), hand.w.sum() ** 2 / (B * (hand.w**2).sum())],
        rtol=1e-6,
    )

    # One update: every parameter gets the gradient of its own loss, then the optimiser and the targets step.
    before, before_target = copy.deepcopy(critics), copy.deepcopy(target)
    for p in (p for name, p in critics.named_parameters() if name != "lam"):
        p.grad = torch.ones_like(p)  # as the last step may have left it
    comadice_train.make_critic_update(critics, target, torch.optim.SGD(critics.parameters(), 0.1), args, data)(
        batch, init
    )
    np.testing.assert_allclose(critics.q.table.grad, hand.psi_q, atol=1e-12)
    np.testing.assert_allclose(critics.nu.table.grad, hand.psi_nu, atol=1e-12)
    np.testing.assert_allclose(critics.mixer.b[2].bias.grad, [hand.theta["b"]], atol=1e-12)
    np.testing.assert_allclose(critics.mixer.W[2].bias.grad, hand.theta["W"], atol=1e-12)
    if lambda_scale and objective != "released_nu":
        mass = data.mass if objective == "exact" else 1
        np.testing.assert_allclose(critics.lam.grad, 1 - mass * hand.w.mean(), atol=1e-12)
    if not lambda_scale:
        assert critics.lam.item() == 0
    for new, old, new_target, old_target in zip(*(x.parameters() for x in (critics, before, target, before_target))):
        torch.testing.assert_close(new, old - 0.1 * new.grad if new.grad is not None else old)
        torch.testing.assert_close(new_target, (1 - args.tau) * old_target + args.tau * new)


@pytest.mark.parametrize("lambda_scale", [0.0, 0.5])
@pytest.mark.parametrize("mixer_layers", [1, 2])
@pytest.mark.parametrize("objective", ["exact", "printed", "semi", "released_nu"])
def test_no_parameter_is_in_both_losses(objective, mixer_layers, lambda_scale):
    """Which loss trains which part. q, nu and theta are constants in the loss that does not train them.

    That is why one backward pass through the losses' sum gives each part the gradient of its own loss.
    """
    if (objective, mixer_layers) == ("released_nu", 2) or (objective == "semi" and lambda_scale):
        return  # refused by comadice_train.py
    critics, target, batch, init = random_setting()
    critics.mixer = comadice_train.Critics(
        N_AGENTS, 1, batch["state"].shape[-1], 1, True, mixer_layers=mixer_layers
    ).mixer.double()
    target.mixer = copy.deepcopy(critics.mixer).requires_grad_(False)
    args = comadice_train.Args(
        objective=objective, advantage="q", alpha=10 * ALPHA, reward_scale=0.1, lambda_scale=lambda_scale
    )
    L_q, L_nu, _, _ = comadice_train.critic_losses(critics, target, batch, init, args, FREE)

    def trains(loss) -> set[str]:
        parts = {"q": critics.q, "nu": critics.nu, "theta": critics.mixer}
        used = lambda parameters: any(
            g is not None for g in torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        )
        return {name for name, part in parts.items() if used(list(part.parameters()))} | (
            {"lam"} if used([critics.lam]) else set()
        )

    lam = {"lam"} if objective != "semi" else set()  # which is trained with lambda_scale alone
    assert (trains(L_q), trains(L_nu)) == (
        ({"q", "theta"}, {"nu"} | lam) if objective == "released_nu" else ({"q"}, {"nu", "theta"} | lam)
    )


@pytest.mark.parametrize("objective", ["exact", "semi"])
def test_without_q_nothing_else_changes(objective):
    """q is not there with --advantage td; nu, theta and their step are the same without it."""
    critics, target, batch, init = random_setting(lam=0.0)
    args = comadice_train.Args(
        objective=objective,
        advantage="q",
        gamma=GAMMA,
        alpha=ALPHA / SCALE,
        reward_scale=SCALE,
        lambda_scale=0.0,
        tau=0.005,
    )
    _, L_nu, w, nu_tot = comadice_train.critic_losses(critics, target, batch, init, args, FREE)
    del critics.q, target.q
    args.advantage = "td"
    L_q, *same = comadice_train.critic_losses(critics, target, batch, init, args, FREE)
    assert L_q == 0 and all(torch.equal(x, y) for x, y in zip(same, (L_nu, w, nu_tot)))
    comadice_train.make_critic_update(critics, target, torch.optim.SGD(critics.parameters(), 0.1), args, FREE)(
        batch, init
    )
    card = {"n_agents": 2, "obs_dim": 3, "state_dim": 4, "action_dim": 2, "discrete": True}
    parts = lambda advantage: {
        name.split(".")[0]
        for name, _ in comadice_train.make_critics(
            card, comadice_train.Args(advantage=advantage, layer_norm=True)
        ).named_parameters()
    }
    assert parts("td") == {"nu", "mixer", "lam"}
    assert parts("q") == {"nu", "q", "mixer", "lam"}


def two_row_episodes(batch):
    """A dataset [2B] in which every transition is an episode of its own."""
    rows = TensorDict({}, [2 * len(batch)])
    for key in ("state", ("agents", "observation")):
        rows[key] = torch.stack([batch[key], batch["next"][key]], 1).flatten(0, 1)
    for key in (("agents", "action"), "reward", "terminated"):
        rows[key] = torch.stack([batch[key], torch.zeros_like(batch[key])], 1).flatten(0, 1)
    rows["done"] = rows["is_init"] = (torch.arange(2 * len(batch)) % 2 == 0)[:, None]
    return rows


@pytest.mark.parametrize(
    "objective, advantage, bound",
    [
        ("exact", "td", False),
        ("semi", "td", True),
        ("exact", "q", False),
        ("printed", "q", False),
        ("released_nu", "q", False),
    ],
)
def test_dataset_ratio_by_hand(objective, advantage, bound, monkeypatch):
    """Section 4.3 over a whole dataset, looked at in pieces of two transitions; all networks are the ones given."""
    monkeypatch.setattr(comadice_train, "CHUNK", 16)
    critics, _, batch, init = random_setting(lam=0.0)
    args = comadice_train.Args(
        objective=objective, advantage=advantage, gamma=GAMMA, alpha=ALPHA / SCALE, reward_scale=SCALE, bound=bound,
        policy_alpha=1.0,
    )  # fmt: skip
    rows = two_row_episodes(batch)
    w = comadice_train.dataset_ratio(critics, rows, args, comadice_train.data_facts(rows, args))
    # Here every transition is an episode, and what follows a state is its one reward.
    data = DataFacts(SCALE * batch["reward"].min().item(), SCALE * batch["reward"].max().item(), 1.0) if bound else FREE
    hand = by_hand(critics, critics, batch, init, objective, "soft_chi2", 0.0, data)
    if (objective, advantage) == ("exact", "q"):  # M[q - nu] without the bias, which Eq. 10 as printed has
        no_bias = copy.deepcopy(critics)
        for parameter in no_bias.mixer.b[2].parameters():
            parameter.data.zero_()
        hand = by_hand(no_bias, no_bias, batch, init, "printed", "soft_chi2", 0.0)
    np.testing.assert_allclose(w, hand.w, rtol=1e-9)


@pytest.mark.parametrize("alpha", [1.0, 10.0])
@pytest.mark.parametrize("name", FS)
def test_training_assembly_solves_a_dataset(name, alpha):
    """critic_losses on a whole dataset of a deterministic MMDP with termination, and dataset_ratio, give the exact w*.

    The data need no occupancy: the dual holds for any D with full support, here the counts of a made-up dataset.
    """
    m = random_model(4, S=5, deterministic=True, termination="none")
    rng = np.random.default_rng(0)
    m.terminated.flat[rng.choice(m.S * m.A, 4, replace=False)] = True
    count, count0 = rng.integers(1, 6, size=(m.S, m.A)), rng.integers(1, 4, size=m.S)
    P_alive, p0 = m.P * ~m.terminated[..., None], count0 / count0.sum()
    d = occupancy(P_alive, p0, np.full((m.S, m.A), 1 / m.A), m.gamma)  # where the primal solver starts
    m = Model(m.P, m.terminated, m.r, p0, d, count / count.sum(), m.gamma, m.n)
    solution = exact_solution(m, name, alpha)

    s, a = (torch.as_tensor(i.repeat(count.ravel())) for i in np.unravel_index(range(count.size), count.shape))
    seen = lambda s: {"state": m.t.state[s], "agents": {"observation": m.t.obs[s]}}
    batch = TensorDict(
        seen(s)
        | {"next": seen(m.t.P[s, a].argmax(-1)), "reward": m.t.r[s, a, None], "terminated": m.t.terminated[s, a, None]},
        [len(s)],
    )
    batch["agents", "action"] = torch.as_tensor(m.actions)[a]
    init = TensorDict(seen(torch.arange(m.S).repeat_interleave(torch.as_tensor(count0))), [int(count0.sum())])
    rows = two_row_episodes(batch)
    batch = as_transition(rows.view(-1, 2))

    args = comadice_train.Args(
        objective="exact", advantage="td", f=name, alpha=alpha, gamma=m.gamma, reward_scale=0.1, policy_alpha=1.0
    )
    critics = tabular_critics(m.n, m.S, m.S)
    loss = lambda: comadice_train.critic_losses(critics, critics, batch, init, args, FREE)[1]
    value = minimise(loss, [*critics.nu.parameters(), *critics.mixer.parameters()])
    assert value == pytest.approx(args.reward_scale * solution.value, abs=1e-5)
    assert abs(comadice_train.dataset_ratio(critics, rows, args, FREE).numpy() - solution.w[s, a]).max() <= 1e-3
