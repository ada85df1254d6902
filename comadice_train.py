"""ComaDICE, Algorithm 1: from an offline dataset to local policies, and to their return in the simulator.

    python comadice_train.py                        # the demonstration: a small hopper dataset, minutes on a CPU
    python comadice_train.py --env mamujoco --task hopper --quality medium-replay --seeds 0 1 2 3 4

Read `algorithm_1` first, near the end of this file. Lines 3 to 8 of Algorithm 1 are in this file: they train nu and the
mixer, and q if w* is to come from it (--advantage q). Then w* is computed once for every transition of the dataset.
Lines 9 to 12 train the local policies by weighted behavioural cloning, in comadice_bc.py. The equations are in
comadice_losses.py, the networks in comadice_mixer.py.

By default (objective `semi`, w* from the TD form) there is no q: line 5 has nothing to do, and lines 6 and 7 minimise
semi_loss in the place of Eq. 10. Not in the paper: transitions of better episodes are drawn more often
(--episode-alpha), w* in Eq. 11 has a smaller alpha than the loss of nu (--policy-alpha), and robots play 0.8 times
their policy's mean action (--action-scale). `--preset paper` runs the algorithm as printed. docs/PAPER.md says why.
`resolve` in support/presets.py fills in the flags of the groups Method and Optimisation whose default is None. --env,
--task and --quality are filled in by `load_dataset` in support/runs.py.
"""

import environments.cpu  # noqa: F401 -- before torch

# isort: split
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from support.flags import parse

Objective = Literal["semi", "exact", "printed", "released_nu"]


