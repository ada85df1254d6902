"""Compares the speed of an update with the machine's limit: updates/s, the share of each part, and FLOP/s against bare
matrix products.

    python -m benchmarks.speed                                                     # three shapes, 1 and 5 seeds
    python -m benchmarks.speed --shapes hopper --seeds 1 --pair "python other.py"  # in turn with another program

The FLOP of an update are counted for the fewest network evaluations that the equations need. A layer k -> n on m rows
costs 2mkn forward, 2mkn for its weight's gradient, and 2mkn for its input's gradient, which the first layer does not
need. The peak is measured with the same products alone: torch.mm into existing memory. Steps and products are timed in
turn, and their medians are compared, since the speed of a shared machine drifts. The command of --pair must print
"NUMBER updates/s" twice: for the critics and for the policy.
"""

import environments.cpu  # noqa: F401 -- before torch

# isort: split
import re
import resource
import subprocess
import time
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import median

import torch
import tyro
from tensordict import TensorDict

import comadice_bc
import comadice_train
from comadice_mixer import make_policy
from environments.checks import BadInput, pick_device, run_script
from offline_data.replay import initial_rows, make_replay, minibatches
from support.flags import program
from support.seeds import Graph, adam, make_generators, set_gradients, stack, target_update

SHAPES = {  # Table 3
    "hopper": {"n_agents": 3, "obs_dim": 14, "state_dim": 42, "action_dim": 1, "discrete": False},
    "zerg_10_vs_11": {"n_agents": 10, "obs_dim": 170, "state_dim": 306, "action_dim": 17, "discrete": True},
    "protoss_20_vs_20": {"n_agents": 20, "obs_dim": 362, "state_dim": 820, "action_dim": 26, "discrete": True},
}


@dataclass
class Args:
    shapes: list[str] = field(default_factory=lambda: list(SHAPES))
    """hopper, zerg_10_vs_11, protoss_20_vs_20"""
    seeds: list[int] = field(default_factory=lambda: [1, 5])
    """how many seeds are trained together"""
    steps: int = 60
    """steps per round"""
    rounds: int = 5
    """timed rounds; one more comes first as a warm-up"""
    rows: int = 5000
    """rows of the random dataset"""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    threads: int = 2
    """CPU threads"""
    pair: str | None = None
    """a command to run after every round"""
    train: comadice_train.Args = field(default_factory=comadice_train.Args)
    """the other arguments of comadice_train.py"""


