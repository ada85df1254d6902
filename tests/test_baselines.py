"""The baselines: their losses against NumPy, games with known optima, and their scripts at toy sizes."""

import copy
import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from tensordict import TensorDict
from test_step import SYNCS, Recorder
from torch import nn

import baselines.common
import comadice_bc
import comadice_eval
import comadice_train
import support.runs
import support.seeds
from baselines import bcq, cql, icq, omar, omiga
from baselines.conservative import sampled_log_sum_exp, span_samples
from environments.checks import BadInput
from offline_data.dataset import open_dataset
from offline_data.replay import as_transition
from offline_data.writer import DatasetWriter
from support.seeds import Graph, adam

METHODS = {"bcq": bcq, "cql": cql, "icq": icq, "omar": omar, "omiga": omiga}
B, n, O, S, A = 7, 2, 3, 5, 4
GAMMA = 0.9
# The card of the games that are made here.
GAME = {
    "env": "nowhere",
    "task": "game",
    "quality": "made",
    "engine": None,
    "interface": "benchmark",
    "made": {"by": "tests"},
}


def resolved(module, discrete: bool, **flags):
    """The flags of a method on data of mean absolute reward 0.4."""
    card = {"discrete": discrete, "quality": "medium"}
    own = module.defaults(card, 0.4) if hasattr(module, "defaults") else {}
    return baselines.common.resolve(module.Args(hidden=6, gamma=GAMMA, tau=0.25, **flags), 0.4, own)


def make_networks(module, discrete: bool, args, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    card = {"n_agents": n, "obs_dim": O, "state_dim": S, "action_dim": A, "discrete": discrete}
    return (module.make_networks if module is bcq else module.Networks)(card, args).double()


def make_update(module, net, target, optimizer, args, seeds: int = 1):
    """The method's update as its script makes it, and the average of the policy that it moves."""
    average = copy.deepcopy(getattr(net, "policy", net)).requires_grad_(False)
    step = torch.tensor(0.1, device=next(net.parameters()).device)
    return baselines.common.make_update(net, target, average, optimizer, step, module.losses, args, seeds), average


def with_noise(module, discrete: bool, batch: TensorDict, args, seed: int = 0, agents: int = n) -> TensorDict:
    """The batch, or stacked batches, with the random numbers that the script draws."""
    generators = [torch.Generator().manual_seed(seed + s) for s in range(batch.batch_size[:-1].numel())]
    method = baselines.common.Method("", None, None, [], noise=getattr(module, "noise", None))
    card = {"n_agents": agents, "action_dim": A, "discrete": discrete}
    batch = baselines.common.add_noise(batch, method, card, args, generators)
    if "noise" in batch.keys():
        batch["noise"] = batch["noise"].to(batch["reward"].dtype)
    return batch


def make_batch(discrete: bool) -> TensorDict:
    """Transitions that end by termination (0, 1), by a time limit (2) and not at all, with forbidden actions."""
    g = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def agents():
        if not discrete:
            return {"observation": rand(B, n, O), "action": 1.5 * rand(B, n, A)}
        mask = torch.rand(B, n, A, generator=g) < 0.5
        action = torch.randint(A - 1, (B, n), generator=g)
        mask.scatter_(-1, action.unsqueeze(-1), True)
        mask[..., -1] = False  # the last action is never available
        return {"observation": rand(B, n, O), "action": action, "action_mask": mask}

    now, after = agents(), agents()
    next_action = after.pop("action")
    t = torch.arange(B).unsqueeze(-1)
    following = {"state": rand(B, S), "agents": TensorDict(after, [B, n])}
    team = {
        "state": rand(B, S),
        "reward": rand(B, 1),
        "terminated": t < 2,
        "next_action": next_action,
        "has_next": t > 2,
    }
    return TensorDict(team | {"agents": TensorDict(now, [B, n]), "next": TensorDict(following, [B])}, [B])


# ---------------------------------------------------------------- the same losses in NumPy: one agent, one transition


def dense(net: nn.Sequential, x: np.ndarray) -> np.ndarray:
    for layer in net:
        if isinstance(layer, nn.Linear):
            x = layer.weight.detach().numpy() @ x + layer.bias.detach().numpy()
        elif isinstance(layer, nn.LayerNorm):
            x = (x - x.mean()) / np.sqrt(
                x.var() + layer.eps
            ) * layer.weight.detach().numpy() + layer.bias.detach().numpy()
        elif isinstance(layer, nn.ReLU):
            x = np.maximum(x, 0)
    return x


def local(mlp, agent: int, *x) -> np.ndarray:
    return dense(mlp.layers, np.concatenate([*x, np.eye(n)[agent]]))


def q_value(q, agent: int, obs, action) -> float:
    return local(q.net, agent, obs)[int(action)] if q.discrete else local(q.net, agent, obs, action)[0]


def mix(mixer, values, state) -> float:
    return float(np.abs(dense(mixer.W, state)) @ values + dense(mixer.b, state)[0])


def log_softmax(x, mask) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.where(mask, np.exp(x), 0) / np.exp(x)[mask].sum())


def log_prob(policy, agent: int, obs, action, mask) -> float:
    out = local(policy.net, agent, obs)
    if mask is not None:
        return log_softmax(out, mask)[int(action)]
    mean, log_std = np.split(out, 2)
    return float(
        sum(
            -((a - m) ** 2) / (2 * np.exp(2 * s)) - s - 0.5 * math.log(2 * math.pi)
            for a, m, s in zip(action, mean, log_std)
        )
    )


def arrays(batch: TensorDict):
    """Transition by transition: (s, o, a, mask, r, terminated, has_next, s', o', a', mask')."""

    def mask(agents, b):
        return agents["action_mask"][b].numpy() if "action_mask" in agents.keys() else [None] * n

    for b in range(B):
        x, y = batch[b], batch["next"][b]
        yield (
            x["state"].numpy(),
            x["agents", "observation"].numpy(),
            x["agents", "action"].numpy(),
            mask(batch["agents"], b),
            x["reward"].item(),
            x["terminated"].item(),
            x["has_next"].item(),
            y["state"].numpy(),
            y["agents", "observation"].numpy(),
            x["next_action"].numpy(),
            mask(batch["next", "agents"], b),
        )


def omiga_losses(net, target, batch, args, calls) -> dict:
    q_loss, v_loss, policy_loss = [], [], []
    for s, o, a, m, r, terminated, _, s2, o2, _, _ in arrays(batch):
        v_next = mix(target.mixer, [local(target.v.net, i, o2[i])[0] for i in range(n)], s2)
        q_tot = mix(net.mixer, [q_value(net.q, i, o[i], a[i]) for i in range(n)], s)
        q_loss.append((q_tot - r - (0 if terminated else GAMMA * v_next)) ** 2)
        w = np.abs(dense(target.mixer.W, s))
        v = [local(net.v.net, i, o[i])[0] for i in range(n)]
        alpha = args.alpha * args.reward_scale  # the batch's rewards are scaled
        z = [w[i] * (q_value(target.q, i, o[i], a[i]) - v[i]) / alpha for i in range(n)]
        v_loss.append(sum(np.exp(z[i]) + w[i] * v[i] / alpha for i in range(n)))
        policy_loss.append(-sum(np.exp(z[i]) * log_prob(net.policy, i, o[i], a[i], m[i]) for i in range(n)))
    return {"q_loss": np.mean(q_loss), "v_loss": np.mean(v_loss), "policy_loss": np.mean(policy_loss)}


