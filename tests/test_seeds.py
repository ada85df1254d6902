"""Seeds trained together are the seeds trained alone, and on a GPU the graph is the update."""

import dataclasses
import shutil
from copy import deepcopy

import pytest
import torch
from conftest import ROOT
from tensordict import TensorDict
from test_exact import ALPHA, FREE, FS, GAMMA, SCALE, by_hand, random_setting
from test_step import DATA, SYNCS, Recorder, adam_reads
from test_step import rows as random_rows

import comadice_bc
import comadice_train
import support.seeds
from comadice_mixer import make_policy
from offline_data.dataset import open_dataset
from offline_data.replay import initial_rows, make_replay, minibatches
from support.seeds import Graph, adam, load_seeds, make_generators, per_seed, seed_states, split_seeds, stack

SEEDS = [3, 0, 7]
CARD = {"n_agents": 3, "obs_dim": 5, "state_dim": 7, "action_dim": 4}
GIVEN = comadice_train.Args(
    hidden=16,
    batch_size=16,
    init_batch_size=4,
    reward_scale=0.2,
    alpha=1.0,
    critic_lr=1e-3,
    lr=1e-3,
    tau=0.05,
    layer_norm=False,
)


def resolved(**changes) -> comadice_train.Args:
    return comadice_train.resolve(dataclasses.replace(GIVEN, **changes), 1.0)


ARGS = resolved(objective="exact", advantage="q")


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=["one after another", "vmapped"])
def way(request, monkeypatch):
    """Both ways in which per_seed goes through the seeds, the GPU's on a CPU too."""
    if request.param == "vmapped":
        monkeypatch.setattr(support.seeds, "VMAPPED", ("cuda", "cpu"))
    return request.param


def data(discrete: bool, device: str = "cpu") -> TensorDict:
    torch.manual_seed(0)
    rows = random_rows(3, discrete)
    return rows.to(device) if device != "cpu" else rows


def critics_of(seeds: list[int], rows: TensorDict, card: dict, args, device: str = "cpu"):
    """What train_critics sets up: (parts, generators, update, function that gives the batches of steps)."""
    each = []
    for seed in seeds:
        torch.manual_seed(seed)
        each.append(comadice_train.make_critics(card, args).to(device))
    critics, target = stack(each), stack(deepcopy(each))
    parts = {"critics": critics, "target": target, "optimizer": comadice_train.make_optimizer(critics, args)}
    generators = make_generators(seeds, 1, rows)
    starts = {"pairs": False, "generators": generators, "drawn_from": initial_rows(rows)}
    transitions = make_replay(rows, comadice_train.CRITIC_KEYS, generators=generators), args.batch_size
    sources = transitions, (make_replay(rows, comadice_train.INIT_KEYS, **starts), args.init_batch_size)
    update = comadice_train.make_critic_update(critics, target, parts["optimizer"], args, DATA)
    return parts, generators, update, lambda start, stop: minibatches(start, {stop}, *sources)


