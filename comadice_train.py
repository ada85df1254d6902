"""ComaDICE, Algorithm 1: from an offline dataset to local policies to a measured return.

    python comadice_train.py                  # a small hopper dataset that ships with this code; a few minutes on a CPU
    python comadice_train.py --env mamujoco --task hopper --quality medium-replay --seeds 0 1 2 3 4

Lines 3-8 train nu, q and the mixer for --steps, then the ratio w* is computed once for every transition of the dataset,
then lines 9-12 (comadice_bc.py) train the local policies by weighted behavioural cloning for as many steps.
"""

import copy
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Literal

import environments.threads  # noqa: F401 -- before torch

# isort: split
import torch
import tyro
from tensordict import TensorDict
from tqdm import tqdm

import comadice_bc
import comadice_losses as losses
from comadice_eval import try_eval_env
from comadice_mixer import Critics
from environments.checks import BadInput, check_positive, pick_device, run_script
from offline_data.dataset import CHUNK
from offline_data.replay import as_transition, initial_rows, make_replay, minibatches, transition_rows
from support.report import report
from support.runs import (
    RunArgs,
    check_args,
    check_discount,
    equally_far,
    eval_steps,
    finish_run,
    load_dataset,
    save_checkpoints,
    start_runs,
)
from support.seeds import (
    Graph,
    adam,
    load_seeds,
    make_generators,
    name_seeds,
    per_seed,
    seed_states,
    set_gradients,
    split_seeds,
    stack,
)

# What Eq. 9 and Eq. 10 need of a transition.
CRITIC_KEYS = ["state", ("agents", "observation"), ("agents", "action"), "reward", "terminated"]
INIT_KEYS = ["state", ("agents", "observation")]


@dataclass
class Args(RunArgs):
    objective: Literal["exact", "printed", "released", "semi"] | None = None
    """how nu and theta are trained, see comadice_losses.py (default: exact for continuous actions, semi for discrete ones)"""
    advantage: Literal["td", "q"] = "td"
    """what w* is extracted from: r + gamma nu_tot(s') - nu_tot(s), or the paper's M[q - nu]"""
    critic_lr: float = 1e-4
    """Adam's learning rate for nu, q and the mixer (Table 4 gives q's); --lr is the policies'"""
    alpha: float | None = None
    """weight of the divergence from the data, in units of the reward (Eq. 1; default: 5 times the data's mean absolute reward with semi, else half of it)"""
    f: Literal["soft_chi2", "chi2", "kl"] = "soft_chi2"
    """f-divergence (Section B.5)"""
    mixer_layers: Literal[1, 2] = 1
    """layers of the mixer (Section B.6)"""
    mixer_hidden: int = 64
    """hidden units of the mixer's hyper-networks (Table 4)"""
    gamma: float = 0.99
    """discount (Table 4)"""
    init_batch_size: int = 32
    """initial states in a batch"""
    tau: float | None = None
    """step of the target networks towards the networks (default: 0.05 with semi, else Table 4's 0.005)"""
    lambda_scale: float = 0.0
    """learning rate of the multiplier that holds E[w] = 1, relative to --critic-lr (Table 4's lambda; 0: off)"""
    reward_scale: float | None = None
    """nu and q are learned in units of 1 / reward_scale rewards (default: of 5 mean absolute rewards); alpha's meaning and w* do not depend on it"""
    compile: bool = False
    """torch.compile the losses (of both stages): for a GPU, on a CPU it is twice as slow"""
    layer_norm: bool = True
    """LayerNorm in nu and q: not in the paper, and what makes the ratio worth its weight (README)"""


# What `python comadice_train.py` runs: the dataset in the repository, fewer steps and evaluations than the paper's, and an alpha that
# stays nearer to the data, which are 3% of medium-replay's: at alpha 1 the few with a high ratio are overfitted.
QUICK = Args(quality="demo", seeds=[0, 1, 2], steps=3000, evals=6, eval_episodes=10, lr=1e-3, critic_lr=3e-4, alpha=10.0, overwrite=True)


def fill_in(args: Args, rows: TensorDict, card: dict) -> Args:
    """The defaults that depend on the data: with them alpha means the same, and nu is of the order of 10, on robots and in battles.

    Where episodes end, `exact` leans towards policies that live longer, which is a robot's reward and a battle's stalling (README).
    Numbers are rounded to four digits, so that they do not depend on the order in which a machine adds up.
    """
    size = rows["reward"].double().abs().mean().item() or 1.0
    objective = args.objective or ("semi" if card["discrete"] else "exact")
    alpha, tau = (5 * size, 0.05) if objective == "semi" else (0.5 * size, 0.005)
    defaults = {"objective": objective, "alpha": float(f"{alpha:.4g}"), "tau": tau, "reward_scale": float(f"{0.2 / size:.4g}")}
    return replace(args, **{name: value for name, value in defaults.items() if getattr(args, name) is None})