def icq_losses(net, target, batch, args, calls) -> dict:
    rows = list(arrays(batch))
    q_next = [
        mix(target.mixer, [q_value(target.q, i, o2[i], a2[i]) for i in range(n)], s2) for *_, s2, o2, a2, _ in rows
    ]
    with_next = [b for b, row in enumerate(rows) if row[6]]
    alpha, alpha_q = args.alpha * args.reward_scale, args.alpha_q * args.reward_scale  # the batch's rewards are scaled
    Z = sum(math.exp(q_next[b] / alpha_q) for b in with_next) / len(with_next)
    errors, exponent, log_pi = [], np.zeros((B, n)), np.zeros((B, n))
    for b, (s, o, a, m, r, terminated, has_next, *_) in enumerate(rows):
        q = [q_value(net.q, i, o[i], a[i]) for i in range(n)]
        if terminated or has_next:
            backup = math.exp(q_next[b] / alpha_q) / Z * q_next[b] if has_next else 0
            errors.append((r + GAMMA * backup - mix(net.mixer, q, s)) ** 2)
        for i in range(n):
            baseline = 0.0
            if m[i] is not None:
                pi = np.exp(log_softmax(local(net.policy.net, i, o[i]), m[i]))
                baseline = sum(pi[k] * q_value(net.q, i, o[i], k) for k in range(A))
            exponent[b, i] = np.abs(dense(net.mixer.W, s))[i] * (q[i] - baseline) / alpha
            log_pi[b, i] = log_prob(net.policy, i, o[i], a[i], m[i])
    weight = np.exp(exponent) / np.exp(exponent).mean(0)
    return {"q_loss": np.mean(errors), "policy_loss": -(weight * log_pi).sum(1).mean()}


def sampled_total(noise, b: int, i: int, mean, std, value, fed) -> float:
    """log of the mean of exp(value(x)) / density over uniform samples in [-2, 2] and samples around the mean.

    Samples beyond 2 add nothing. `fed` are the actions that q saw.
    """
    mean = mean.clip(-1, 1)
    uniform, drawn = noise["uniform"][b, :, i].numpy(), mean + std * noise["near"][b, :, i].numpy()
    log_density = (-((drawn - mean) ** 2) / (2 * std**2) - np.log(std) - 0.5 * math.log(2 * math.pi)).sum(-1)
    assert (np.abs(uniform) <= 2).all() and (np.abs(uniform) > 1).any()
    terms = [math.exp(value(x)) * 4**A for x in uniform]
    terms += [math.exp(value(x) - d) if (abs(x) <= 2).all() else 0.0 for x, d in zip(drawn, log_density)]
    np.testing.assert_allclose(fed, np.concatenate([uniform, drawn]))
    return math.log(np.mean(terms))


def drawn_action(policy, agent: int, obs, normal) -> np.ndarray:
    """The policy's action for these standard normal numbers."""
    mean, log_std = np.split(local(policy.net, agent, obs), 2)
    return mean + np.exp(log_std) * normal


def cql_losses(net, target, batch, args, calls) -> dict:
    td, gap, actor = [], [], []
    for b, (s, o, a, m, r, terminated, _, s2, o2, _, m2) in enumerate(arrays(batch)):
        w = np.abs(dense(net.mixer.W, s))
        if m[0] is not None:
            q = [q_value(net.q, i, o[i], a[i]) for i in range(n)]
            q_next = [max(q_value(target.q, i, o2[i], k) for k in range(A) if m2[i][k]) for i in range(n)]
            total = [
                math.log(sum(math.exp(w[i] * q_value(net.q, i, o[i], k)) for k in range(A) if m[i][k]))
                for i in range(n)
            ]
        else:
            samples, noise = calls["q"][1], calls["noise"]
            q = [q_value(net.q, i, o[i], a[i]) for i in range(n)]
            draw = lambda agent, obs, normal: drawn_action(net.policy, agent, obs, normal[b, agent].numpy())
            new = [draw(i, o[i], noise["new_action"]) for i in range(n)]
            next_action = [draw(i, o2[i], noise["next_action"]).clip(-1, 1) for i in range(n)]
            q_next = [q_value(target.q, i, o2[i], next_action[i]) for i in range(n)]
            total = []
            for i in range(n):
                mean, log_std = np.split(local(net.policy.net, i, o[i]), 2)
                value = lambda x, i=i: w[i] * q_value(net.q, i, o[i], x)
                total.append(sampled_total(noise, b, i, mean, np.exp(log_std), value, samples[:, b, i]))
            # see the test; the actor's loss outside of the box is checked by hand below
            assert (np.abs(new) < 1).all()
            t = net.log_temperature.exp().item()
            actor.append(
                sum(
                    t * log_prob(net.policy, i, o[i], new[i], None) - w[i] * q_value(net.q, i, o[i], new[i])
                    for i in range(n)
                )
            )
        td.append((r + (0 if terminated else GAMMA * mix(target.mixer, q_next, s2)) - mix(net.mixer, q, s)) ** 2)
        gap.append(sum(total[i] - w[i] * q[i] for i in range(n)))
    return {"td_loss": np.mean(td), "conservative_loss": np.mean(gap)} | (
        {"policy_loss": np.mean(actor)} if actor else {}
    )


def omar_losses(net, target, batch, args, calls) -> dict:
    td, gap, actor, c = [], [], [], args.rectification
    for b, (_, o, a, m, r, terminated, _, _, o2, _, m2) in enumerate(arrays(batch)):
        for i in range(n):
            if m[i] is not None:
                best = max((k for k in range(A) if m2[i][k]), key=lambda k: local(target.policy.net, i, o2[i])[k])
                q_next = min(q_value(q, i, o2[i], best) for q in target.q)
                q = [q_value(q, i, o[i], a[i]) for q in net.q]
                total = [math.log(sum(math.exp(q_value(q, i, o[i], k)) for k in range(A) if m[i][k])) for q in net.q]
                values = [q_value(net.q[0], i, o[i], k) for k in range(A)]
                log_pi = log_softmax(local(net.policy.net, i, o[i]), m[i])
                a_hat = max((k for k in range(A) if m[i][k]), key=lambda k: values[k])
                actor.append(-(1 - c) * np.exp(log_pi) @ values - c * log_pi[a_hat])
            else:
                q_next = min(q_value(q, i, o2[i], local(target.policy.net, i, o2[i])[:A].clip(-1, 1)) for q in target.q)
                q = [q_value(q, i, o[i], a[i]) for q in net.q]
                mean = local(net.policy.net, i, o[i])[:A]
                samples, searched = calls["q.0"][1], calls["q.0"][-1]  # of the log-sum-exp, of the search's last step
                values = [lambda x, q=q, i=i: q_value(q, i, o[i], x) for q in net.q]
                fed = samples[:, b, i]
                total = [sampled_total(calls["noise"], b, i, mean, args.cql_std, value, fed) for value in values]
                candidates = [*searched[:, b, i], mean.clip(-1, 1)]
                a_hat = max(candidates, key=lambda x: q_value(net.q[0], i, o[i], x))
                pull = ((mean - a_hat) ** 2).mean()
                actor.append(-(1 - c) * q_value(net.q[0], i, o[i], mean.clip(-1, 1)) + c * pull)
            td.append(sum((r + (0 if terminated else GAMMA * q_next) - x) ** 2 for x in q))
            gap.append(sum(total) - sum(q))
    return {"td_loss": np.mean(td), "conservative_loss": np.mean(gap), "policy_loss": np.mean(actor)}