@dataclass
class Args:
    """Train ComaDICE. Without --env, --task, --quality and --data it is the demonstration.

    The flags come in four groups. Task: --env to --data. Method: --preset to --lambda-scale. Optimisation: --steps to
    --layer-norm. Run: --seeds to --overwrite.
    """

    # Task
    env: str | None = None
    """simulator: mamujoco, smacv2, smacv1, smax (default: mamujoco, or that of --data)"""
    task: str | None = None
    """task of that simulator (default: hopper or zerg_5_vs_5, or that of --data)"""
    quality: str | None = None
    """quality of the dataset (default: that of --data, or medium-replay for robots and medium for battles; demo if that
    is missing and a demo comes with the code)"""
    data: str | None = None
    """a dataset directory, instead of data/ENV/TASK/QUALITY"""

    # Method
    preset: Literal["comadice", "paper"] = "comadice"
    """comadice: what RESULTS.md measures; paper: Table 4 and Eq. 10 as printed. Other flags override it"""
    objective: Objective | None = None
    """how nu and theta are trained (docs/PAPER.md). It has its own defaults of other flags, which their texts name"""
    advantage: Literal["td", "q"] | None = None
    """what w* is computed from. td: the TD form r + gamma nu_tot(s') - nu_tot(s). q: M[q - nu] - M[0], with q trained
    by Eq. 9 (printed: M[q - nu]; released_nu: from W_i (q_i - nu_i) of each agent)"""
    alpha: float | None = None
    """weight of the divergence from the data, in units of the reward (default with semi: 5 mean absolute rewards). If
    it is k > 1 times its default, the default of --episode-alpha is multiplied by k squared"""
    policy_alpha: float | None = None
    """w* in Eq. 11 is computed with this multiple of --alpha (default 1, with semi 0.5)"""
    episode_alpha: float | None = None
    """transitions of better episodes are drawn more often. A smaller value prefers them more; 0 switches this off. It
    is the alpha of a ratio between episodes, in units of the return (default with semi: the mean absolute deviation of
    the episodes' returns, clipped to their 10th and 90th percentile; with --neighbours half of that of the neighbours'
    mean returns, if these tell something)"""
    neighbours: bool | None = None
    """an episode counts as good if the 32 episodes before it and the 32 after it have high returns. Its own return does
    not count, since it is partly luck. Where neighbours tell nothing about an episode's return, its own return counts
    instead (default with semi)"""
    action_scale: float | None = None
    """robots' policies play this multiple of their mean action, clipped to the simulator's box (default 0.85, with semi
    0.8; 1: the mean)"""
    f: Literal["soft_chi2", "chi2", "kl"] = "soft_chi2"
    """f-divergence (Section B.5)"""
    gamma: float = 0.99
    """discount (Table 4)"""
    bound: bool | None = None
    """clip nu_tot(s') to the range of the data's discounted returns, so that nu can't blow up (default with semi)"""
    mixer_layers: Literal[1, 2] = 1
    """layers of the mixer (Section B.6)"""
    lambda_scale: float | None = None
    """learning rate of lambda, relative to --critic-lr; 0: no lambda. lambda is the multiplier that enforces
    mass E[w] = 1, where mass is 1 except with exact. Our reading of Table 4's lambda scale, which the paper does not
    explain"""

    # Optimisation
    steps: int = 200_000
    """gradient steps of each stage"""
    critic_lr: float | None = None
    """Adam's learning rate for nu, q and the mixer (default 3e-4, with semi 1e-3; Table 4: 1e-4 for q, and none for
    the others)"""
    critic_lr_decay: bool | None = None
    """let the learning rate of nu, q and the mixer fall linearly to 0 (default with semi)"""
    lr: float | None = None
    """Adam's learning rate for the policies (default 1e-3; Table 4: 1e-4)"""
    lr_decay: bool | None = None
    """let the policies' learning rate fall linearly to 0 (default; Table 4 has none)"""
    ema: float | None = None
    """decay of the average of the policies' weights, which is played (default 0.999; 0: no average)"""
    tau: float | None = None
    """step of the target networks towards the networks (default with semi: 0.05; Table 4: 0.005)"""
    batch_size: int = 128
    """transitions in a batch (Table 4)"""
    init_batch_size: int = 32
    """initial states in a batch"""
    hidden: int = 256
    """hidden units of the local networks (Table 4)"""
    mixer_hidden: int = 64
    """hidden units of the mixer: of its hyper-networks, and with 2 layers of its own hidden layer (Table 4)"""
    reward_scale: float | None = None
    """rewards are multiplied by it before nu and q are learned (default: so that 5 mean absolute rewards become 1)"""
    layer_norm: bool | None = None
    """LayerNorm in nu and q (default; the paper has none)"""

    # Run
    seeds: list[int] = field(default_factory=lambda: [0])
    """one run for each seed; they are trained together"""
    out: str = "runs"
    """run directories go to OUT/ENV/TASK/QUALITY/comadice/seedN"""
    evals: int = 100
    """evaluations over the training of the policies (Table 4)"""
    eval_episodes: int = 32
    """episodes per evaluation (Table 4)"""
    workers: int = 1
    """processes that simulate evaluation episodes; the start states depend on it"""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""
    data_device: Literal["auto", "cpu", "device"] = "auto"
    """where the dataset is kept: cpu, device (that of --device), or auto (on --device if it fits there)"""
    tf32: bool = False
    """on a GPU: matrix products in TF32, faster and less exact"""
    graph: bool = True
    """on a GPU: replay the update as a CUDA graph"""
    compile: bool = False
    """torch.compile the losses: for a GPU, on a CPU it is slower"""
    quiet: bool = False
    """no progress bars"""
    logger: Literal["none", "csv", "tensorboard", "wandb"] = "none"
    """also log metrics.csv's rows with TorchRL's csv, tensorboard or (offline) wandb logger (support/loggers.py)"""
    resume: bool = False
    """go on with runs that were stopped, leave finished ones as they are, extend them with more --steps and --evals"""
    overwrite: bool = False
    """replace runs that are already there"""


