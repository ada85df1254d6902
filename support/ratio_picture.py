"""ratio.png: which transitions and episodes a ComaDICE run prefers.

    python comadice_eval.py ratio runs/mamujoco/hopper/medium-replay/comadice/seed0

A transition's weight in Eq. 11 is a product of two factors. Its own w* multiplies its log-likelihood. The ratio of its
episode says how often it is drawn. Each is divided by its mean here: 1 is plain BC.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

from comadice_losses import effective_sample_size
from environments.checks import BadInput
from offline_data.card import DATA_ROOT, dataset_path
from offline_data.dataset import episode_returns, open_dataset
from offline_data.durable import check_new, write_figure
from offline_data.replay import best_episodes, episode_weights, transition_rows
from support.ratio_args import Args
from support.runs import check_checkpoint, load_ratio_run

LEAST = -4  # weights below 10^-4 are drawn at this logarithm
BEST = 0.1  # the picture says how much of the weight this share of the episodes has, the best by return


class Weights(NamedTuple):
    """Weights of T transitions from E episodes. Each column has mean 1 over the transitions."""

    step: Tensor  # [T] w*
    between: Tensor  # [T] the ratio of the transition's episode
    total: Tensor  # [T] the weight in Eq. 11
    episode: Tensor  # [T] int64, the transition's episode
    returns: Tensor  # [E]

    def of_episodes(self, weight: Tensor) -> Tensor:
        """The mean weight of each episode's transitions, [E]."""
        sums = torch.zeros_like(self.returns).index_add_(0, self.episode, weight)
        return sums / torch.bincount(self.episode, minlength=len(self.returns))


def weights_of(w: Tensor, rows: TensorDict, episode_alpha: float, f: str, neighbours: bool) -> Weights:
    """Weights from a run's ratio w [T] and its three flags. Raises BadInput for a ratio that can't be used."""
    episode, step = rows["episode"][transition_rows(rows), 0].cpu(), w.double().cpu()
    between = episode_weights(rows, episode_alpha, f, neighbours)
    between = torch.ones_like(step) if between is None else between.double().cpu()
    total = step * between
    if not (torch.isfinite(step).all() and total.mean() > 0):
        raise BadInput(f"the ratio w* can't be drawn: its mean is {step.mean():.3g}")
    return Weights(*(weight / weight.mean() for weight in (step, between, total)), episode, episode_returns(rows).cpu())


def correlation(weights: Weights) -> float:
    """Pearson's correlation of the episodes' mean weights and returns; nan if either is the same for all episodes."""
    pair = torch.stack([weights.of_episodes(weights.total), weights.returns])
    return torch.corrcoef(pair)[0, 1].item() if (pair.std(1, correction=0) > 1e-9).all() else math.nan


def share_of_best(weights: Weights) -> tuple[float, float]:
    """The shares of the weight, and of the transitions, that belong to the best episodes by return."""
    chosen = best_episodes(weights.returns, BEST)[weights.episode]
    return (weights.total[chosen].sum() / weights.total.sum()).item(), chosen.double().mean().item()


def verdict(weights: Weights) -> str:
    """One line: how far the weight goes to the better episodes."""
    r, (weight, transitions) = correlation(weights), share_of_best(weights)
    said = "undefined, one of them is the same everywhere" if math.isnan(r) else f"{r:.2f}"
    return (
        f"correlation of episode weight and episode return: {said}; the best {BEST:.0%} of the episodes have "
        f"{weight:.0%} of the weight and {transitions:.0%} of the transitions"
    )


# ---------------------------------------------------------------- the picture


def draw_histogram(axis, weights: Weights):
    """The distribution of w* and of the whole weight. Zeros have no logarithm, so the legend counts them."""
    for weight, name, style in (
        (weights.step, "w*", {"alpha": 0.6}),
        (weights.total, "w* × ratio of the episode", {"histtype": "step", "color": "black"}),
    ):
        zero = (weight == 0).double().mean()
        positive = weight[weight > 0].log10().clamp(min=LEAST)
        axis.hist(positive.numpy(), bins=60, label=f"{name} (zero: {zero:.0%})", **style)
    axis.axvline(0, color="grey", linestyle="--", linewidth=1)
    axis.set(xlabel=f"log10 of the weight, or {LEAST} (0: as in plain BC)", ylabel="transitions", title="all weights")
    axis.legend(fontsize=8)