def bcq_losses(net, target, batch, args, calls) -> dict:
    q_loss, policy_loss, vae = [], [], []
    for b, (s, o, a, m, r, terminated, _, s2, o2, _, m2) in enumerate(arrays(batch)):
        if m[0] is not None:
            q_next = []
            for i in range(n):
                G = np.exp(log_softmax(local(net.behaviour.net, i, o2[i]), m2[i]))
                candidates = [k for k in range(A) if G[k] > args.threshold * G.max()]
                q_next.append(q_value(target.q, i, o2[i], max(candidates, key=lambda k: q_value(net.q, i, o2[i], k))))
            totals = [mix(net.mixer, [q_value(net.q, i, o[i], a[i]) for i in range(n)], s)]
            policy_loss.append(-sum(log_prob(net.behaviour, i, o[i], a[i], m[i]) for i in range(n)))
        else:
            z, latents, latent = (x[..., O:] for x in calls["decoder"])

            def perturbed(networks, i, obs, action):
                return (action + args.phi * np.tanh(local(networks.perturbation, i, obs, action))).clip(-1, 1)

            q_next = []
            for i in range(n):
                mean, log_std = np.split(local(net.encoder, i, o[i], a[i].clip(-1, 1)), 2)
                error = np.tanh(local(net.decoder, i, o[i], z[b, i])) - a[i].clip(-1, 1)
                kl = (mean**2 + np.exp(2 * log_std) - 1 - 2 * log_std) / 2
                vae.append((error**2).mean() + args.kl_weight * kl.mean())
                values = []
                for k in range(args.target_candidates):
                    x = perturbed(target, i, o2[i], np.tanh(local(net.decoder, i, o2[i], latents[k, b, i])))
                    twins = [q_value(q, i, o2[i], x) for q in target.q]
                    values.append(args.clip_lambda * min(twins) + (1 - args.clip_lambda) * max(twins))
                q_next.append(max(values))
            assert np.abs(latents).max() == 0.5
            totals = [mix(net.mixer, [q_value(q, i, o[i], a[i]) for i in range(n)], s) for q in net.q]
            proposal = [np.tanh(local(net.decoder, i, o[i], latent[b, i])) for i in range(n)]
            policy_loss.append(-sum(q_value(net.q[0], i, o[i], perturbed(net, i, o[i], proposal[i])) for i in range(n)))
        errors = [r + (0 if terminated else GAMMA * mix(target.mixer, q_next, s2)) - x for x in totals]
        if m[0] is not None:  # Huber's loss
            errors = [math.sqrt(e**2 / 2 if abs(e) < 1 else abs(e) - 0.5) for e in errors]
        q_loss.append(sum(e**2 for e in errors))
    return {"q_loss": np.mean(q_loss), "policy_loss": np.mean(policy_loss)} | (
        {"vae_loss": np.mean(vae)} if vae else {}
    )


def updated(name: str, discrete: bool, batch: TensorDict, change=None, lr: float = 1e-3, **flags):
    """One update of networks and of targets that differ from them.

    Returns (metrics, networks and targets before, the same after, what modules were fed).
    """
    module = METHODS[name]
    args = resolved(module, discrete, **flags)
    net, target = make_networks(module, discrete, args, 1), make_networks(module, discrete, args, 2)
    if change is not None:
        change(net, target)
    before, calls = copy.deepcopy((net, target)), {}
    for prefix, networks in (("", net), ("target.", target)):
        for part, m in networks.named_modules():
            if part in ("q", "q.0", "decoder"):
                m.register_forward_hook(
                    lambda m, x, out, key=prefix + part: calls.setdefault(key, []).append(x[-1].detach().numpy())
                )
    update, _ = make_update(module, net, target, torch.optim.SGD(net.parameters(), lr), args)
    batch = with_noise(module, discrete, batch, args)
    metrics, calls["noise"] = update(batch), batch.get("noise", None)
    return {k: v.item() for k, v in metrics.items()}, before, (net, target), calls, args


both = pytest.mark.parametrize("discrete", [False, True], ids=["continuous", "discrete"])
each = pytest.mark.parametrize("name", METHODS)


@both
@each
def test_losses_are_those_of_numpy(name, discrete):
    def narrow(net, target):
        if name == "cql" and not discrete:  # a Gaussian whose actions are in the box
            net.policy.net.layers[-1].bias.data[A:] = -2

    batch = make_batch(discrete)
    metrics, (net, target), _, calls, args = updated(name, discrete, batch, narrow)
    expected = globals()[f"{name}_losses"](net, target, batch, args, calls)
    assert expected.keys() == {k for k in metrics if k.endswith("_loss")}
    for key, value in expected.items():
        assert metrics[key] == pytest.approx(value, rel=1e-9), key


def test_actor_loss_of_cql_inside_and_outside_of_the_box():
    """By hand: 0.5 * log pi - 2 * q, plus the squared distance to the box."""
    w, q, log_pi = torch.tensor([[2.0, 2.0]]), torch.tensor([[3.0, 3.0]]), torch.tensor([[-1.0, -1.0]])
    loss = cql.actor_loss(w, q, log_pi, torch.tensor(0.5), torch.tensor([[[0.9], [-1.5]]]))
    assert loss.item() == pytest.approx((-0.5 - 6) + (-0.5 - 6 + 0.25))


def test_search_of_omar_is_that_of_numpy():
    """Eq. 3 of Pan et al. in a loop: three steps, whose samples' softmax of q gives the next mean and deviation."""
    g = torch.Generator().manual_seed(0)
    noise, own = torch.randn(3, 10, 5, 2, 1, generator=g), torch.rand(5, 2, 1, generator=g)
    q = lambda obs, a: 3 * torch.sin(4 * a).sum(-1) - (a - 0.3).square().sum(-1)
    found = omar.search(q, torch.zeros(5, 2, 1), own, q(None, own), noise, 2.0)
    for b in range(5):
        for i in range(2):
            value = lambda x: 3 * np.sin(4 * x) - (x - 0.3) ** 2
            mean, std = 0.0, 2.0
            for step in noise[:, :, b, i, 0].numpy():
                x = (mean + std * step).clip(-1, 1)
                weight = np.exp(value(x)) / np.exp(value(x)).sum()
                mean = (weight * x).sum()
                std = np.sqrt(((x - mean) ** 2).mean())
            candidates = [*x, own[b, i, 0].item()]
            assert found[b, i, 0].item() == pytest.approx(max(candidates, key=value), abs=1e-5)


def test_gradient_of_omar_s_policy():
    """-(1 - c) dq/da + 2 c (a - a_hat), the first term through q of the clipped action: none outside of the box."""
    mean, a_hat, c = torch.tensor([[[0.5], [1.5]]], requires_grad=True), torch.tensor([[[0.2], [0.9]]]), 0.7
    q = (3 * mean.clamp(-1, 1) ** 2)[..., 0]
    (gradient,) = torch.autograd.grad(omar.actor_loss(q, mean, a_hat, c), mean)
    wanted = [(-0.3 * 6 * 0.5 + 1.4 * 0.3) / 2, 1.4 * 0.6 / 2]  # a mean over two agents
    assert gradient.flatten().tolist() == pytest.approx(wanted)


def test_weight_of_omiga_is_bounded():
    """exp(z) is at most exp(10), as in the authors' code."""
    w, log_prob = torch.ones(1, 2), torch.tensor([[-1.0, -2.0]])
    loss = omiga.policy_loss(w, torch.tensor([[3.0, 50.0]]), torch.zeros(1, 2), 1.0, log_prob)
    assert loss.item() == pytest.approx(math.exp(3) + 2 * math.exp(10))


