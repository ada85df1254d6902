"""Statistics over seeds and tasks for few runs (Agarwal et al. 2021, Deep RL at the Edge of the Statistical Precipice).

Scores of one method are a list with one array per task, which has one score per seed: [N_1], [N_2], ... Tasks may have
different numbers of seeds. Every interval is a percentile interval of the stratified bootstrap: the seeds of each task
are drawn with replacement, the tasks stay the same.
"""

from collections.abc import Callable

import numpy as np

DRAWS = 5000  # bootstrap samples
LEVEL = 0.95


def iqm(scores: list[np.ndarray]) -> np.ndarray:
    """Interquartile mean: the mean of all tasks' scores without the lowest and the highest quarter. -> [...]

    scores: [..., N_t] for each task. Of N scores in all, floor(N / 4) are left out at each end.
    """
    pooled = np.sort(np.concatenate(scores, -1), -1)
    cut = pooled.shape[-1] // 4
    return pooled[..., cut : pooled.shape[-1] - cut].mean(-1)


def probability_of_improvement(x: list[np.ndarray], y: list[np.ndarray]) -> np.ndarray:
    """The probability that a run of x scores more than a run of y on the same task, mean over tasks; ties count half.

    x, y: [..., N_t] and [..., K_t] for each task -> [...]
    """
    each = []
    for a, b in zip(x, y):
        difference = a[..., :, None] - b[..., None, :]
        each.append(((difference > 0) + 0.5 * (difference == 0)).mean((-2, -1)))
    return np.mean(each, 0)


def profile(scores: list[np.ndarray], taus: np.ndarray) -> np.ndarray:
    """The share of runs that score more than each tau, mean over tasks. [..., N_t] for each task, [K] -> [..., K]"""
    return np.mean([(task[..., None] > taus).mean(-2) for task in scores], 0)


def interval(statistic: Callable, *methods: list[np.ndarray], draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """The 95% interval of statistic(*methods): its low and high end, [2, ...].

    If every task has one seed, there is nothing to draw from, and the interval is a point.
    """
    generator = np.random.default_rng(seed)
    drawn = [[task[generator.integers(len(task), size=(draws, len(task)))] for task in scores] for scores in methods]
    return np.quantile(statistic(*drawn), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