def random_rows(card: dict, N: int) -> TensorDict:
    """Episodes of 100 transitions of noise, in the dataset's layout."""
    N, n, A = max(N // 101, 1) * 101, card["n_agents"], card["action_dim"]
    t = torch.arange(N) % 101
    agents = {
        "observation": torch.randn(N, n, card["obs_dim"]),
        "action": torch.randint(A, (N, n)) if card["discrete"] else torch.randn(N, n, A),
    }
    if card["discrete"]:
        agents["action_mask"] = torch.ones(N, n, A, dtype=torch.bool)
    done = (t == 99)[:, None]
    flags = {"done": done, "terminated": done, "is_init": (t == 0)[:, None]}
    return TensorDict(
        {"state": torch.randn(N, card["state_dim"]), "agents": TensorDict(agents, [N, n]), "reward": torch.randn(N, 1)}
        | flags,
        [N],
    )


def products(rows: int, sizes: list[int], trained: bool = True) -> list[tuple[int, int, int]]:
    """The matrix products (m, k, n) of an MLP on `rows` rows: forward, and if it is trained also backward."""
    out = []
    for layer, (k, n) in enumerate(pairwise(sizes)):
        out += [(rows, k, n)] + trained * [(k, rows, n)] + (trained and layer > 0) * [(rows, n, k)]
    return out


def needed(card: dict, args: comadice_train.Args) -> tuple[list, list]:
    """The matrix products of the critics' update and of the policy's."""
    n, O, S, A = (card[k] for k in ("n_agents", "obs_dim", "state_dim", "action_dim"))
    B, H = args.batch_size, args.hidden
    mixer = lambda rows, trained: [p for out in (n, 1) for p in products(rows, [S, args.mixer_hidden, out], trained)]
    nu_tot = lambda rows, trained: products(rows * n, [O + n, H, H, 1], trained) + mixer(rows, trained)
    # semi: nu and theta at s. exact: at s, s' and s_0
    critics = nu_tot(B if args.objective == "semi" else 2 * B + args.init_batch_size, True)
    if args.objective == "semi" or args.advantage != "td":  # the target networks at s'
        critics += nu_tot(B, False)
    if args.advantage != "td":
        critics += products(B * n, [O + n, H, H, A] if card["discrete"] else [O + n + A, H, H, 1])
    return critics, products(B * n, [O + n, H, H, A if card["discrete"] else 2 * A])


def flop(products: list) -> int:
    return sum(2 * m * k * n for m, k, n in products)


class Timer:
    """Seconds per call. It waits for the GPU."""

    def __init__(self, device: torch.device):
        self.device = device

    def __call__(self, function, times: int = 1) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(times):
            function()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / times


def product_pass(shapes: list, n_seeds: int, device: torch.device):
    """A function that computes the products once for every seed, batched over seeds if there are several. On a GPU it
    is a graph."""
    lead = (n_seeds,) if n_seeds > 1 else ()
    tensor = lambda *shape: torch.randn(*lead, *shape, device=device)
    buffers = [(tensor(m, k), tensor(k, n), tensor(m, n)) for m, k, n in shapes]
    product = torch.bmm if n_seeds > 1 else torch.mm

    def run():
        for a, b, out in buffers:
            product(a, b, out=out)

    if device.type == "cpu":
        return run
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def critics_stage(rows: TensorDict, card: dict, n_seeds: int, args: Args, device: torch.device):
    """(steps, parts): a function that makes args.steps updates as in training, and the parts of one update by name."""
    train, each = args.train, [comadice_train.make_critics(card, args.train).to(device) for _ in range(n_seeds)]
    critics, target = stack(each), stack(deepcopy(each))
    optimizer = comadice_train.make_optimizer(critics, train)
    generators = make_generators(list(range(n_seeds)), 1, rows)
    data = comadice_train.data_facts(rows, train)
    update = Graph(comadice_train.make_critic_update(critics, target, optimizer, train, data), train.graph)
    how = {"generators": generators, "device": device}
    replay = make_replay(rows, comadice_train.CRITIC_KEYS, **how)
    initial = make_replay(rows, comadice_train.INIT_KEYS, pairs=False, drawn_from=initial_rows(rows), **how)
    draw = lambda: minibatches(0, {args.steps}, (replay, train.batch_size), (initial, train.init_batch_size))

    def steps():
        for _, batch, init in draw():
            update(batch, init)

    _, batch, init = next(draw())
    losses_of = comadice_train.losses_per_seed(critics, target, train, data, n_seeds)
    losses = lambda: losses_of(batch, init)
    parts = {
        "sample": lambda: [None for _ in draw()],
        "losses": losses,
        "nu, theta": lambda: set_gradients(losses()[1].sum(), [*critics.nu.parameters(), *critics.mixer.parameters()]),
        "optimiser": optimizer.step,
        "targets": target_update(target, critics, train.tau),
    }
    if train.advantage != "td":
        parts["q"] = lambda: set_gradients(losses()[0].sum(), list(critics.q.parameters()))
    return steps, parts


def policy_stage(rows: TensorDict, card: dict, n_seeds: int, args: Args, device: torch.device):
    """The same for the policies' stage."""
    sizes = card["n_agents"], card["obs_dim"], card["action_dim"], card["discrete"], args.train.hidden
    each = [make_policy(*sizes).to(device) for _ in range(n_seeds)]
    policy, average = stack(each), stack(deepcopy(each))
    optimizer, weight = adam(list(policy.parameters()), args.train.lr, device), torch.ones((), device=device)
    step = comadice_bc.make_policy_update(policy, average, optimizer, weight, n_seeds, args.train.compile)
    update, generators = Graph(step, args.train.graph), make_generators(list(range(n_seeds)), 2, rows)
    weighted = comadice_bc.with_ratios(rows, dict.fromkeys(range(n_seeds)))
    replay = make_replay(weighted, comadice_bc.POLICY_KEYS, pairs=False, generators=generators, device=device)
    draw = lambda: minibatches(0, {args.steps}, (replay, args.train.batch_size))

    def steps():
        for step, batch in draw():
            comadice_bc.set_schedule(optimizer, weight, step, args.train)
            update(batch)

    parts = {"sample": lambda: [None for _ in draw()], "optimiser": optimizer.step}
    return steps, parts | {"average": target_update(average, policy, weight)}


def outside(command: str) -> list[float]:
    """Updates/s of each stage, printed by another implementation's command."""
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    found = [float(x) for x in re.findall(r"([\d.]+) (?:updates|steps)/s", done.stdout)]
    if done.returncode or len(found) != 2:
        raise BadInput(
            f"--pair: the command ended with code {done.returncode} and printed {len(found)} times 'NUMBER updates/s'; "
            "it must end with 0 and print that twice, for the critics and for the policy"
        )
    return found


def kernel_share(steps) -> float:
    """The share of the time in which a GPU's kernels run."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        began = time.perf_counter()
        steps()
        torch.cuda.synchronize()
        wall = time.perf_counter() - began
    return sum(event.device_time_total for event in profile.key_averages()) * 1e-6 / wall


def measure(shape: str, seeds: int, args: Args, device: torch.device):
    card, timer = SHAPES[shape], Timer(device)
    torch.manual_seed(0)
    rows = random_rows(card, args.rows).to(device)
    train = comadice_train.resolve(args.train, rows["reward"].abs().mean().item())
    args = replace(args, train=replace(train, steps=args.steps))
    stages = {"critics": critics_stage, "policy": policy_stage}
    work = dict(zip(stages, needed(card, args.train)))
    made = {name: make(rows, card, seeds, args, device) for name, make in stages.items()}
    passes = {name: {s: product_pass(work[name], s, device) for s in {1, seeds}} for name in stages}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step, peak, others = {name: [] for name in stages}, {name: {s: [] for s in passes[name]} for name in stages}, []
    for i in range(args.rounds + 1):
        for name in stages:
            seconds = timer(made[name][0]) / args.steps
            bare = {s: timer(run, args.steps) for s, run in passes[name].items()}
            if i:
                step[name].append(seconds)
                for s, value in bare.items():
                    peak[name][s].append(value / s)
        if args.pair and i:
            others.append(outside(args.pair))
    method = f"objective {args.train.objective}, w* from {args.train.advantage}"
    print(f"\n{shape}, {seeds} seed{'s' * (seeds > 1)}: {card}, {method}")
    for name in stages:
        seconds, single = median(step[name]) / seeds, median(peak[name][1])
        G = flop(work[name]) / 1e9
        print(
            f"  {name}: {1 / (seconds * seeds):.1f} updates/s, {1 / seconds:.1f} seed-updates/s; "
            f"{G:.3f} GFLOP per seed, {G / seconds:.1f} GFLOP/s, "
            f"{100 * single / seconds:.0f}% of the products' {G / single:.1f}"
            + (f" (batched over seeds these reach {G / median(peak[name][seeds]):.1f})" if seeds > 1 else "")
        )
        if device.type == "cuda":
            print(f"    kernels run {100 * kernel_share(made[name][0]):.0f}% of the time")
            if args.train.graph:
                continue  # a graph's parts can't be timed; --train.no-graph shows them
        parts = {
            part: timer(run, 1 if part == "sample" else args.steps) / (args.steps if part == "sample" else 1)
            for part, run in made[name][1].items()
        }
        if "losses" in parts:  # the time of a gradient includes its losses, so they are subtracted
            trained = {"q", "nu, theta"} & set(parts)
            parts |= {f"gradient of {part}": parts.pop(part) - parts["losses"] for part in sorted(trained)}
        print("    " + ", ".join(f"{part} {100 * value / (seconds * seeds):.0f}%" for part, value in parts.items()))
    both, single = sum(median(x) for x in step.values()) / seeds, sum(median(peak[name][1]) for name in stages)
    print(f"  both stages: {100 * single / both:.0f}% of the products' peak, {1 / both:.1f} seed-updates/s of both")
    if others:
        ratios = [
            sum(1 / x for x in other) * seeds / sum(step[name][i] for name in stages) for i, other in enumerate(others)
        ]
        print(
            f"  {min(ratios):.2f}, {median(ratios):.2f}, {max(ratios):.2f} times the updates/s of `{args.pair}` "
            f"(least, median, most of {len(ratios)})"
        )
    memory = (
        torch.cuda.max_memory_allocated() / 2**20
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    )
    print(f"  peak memory so far {memory:.0f} MiB")


def main(args: Args):
    unknown = set(args.shapes) - set(SHAPES)
    if unknown or min(args.seeds, default=0) < 1 or args.steps < 1 or args.rounds < 1:
        raise BadInput(f"--shapes takes {', '.join(SHAPES)}; --seeds, --steps and --rounds positive numbers")
    if args.train.objective not in (None, "exact", "semi") or args.train.preset == "paper":
        raise BadInput("FLOP are counted only for the objectives exact and semi, without --train.preset paper")
    if args.train.mixer_layers == 2:
        raise BadInput("FLOP are counted only for the 1-layer mixer: leave out --train.mixer-layers 2")
    torch.set_num_threads(args.threads)
    device = pick_device(args.device, args.train.tf32)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{args.threads} CPU threads"
    print(f"batch {args.train.batch_size}, {where}, torch {torch.__version__}")
    print(
        "FLOP of a layer k -> n on m rows: 2mkn forward, 2mkn for the weight's gradient, 2mkn for the input's (not "
        "needed in the first layer)"
    )
    for shape in args.shapes:
        for seeds in args.seeds:
            measure(shape, seeds, args, device)


if __name__ == "__main__":
    run_script(main, tyro.cli(Args, prog=program()))
