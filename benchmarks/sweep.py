"""The grid objective x advantage x alpha x seed on one dataset, each objective's members trained as one batched computation.

    python benchmarks/sweep.py --data data/mamujoco/hopper/medium-replay --steps 20000 --out sweep.csv

Every member is what `python comadice_train.py` with its flags trains (the same losses, networks and optimiser, through
torch.vmap), with batches of its own; of the --train flags, alpha, objective, advantage and those of every script but lr,
hidden and batch_size have no effect here. Plain BC is a member too, once per --bc-lr. A member's score is the mean
return over its last evaluations, since a policy's return swings from one checkpoint to the next. On a GPU the update is
one CUDA graph, while the evaluations run in processes beside it.
"""

import csv
import math
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import tyro
from tensordict import TensorDict
from tqdm import tqdm

import comadice_train
from comadice_bc import POLICY_KEYS, ratio_stats
from comadice_data import as_transition, initial_rows, open_dataset, run_script, transition_rows
from comadice_losses import policy_loss
from comadice_mixer import make_policy
from comadice_rollout import eval_env, evaluate
from comadice_runs import pick_device


@dataclass
class Args:
    data: str
    """dataset directory"""
    out: str = "sweep.csv"
    """a row a member"""
    objectives: list[Literal["exact", "printed", "released", "semi"]] = field(default_factory=lambda: ["exact", "printed", "released", "semi"])
    """objectives to try"""
    advantages: list[Literal["td", "q"]] = field(default_factory=lambda: ["td", "q"])
    """what w* is extracted from (`released` has its own)"""
    alphas: list[float] = field(default_factory=lambda: [0.01, 0.1, 1.0, 10.0, 100.0])
    """values of alpha"""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """seeds of each cell"""
    bc_lrs: list[float] = field(default_factory=lambda: [1e-4, 3e-4, 1e-3])
    """learning rates of plain BC"""
    steps: int = 20_000
    """gradient steps of each stage"""
    last: int = 10
    """evaluations, spread over the last fifth of the policy's training"""
    episodes: int = 32
    """episodes an evaluation"""
    processes: int = 2
    """processes that simulate"""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    train: comadice_train.Args = field(default_factory=comadice_train.Args)
    """the other arguments of comadice_train.py"""


def stack(modules: list[torch.nn.Module]) -> TensorDict:
    """Parameters of M equal modules as leaves [M, ...]."""
    return torch.stack([TensorDict.from_module(m).data for m in modules]).apply(lambda t: t.clone().requires_grad_())


def leaves(params: TensorDict, *names: str) -> list[torch.Tensor]:
    return [t for name in names for t in ([params[name]] if isinstance(params[name], torch.Tensor) else params[name].values(True, True))]


class Draw:
    """Batches [M, B] of transitions, each member's its own."""

    def __init__(self, rows: TensorDict, M: int, B: int, keys: list):
        self.rows, self.shape, self.device = rows.select(*keys, strict=False), (M * B,), rows["state"].device
        self.first, self.initial = transition_rows(rows), initial_rows(rows)
        self.size = (M, B)

    def transitions(self) -> tuple[TensorDict, torch.Tensor]:
        """Batches, and each transition's number in the dataset."""
        number = torch.randint(len(self.first), self.shape, device=self.device)
        index = self.first[number]
        return as_transition(self.rows[torch.stack([index, index + 1], -1)]).reshape(self.size), number.reshape(self.size)

    def initials(self, B: int) -> TensorDict:
        size = (self.size[0], B)
        return self.initial[torch.randint(len(self.initial), size, device=self.device)]


def repeat(step, times: int, label: str, device: torch.device):
    """Calls step() `times` times, yielding after each; on a GPU it is captured as a CUDA graph after three calls and replayed."""
    bar = tqdm(total=times, desc=label, mininterval=2)
    graph = torch.cuda.CUDAGraph() if device.type == "cuda" else None
    side = torch.cuda.Stream() if graph is not None else None
    for i in range(times):
        if graph is None:
            step()
        elif i < 3:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                step()
            torch.cuda.current_stream().wait_stream(side)
        else:
            if i == 3:
                with torch.cuda.graph(graph):
                    step()
            graph.replay()
        bar.update()
        yield i + 1
    bar.close()