def draw_episodes(axis, weights: Weights):
    """Both factors and their product against the return: one point per episode."""
    for weight, name, style in (
        (weights.between, "ratio of the episode", {"edgecolor": "C1", "facecolor": "none", "marker": "s", "s": 45}),
        (weights.step, "mean w* of its steps", {"color": "C0", "marker": "+", "s": 25}),
        (weights.total, "both: its weight in Eq. 11", {"color": "black", "marker": "o", "s": 9}),
    ):
        axis.scatter(weights.returns.numpy(), weights.of_episodes(weight).numpy(), label=name, linewidth=1, **style)
    axis.axhline(1, color="grey", linestyle="--", linewidth=1)
    axis.set_yscale("symlog", linthresh=1)  # linear up to 1 and logarithmic above, so that weights of 0 can be seen
    axis.set_ylim(0, 1.3 * axis.get_ylim()[1])
    ticks = [tick for tick in (0, 0.5, 1, 2, 5, 10, 20, 50, 100, 1000) if tick <= axis.get_ylim()[1]]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set(xlabel="return of the episode", ylabel="mean weight", title="which episodes get the weight")
    axis.legend(fontsize=8)


def draw_three(axis, weights: Weights):
    """w* along the episodes of the highest, the median and the lowest return."""
    order = weights.returns.argsort(descending=True)
    named = {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}
    for name, episode in named.items():
        chosen = weights.episode == episode
        between = weights.between[chosen][0]
        label = f"{name}: return {weights.returns[episode]:.4g}, episode ratio {between:.2g}"
        axis.plot(weights.step[chosen].numpy(), label=label, linewidth=1)
    axis.axhline(1, color="grey", linestyle="--", linewidth=1)
    axis.set(xlabel="step of the episode", ylabel="w*", title="w* along three episodes")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)


def draw_training(axis, metrics: list[dict], weights: Weights):
    """Effective sample size and nu_tot at initial states over the training of the critics."""
    rows = [row for row in metrics if row["stage"] == "critics"]
    steps = [row["step"] for row in rows]
    ess = 100 * effective_sample_size(weights.total).item()
    batch_ess = [100 * row.get("ess", math.nan) for row in rows]
    axis.plot(steps, batch_ess, color="C0", marker=".", label="of nu's w on a batch")
    axis.axhline(ess, color="C0", linestyle=":", label="of the weights in Eq. 11, at the end")
    axis.set(xlabel="gradient steps of the critics", title="over training")
    axis.set_ylabel("effective sample size (%)", color="C0")
    axis.set_ylim(0, 100)
    axis.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 0.22))
    nu = [row.get("nu_init") for row in rows]
    if None not in nu:  # older runs did not record it
        other = axis.twinx()
        other.plot(steps, nu, color="C1", marker=".")
        other.set_ylabel("nu_tot(s0), in units of the reward", color="C1")


def draw(state: dict, rows: TensorDict, metrics: list[dict], out: Path, shared: bool = True):
    """Draws a run's ratio into the file `out` and prints its verdict; `state` is the run's checkpoint.

    `shared`: another process may be drawing the same file. Not so while this process trains the run.
    Raises BadInput if the file can't be written.
    """
    from matplotlib.figure import Figure

    config = state["config"]
    weights = weights_of(state["w"], rows, config["episode_alpha"], config["f"], config["neighbours"])
    figure = Figure(figsize=(9, 6.8))
    axes = figure.subplots(2, 2)
    draw_histogram(axes[0, 0], weights)
    draw_episodes(axes[0, 1], weights)
    draw_three(axes[1, 0], weights)
    draw_training(axes[1, 1], metrics, weights)
    said = verdict(weights)
    figure.suptitle(f"{state['card']['task']} {state['card']['quality']}: {said}".replace("; ", "\n"), fontsize=10)
    figure.subplots_adjust(0.1, 0.08, 0.92, 0.87, 0.24, 0.36)
    write_figure(out, figure, 100, shared=shared)
    print(f"{out}: {said}")


def main(args: Args):
    state = load_ratio_run(args.run)
    if args.out:
        check_new("--out", args.out)
    config, card = state["config"], state["card"]
    path = dataset_path(args.data or config.get("data"), card["env"], card["task"], config["quality"], DATA_ROOT)
    if args.data is None and not path.is_dir():
        raise BadInput(f"the run's dataset is not at {path} any more: name its directory with --data")
    rows, card = open_dataset(path)
    check_checkpoint(state, card, args.run)
    draw(state, rows, state["metrics"], Path(args.out or Path(args.run, "ratio.png")))
