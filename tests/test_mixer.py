"""Local networks, policies and mixers keep their docstrings' promises.

They are checked against loops, closed forms and finite steps.
"""

import math

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.func import functional_call, stack_module_state

from comadice_mixer import (
    MIXERS,
    CategoricalPolicy,
    Critics,
    GaussianPolicy,
    LinearMixer,
    Nu,
    Q,
    TwoLayerMixer,
    make_policy,
)

N, O, S, A, H = 3, 5, 7, 4, 16  # agents, observation, state, actions, hidden units


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random_mask(*shape):
    """At least one available action each, and some masked ones."""
    mask = torch.rand(*shape) < 0.5
    return mask | (torch.arange(shape[-1]) == torch.randint(shape[-1], shape[:-1]).unsqueeze(-1))


def available(mask):
    return torch.multinomial(mask.flatten(0, -2).float(), 1).view(mask.shape[:-1])


# ---------------------------------------------------------------- nu_i, q_i


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("leading", [(), (6,), (2, 6)])
def test_shapes(leading, layer_norm):
    obs, state = torch.randn(*leading, N, O), torch.randn(*leading, S)
    continuous, discrete, mask = (
        torch.randn(*leading, N, A),
        torch.randint(A, (*leading, N)),
        torch.ones(*leading, N, A, dtype=torch.bool),
    )
    assert Nu(N, O, H, layer_norm)(obs).shape == (*leading, N)
    assert Q(N, O, A, H, layer_norm=layer_norm)(obs, continuous).shape == (*leading, N)
    assert Q(N, O, A, H, discrete=True, layer_norm=layer_norm)(obs, discrete).shape == (*leading, N)
    gaussian, categorical = make_policy(N, O, A, False, H), make_policy(N, O, A, True, H)
    assert gaussian.log_prob(obs, continuous).shape == (*leading, N) and gaussian.act(obs).shape == (*leading, N, A)
    assert categorical.log_prob(obs, discrete, mask).shape == categorical.act(obs, mask).shape == (*leading, N)
    for layers in MIXERS:
        critics = Critics(N, O, S, A, True, H, 8, layers, layer_norm)
        x = critics.nu(obs)
        assert (
            critics.mixer(x, state).shape
            == critics.mixer.advantage(critics.q(obs, discrete) - x, state).shape
            == leading
        )
        assert critics.lam.item() == 0


def test_batched_call_is_a_loop_over_agents():
    """Agent i alone: its observation, its one-hot id, the shared layers."""
    obs, action, index = torch.randn(6, N, O), torch.randn(6, N, A), torch.randint(A, (6, N))
    nu, q, q_discrete = Nu(N, O, H), Q(N, O, A, H), Q(N, O, A, H, discrete=True)
    for b in range(6):
        for i in range(N):
            agent = torch.eye(N)[i]
            torch.testing.assert_close(nu(obs)[b, i], nu.net.layers(torch.cat([obs[b, i], agent]))[0])
            torch.testing.assert_close(
                q(obs, action)[b, i], q.net.layers(torch.cat([obs[b, i], action[b, i], agent]))[0]
            )
            torch.testing.assert_close(
                q_discrete(obs, index)[b, i], q_discrete.net.layers(torch.cat([obs[b, i], agent]))[index[b, i]]
            )


@pytest.mark.parametrize(
    "make", [lambda: Nu(N, O, H), lambda: GaussianPolicy(N, O, A, H), lambda: CategoricalPolicy(N, O, A, H)]
)
def test_agents_share_parameters_and_know_their_id(make):
    module = make()
    net, obs = module.net, torch.randn(6, N, O)
    same = net(obs[:, :1].expand(-1, N, -1))
    assert (same[:, 0] - same[:, 1]).abs().min() > 1e-6  # one observation, another agent, another output
    assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in net.layers.parameters())

    # Decentralised: an agent's output depends on its own observation alone.
    obs.requires_grad_()
    for i in range(N):
        moved = torch.autograd.grad(net(obs)[:, i].sum(), obs)[0].abs().sum((0, -1)) > 0
        assert moved.tolist() == [j == i for j in range(N)]

    # The id is all that tells agents apart: only once the ids' weights are zero does permuting agents permute outputs.
    order = torch.tensor([2, 0, 1])
    assert not torch.allclose(net(obs[:, order]), net(obs)[:, order])
    with torch.no_grad():
        net.layers[0].weight[:, O:] = 0
    torch.testing.assert_close(net(obs[:, order]), net(obs)[:, order])