def train_critics(objective: str, rows: TensorDict, card: dict, args: Args) -> list[tuple[dict, torch.Tensor]]:
    """Lines 3-8 for alphas x seeds at once. Returns (name of the cell and seed, w* of all transitions) of each member and advantage."""
    train = replace(args.train, objective=objective)
    members = [(alpha, seed) for alpha in args.alphas for seed in args.seeds]
    device, critics = rows["state"].device, []
    for _, seed in members:
        torch.manual_seed(seed)
        critics.append(comadice_train.make_critics(card, train).to(device))
    params = stack(critics)
    average = params.data.clone()
    model, target = critics[0], deepcopy(critics[0])
    alpha = torch.tensor([a * train.reward_scale for a, _ in members], device=device)
    groups = [{"params": leaves(params, "q", "nu", "mixer")}, {"params": leaves(params, "lam"), "lr": train.critic_lr * train.lambda_scale}]
    optimizer = torch.optim.Adam(groups, train.critic_lr, capturable=device.type == "cuda")
    draw = Draw(rows, len(members), train.batch_size, comadice_train.CRITIC_KEYS)
    of_q, of_nu = (["q", "mixer"], ["nu"]) if objective == "released" else (["q"], ["nu", "mixer"])
    if train.lambda_scale:
        of_nu.append("lam")

    def one(p, t, batch, init, a):
        with p.to_module(model), t.to_module(target):
            return comadice_train.critic_losses(model, target, batch, init, a, train)[:2]

    def step():
        L_q, L_nu = torch.vmap(one)(params, average, draw.transitions()[0], draw.initials(train.init_batch_size), alpha)
        for loss, group in ((L_q, leaves(params, *of_q)), (L_nu, leaves(params, *of_nu))):
            for leaf, gradient in zip(group, torch.autograd.grad(loss.sum(), group, retain_graph=True, allow_unused=True)):
                leaf.grad = gradient
        optimizer.step()
        average.lerp_(params.data, train.tau)

    for _ in repeat(step, args.steps, f"{objective}: {len(members)} critics", device):
        pass
    results = []
    for m, (a, seed) in enumerate(members):
        average[m].to_module(target)
        for advantage in args.advantages if objective != "released" else ["q"]:
            w = comadice_train.dataset_ratio(target, rows, replace(train, alpha=a, advantage=advantage))
            with torch.no_grad():
                first = draw.initial[:1000]
                nu_init = target.mixer(target.nu(first["agents", "observation"]), first["state"]).mean().item() / train.reward_scale
            results.append(({"objective": objective, "advantage": advantage, "alpha": a, "seed": seed, "lr": args.train.lr, "nu_init": nu_init}, w))
    return results


def train_policies(members: list[tuple[dict, torch.Tensor]], rows: TensorDict, card: dict, args: Args, pool) -> list[dict]:
    """Lines 9-12 for members of one learning rate at once. Returns a row each."""
    device, policies = rows["state"].device, []
    for name, _ in members:
        torch.manual_seed(name["seed"])
        policies.append(make_policy(card["n_agents"], card["obs_dim"], card["action_dim"], card["discrete"], args.train.hidden).to(device))
    params, model = stack(policies), policies[0]
    finite = [bool(torch.isfinite(w).all()) and bool(w.mean() > 0) for _, w in members]
    ratio = torch.stack([w / w.mean() if ok else torch.zeros_like(w) for ok, (_, w) in zip(finite, members)])
    draw = Draw(rows, len(members), args.train.batch_size, POLICY_KEYS)
    member = torch.arange(len(members), device=device)[:, None]
    optimizer = torch.optim.Adam(params.values(True, True), members[0][0]["lr"], capturable=device.type == "cuda")

    def one(p, batch, w):
        with p.to_module(model):
            agents = batch["agents"]
            return policy_loss(w, model.log_prob(agents["observation"], agents["action"], agents.get("action_mask", None)))

    def step():
        batch, number = draw.transitions()
        loss = torch.vmap(one)(params, batch, ratio[member, number])
        for leaf, gradient in zip(params.values(True, True), torch.autograd.grad(loss.sum(), list(params.values(True, True)))):
            leaf.grad = gradient
        optimizer.step()

    at = {args.steps - round(i * args.steps / 5 / args.last) for i in range(args.last)}
    jobs = []
    for i in repeat(step, args.steps, f"{len(members)} policies", device):
        if i in at:
            now = params.data.cpu()
            jobs.append([pool.submit(play, card, now[m].clone().to_dict(), args.train.hidden, args.episodes, i) for m in range(len(members))])
    table = []
    for m, (name, w) in enumerate(tqdm(members, desc="evaluations", mininterval=2)):
        # A ratio that is zero or not finite trains nothing; comadice_train.py refuses it.
        played = torch.tensor([job[m].result() if finite[m] else (math.nan, math.nan) for job in jobs])
        (score, winrate), spread = played.mean(0).tolist(), played[:, 0].std(correction=0).item()
        table.append(name | {"return": score, "winrate": winrate, "std_over_evaluations": spread, **ratio_stats(w)})
    return table