def test_sampled_log_sum_exp_is_the_integral():
    """log of the integral of exp(3x) over [-1, 1], from uniform samples and a Gaussian's samples inside the box."""
    g = torch.Generator().manual_seed(0)
    uniform, drawn = torch.rand(200_000, generator=g) * 2 - 1, 0.3 + 0.8 * torch.randn(200_000, generator=g)
    density = torch.distributions.Normal(0.3, 0.8).log_prob(drawn).masked_fill(drawn.abs() > 1, torch.inf)
    x, log_density = (
        torch.cat([uniform, drawn])[:, None, None],
        torch.cat([torch.full_like(uniform, -math.log(2)), density])[:, None, None],
    )
    exact = math.log((math.exp(3) - math.exp(-3)) / 3)
    assert sampled_log_sum_exp(3 * x, log_density).item() == pytest.approx(exact, abs=0.01)
    twins = sampled_log_sum_exp(torch.stack([3 * x, torch.zeros_like(x)]), log_density)
    assert twins.flatten().tolist() == pytest.approx([exact, math.log(2)], abs=0.01)


def test_the_integral_reaches_beyond_the_box():
    """log of the integral of exp(x) over [-2, 2], though the simulator's box ends at 1."""
    noise = cql.sample_noise({"n_agents": 1, "action_dim": 1}, 1, 200_000, torch.Generator().manual_seed(0))
    samples, log_density = span_samples(torch.tensor([[[0.3]]]), torch.tensor([[[0.8]]]), noise)
    exact = math.log(math.exp(2) - math.exp(-2))
    assert sampled_log_sum_exp(samples[..., 0], log_density).item() == pytest.approx(exact, abs=0.01)


def test_value_of_omiga_is_the_soft_maximum():
    """The loss is least at v = alpha / w log E[exp(w q / alpha)]. There exp(z) is a policy over the data's actions.

    Far from the minimum the gradient still leads to it.
    """
    q, w, alpha = torch.tensor([[0.0], [1.0], [4.0], [4.0]]), torch.full((4, 1), 2.0), 1.5
    v = torch.tensor(-100.0, requires_grad=True)  # z is far beyond its bound
    (slope,) = torch.autograd.grad(omiga.v_loss(w, q, v.expand(4, 1), alpha), v)
    assert slope < -1000
    v = torch.tensor(alpha / 2 * math.log(sum(math.exp(2 * x / alpha) for x in (0, 1, 4, 4)) / 4), requires_grad=True)
    (slope,) = torch.autograd.grad(omiga.v_loss(w, q, v.expand(4, 1), alpha), v)
    assert slope.item() == pytest.approx(0, abs=1e-5)


def test_search_of_omar_finds_the_best_action():
    peak = torch.tensor([0.7, -0.4])
    obs = torch.zeros(3, n, O)

    def q(obs, action):
        return -10 * (action - peak).square().sum(-1)

    noise = torch.randn(3, 200, 3, n, 2, generator=torch.Generator().manual_seed(0))
    own = torch.zeros(3, n, 2)
    found = omar.search(q, obs, own, q(obs, own), noise, 2.0)
    assert (found - peak).abs().max() < 0.2
    best = peak.expand(3, n, 2)
    assert torch.equal(omar.search(q, obs, best, q(obs, best), noise, 2.0), best), (
        "nothing that is sampled beats the policy's action at the peak"
    )


@both
@each
def test_update_moves_all_networks_and_the_targets(name, discrete):
    """Every part of the networks learns, and the targets move a quarter of the way to them (tau 0.25)."""
    _, (net, target), (net2, target2), _, _ = updated(name, discrete, make_batch(discrete), lr=1.0)
    moved = {k for (k, x), y in zip(net.named_parameters(), net2.parameters()) if not torch.equal(x, y)}
    assert {k.split(".")[0] for k in moved} == {k.split(".")[0] for k, _ in net.named_parameters()}
    for x, y, z in zip(target.parameters(), target2.parameters(), net2.parameters()):
        torch.testing.assert_close(y, x + 0.25 * (z - x))


@both
@pytest.mark.parametrize(
    "name, flags", [("icq", {"alpha": 5.0}), ("omar", {"rectification": 0.9}), ("omiga", {"alpha": 1.0}), ("cql", {})]
)
def test_the_policy_s_loss_leaves_the_values_alone(name, flags, discrete):
    """What only the policy's loss depends on changes the policy's step, and not q's or the mixer's."""

    def hotter(net, target):
        if name == "cql" and not discrete:
            net.log_temperature.data += 2

    (_, _, (one, _), _, _), (_, _, (other, _), _, _) = (
        updated(name, discrete, make_batch(discrete), *x[0], **x[1]) for x in (((), {}), ((hotter,), flags))
    )
    for part in ("q", "mixer"):
        assert all(
            torch.equal(x, y) for x, y in zip(*(getattr(m, part, nn.Identity()).parameters() for m in (one, other)))
        )
    policies = (getattr(m, "policy", m.q).parameters() for m in (one, other))
    same = all(torch.equal(x, y) for x, y in zip(*policies))
    assert same == (name == "cql" and discrete)  # which has no policy beside q


# Which loss trains which parts of the networks.
TRAINS = {
    ("bcq", False): {"q_loss": {"q", "mixer"}, "policy_loss": {"perturbation"}, "vae_loss": {"encoder", "decoder"}},
    ("bcq", True): {"q_loss": {"q", "mixer"}, "policy_loss": {"behaviour"}},
    ("cql", False): {"td_loss": {"q", "mixer"}, "conservative_loss": {"q", "mixer"}, "policy_loss": {"policy"}},
    ("cql", True): {"td_loss": {"q", "mixer"}, "conservative_loss": {"q", "mixer"}},
    ("icq", False): {"q_loss": {"q", "mixer"}, "policy_loss": {"policy"}},
    ("icq", True): {"q_loss": {"q", "mixer"}, "policy_loss": {"policy"}},
    ("omar", False): {"td_loss": {"q"}, "conservative_loss": {"q"}, "policy_loss": {"policy"}},
    ("omar", True): {"td_loss": {"q"}, "conservative_loss": {"q"}, "policy_loss": {"policy"}},
    ("omiga", False): {"q_loss": {"q", "mixer"}, "v_loss": {"v"}, "policy_loss": {"policy"}},
    ("omiga", True): {"q_loss": {"q", "mixer"}, "v_loss": {"v"}, "policy_loss": {"policy"}},
}


@both
@each
def test_each_loss_trains_its_own_parts(name, discrete):
    """A gradient of any other part would be added to that of the part's own loss, since their sum is minimised."""
    module = METHODS[name]
    args = resolved(module, discrete)
    net, target = (make_networks(module, discrete, args, seed) for seed in (1, 2))
    values = module.losses(net, target, with_noise(module, discrete, make_batch(discrete), args), args)
    names, parameters = zip(*net.named_parameters())
    trained = {}
    for key in [key for key in values if key.endswith("_loss")]:
        gradients = torch.autograd.grad(values[key], parameters, retain_graph=True, allow_unused=True)
        trained[key] = {part.split(".")[0] for part, grad in zip(names, gradients) if grad is not None and grad.any()}
    assert trained == TRAINS[name, discrete]


@both
@each
def test_only_termination_cuts_the_bootstrap(name, discrete):
    base = updated(name, discrete, make_batch(discrete))[0]
    batch = make_batch(discrete)
    batch["next", "agents", "observation"][:2] = torch.nan  # nothing beyond termination is looked at
    batch["next", "state"][:2] = torch.nan
    ended = updated(name, discrete, batch)[0]
    key = "q_loss" if "q_loss" in base else "td_loss"
    assert ended[key] == pytest.approx(base[key], rel=1e-12)
    batch = make_batch(discrete)
    batch["next", "agents", "observation"][2] += 1  # a time limit's next state
    assert (updated(name, discrete, batch)[0][key] != base[key]) == (name != "icq")  # whose action nobody recorded