def test_layer_norm():
    """On, each hidden layer's input is normalised: the first layer's scale does not matter. Off, it does."""
    for layer_norm in (False, True):
        nu, obs = Nu(N, O, H, layer_norm), torch.randn(6, N, O)
        before = nu(obs)
        with torch.no_grad():
            for p in nu.net.layers[0].parameters():
                p *= 100
        assert torch.allclose(nu(obs), before, atol=1e-2) == layer_norm


# ---------------------------------------------------------------- policies


def test_unavailable_actions_have_probability_zero():
    pi, obs, mask = CategoricalPolicy(N, O, A, H), torch.randn(50, N, O), random_mask(50, N, A)
    probs = pi.logits(obs, mask).softmax(-1)
    assert (probs[~mask] == 0).all() and (probs[mask] > 0).all()
    all_log_probs = torch.stack([pi.log_prob(obs, torch.full((50, N), a), mask) for a in range(A)], -1)
    assert (all_log_probs[~mask] == -torch.inf).all()
    torch.testing.assert_close(all_log_probs.exp(), probs)
    torch.testing.assert_close(all_log_probs.exp().sum(-1), torch.ones(50, N))
    # The softmax of the available logits, by hand.
    logits = pi.net(obs).detach().numpy()
    weight = np.exp(logits) * mask.numpy()
    np.testing.assert_allclose(probs.detach(), weight / weight.sum(-1, keepdims=True), rtol=1e-5, atol=1e-7)

    act = pi.act(obs, mask)
    assert mask.gather(-1, act.unsqueeze(-1)).all()
    assert (act == torch.tensor(np.where(mask.numpy(), logits, -np.inf).argmax(-1))).all()

    gradients = torch.autograd.grad(pi.log_prob(obs, available(mask), mask).sum(), list(pi.parameters()))
    assert all(torch.isfinite(g).all() for g in gradients) and any((g != 0).any() for g in gradients)


def test_dead_agent_has_no_gradient():
    """With its no-op alone available an agent has log pi = 0 and does not pull on the shared parameters."""
    pi, obs = CategoricalPolicy(N, O, A, H), torch.randn(6, N, O)
    mask = torch.ones(6, N, A, dtype=torch.bool)
    mask[:, 1] = torch.arange(A) == 0
    log_prob = pi.log_prob(obs, torch.zeros(6, N, dtype=torch.long), mask)
    assert (log_prob[:, 1] == 0).all() and (log_prob[:, 0] < 0).all()
    dead, alive = (torch.autograd.grad(log_prob[:, i].sum(), list(pi.parameters()), retain_graph=True) for i in (1, 0))
    assert all((g == 0).all() for g in dead) and any((g != 0).any() for g in alive)