def values(critics, *where: TensorDict) -> tuple[tuple, tuple, tuple]:
    """nu [B, n], nu_tot [B] and the mixer's coefficients at several batches of states, from one call of each network."""
    sizes = [len(w["state"]) for w in where]
    state = torch.cat([w["state"] for w in where])
    nu, at = critics.nu(torch.cat([w["agents", "observation"] for w in where])), critics.mixer.at(state)
    return nu.split(sizes), critics.mixer(nu, state, at).split(sizes), tuple(zip(*(c.split(sizes) for c in at)))


def critic_losses(critics, target, batch: TensorDict, init: TensorDict, alpha, args) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The losses of lines 5-7 on one batch: (L_q of Eq. 9, L(nu, theta) of Eq. 10, w [B], nu_tot(s) [B]), the last two detached.

    batch [B]: transitions; init: initial states; alpha: in units of the scaled reward, as both losses and nu_tot are.
    psi_q is a variable of L_q alone, psi_nu and theta of L(nu, theta) alone; with `released` theta is L_q's.
    """
    f, gamma = losses.DIVERGENCES[args.f], args.gamma
    obs, state = batch["agents", "observation"], batch["state"]
    reward, terminated = args.reward_scale * batch["reward"][:, 0], batch["terminated"][:, 0]
    lam = critics.lam if args.lambda_scale else 0.0
    q = critics.q(obs, batch["agents", "action"])

    if args.objective == "exact":
        (nu, _, _), (nu_tot, nu_tot_next, nu_tot_init), (theta, _, _) = values(critics, batch, batch["next"], init)
        A = losses.td_advantage(reward, terminated, nu_tot, nu_tot_next, gamma)  # Eq. 5
        nu_tot_next = nu_tot_next.detach()  # Eq. 9 then regresses on the same nu_tot(s'), which saves the target's evaluation
    else:
        with torch.no_grad():
            _, (nu_tot_next,), _ = values(target, batch["next"])
        if args.objective == "semi":
            (nu,), (nu_tot,), (theta,) = values(critics, batch)
            A = losses.td_advantage(reward, terminated, nu_tot, nu_tot_next, gamma)  # Eq. 5
        else:
            (nu, nu_init), (nu_tot, nu_tot_init), (theta, _) = values(critics, batch, init)
            if args.objective == "printed":
                A = critics.mixer.advantage(q.detach() - nu, state, theta)  # A_tot of Section 5
            elif args.objective == "released":
                A_i = theta[0].detach() * (q.detach() - nu)  # W_i (q_i - nu_i), [B, n]

    if args.objective == "released":
        # q_tot itself is regressed, and theta with it; nu_tot(s) is no part of it.
        L_q = losses.q_loss(critics.mixer(q, state, theta), reward, terminated, torch.zeros_like(nu_tot), nu_tot_next, gamma)
        L_nu = losses.released_loss(nu_init, A_i, alpha, f, gamma, lam)
        w = losses.released_ratio(A_i, alpha, f, lam)
    else:
        # Line 5, Eq. 9
        fixed = tuple(c.detach() for c in theta)
        L_q = losses.q_loss(critics.mixer.advantage(q - nu.detach(), state, fixed), reward, terminated, nu_tot.detach(), nu_tot_next, gamma)
        # Lines 6-7, Prop. 4.1 or Eq. 10
        L_nu = losses.semi_loss(nu_tot, A, alpha, f) if args.objective == "semi" else losses.dual_loss(nu_tot_init, A, alpha, f, gamma, lam)
        w = losses.occupancy_ratio(A, alpha, f, lam)
    return L_q, L_nu, w.detach(), nu_tot.detach()


def critic_metrics(L_q: torch.Tensor, L_nu: torch.Tensor, w: torch.Tensor, nu_tot: torch.Tensor, args) -> dict[str, float]:
    """What metrics.csv says of a batch; mean_nu is in units of the reward as recorded."""
    return {"q_loss": L_q.item(), "nu_loss": L_nu.item(), "mean_nu": nu_tot.mean().item() / args.reward_scale, "mean_w": w.mean().item(),
            "w_zero": (w == 0).float().mean().item(), "ess": losses.effective_sample_size(w).item()}


def make_optimizer(critics, args) -> torch.optim.Adam:
    """Adam for psi_q, psi_nu and theta, and for the multiplier with a rate of its own."""
    networks = [parameter for name, parameter in critics.named_parameters() if name != "lam"]
    return adam([{"params": networks}, {"params": [critics.lam], "lr": args.critic_lr * args.lambda_scale}], args.critic_lr, critics.lam.device)


@torch.no_grad()
def update_target(target: Iterable[torch.Tensor], networks: Iterable[torch.Tensor], tau: float):
    """target <- target + tau (networks - target), in every parameter."""
    torch._foreach_lerp_(list(target), list(networks), tau)


def make_critic_update(critics, target, optimizer, args, alpha: torch.Tensor | None = None):
    """Lines 5-7 of Algorithm 1 as a function of (batch, init), with one Adam step for all three, and the target networks' step.

    It returns what critic_losses does. Critics of S seeds, stacked, take batches [S, B] and give [S] and [S, B]. alpha [S] in
    units of the scaled reward may be each one's own; it is args.alpha for all otherwise.
    """
    alpha = torch.full_like(critics.lam, args.alpha * args.reward_scale) if alpha is None else alpha
    networks, targets = list(critics.parameters()), list(target.parameters())
    trained = [parameter for name, parameter in critics.named_parameters() if name != "lam" or args.lambda_scale]
    losses_of = per_seed(lambda *inputs: critic_losses(*inputs, args), [critics, target], alpha.numel(), args.compile)

    def update(batch: TensorDict, init: TensorDict):
        L_q, L_nu, w, nu_tot = losses_of(batch, init, alpha)
        set_gradients((L_q + L_nu).sum(), trained)  # no parameter is in both, so each has its own loss's gradient
        optimizer.step()
        update_target(targets, networks, args.tau)
        return L_q.detach(), L_nu.detach(), w, nu_tot

    return update


@torch.no_grad()
def dataset_ratio(critics, rows: TensorDict, args) -> torch.Tensor:
    """w_tot* of every transition of the dataset, [T]: Section 4.3, from the target copies of all networks.

    With advantage "td" q is no part of it: Eq. 9 is trained as Algorithm 1 has it, and not used.
    """
    f, alpha = losses.DIVERGENCES[args.f], args.alpha * args.reward_scale
    lam = critics.lam if args.lambda_scale else 0.0
    first, device = transition_rows(rows), critics.lam.device
    w = torch.empty(len(first), dtype=rows["state"].dtype, device=first.device)  # in place: a list of pieces would scatter memory
    for index, out in zip(first.split(CHUNK // 8), w.split(CHUNK // 8)):
        batch = as_transition(rows[torch.stack([index, index + 1], -1)].to(device))
        obs, state = batch["agents", "observation"], batch["state"]
        nu = critics.nu(obs)
        if args.objective == "released":
            A_i = critics.mixer.weights(state) * (critics.q(obs, batch["agents", "action"]) - nu)
            out.copy_(losses.released_ratio(A_i, alpha, f, lam))
            continue
        if args.advantage == "q":
            A_tot = critics.mixer.advantage(critics.q(obs, batch["agents", "action"]) - nu, state)
        else:
            nu_tot_next = critics.mixer(critics.nu(batch["next", "agents", "observation"]), batch["next", "state"])
            A_tot = losses.td_advantage(args.reward_scale * batch["reward"][:, 0], batch["terminated"][:, 0], critics.mixer(nu, state), nu_tot_next, args.gamma)
        out.copy_(losses.occupancy_ratio(A_tot, alpha, f, lam))
    return w


def make_critics(card: dict, args) -> Critics:
    sizes = (card[k] for k in ("n_agents", "obs_dim", "state_dim", "action_dim", "discrete"))
    return Critics(*sizes, args.hidden, args.mixer_hidden, args.mixer_layers, args.layer_norm)


def train_critics(rows: TensorDict, card: dict, args, seeds: list[int], states: list[dict]):
    """Lines 3-8 of Algorithm 1 for several seeds together, from their checkpoints `states` on, which are equally far.

    A generator: args.evals times on the way it yields for each seed (what a checkpoint needs, row of metrics.csv).
    """
    device, start, seconds = pick_device(args.device), states[0]["critic_step"], states[0]["critic_seconds"]
    each, targets = [], []
    for seed in seeds:
        torch.manual_seed(seed)
        each.append(make_critics(card, args).to(device))
        targets.append(copy.deepcopy(each[-1]))
    critics, target = stack(each), stack(targets)
    optimizer = make_optimizer(critics, args)
    generators = make_generators(seeds, 1, rows)
    parts = {"critics": critics, "target": target, "critic_optimizer": optimizer}
    if start:
        load_seeds(parts, generators, states)
    replay = make_replay(rows, CRITIC_KEYS, True, generators, device)
    initial = make_replay(rows, INIT_KEYS, False, generators, device, initial_rows(rows))
    update = Graph(make_critic_update(critics, target, optimizer, args), args.graph)
    at = eval_steps(args)
    clock = time.perf_counter()
    batches = minibatches(start, at, (replay, args.batch_size), (initial, args.init_batch_size))
    for step, batch, init in tqdm(batches, initial=start, total=args.steps, desc=f"critics {name_seeds(seeds)}", mininterval=1):
        results = update(batch, init)
        if step in at:
            table = [{"stage": "critics", "step": step} | critic_metrics(*result, args) for result in split_seeds(results, seeds)]
            seconds += time.perf_counter() - clock
            yield [(state | {"critic_step": step, "critic_seconds": seconds}, row) for state, row in zip(seed_states(parts, generators), table)]
            clock = time.perf_counter()


def train_seeds(args: Args, rows: TensorDict, card: dict, env) -> list[list[dict]]:
    """Algorithm 1 for args.seeds, each in its own run directory; returns the rows of each seed's metrics.csv.

    The seeds are trained together; of runs that are resumed, those that are equally far.
    """
    runs = start_runs(args, "comadice", card, rows, {"critic_step": 0, "critic_seconds": 0.0})
    for seeds in equally_far(runs):
        if runs[seeds[0]].state["critic_step"] < args.steps:
            for progress in train_critics(rows, card, args, seeds, [runs[seed].state for seed in seeds]):
                save_checkpoints(runs, seeds, progress)
        critics = make_critics(card, args).to(pick_device(args.device))
        for seed in seeds:
            critics.load_state_dict(runs[seed].state["target"])
            runs[seed].state["w"] = dataset_ratio(critics, rows, args)
        for progress in comadice_bc.train_policies(rows, card, args, seeds, [runs[seed].state for seed in seeds], env, "policy"):
            save_checkpoints(runs, seeds, progress)
        for seed in seeds:
            state = runs[seed].state
            finish_run(runs[seed], args, card, len(seeds), 2 * args.steps, state["critic_seconds"] + state["seconds"], state["critic_seconds"] + state["wall"])
    return [run.metrics for run in runs.values()]


def main(args: Args):
    quick = args is QUICK
    check_args(args)
    device = pick_device(args.device, args.tf32)
    if quick:
        print("No arguments: the demonstration on the small dataset in data/mamujoco/hopper/demo,")
        print(f"{args.steps:,} steps a stage, {args.evals} evaluations of {args.eval_episodes} episodes, {len(args.seeds)} seeds, alpha {args.alpha:g}.")
        print("The paper's setting on a full dataset:")
        print("  python -m offline_data collect --env mamujoco --task hopper")
        print("  python comadice_train.py --env mamujoco --task hopper --quality medium-replay --seeds 0 1 2 3 4\n")
    rows, card = load_dataset(args, device)
    args = fill_in(args, rows, card)
    check_positive(args, "critic_lr", "mixer_hidden", "init_batch_size", "alpha", "reward_scale")
    check_discount(args)
    if not 0 <= args.lambda_scale < math.inf:
        raise BadInput("--lambda-scale must be a finite number, at least 0")
    if args.objective == "semi" and args.lambda_scale:
        raise BadInput("--objective semi has E[w | s] = 1 in every state and no multiplier: use --lambda-scale 0")
    if args.objective == "released" and args.mixer_layers == 2:
        raise BadInput("--objective released needs local weights W_i, which a 2-layer mixer does not have: use --mixer-layers 1")
    env = try_eval_env(card, args.eval_episodes, args.workers)
    curves = {"ComaDICE": train_seeds(args, rows, card, env)}
    if quick:
        shared = {k: v for k, v in asdict(args).items() if k in RunArgs.__dataclass_fields__}
        bc = comadice_bc.Args(**shared)
        curves["BC"] = comadice_bc.train_seeds(bc, "bc", rows, card, None, env)

    report(curves, card, args, "learning_curve.png")


if __name__ == "__main__":
    run_script(main, QUICK if len(sys.argv) == 1 else tyro.cli(Args))