ENVS = {}


def play(card: dict, parameters: dict, hidden: int, episodes: int, seed: int) -> tuple[float, float]:
    """A policy's mean return and its winrate in percent (nan where there are no battles); runs in a worker process."""
    torch.set_num_threads(1)
    if not ENVS:
        ENVS["env"] = eval_env(card, episodes)
    policy = make_policy(card["n_agents"], card["obs_dim"], card["action_dim"], card["discrete"], hidden)
    TensorDict(parameters).to_module(policy)
    result = evaluate(policy, ENVS["env"], episodes, seed)
    return result["return_mean"], math.nan if result["winrate"] is None else 100 * result["winrate"]


def main(args: Args):
    device = pick_device(args.device)
    rows, card = open_dataset(args.data)
    if device.type == "cuda":
        rows = rows.to(device)
    args.train = comadice_train.fill_in(args.train, rows)
    table, began = [], time.time()
    with ProcessPoolExecutor(args.processes, mp_context=torch.multiprocessing.get_context("spawn")) as pool:
        members = [({"objective": "bc", "advantage": "", "alpha": "", "seed": seed, "lr": lr, "nu_init": math.nan}, torch.ones(card["samples"], device=device))
                   for lr in args.bc_lrs for seed in args.seeds]
        for objective in args.objectives:
            members += train_critics(objective, rows, card, args)
        for lr in dict.fromkeys(name["lr"] for name, _ in members):
            table += train_policies([m for m in members if m[0]["lr"] == lr], rows, card, args, pool)
    with open(args.out, "w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    print(f"\n{card['env']} {card['task']} {card['quality']}: behaviour {card['return_mean']:.4g}, {args.steps} steps a stage, "
          f"{time.time() - began:.0f} s on {torch.cuda.get_device_name(device) if device.type == 'cuda' else device}")
    battles = not math.isnan(table[0]["winrate"])
    print(f"| objective | w* from | alpha | lr | return |{' won % |' * battles} E[w] | w = 0 | ess | nu_tot(s0) |\n|{'---|' * (9 + battles)}")
    cells = {}
    for row in table:
        cells.setdefault((row["objective"], row["advantage"], row["alpha"], row["lr"]), []).append(row)
    for key, runs in cells.items():
        score = lambda key, runs=runs: torch.tensor([r[key] for r in runs])
        won = f" {score('winrate').mean():.1f} ± {score('winrate').std(correction=0):.1f} |" * battles
        w, zero, ess, nu = (sum(r[k] for r in runs) / len(runs) for k in ("mean_w", "w_zero", "ess", "nu_init"))
        returns = f"{score('return').mean():.4g} ± {score('return').std(correction=0):.3g}"
        print(f"| {' | '.join(map(str, key))} | {returns} |{won} {w:.3g} | {zero:.2f} | {ess:.3f} | {nu:.3g} |")


if __name__ == "__main__":
    run_script(main, tyro.cli(Args))