@each
def test_unavailable_actions_have_no_part(name):
    """The last action is forbidden everywhere: what the networks say of it changes nothing, in any loss."""

    def praise(net, target):
        for networks in (net, target):
            parts = [networks.q] if not isinstance(networks.q, nn.ModuleList) else networks.q
            for part in [*parts, *(getattr(networks, k) for k in ("policy", "behaviour") if hasattr(networks, k))]:
                with torch.no_grad():
                    part.net.layers[-1].bias[-1] += 50

    base, praised = (updated(name, True, make_batch(True), change)[0] for change in (None, praise))
    assert base == pytest.approx(praised)


@both
@each
def test_update_waits_for_nothing(name, discrete):
    """No value is fetched to the host, and twice the agents need no more operations."""
    module, names = METHODS[name], []
    for agents in (2, 4):
        args = resolved(module, discrete)
        card = {"n_agents": agents, "obs_dim": O, "state_dim": S, "action_dim": A, "discrete": discrete}
        net = (module.make_networks if module is bcq else module.Networks)(card, args)
        rows = {
            "observation": torch.randn(B, agents, O),
            "action": torch.randint(A, (B, agents)) if discrete else torch.randn(B, agents, A),
        }
        if discrete:
            rows["action_mask"] = torch.ones(B, agents, A, dtype=torch.bool)
        no = torch.zeros(B, 1, dtype=torch.bool)
        batch = TensorDict(
            {
                "state": torch.randn(B, S),
                "reward": torch.randn(B, 1),
                "terminated": no,
                "has_next": ~no,
                "next_action": rows["action"],
                "agents": TensorDict(rows, [B, agents]),
            },
            [B],
        )
        batch["next"] = batch.select("state", "agents").clone()
        update, _ = make_update(module, net, copy.deepcopy(net), torch.optim.SGD(net.parameters(), 1e-3), args)
        with Recorder() as recorder:
            update(with_noise(module, discrete, batch, args, agents=agents))
        names.append(recorder.names)
    assert not SYNCS & set(names[0]) and names[0] == names[1]


def make_batches(discrete: bool, seeds: int) -> TensorDict:
    """make_batch for one seed, or stacked for several."""
    return torch.stack([make_batch(discrete)] * seeds) if seeds > 1 else make_batch(discrete)


def train(
    name: str, discrete: bool, device: str, enabled: bool, seeds: int
) -> tuple[list[torch.Tensor], Graph, list[tuple[int, ...]], TensorDict]:
    """Eight updates through a Graph, of stacked seeds if there are several.

    Returns (the tensors that were trained, the graph, their addresses after each step, the graph's last batch).
    """
    module = METHODS[name]
    args = resolved(module, discrete)
    each = lambda first: [make_networks(module, discrete, args, first + s).to(device) for s in range(seeds)]
    net, target = support.seeds.stack(each(1)), support.seeds.stack(each(11))
    optimizer = adam(list(net.parameters()), 1e-3, torch.device(device))
    update, average = make_update(module, net, target, optimizer, args, seeds)
    graph, batch, places = Graph(update, enabled), make_batches(discrete, seeds).to(device), []
    for step in range(8):
        batch["reward"].fill_(step)
        graph(with_noise(module, discrete, batch, args, step))
        tensors = [
            *net.parameters(),
            *target.parameters(),
            *average.parameters(),
            *(v for state in optimizer.state.values() for v in state.values()),
        ]
        places.append(tuple(t.data_ptr() for t in tensors))
    return [t.detach().cpu() for t in tensors], graph, places, batch


@pytest.mark.parametrize("seeds", [1, 2])
@both
@each
def test_update_works_in_place(name, discrete, seeds, monkeypatch):
    """As a CUDA graph asks for: the same tensors at every step, and inputs that are read and not changed."""
    monkeypatch.setattr(support.seeds, "VMAPPED", ("cpu",))
    tensors, graph, places, batch = train(name, discrete, "cpu", True, seeds)
    assert graph.graph is None and len(set(places)) == 1 and len(places[0]) == len(tensors)
    untouched = make_batches(discrete, seeds)
    untouched["reward"].fill_(7)
    assert set(batch.keys(True, True)) == set(untouched.keys(True, True)) and (batch == untouched).all()


@pytest.mark.cuda
@pytest.mark.parametrize("seeds", [1, 2])
@both
@each
def test_graph_trains_as_eager_does(name, discrete, seeds):
    """With the same random numbers; the first steps are eager, the later ones replays."""
    (eager, _, _, _), (replayed, graph, _, _) = (
        train(name, discrete, "cuda", False, seeds),
        train(name, discrete, "cuda", True, seeds),
    )
    assert graph.graph is not None
    for ours, theirs in zip(replayed, eager):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@both
@pytest.mark.parametrize("name", ["omiga", "icq", "cql", "omar"])
def test_temperatures_are_in_units_of_the_reward(name, discrete, tmp_path):
    """With ten times the rewards the policy is the same: with the defaults, and with ten times the temperatures."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(8, 6, 1, generator=generator)
    module, policies, configs = METHODS[name], [], []
    published = {"omiga": {"alpha": 0.7}, "icq": {"alpha": 0.7, "alpha_q": 30.0}}.get(name, {"cql_alpha": 2.0})
    for number, (factor, relative) in enumerate([(1, True), (10, True), (1, False), (10, False)]):
        writer, g = DatasetWriter(tmp_path / f"data{number}"), torch.Generator().manual_seed(1)
        for reward in rewards:
            end = torch.tensor([[False], [False], [False], [False], [True], [False]])
            action = torch.randint(3, (6, 2), generator=g) if discrete else torch.rand(6, 2, 1, generator=g)
            agents = {"observation": torch.randn(6, 2, 3, generator=g), "action": action} | (
                {"action_mask": torch.ones(6, 2, 3, dtype=torch.bool)} if discrete else {}
            )
            team = {
                "state": torch.randn(6, 4, generator=g),
                "reward": factor * reward,
                "terminated": end,
                "done": end.clone(),
            }
            writer.append(TensorDict(team | {"agents": TensorDict(agents, [6, 2])}, [6]))
        data = writer.close(GAME)
        flags = {} if relative else {flag: factor * value for flag, value in published.items()}
        out = tmp_path / f"runs{number}"
        module.main(module.Args(**QUICK | {"steps": 40}, **flags, data=str(data), out=str(out)))
        run = out / "nowhere/game/made" / name / "seed0"
        policies.append(torch.load(run / "checkpoint.pt", weights_only=True)["policy"])
        configs.append(json.loads((run / "config.json").read_text()))
    for one, ten in (policies[:2], policies[2:]):
        for key, value in one.items():
            torch.testing.assert_close(ten[key], value, rtol=1e-3, atol=1e-4)
    moved = [(policies[0][key] - policies[2][key]).abs().max() for key in policies[0]]
    assert any(distance > 1e-3 for distance in moved), "the temperature matters"
    # The defaults are multiples of the mean absolute reward of the transitions.
    unit = rewards[:, :5].abs().mean().item()
    times = {"omiga": {"alpha": 5}, "icq": {"alpha": 0.4 if discrete else 50, "alpha_q": 4000}}
    times = times.get(name, {"cql_alpha": 5})
    for config, factor in zip(configs, (1, 10)):
        assert config["reward_scale"] == pytest.approx(0.2 / unit / factor, rel=1e-3)
        for flag, value in times.items():
            assert config[flag] == pytest.approx(value * unit * factor, rel=1e-3)


@each
def test_methods_are_on_equal_terms(name):
    """Every q and v has the target step, discount and LayerNorm of ComaDICE's default. Rewards are 0.2 on average."""
    for discrete in (False, True):
        args, comadice = resolved(METHODS[name], discrete), comadice_train.resolve(comadice_train.Args(), 0.4)
        fresh = METHODS[name].Args()
        assert (fresh.tau, fresh.gamma) == (comadice.tau, comadice.gamma)
        assert (fresh.layer_norm, args.reward_scale) == (comadice.layer_norm, comadice.reward_scale)
        net = make_networks(METHODS[name], discrete, args, 0)
        normed = {key.split(".")[0] for key, module in net.named_modules() if isinstance(module, nn.LayerNorm)}
        # q's network in discrete CQL's policy is listed once
        assert normed == {key for key, _ in net.named_children() if key in ("q", "v")}
        args.layer_norm = False
        assert not any(
            isinstance(module, nn.LayerNorm) for module in make_networks(METHODS[name], discrete, args, 0).modules()
        )