def same(state: dict, other: dict, **tolerance):
    """Compares two state_dicts of whatever depth."""
    assert state.keys() == other.keys()
    for key, value in state.items():
        if isinstance(value, dict):
            same(value, other[key], **tolerance)
        elif isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, other[key], **tolerance)
        else:
            assert value == other[key], key


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "exact"},
        {"objective": "semi", "alpha": 5.0},
        {"objective": "semi", "advantage": "q"},
        {"objective": "printed"},
        {"objective": "released_nu"},
        {"objective": "exact", "mixer_layers": 2, "lambda_scale": 0.5},
    ],
    ids=lambda c: " ".join(map(str, c.values())),
)
def test_critics_together_are_critics_alone(changes, discrete, double, way):
    args, card, rows = resolved(**changes), CARD | {"discrete": discrete}, data(discrete)
    parts, generators, update, batches = critics_of(SEEDS, rows, card, args)
    together = [update(batch, init) for _, batch, init in batches(0, 50)]
    states = seed_states(parts, generators)
    for s, seed in enumerate(SEEDS):
        parts, generators, update, batches = critics_of([seed], rows, card, args)
        for results, (_, batch, init) in zip(together, batches(0, 50)):
            assert batch.batch_size == (16,) and init.batch_size == (4,)
            for ours, alone in zip(split_seeds(results, SEEDS)[s], update(batch, init)):
                torch.testing.assert_close(ours, alone, rtol=1e-9, atol=1e-9)
        same(states[s], seed_states(parts, generators)[0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("discrete", [False, True])
def test_policies_together_are_policies_alone(discrete, double, way):
    """Each with a ratio of its own."""
    rows = data(discrete)
    ratios = [torch.rand(300, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS]

    def train(seeds: list[int], ratios: list) -> list[dict]:
        each = []
        for seed in seeds:
            torch.manual_seed(seed)
            each.append(make_policy(3, 5, 4, discrete, 16))
        policy, average, generators = stack(each), stack(deepcopy(each)), make_generators(seeds, 2, rows)
        optimizer, weight = adam(list(policy.parameters()), 1e-3, torch.device("cpu")), torch.tensor(0.1)
        update = comadice_bc.make_policy_update(policy, average, optimizer, weight, len(seeds))
        weighted = comadice_bc.with_ratios(rows, dict(enumerate(ratios)))
        replay = make_replay(weighted, comadice_bc.POLICY_KEYS, pairs=False, generators=generators)
        for _, batch in minibatches(0, {50}, (replay, 16)):
            loss = update(batch)
            assert loss.shape == ((len(seeds),) if len(seeds) > 1 else ())
        return seed_states({"eta": policy, "policy": average, "optimizer": optimizer}, generators)

    for seed, ratio, state in zip(SEEDS, ratios, train(SEEDS, ratios)):
        same(state, train([seed], [ratio])[0], rtol=1e-9, atol=1e-10)


def test_states_of_lone_seeds_go_on_together(double):
    """Three seeds alone for 20 steps, then together for 20, are three seeds alone for 40."""
    args, card, rows = ARGS, CARD | {"discrete": False}, data(False)
    states, whole = [], []
    for seed in SEEDS:
        parts, generators, update, batches = critics_of([seed], rows, card, args)
        for start, saved in ((0, states), (20, whole)):
            for _, batch, init in batches(start, start + 20):
                update(batch, init)
            saved.append(deepcopy(seed_states(parts, generators)[0]))
    parts, generators, update, batches = critics_of(SEEDS, rows, card, args)
    load_seeds(parts, generators, states)
    same(seed_states(parts, generators)[1], states[1], rtol=0, atol=0)
    for _, batch, init in batches(20, 40):
        update(batch, init)
    for state, alone in zip(seed_states(parts, generators), whole):
        same(state, alone, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", FS)
@pytest.mark.parametrize("objective", ["exact", "semi"])
def test_stacked_losses_by_hand(objective, name, way):
    """The hand-written losses and gradients of test_exact.py, for two different sets of critics in one call."""
    settings = [random_setting(lam=0.0) for _ in range(2)]
    for parameter in settings[1][0].parameters():
        parameter.data *= 1.5
    args = comadice_train.Args(
        objective=objective,
        advantage="q",
        f=name,
        gamma=GAMMA,
        alpha=ALPHA / SCALE,
        reward_scale=SCALE,
        lambda_scale=0.0,
        tau=0.1,
    )
    hand = [by_hand(*setting, objective, name, 0.0) for setting in settings]
    critics, target = (stack([deepcopy(setting[i]) for setting in settings]) for i in (0, 1))
    batch, init = (torch.stack([setting[i] for setting in settings]) for i in (2, 3))
    L_q, L_nu, w, _ = comadice_train.make_critic_update(
        critics, target, torch.optim.SGD(critics.parameters(), 0.1), args, FREE
    )(batch, init)
    for s in range(2):
        torch.testing.assert_close(torch.stack([L_q[s], L_nu[s]]), torch.tensor([hand[s].L_q, hand[s].L_nu]).double())
        torch.testing.assert_close(w[s], torch.as_tensor(hand[s].w))
        torch.testing.assert_close(critics.nu.table.grad[s], torch.as_tensor(hand[s].psi_nu))
        torch.testing.assert_close(critics.q.table.grad[s], torch.as_tensor(hand[s].psi_q))


def test_long_runs_together_stay_within_float32(way):
    """500 float32 steps on the dataset in the repository: sums in another order, but the same training."""
    rows, card = open_dataset(ROOT / "data/mamujoco/hopper/demo")
    args = comadice_train.resolve(
        dataclasses.replace(GIVEN, alpha=None, reward_scale=None, hidden=32, batch_size=64),
        rows["reward"].abs().mean().item(),
    )

    def late_losses(seeds: list[int]) -> torch.Tensor:
        _, _, update, batches = critics_of(seeds, rows, card, args)
        results = [update(batch, init)[1] for _, batch, init in batches(0, 500)]
        return torch.stack(results[-100:]).mean(0)

    alone = torch.stack([late_losses([seed]) for seed in SEEDS])
    together = late_losses(SEEDS)
    assert (together - alone).abs().max() < 0.25 * alone.std(), (together, alone)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_losses_are_the_losses(double, monkeypatch):
    """With --compile, as on a GPU: in one graph, without a break. (A minute and more: one case is all there is.)"""
    monkeypatch.setattr(support.seeds, "VMAPPED", ("cuda", "cpu"))
    rows, states = data(False), []
    for compiled in (False, True):
        parts, generators, update, batches = critics_of(
            SEEDS, rows, CARD | {"discrete": False}, dataclasses.replace(ARGS, compile=compiled)
        )
        for _, batch, init in batches(0, 5):
            update(batch, init)
        states.append(seed_states(parts, generators))
    for eager, compiled in zip(*states):
        same(eager, compiled, rtol=1e-9, atol=1e-10)


def test_graph_is_the_function_on_a_cpu():
    """Nothing is copied or kept there, and per_seed calls a lone seed's function as it is."""
    calls = []
    graph = Graph(lambda batch: calls.append(batch))
    batch = TensorDict({"x": torch.zeros(2)}, [2])
    for _ in range(5):
        graph(batch)
    assert len(calls) == 5 and all(call is batch for call in calls) and graph.graph is None
    module = torch.nn.Linear(1, 1)
    assert per_seed(lambda m, b: (m, b), [module], 1)(batch) == (module, batch)
    assert stack([module]) is module


@pytest.mark.parametrize("seeds", [[0], SEEDS], ids=len)
@pytest.mark.parametrize("stage", ["critics", "policies"])
def test_an_update_can_be_captured(stage, seeds, monkeypatch):
    """What a CUDA graph asks for, tested on a CPU.

    There is no waiting, the tensors stay the same all along, and inputs are read and not changed.
    """
    monkeypatch.setattr(support.seeds, "VMAPPED", ("cuda", "cpu"))
    rows = data(False)

    def make():
        if stage == "critics":
            parts, _, update, batches = critics_of(seeds, rows, CARD | {"discrete": False}, ARGS)
            return (
                parts["critics"],
                parts["optimizer"],
                update,
                [[b.clone() for b in batch] for _, *batch in batches(0, 8)],
            )
        torch.manual_seed(0)
        each = [make_policy(3, 5, 4, False, 16) for _ in seeds]
        policy, average = stack(each), stack(deepcopy(each))
        optimizer = adam(list(policy.parameters()), 1e-3, torch.device("cpu"))
        replay = make_replay(
            comadice_bc.with_ratios(rows, dict.fromkeys(range(len(seeds)))),
            comadice_bc.POLICY_KEYS,
            pairs=False,
            generators=make_generators(seeds, 2, rows),
        )
        update = comadice_bc.make_policy_update(policy, average, optimizer, torch.tensor(0.1), len(seeds))
        return policy, optimizer, update, [[b] for _, b in minibatches(0, {8}, (replay, 16))]

    eager, _, update, batches = make()
    for batch in batches:
        update(*batch)
    module, optimizer, update, batches = make()
    inputs = [batch.clone() for batch in batches[0]]
    update(*inputs)  # the first step makes the optimiser's state
    tensors = lambda: [*module.parameters(), *(v for state in optimizer.state.values() for v in state.values())]
    places, layout = [t.data_ptr() for t in tensors()], [sorted(map(str, batch.keys(True, True))) for batch in inputs]
    for batch in batches[1:]:
        for mine, new in zip(inputs, batch):
            mine.copy_(new)
        with Recorder() as recorder:
            update(*inputs)
        assert sum(name in SYNCS for name in recorder.names) <= adam_reads(len(list(module.parameters())))
    assert [t.data_ptr() for t in tensors()] == places
    assert [sorted(map(str, batch.keys(True, True))) for batch in inputs] == layout
    for mine, new in zip(inputs, batches[-1]):
        assert (mine == new).all()
    for ours, theirs in zip(module.parameters(), eager.parameters()):
        assert torch.equal(ours, theirs)


# ---------------------------------------------------------------- a GPU


@pytest.mark.cuda
@pytest.mark.parametrize("seeds", [[0], SEEDS], ids=len)
@pytest.mark.parametrize(
    "changes",
    [
        *({"objective": objective} for objective in ("exact", "semi", "printed", "released_nu")),
        {"objective": "semi", "advantage": "q"},
    ],
    ids=lambda c: " ".join(c.values()),
)
def test_graph_trains_as_a_cpu_does(changes, seeds, double):
    """The same batches in float64: the first steps are eager, the later ones replays."""
    args, card, rows = resolved(alpha=5.0, **changes), CARD | {"discrete": False}, data(False)
    here = critics_of(seeds, rows, card, args)
    there = critics_of(seeds, rows.to("cuda"), card, args, "cuda")
    graph = Graph(there[2])
    for _, *batches in here[3](0, 20):
        results = graph(*(batch.to("cuda") for batch in batches))
        for ours, theirs in zip(here[2](*batches), results):
            torch.testing.assert_close(theirs.cpu(), ours, rtol=1e-8, atol=1e-8)
    assert graph.graph is not None
    for ours, theirs in zip(here[0]["critics"].parameters(), there[0]["critics"].parameters()):
        torch.testing.assert_close(theirs.cpu(), ours, rtol=1e-7, atol=1e-8)


@pytest.mark.cuda
def test_a_step_of_the_graph_does_not_synchronise():
    args, card, rows = ARGS, CARD | {"discrete": False}, data(False, "cuda")
    _, _, update, batches = critics_of(SEEDS, rows, card, args, "cuda")
    graph = Graph(update)
    try:
        for step, batch, init in batches(0, 64):
            graph(batch, init)
            if step == 10:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
    finally:
        torch.cuda.set_sync_debug_mode("default")