@pytest.mark.parametrize(
    "shift, std", [(0.0, None), (10.0, math.exp(2)), (-20.0, math.exp(-5))], ids=["inside", "above", "below"]
)
def test_gaussian_log_prob_in_closed_form(shift, std):
    pi, obs = GaussianPolicy(N, O, A, H).double(), torch.randn(6, N, O).double()
    with torch.no_grad():
        pi.net.layers[-1].bias[A:] += shift  # drives log std to its bounds, -5 and 2
    mean, log_std = np.split(pi.net(obs).detach().numpy(), 2, -1)
    std = np.exp(log_std) if std is None else np.full_like(mean, std)
    action = mean + std * np.random.default_rng(0).normal(size=mean.shape)
    expected = (-0.5 * ((action - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)).sum(-1)
    np.testing.assert_allclose(pi.log_prob(obs, torch.tensor(action)).detach(), expected, rtol=1e-10)
    np.testing.assert_array_equal(pi.act(obs).detach(), mean)
    pi.action_scale = 0.85
    np.testing.assert_allclose(pi.log_prob(obs, torch.tensor(action)).detach(), expected, rtol=1e-10)
    np.testing.assert_allclose(pi.act(obs).detach(), 0.85 * mean, rtol=1e-12)


# ---------------------------------------------------------------- mixers


@pytest.mark.parametrize("mixer", [LinearMixer, TwoLayerMixer])
def test_mixer_is_monotone_and_convex_in_x(mixer):
    M, state = mixer(N, S, H).double(), 3 * torch.randn(500, S).double()
    x, y = 5 * torch.randn(2, 500, N).double()
    for function in (M, M.advantage):
        z = x.clone().requires_grad_()
        gradient = torch.autograd.grad(function(z, state).sum(), z)[0]
        assert (gradient >= 0).all() and (gradient > 0).any(0).all()
        assert (function(torch.maximum(x, y), state) >= function(x, state)).all()
        gap = (function(x, state) + function(y, state)) / 2 - function((x + y) / 2, state)
        assert gap.min() > -1e-9
        assert (gap.max() > 0.01) == (mixer is TwoLayerMixer)  # linear has no gap at all
        # Not trivially so: both signs come out of the hyper-networks, and the state matters.
        assert (function(x, state) - function(x, state.flip(0))).abs().max() > 0.1
    assert (M.W if mixer is LinearMixer else M.W1)(state).min() < 0


@pytest.mark.parametrize("mixer", [LinearMixer, TwoLayerMixer])
def test_advantage_is_zero_at_zero_and_carries_no_bias(mixer):
    M, state, x = mixer(N, S, H).double(), torch.randn(20, S).double(), torch.randn(20, N).double()
    assert (M.advantage(torch.zeros(20, N).double(), state) == 0).all()
    torch.testing.assert_close(M.advantage(x, state), M(x, state) - M(0 * x, state))
    before_M, before_advantage = M(x, state), M.advantage(x, state)
    output_bias = (M.b if mixer is LinearMixer else M.b2)[-1].bias
    with torch.no_grad():
        output_bias += 3
    torch.testing.assert_close(M(x, state), before_M + 3)
    torch.testing.assert_close(M.advantage(x, state), before_advantage)


def test_linear_mixer_satisfies_eq_5():
    """M[q] - M[nu] = M.advantage(q - nu); with two layers they differ."""
    q, nu = 3 * torch.randn(2, 20, N).double()
    state = torch.randn(20, S).double()
    M = LinearMixer(N, S, H).double()
    torch.testing.assert_close(M(q, state) - M(nu, state), M.advantage(q - nu, state))
    torch.testing.assert_close(M(q, state), (q * M.weights(state)).sum(-1) + M.b(state)[:, 0])
    M = TwoLayerMixer(N, S, H).double()
    assert (M(q, state) - M(nu, state) - M.advantage(q - nu, state)).abs().max() > 0.01


def test_two_layer_mixer_by_hand():
    """elu(x |W1| + b1) |W2| + b2 in numpy, from the hyper-networks' outputs; layouts [n, hidden]."""
    M, state, x = TwoLayerMixer(N, S, H).double(), torch.randn(6, S).double(), torch.randn(6, N).double()
    W1, b1, W2, b2 = (net(state).detach().numpy() for net in (M.W1, M.b1, M.W2, M.b2))
    for b in range(6):
        layer1 = x[b].numpy() @ abs(W1[b]).reshape(N, H) + b1[b]
        layer1 = np.where(layer1 > 0, layer1, np.exp(layer1) - 1)
        assert M(x[b], state[b]).item() == pytest.approx(layer1 @ abs(W2[b]) + b2[b, 0])


# ---------------------------------------------------------------- stacked parameters (several seeds in one call)


class Call(nn.Module):
    """functional_call runs forward; this makes another method the forward."""

    def __init__(self, module, method):
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *args):
        return getattr(self.module, self.method)(*args)