def test_published_values_of_omar_and_bcq():
    """Pan et al.'s coefficient depends on the data's quality.

    BCQ plays the best of 100 candidates and backs up the best of 10.
    """
    quality = lambda name: omar.defaults({"quality": name}, 1.0)["rectification"]
    assert [quality(name) for name in ("medium-replay", "medium", "expert", "demo")] == [0.5, 0.7, 0.9, 0.5]
    args = bcq.Args(hidden=6)
    assert (args.candidates, args.target_candidates) == (100, 10)
    assert make_networks(bcq, False, args, 0).latents.shape[0] == 100


@both
def test_actions_of_bcq(discrete):
    """The best candidate by q_i, in NumPy; the same at every call and with any leading dimensions."""
    args = bcq.Args(hidden=6)
    net, batch = make_networks(bcq, discrete, args, 1), make_batch(discrete)
    obs, mask = batch["agents", "observation"], batch["agents"].get("action_mask", None)
    with torch.no_grad():
        action = net.act(obs, mask)
        assert torch.equal(action, net.act(obs.unsqueeze(0), None if mask is None else mask.unsqueeze(0))[0])
    for b in range(B):
        for i in range(n):
            o = obs[b, i].numpy()
            if discrete:
                G = np.exp(log_softmax(local(net.behaviour.net, i, o), mask[b, i].numpy()))
                wanted = max((k for k in range(A) if G[k] > 0.3 * G.max()), key=lambda k: q_value(net.q, i, o, k))
            else:
                proposals = [np.tanh(local(net.decoder, i, o, z)) for z in net.latents[:, i].numpy()]
                candidates = [(x + args.phi * np.tanh(local(net.perturbation, i, o, x))).clip(-1, 1) for x in proposals]
                wanted = max(candidates, key=lambda x: q_value(net.q[0], i, o, x))
            np.testing.assert_allclose(action[b, i].numpy(), wanted)


# ---------------------------------------------------------------- games with known optima


def write_episode(writer: DatasetWriter, seen: torch.Tensor, actions: list, rewards: list[float], n_actions: int = 0):
    """An episode of T steps that two agents play. Both see the state, `seen` [T + 1, O].

    Actions are discrete if there are `n_actions`. One action more than that is never available.
    """
    T = len(rewards)
    end = (torch.arange(T + 1) == T - 1).unsqueeze(-1)
    agents = {"observation": seen.unsqueeze(1).repeat(1, 2, 1), "action": torch.stack([*actions, actions[-1]])}
    if n_actions:
        agents["action_mask"] = (torch.arange(n_actions + 1) < n_actions).expand(T + 1, 2, -1).clone()
    reward = torch.tensor([*rewards, 0.0]).unsqueeze(-1)
    team = {"state": seen, "reward": reward, "terminated": end, "done": end.clone()}
    writer.append(TensorDict(team | {"agents": TensorDict(agents, [T + 1, 2])}, [T + 1]))


def game(path, joint_actions: list, reward, n_actions: int) -> str:
    """One-step episodes of two agents that see nothing."""
    writer = DatasetWriter(path)
    for a in joint_actions:
        write_episode(writer, torch.ones(2, 1), [torch.tensor(a)], [float(reward(*a))], n_actions)
    return str(writer.close(GAME))


MODULES = METHODS | {"comadice": comadice_train, "bc": comadice_bc}
# What differs from each method's own defaults. With QUICK, 150 steps are enough.
# The alpha in FLAGS fits rewards of 1 to 8 a game instead of hundreds.
QUICK = {"device": "cpu", "hidden": 16, "batch_size": 32, "steps": 150, "evals": 1, "lr": 1e-2}
FLAGS = {
    "bc": {},
    "bcq": {},
    "cql": {},
    "icq": {},
    "omar": {},
    "omiga": {"alpha": 1.0},
    "comadice": {"critic_lr": 1e-2},
}


@torch.no_grad()
def solve(name: str, data: str, out, seeds: int, **flags) -> tuple[list[tuple], list[float]]:
    """Trains by the method's own script. Returns each seed's joint action, and how often the two agents differ.

    The second is the chance that the agents act differently when they draw from the policy.
    """
    module = MODULES[name]
    with torch.enable_grad():
        module.main(module.Args(**QUICK | FLAGS[name] | flags, data=data, out=str(out), seeds=list(range(seeds))))
    actions, differ = [], []
    for seed in range(seeds):
        policy, state = comadice_eval.load_policy(out / f"nowhere/game/made/{name}/seed{seed}")
        k = state["card"]["action_dim"]
        obs, mask = torch.ones(1, 2, 1), (torch.arange(k) < k - 1).expand(1, 2, k)
        actions.append(tuple(policy.act(obs, mask)[0].tolist()))
        if hasattr(policy, "logits"):
            (p, q) = policy.logits(obs, mask).softmax(-1)[0]
            differ.append(1 - (p * q).sum().item())
    return actions, differ


REWARDS = [[0, 2, 1], [3, 8, 4], [1, 5, 2]]
BEST = (1, 1)
PEAK = torch.tensor([0.4, -0.3])


def peaked(actions: torch.Tensor) -> float:
    """The reward of the continuous games, 10 at the actions PEAK: actions [2, 1], clipped to the box."""
    return (10 * (1 - (actions[:, 0].clamp(-1, 1) - PEAK).square().sum())).item()


@pytest.mark.parametrize("name", MODULES)
def test_matrix_game(name, tmp_path):
    """The data hold all nine joint actions equally often.

    Every method that looks at rewards must find the best one with all of 6 seeds. Measured: all 20 of 20 for each.
    BC's policy is uniform, as the data are. So two agents that draw from it differ with probability 2/3, and its most
    likely actions end anywhere.
    """
    data = game(tmp_path / "data", [(i, j) for i in range(3) for j in range(3)], lambda i, j: REWARDS[i][j], 3)
    actions, differ = solve(name, data, tmp_path, 20 if name == "bc" else 6)
    if name == "bc":
        assert differ == pytest.approx([2 / 3] * 20, abs=0.01)
        assert actions.count(BEST) <= 12 and len(set(actions)) > 2
    else:
        assert actions == [BEST] * 6