# Only 2% of these episodes are good. So --episode-alpha is 0.4 times its default here. With a former default, one of
# six seeds returned less than BC. ComaDICE's policies return more here if they play the mean action, so all do.
DEMO = Args(
    data=str(Path(__file__).parent / "data" / "mamujoco" / "hopper" / "few-good"), episode_alpha=43.29,
    action_scale=1.0, seeds=[0, 1, 2], steps=3000, evals=6, eval_episodes=10, resume=True,
)  # fmt: skip


def demonstration(args: Args) -> Args:
    """DEMO with the method's own --episode-alpha if `args` has another preset, an objective or an alpha."""
    other = args.preset != "comadice" or args.objective is not None or args.alpha is not None
    return replace(DEMO, resume=not args.overwrite, episode_alpha=None if other else DEMO.episode_alpha)


if __name__ == "__main__":  # before the slow imports, so that --help and a mistyped flag answer at once
    ARGS = parse(Args)
    IS_DEMO = ARGS.env is ARGS.task is ARGS.quality is ARGS.data is None
    if IS_DEMO:
        ARGS = parse(Args, demonstration(ARGS))  # again: the other flags override DEMO's

# isort: split
from dataclasses import asdict

import torch
from tensordict import TensorDict
from torch import Tensor

import comadice_bc
import comadice_losses as losses
from comadice_eval import try_eval_env
from comadice_mixer import Critics
from environments import stops
from environments.checks import pick_device, run_script
from offline_data.dataset import CHUNK, preferred_by
from offline_data.facts import DataFacts, data_facts, mean_abs_reward, return_deviation
from offline_data.replay import as_transition, episode_weights, initial_rows, make_replay, transition_rows
from support import ratio_picture
from support.presets import resolve
from support.report import report
from support.runs import (
    Diverged,
    Run,
    check_args,
    end_runs,
    finish_run,
    give_up,
    load_checkpoint,
    load_dataset,
    loading,
    next_group,
    start_runs,
)
from support.seeds import (
    Graph,
    adam,
    make_generators,
    make_stacked,
    per_seed,
    set_gradients,
    split_seeds,
    target_update,
)
from support.stages import Stage

# The entries of a transition, and of an initial state, that Eq. 9 and Eq. 10 need.
CRITIC_KEYS = ["state", ("agents", "observation"), ("agents", "action"), "reward", "terminated"]
INIT_KEYS = ["state", ("agents", "observation")]
STARTS = 1024  # nu_init in metrics.csv is the mean of nu_tot over the dataset's first 1024 initial states

# ---------------------------------------------------------------- A_tot and the losses on one batch of transitions [B]


def nu_tot(critics: Critics, states: TensorDict) -> Tensor:
    """nu_tot(s) = M_theta^s[nu(s; psi_nu)] at states [B] -> [B]."""
    return critics.mixer(critics.nu(states["agents", "observation"]), states["state"])


def td_form(critics_next: Critics, batch: TensorDict, nu_s: Tensor, args: Args, facts: DataFacts) -> Tensor:
    """A_tot(s, a) = r + gamma nu_tot(s') - nu_tot(s) -> [B]. `critics_next` give nu_tot(s'), and nu_s is nu_tot(s).

    With --bound, nu_tot(s') is clipped to the lowest and the highest discounted return after any recorded state.
    Without it, facts.low and facts.high are infinite.
    """
    nu_next = nu_tot(critics_next, batch["next"]).clamp(facts.low, facts.high)
    reward, terminated = args.reward_scale * batch["reward"][:, 0], batch["terminated"][:, 0]
    return losses.td_advantage(reward, terminated, nu_s, nu_next, args.gamma)  # Eq. 5