def cases():
    obs, state, x = torch.randn(6, N, O), torch.randn(6, S), torch.randn(6, N)
    mask = random_mask(6, N, A)
    continuous, discrete = torch.randn(6, N, A), available(mask)
    return {
        "nu": (lambda: Nu(N, O, H), "forward", (obs,)),
        "nu, LayerNorm": (lambda: Nu(N, O, H, True), "forward", (obs,)),
        "q, continuous": (lambda: Q(N, O, A, H), "forward", (obs, continuous)),
        "q, discrete": (lambda: Q(N, O, A, H, discrete=True), "forward", (obs, discrete)),
        "linear mixer": (lambda: LinearMixer(N, S, H), "forward", (x, state)),
        "linear mixer's advantage": (lambda: LinearMixer(N, S, H), "advantage", (x, state)),
        "2-layer mixer": (lambda: TwoLayerMixer(N, S, H), "forward", (x, state)),
        "2-layer mixer's advantage": (lambda: TwoLayerMixer(N, S, H), "advantage", (x, state)),
        "Gaussian log_prob": (lambda: GaussianPolicy(N, O, A, H), "log_prob", (obs, continuous)),
        "Gaussian act": (lambda: GaussianPolicy(N, O, A, H), "act", (obs,)),
        "categorical log_prob": (lambda: CategoricalPolicy(N, O, A, H), "log_prob", (obs, discrete, mask)),
        "categorical act": (lambda: CategoricalPolicy(N, O, A, H), "act", (obs, mask)),
    }


@pytest.mark.parametrize("case", cases())
def test_stacked_parameters_equal_the_loop(case):
    make, method, args = cases()[case]
    modules = [make() for _ in range(3)]
    expected = torch.stack([getattr(module, method)(*args) for module in modules])
    assert not torch.equal(expected[0], expected[1])

    wrapped = [Call(module, method) for module in modules]
    params, buffers = stack_module_state(wrapped)
    assert not buffers
    by_functional_call = torch.vmap(lambda p: functional_call(wrapped[0], p, args))(params)
    torch.testing.assert_close(by_functional_call, expected)

    def call(params, *args):
        with params.to_module(modules[0]):
            return getattr(modules[0], method)(*args)

    stacked = TensorDict.from_modules(*modules)
    torch.testing.assert_close(torch.vmap(call, (0, *[None] * len(args)))(stacked, *args), expected)
    # Each its own inputs as well, as batched training of several seeds has it.
    own = [torch.stack([a.roll(k, 0) for k in range(3)]) for a in args]
    expected = torch.stack([getattr(module, method)(*(a[k] for a in own)) for k, module in enumerate(modules)])
    torch.testing.assert_close(torch.vmap(call)(stacked, *own), expected)


def test_stacked_gradients_equal_the_loop():
    """torch.func.grad through the 2-layer mixer and nu together, and the module is left as it was."""
    obs, state = torch.randn(6, N, O), torch.randn(6, S)
    critics = [Critics(N, O, S, A, True, H, 8, 2) for _ in range(3)]
    before = [p.clone() for p in critics[0].parameters()]

    def loss(params):
        with params.to_module(critics[0]):
            return (critics[0].mixer(critics[0].nu(obs), state) ** 2).mean()

    gradients = torch.vmap(torch.func.grad(loss))(TensorDict.from_modules(*critics).detach())
    for k, c in enumerate(critics):
        (c.mixer(c.nu(obs), state) ** 2).mean().backward()
        for name, p in c.named_parameters():
            expected = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(gradients[k].get(tuple(name.split("."))), expected)
    assert all(torch.equal(p, q) for p, q in zip(critics[0].parameters(), before))