def test_better_episodes_can_be_drawn_more_often(tmp_path):
    """With a large alpha OMIGA imitates, so its policy is uniform as the data are. Drawing decides what it imitates."""
    data = game(tmp_path / "data", [(i, j) for i in range(3) for j in range(3)], lambda i, j: REWARDS[i][j], 3)
    _, differ = solve("omiga", data, tmp_path / "equally", 1, alpha=1e6)
    assert differ == pytest.approx([2 / 3], abs=0.02)
    actions, differ = solve("omiga", data, tmp_path / "better", 2, alpha=1e6, episode_alpha=0.3)
    assert actions == [BEST] * 2 and max(differ) < 0.1


@pytest.mark.parametrize("name", MODULES)
def test_xor_game(name, tmp_path):
    """Reward 1 if the actions differ. The data hold (0, 1) and (1, 0) equally often. No method here passes.

    Seen by one agent, both of its actions are equally frequent and equally good. So agents that choose independently
    agree on nothing: a joint action is like two coins. Policies that are distributions show it exactly. The optimum,
    one of the two pairs, pays 1. Drawing from the policy pays 0.50 for BC and ComaDICE, 0.45 to 0.50 for OMIGA and 0.13
    to 0.5 for ICQ. Only OMAR's actor may commit, but it may commit to a wrong pair as well.
    The most likely actions only say how ties break. Those of BC and ComaDICE make a pair of the data with all of ten
    seeds. Both agents imitate the same draws, so the pair that was drawn more often of late is slightly ahead for both.
    """
    data = game(tmp_path / "data", [(0, 1), (1, 0)], lambda i, j: i != j, 2)
    actions, differ = solve(name, data, tmp_path, 10)
    if name in ("bc", "comadice"):
        assert differ == pytest.approx([0.5] * 10, abs=0.02)
    else:
        assert sum(i != j for i, j in actions) < 10, "passes by luck or by a method that this test does not know of"
    if name == "omiga":
        assert differ == pytest.approx([0.48] * 10, abs=0.04)
    elif name == "icq":
        assert max(differ) < 0.52


@pytest.mark.parametrize(
    "name, flags, chosen",
    [
        ("bc", {}, (0, 0)),  # both agents' most frequent actions: a pair that pays 0
        ("omiga", {"alpha": 10.0}, (0, 0)),  # as published: at rewards of 1 that is BC
        ("omiga", {}, (0, 1)),
        ("omiga", {"alpha": 0.1}, (1, 1)),  # greedy in an additive q: out of the data
        # at its default of 5 mean absolute rewards, 3.25, (0, 0) is slightly ahead
        ("comadice", {"alpha": 1.5}, (0, 1)),
        ("comadice", {"alpha": 1.5, "advantage": "q"}, (0, 1)),
        ("bcq", {}, (0, 1)),  # agent 0's action 1 is too rare to be a candidate
        ("cql", {}, (0, 0)),  # at 5 mean absolute rewards it is near BC
        ("cql", {"cql_alpha": 1.6}, (0, 1)),
        ("cql", {"cql_alpha": 0.3}, (1, 1)),
        ("omar", {}, (0, 1)),
        ("omar", {"cql_alpha": 0.3}, (1, 1)),
        ("icq", {}, (1, 1)),
    ],
)
def test_skewed_xor_game(name, flags, chosen, tmp_path):
    """The same rewards, and data of 7 (0, 0), 9 (0, 1) and 4 (1, 0): symmetry is broken, and methods differ.

    (0, 1) is the good pair that the data favour. Imitation takes each agent's most frequent action, (0, 0). Local
    values are an additive fit. Its best pair is (1, 1), which the data never hold. A method's regularisation keeps it
    off that pair: the joint ratio (ComaDICE), the pull to the data (OMIGA at alpha 1), the threshold (BCQ), the
    conservative term (CQL, OMAR).
    Measured: the pair named here with all of ten seeds, in every line. Six of the seeds are run.
    """
    data = game(tmp_path / "data", [(0, 0)] * 7 + [(0, 1)] * 9 + [(1, 0)] * 4, lambda i, j: i != j, 2)
    actions, _ = solve(name, data, tmp_path, 6, **flags)
    assert actions.count(chosen) >= 5, actions


@pytest.mark.parametrize("data_of", ["uniform", "gaussian"])
@pytest.mark.parametrize("name", MODULES)
def test_continuous_game(name, data_of, tmp_path):
    """The reward is 10 (1 - (a - 0.4)^2 - (b + 0.3)^2) of the actions a and b, clipped to the box.

    The data's actions are uniform in the box, or those of a Gaussian policy, a third of which are outside. All methods
    but BC come near (0.4, -0.3). BC stays at the data's mean, 0. CQL and OMAR have a cql_alpha of about half a mean
    absolute reward here: their default pulls them too far towards the data.
    """
    writer, g = DatasetWriter(tmp_path / "data"), torch.Generator().manual_seed(0)
    uniform, gaussian = 2 * torch.rand(400, 2, 1, generator=g) - 1, torch.randn(400, 2, 1, generator=g)
    for a in uniform if data_of == "uniform" else gaussian:
        write_episode(writer, torch.ones(2, 1), [a], [peaked(a)])
    data = writer.close(GAME)
    module, flags = (
        MODULES[name],
        FLAGS[name]
        | {"hidden": 32, "batch_size": 64, "steps": 250}
        | ({"alpha": 1.0} if name in ("icq", "comadice") else {})
        | ({"cql_alpha": 1.7} if name in ("cql", "omar") else {}),
    )
    module.main(module.Args(**QUICK | flags, data=str(data), out=str(tmp_path), seeds=[0, 1]))
    for seed in (0, 1):
        policy, _ = comadice_eval.load_policy(tmp_path / f"nowhere/game/made/{name}/seed{seed}")
        with torch.no_grad():
            action = policy.act(torch.ones(1, 2, 1))[0, :, 0]
        wanted = torch.zeros(2) if name == "bc" else PEAK
        assert (action - wanted).abs().max() < 0.3, action


@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_reward_comes_one_step_later(name, discrete, tmp_path):
    """Both games again, in two steps: the first actions decide the reward, which comes at the second step.

    Agents see at the second step which reward is to come. What they do there changes nothing. So only values that are
    backed up say which first action is good. ComaDICE has no ratio between episodes here, which would say it as well.
    """
    g, mask = torch.Generator().manual_seed(0), (torch.arange(4) < 3).expand(1, 2, 4)
    if discrete:
        firsts = [torch.tensor([i, j]) for i in range(3) for j in range(3)] * 12
        second = lambda: torch.randint(3, (2,), generator=g)
        value = lambda a: float(REWARDS[a[0]][a[1]])
    else:
        firsts = list(2 * torch.rand(400, 2, 1, generator=g) - 1)
        second = lambda: 2 * torch.rand(2, 1, generator=g) - 1
        value = peaked
    writer = DatasetWriter(tmp_path / "data")
    for first in firsts:
        r = value(first)
        seen = torch.tensor([[1.0, 0.0], [0.0, r / 5], [0.0, r / 5]])
        write_episode(writer, seen, [first, second()], [0.0, r], 3 if discrete else 0)
    data = writer.close(GAME)
    flags = QUICK | FLAGS[name] | {"hidden": 32, "batch_size": 64, "steps": 400}
    flags |= {"alpha": 1.0} if name in ("icq", "comadice") else {}
    flags |= {"episode_alpha": 0.0} if name == "comadice" else {}
    flags |= {"cql_alpha": 0.8} if name in ("cql", "omar") else {}
    MODULES[name].main(MODULES[name].Args(**flags, data=str(data), out=str(tmp_path), seeds=[0, 1]))
    for seed in (0, 1):
        policy, _ = comadice_eval.load_policy(tmp_path / f"nowhere/game/made/{name}/seed{seed}")
        obs = torch.tensor([1.0, 0.0]).expand(1, 2, 2)
        with torch.no_grad():
            action = policy.act(obs, *([mask] if discrete else []))[0]
        if name == "bc" and discrete:
            chances = policy.logits(obs, mask).softmax(-1)[0, :, :3]
            torch.testing.assert_close(chances, torch.full((2, 3), 1 / 3), atol=0.03, rtol=0)
        elif discrete:
            assert tuple(action.tolist()) == BEST
        else:
            wanted = torch.zeros(2) if name == "bc" else PEAK
            assert (action[:, 0] - wanted).abs().max() < 0.3, action


