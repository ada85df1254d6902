"""Replay of a dataset: which rows are drawn, and what a batch holds of them."""

import torch
from tensordict import TensorDict
from torchrl.data import TensorDictReplayBuffer, TensorStorage
from torchrl.data.replay_buffers.samplers import Sampler

from environments.stops import asked
from offline_data.dataset import episode_returns, last_rows

DRAW = 16  # batches drawn together, see minibatches


def transition_rows(rows: TensorDict) -> torch.Tensor:
    """[T] int64: the row of each transition, in order; the row after it is its next observation."""
    return (~last_rows(rows)).nonzero()[:, 0]


def initial_rows(rows: TensorDict) -> torch.Tensor:
    """[E] int64: the rows that begin an episode, samples of p_0."""
    return rows["is_init"][:, 0].nonzero()[:, 0]


def best_transitions(rows: TensorDict, share: float) -> torch.Tensor:
    """[T'] int64: the row of each transition of the best episodes by return, `share` of them and at least one."""
    returns = episode_returns(rows)
    best = torch.zeros_like(returns, dtype=torch.bool)
    best[returns.topk(max(round(share * len(returns)), 1)).indices] = True
    first = transition_rows(rows)
    return first[best[rows["episode"][first, 0]]]


class RowSampler(Sampler):
    """Draws rows of `first` uniformly with replacement, on their device: rows t alone [B], or pairs (t, t + 1) [B, 2].

    TorchRL's SliceSampler draws trajectories uniformly, so it would draw short episodes too often.

    With `weights` [T] it draws in proportion to them. With S generators it draws for S seeds, each from its own: [S, B]
    or [S, B, 2]. One generator, or none, has no such dimension.
    """

    def __init__(
        self,
        first: torch.Tensor,
        pairs: bool = False,
        generators: list[torch.Generator] | None = None,
        weights: torch.Tensor | None = None,
    ):
        self.first, self.pairs, self.generators = first, pairs, generators or [None]
        self.cumulated = None if weights is None else (weights.double() / weights.double().sum()).cumsum(0)

    def draw(self, count: int, generator: torch.Generator | None) -> torch.Tensor:
        """Indices into `first`, [count]."""
        device, n = self.first.device, len(self.first)
        if self.cumulated is None:
            return torch.randint(n, (count,), device=device, generator=generator)
        uniform = torch.rand(count, dtype=torch.float64, device=device, generator=generator)
        return torch.searchsorted(self.cumulated, uniform, right=True).clamp(max=n - 1)

    def sample(self, storage, batch_size: int) -> tuple[torch.Tensor, dict]:
        drawn = [self.draw(batch_size, generator) for generator in self.generators]
        first = self.first[torch.stack(drawn) if len(drawn) > 1 else drawn[0]]
        return torch.stack([first, first + 1], -1) if self.pairs else first, {}

    def _empty(self):
        raise NotImplementedError("a dataset is read-only")

    dumps = loads = state_dict = load_state_dict = _empty


class RowStorage(TensorStorage):
    """Reads whole rows, which index_select copies several times faster than an index does."""

    def get(self, index: torch.Tensor) -> TensorDict:
        flat = index.flatten()
        return self._storage.apply(lambda x: x.index_select(0, flat).unflatten(0, index.shape), batch_size=index.shape)


def as_transition(pairs: TensorDict) -> TensorDict:
    """[..., 2] rows -> [...] transitions in TorchRL's layout: row t, and what is seen at t + 1 under "next"."""
    batch, after = pairs.unbind(-1)
    batch["next"] = after.select("state", ("agents", "observation"), ("agents", "action_mask"), strict=False)
    return batch


def make_replay(
    rows: TensorDict,
    keys: list | None = None,
    pairs: bool = True,
    generators: list[torch.Generator] | None = None,
    device: torch.device | None = None,
    first: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> TensorDictReplayBuffer:
    """TorchRL replay of a dataset's transitions, or of the rows `first`, drawn as RowSampler does and moved to
    `device`.

    Rows are read where they lie, on the CPU from the memory map or in a GPU's memory. With `keys`, only those entries
    (where there are any) are read; without `pairs`, nothing of the next row is.
    """
    storage = RowStorage(rows if keys is None else rows.select(*keys, strict=False), device=rows["is_init"].device)
    sampler = RowSampler(transition_rows(rows) if first is None else first, pairs, generators, weights)
    elsewhere = device is not None and device.type != rows["is_init"].device.type

    def transform(batch):
        batch = as_transition(batch) if pairs else batch
        return batch.to(device) if elsewhere else batch

    return TensorDictReplayBuffer(storage=storage, sampler=sampler, transform=transform)


def minibatches(start: int, stops: set[int], *sources: tuple[TensorDictReplayBuffer, int]):
    """Yields (step, a batch of each source) for the steps from start + 1 to the last of `stops`; a source is (replay,
    batch size).

    Batches are drawn DRAW at a time, which spreads the cost of a draw, and never across a stop: a run that goes on from
    one draws what it would have drawn. For the same reason they end early, between two draws, where a stop of the
    script is asked for: the caller sees that by the step it has reached.
    """
    step = start
    for stop in sorted(s for s in stops if s > start):
        while step < stop:
            if asked():
                return
            count = min(DRAW, stop - step)
            for batches in zip(*(replay.sample(count * size).split(size, -1) for replay, size in sources)):
                step += 1
                yield step, *batches