def q_form(critics: Critics, batch: TensorDict, q: Tensor, args: Args, trains_q: bool) -> Tensor:
    """A_tot(s, a) = M_theta^s[q - nu] - M_theta^s[0] -> [B]; with `printed` M_theta^s[q - nu]. q is [B, n].

    The gradient flows to psi_q with `trains_q`, else to psi_nu and theta.
    """
    nu, state = critics.nu(batch["agents", "observation"]), batch["state"]
    at = critics.mixer.at(state)  # W_theta^s and b_theta^s
    if trains_q:
        nu, at = nu.detach(), tuple(weights.detach() for weights in at)
    else:
        q = q.detach()
    # `printed` keeps the mixer's bias b in A_tot, as Section 5 does. In q_tot - nu_tot, Eq. 5, b cancels.
    mix = critics.mixer if args.objective == "printed" else critics.mixer.advantage
    return mix(q - nu, state, at)


def local_form(critics: Critics, batch: TensorDict, q: Tensor) -> Tensor:
    """The local A_i = W_i (q_i - nu_i) of `released_nu` -> [B, n]. The gradient flows to psi_nu alone."""
    return critics.mixer.weights(batch["state"]).detach() * (q.detach() - critics.nu(batch["agents", "observation"]))


def nu_loss(
    critics: Critics, batch: TensorDict, init: TensorDict, nu_s: Tensor, td: Tensor | None, q: Tensor | None,
    args: Args, facts: DataFacts,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What lines 6 and 7 minimise: L(nu, theta) of args.objective, and w [B], which is for metrics.csv alone.

    nu_s is nu_tot(s) [B]. td is the TD form [B] with nu_tot(s') from the target networks, slowly moving copies of the
    networks; only `semi` needs it. q is q_i(o_i, a_i) [B, n], or None without --advantage q. `init` are initial states,
    which `semi` does not need. critics.lam is the multiplier of mass E[w] = 1. It stays at 0 where --lambda-scale is 0.
    """
    f, gamma, lam, alpha = losses.DIVERGENCES[args.f], args.gamma, critics.lam, args.alpha * args.reward_scale
    if args.objective == "semi":  # the default, in the place of Eq. 10: no gradient flows at s'
        return losses.semi_loss(nu_s, td, alpha, f), losses.occupancy_ratio(td, alpha, f)
    if args.objective == "released_nu":  # the released code's rule. theta gets no gradient: q's loss trains it
        A_i, nu_init = local_form(critics, batch, q), critics.nu(init["agents", "observation"])
        loss = losses.released_nu_loss(nu_init, A_i, alpha, f, gamma, lam)
        return loss, losses.released_nu_ratio(A_i, alpha, f, lam)
    if args.objective == "exact":  # Prop. 4.1, with the gradient at s, s' and s0
        A_tot, mass = td_form(critics, batch, nu_s, args, facts), facts.mass
    else:  # printed: Eq. 10 as it is printed, with q fixed. It needs --advantage q
        A_tot, mass = q_form(critics, batch, q, args, trains_q=False), 1.0
    loss = losses.dual_loss(nu_tot(critics, init), A_tot, alpha, f, gamma, lam, mass)  # Eq. 10 (printed)
    return loss, losses.occupancy_ratio(A_tot, alpha, f, lam)


def critic_losses(
    critics: Critics, target: Critics, batch: TensorDict, init: TensorDict, args: Args, facts: DataFacts
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The losses of lines 5 to 7: (L_q, L(nu, theta), w [B], nu_tot(s) [B]). The last two are for metrics.csv.

    batch is [B] transitions, init [B0] initial states; both losses are scalars. L_q is 0 if w* does not come from q. In
    Eq. 9 the target networks give nu_tot(s'). No parameter gets a gradient from both losses.
    """
    nu_s, with_q = nu_tot(critics, batch), args.advantage == "q"
    td = td_form(target, batch, nu_s, args, facts) if with_q or args.objective == "semi" else None
    q = critics.q(batch["agents", "observation"], batch["agents", "action"]) if with_q else None
    L_nu, w = nu_loss(critics, batch, init, nu_s, td, q, args, facts)  # lines 6 and 7
    L_q = torch.zeros_like(L_nu)
    if with_q:
        if args.objective == "released_nu":  # M[q] is fitted to r + gamma nu_tot(s'), and theta is trained with q
            A_q = critics.mixer(q, batch["state"]) - nu_s.detach()
        else:
            A_q = q_form(critics, batch, q, args, trains_q=True)
        L_q = losses.q_loss(A_q, td)  # line 5, Eq. 9 (released_nu: the same with M[q])
    return L_q, L_nu, w.detach(), nu_s.detach()


def critic_metrics(L_q: Tensor, L_nu: Tensor, w: Tensor, nu_s: Tensor, args: Args) -> dict[str, float]:
    """The values for metrics.csv. mean_nu is in units of the recorded reward."""
    values = {"q_loss": L_q.item(), "nu_loss": L_nu.item(), "mean_nu": nu_s.mean().item() / args.reward_scale}
    return values | comadice_bc.ratio_stats(w)


# ---------------------------------------------------------------- lines 3 to 8: training nu, q and the mixer


def make_critics(card: dict, args: Args) -> Critics:
    """psi_nu and theta, psi_q if w* comes from q, and the multiplier lambda."""
    sizes = (card[k] for k in ("n_agents", "obs_dim", "state_dim", "action_dim", "discrete"))
    with_q = args.advantage == "q"
    return Critics(*sizes, args.hidden, args.mixer_hidden, args.mixer_layers, args.layer_norm, with_q)


def make_optimizer(critics: Critics, args: Args) -> torch.optim.Adam:
    """Adam for psi_q, psi_nu and theta, and for the multiplier with another learning rate."""
    networks = [parameter for name, parameter in critics.named_parameters() if name != "lam"]
    groups = [{"params": networks}, {"params": [critics.lam], "lr": args.critic_lr * args.lambda_scale}]
    return adam(groups, args.critic_lr, critics.lam.device)


def losses_per_seed(critics: Critics, target: Critics, args: Args, facts: DataFacts, n_seeds: int):
    """critic_losses for each seed, as a function of (batch, init)."""
    on_batch = lambda *inputs: critic_losses(*inputs, args, facts)
    return per_seed(on_batch, [critics, target], n_seeds, args.compile)


def make_critic_update(critics: Critics, target: Critics, optimizer: torch.optim.Adam, args: Args, facts: DataFacts):
    """Lines 5 to 7 as a function of (batch, init): one Adam step for all at once, then a step of the target networks.

    It returns what critic_losses does. With stacked critics of S seeds, batches are [S, B], losses [S], w and nu_s
    [S, B].
    """
    trained = [parameter for name, parameter in critics.named_parameters() if name != "lam" or args.lambda_scale]
    losses_of = losses_per_seed(critics, target, args, facts, critics.lam.numel())
    update_target = target_update(target, critics, args.tau)

    def update(batch: TensorDict, init: TensorDict):
        L_q, L_nu, w, nu_s = losses_of(batch, init)
        set_gradients((L_q + L_nu).sum(), trained)  # no parameter gets a gradient from both
        optimizer.step()  # lines 5, 6 and 7: psi_q, theta and psi_nu
        update_target()
        return L_q.detach(), L_nu.detach(), w, nu_s

    return update


def train_critics(rows: TensorDict, card: dict, args: Args, runs: list[Run], facts: DataFacts, weights: Tensor | None):
    """Lines 3 to 8 for runs at the same step, from their checkpoints on. args.evals checkpoints are saved on the way.

    A transition is a row of `rows` and the next row. Not in the paper: for critics and policies, a transition is drawn
    with a probability proportional to `weights`, the ratio of its episode (comadice_losses.episode_ratio). Initial
    states are drawn uniformly.
    """
    device, seeds = pick_device(args.device), [run.seed for run in runs]
    critics, target = make_stacked(lambda: make_critics(card, args).to(device), seeds)  # line 1: theta, psi_q, psi_nu
    optimizer = make_optimizer(critics, args)  # line 1: one learning rate for theta, psi_q and psi_nu
    generators = make_generators(seeds, 1, rows)
    parts = {"critics": critics, "target": target, "critic_optimizer": optimizer}
    stage = Stage("critics", "critics", args, runs, parts, generators, "critic_")
    how, first_rows = {"generators": generators, "device": device}, initial_rows(rows)
    transitions = make_replay(rows, CRITIC_KEYS, pairs=True, weights=weights, **how)
    initial_states = make_replay(rows, INIT_KEYS, pairs=False, drawn_from=first_rows, **how)
    # nu_tot(s0) of always the same initial states, for metrics.csv alone
    starts = rows[first_rows[:STARTS]].select(*INIT_KEYS).to(device)
    starts = starts.expand(len(seeds), *starts.shape) if len(seeds) > 1 else starts
    nu_at_starts = per_seed(lambda critics, states: (nu_tot(critics, states).mean(),), [target], len(seeds))
    update = Graph(make_critic_update(critics, target, optimizer, args, facts), args.graph)
    # `semi` ignores the initial states. They are drawn for it too, so that all objectives see the same transitions.
    sources = (transitions, args.batch_size), (initial_states, args.init_batch_size)
    # line 3: training the occupancy ratio
    for step, batch, init in stage.steps(*sources):  # line 4: to step args.steps
        if args.critic_lr_decay:
            optimizer.param_groups[0]["lr"].fill_(args.critic_lr * (1 - (step - 1) / args.steps))  # not lambda's
        results = update(batch, init)  # lines 5 to 7: `update` of make_critic_update
        if step in stage.eval_steps:  # --evals times
            metrics = [critic_metrics(*result, args) for result in split_seeds(results, seeds)]
            with torch.no_grad():
                nu_init = [nu.item() / args.reward_scale for (nu,) in split_seeds(nu_at_starts(starts), seeds)]
            stage.save([{"stage": "critics", "step": step} | m | {"nu_init": nu} for m, nu in zip(metrics, nu_init)])
    stage.end()  # line 8


@torch.no_grad()
def dataset_ratio(target: Critics, rows: TensorDict, args: Args, facts: DataFacts) -> Tensor:
    """w_tot*(s, a) of every transition of the dataset, [T]. `target` are the trained target networks."""
    t, device = transition_rows(rows), target.lam.device
    alpha = args.policy_alpha * args.alpha * args.reward_scale
    f = losses.DIVERGENCES[args.f]
    w = torch.empty(len(t), dtype=rows["state"].dtype, device=t.device)  # filled in place, to save memory
    for index, out in zip(t.split(CHUNK // 8), w.split(CHUNK // 8)):
        stops.leave()
        batch = as_transition(rows[torch.stack([index, index + 1], -1)].to(device))
        q = target.q(batch["agents", "observation"], batch["agents", "action"]) if args.advantage == "q" else None
        if args.objective == "released_nu":
            w_batch = losses.released_nu_ratio(local_form(target, batch, q), alpha, f, target.lam)
        else:
            if args.advantage == "td":
                A_tot = td_form(target, batch, nu_tot(target, batch), args, facts)
            else:
                A_tot = q_form(target, batch, q, args, trains_q=False)  # no gradient is taken here
            w_batch = losses.occupancy_ratio(A_tot, alpha, f, target.lam)  # w* of Section 4.3
        out.copy_(w_batch)
    return w


# ---------------------------------------------------------------- Algorithm 1


def algorithm_1(
    rows: TensorDict, card: dict, args: Args, runs: list[Run], env, facts: DataFacts, weights: Tensor | None
):
    """Algorithm 1 for runs at the same step, to its end. `rows` is the dataset D of line 1, described by `card`.

    `env` is the simulator for the evaluations, or None.
    """
    if runs[0].state["critic_step"] < args.steps:
        train_critics(rows, card, args, runs, facts, weights)  # lines 3 to 8
    target = make_critics(card, args).to(pick_device(args.device))
    for run in runs:
        with loading([run]):
            target.load_state_dict(run.state["target"])
        run.state["w"] = dataset_ratio(target, rows, args, facts)  # w* for line 11, from the slowly moving copies
    # lines 9 to 12, and line 1 for eta: Eq. 11 with run.state["w"]
    comadice_bc.train_policies(rows, card, args, runs, env, "policy", weights=weights)
    for run in runs:
        ratio_picture.draw(run.state, rows, run.metrics, run.path / "ratio.png", shared=False)
        # Lines 2 and 13: the policies pi_i are in run.state, which is saved. summary.json says that a run is finished,
        # so it is written last.
        finish_run(run, args, card, len(runs))


def train_seeds(args: Args, rows: TensorDict, card: dict, env) -> list[list[dict]]:
    """Algorithm 1 for args.seeds, each in its own run directory. Returns the rows of each seed's metrics.csv.

    Seeds at the same step are trained together.
    """
    runs = start_runs(args, "comadice", card, rows, {"critic_step": 0, "critic_seconds": 0.0})
    facts, weights = data_facts(rows, args), episode_weights(rows, args.episode_alpha, args.f, args.neighbours)
    while group := next_group(runs):
        try:
            algorithm_1(rows, card, args, group, env, facts, weights)
        except Diverged as error:
            give_up(runs, error)
    return end_runs(runs)


def demonstrate(args: Args, rows: TensorDict, card: dict, env):
    """Compares ComaDICE with BC and BC on the best episodes, on the small dataset that comes with the code."""
    curves = {"ComaDICE": train_seeds(args, rows, card, env)}
    shared = {k: v for k, v in asdict(args).items() if k in comadice_bc.Args.__dataclass_fields__}
    for name, best in (("BC", 1.0), ("BC on the best 10%", 0.1)):
        curves[name] = comadice_bc.train_seeds(comadice_bc.Args(**shared | {"best": best}), rows, card, None, env)
    report(curves, card, args, "demonstration.png")
    folder = Path(args.out, args.env, args.task, args.quality)
    paths = [folder / "comadice" / f"seed{seed}" for seed in args.seeds]
    first = load_checkpoint(next(path for path in paths if (path / "summary.json").exists()))  # it did not diverge
    ratio_picture.draw(first, rows, first["metrics"], folder / "ratio.png")


def main(args: Args, is_demo: bool = False):
    check_args(args)
    device = pick_device(args.device, args.tf32)
    rows, card = load_dataset(args, device, "comadice")  # line 1: the offline data D
    units = mean_abs_reward(rows), return_deviation(rows), return_deviation(rows, neighbours=True)
    args = resolve(args, *units)
    for_w = f" ({args.policy_alpha * args.alpha:.4g} for w*)" if args.policy_alpha != 1 else ""
    alphas = f"alpha {args.alpha:g}{for_w}, episode alpha {args.episode_alpha:g}"
    scale = "" if card["discrete"] else f", action scale {args.action_scale:g}"
    objective = f"objective {args.objective}, w* from {args.advantage}"
    if args.neighbours and args.episode_alpha:
        told = preferred_by(rows, neighbours=True)[1]
        alphas += " by the neighbours' returns" if told else " by the own returns (neighbours tell nothing)"
    print(f"preset {args.preset}: {objective}, {alphas}, tau {args.tau:g}{scale}")
    env = try_eval_env(card, args.eval_episodes, args.workers)
    if is_demo:
        demonstrate(args, rows, card, env)
    else:
        report({"ComaDICE": train_seeds(args, rows, card, env)}, card, args, "learning_curve.png")


if __name__ == "__main__":
    run_script(main, ARGS, IS_DEMO)