# ---------------------------------------------------------------- the scripts

TINY = {"device": "cpu", "steps": 20, "evals": 2, "eval_episodes": 2, "hidden": 16, "batch_size": 32}
RUN = {"continuous": "mamujoco/hopper/random", "discrete": "nowhere/game/random"}


@pytest.fixture(params=RUN)
def kind(request) -> str:
    return request.param


@pytest.fixture
def data(kind, hopper_data, discrete_data) -> str:
    return str(hopper_data if kind == "continuous" else discrete_data)


class Stop(KeyboardInterrupt):
    pass


@each
def test_script(name, kind, data, tmp_path, monkeypatch, capsys):
    """A run directory is complete, with rollouts where there is a simulator.

    A stopped run goes on to the same weights and table.
    """
    module = METHODS[name]
    args = module.Args(**TINY, data=data, out=str(tmp_path / "whole"))
    module.main(args)
    whole = tmp_path / "whole" / RUN[kind] / name / "seed0"
    assert sorted(p.name for p in whole.iterdir()) == ["checkpoint.pt", "config.json", "metrics.csv", "summary.json"]
    config, summary = (json.loads((whole / f"{part}.json").read_text()) for part in ("config", "summary"))
    assert {f.name for f in dataclasses.fields(module.Args)} <= set(config)
    assert config["algo"] == summary["algo"] == name
    state = torch.load(whole / "checkpoint.pt", weights_only=True)
    assert [row["step"] for row in state["metrics"]] == [10, 20]
    assert all(row["stage"] == "policy" for row in state["metrics"])
    assert all(math.isfinite(v) for row in state["metrics"] for k, v in row.items() if k.endswith("_loss"))
    assert summary["return"] is None if kind == "discrete" else math.isfinite(summary["return"])

    original, calls = support.runs.save_checkpoint, []

    def stopping(*a):
        original(*a)
        calls.append(1)
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(support.runs, "save_checkpoint", stopping)
        with pytest.raises(Stop):
            module.main(dataclasses.replace(args, out=str(tmp_path / "cut")))
    module.main(dataclasses.replace(args, out=str(tmp_path / "cut"), resume=True))
    cut = tmp_path / "cut" / RUN[kind] / name / "seed0"
    resumed = torch.load(cut / "checkpoint.pt", weights_only=True)
    for part in {"policy", "networks", "target"} & state.keys():
        assert all(torch.equal(v, resumed[part][k]) for k, v in state[part].items()), part
    assert (cut / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


@each
def test_seeds_trained_together_are_those_trained_alone(name, kind, data, tmp_path, monkeypatch):
    """Two seeds in one script: one after another as on a CPU, and vmapped as on a GPU. They are equal within rounding.

    On some CPUs the one-after-another weights are equal to the bit. On one Intel Xeon the last bit differs.
    """
    module = METHODS[name]

    def train(out: str, seeds: list[int]) -> list[dict]:
        module.main(module.Args(**TINY | {"steps": 8}, seeds=seeds, data=data, out=str(tmp_path / out)))
        runs = [tmp_path / out / RUN[kind] / name / f"seed{seed}" / "checkpoint.pt" for seed in seeds]
        return [torch.load(run, weights_only=True) for run in runs]

    alone = train("alone", [3]) + train("alone", [5])
    for how, tolerance in (("cpu", {"rtol": 1e-5, "atol": 1e-6}), ("vmapped", {"rtol": 1e-3, "atol": 1e-4})):
        if how == "vmapped":
            monkeypatch.setattr(support.seeds, "VMAPPED", ("cpu",))
        for ours, theirs in zip(train(how, [3, 5]), alone):
            for part in ("networks", "target", "policy"):
                assert ours[part].keys() == theirs[part].keys()
                for key, value in theirs[part].items():
                    torch.testing.assert_close(ours[part][key], value, **tolerance)
            assert torch.equal(ours["generator"], theirs["generator"])
    first, second = (state["policy"].values() for state in alone)
    assert not all(torch.equal(x, y) for x, y in zip(first, second))


@each
def test_saved_policy_is_the_one_that_was_evaluated(name, hopper_data, tmp_path, monkeypatch):
    module, played = METHODS[name], []
    original = baselines.common.evaluation
    monkeypatch.setattr(
        baselines.common, "evaluation", lambda policy, *a: played.append(copy.deepcopy(policy)) or original(policy, *a)
    )
    module.main(module.Args(**TINY, data=str(hopper_data), out=str(tmp_path)))
    run = tmp_path / "mamujoco/hopper/random" / name / "seed0"
    obs = torch.randn(4, 3, 14)
    policy, _ = comadice_eval.load_policy(run)
    with torch.no_grad():
        assert torch.equal(policy.act(obs), played[-1].act(obs))


def test_next_actions_of_icq(hopper_data):
    rows, _ = open_dataset(hopper_data)
    extended = icq.with_next_action(rows)
    assert "next_action" not in rows.keys() and extended.keys() - rows.keys() == {"next_action", "has_next"}
    for t in range(len(rows) - 1):
        pair = as_transition(extended[[t, t + 1]].unsqueeze(0))
        assert torch.equal(pair["next_action"][0], rows["agents", "action"][t + 1])
        assert pair["has_next"].item() == (not rows["done"][t])


@pytest.mark.parametrize(
    "name, flags, match",
    [
        (name, flags, match)
        for name in METHODS
        for flags, match in (({"gamma": 1.0}, "--gamma"), ({"tau": 0.0}, "--tau"), ({"lr": 0.0}, "--lr"))
    ]
    + [
        ("bcq", {"threshold": 1.0}, "--threshold"),
        ("bcq", {"clip_lambda": 2.0}, "--clip-lambda"),
        ("bcq", {"phi": -1.0}, "--phi"),
        ("cql", {"cql_alpha": -1.0}, "--cql-alpha"),
        ("icq", {"alpha": 0.0}, "--alpha"),
        ("icq", {"action_scale": -1.0}, "--action-scale"),
        ("icq", {"alpha_q": math.inf}, "--alpha-q"),
        ("omar", {"rectification": 1.5}, "--rectification"),
        ("omar", {"search_std": 0.0}, "--search-std"),
        ("omiga", {"alpha": math.nan}, "--alpha"),
        ("omiga", {"episode_alpha": -1.0}, "--episode-alpha"),
        ("omiga", {"episode_alpha": 1e38}, "--episode-alpha is 1e.38: give 0 or a positive number below 1e38"),
    ],
)
def test_bad_flags(name, flags, match, hopper_data, tmp_path):
    module = METHODS[name]
    with pytest.raises(BadInput, match=match) as error:
        module.main(module.Args(**TINY | flags, data=str(hopper_data), out=str(tmp_path / "runs")))
    assert "\n" not in str(error.value) and not (tmp_path / "runs").exists()


@each
def test_scripts_run_from_the_repository(name, tmp_path):
    """Bad input of a script ends in one line and exit code 2."""
    command = [sys.executable, "-m", f"baselines.{name}", "--gamma", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: --gamma"), done.stderr
