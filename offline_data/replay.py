"""Replay of a dataset: draws rows, and makes batches of them."""

import torch
from tensordict import TensorDict
from torchrl.data import TensorDictReplayBuffer, TensorStorage
from torchrl.data.replay_buffers.samplers import Sampler

from comadice_losses import DIVERGENCES, episode_ratio
from environments.stops import asked
from offline_data.dataset import episode_returns, last_rows, preferred_by

DRAW = 16  # batches drawn together, see minibatches


def transition_rows(rows: TensorDict) -> torch.Tensor:
    """[T] int64: the row of each transition, in order. The row after it holds its next observation."""
    return (~last_rows(rows)).nonzero()[:, 0]


def initial_rows(rows: TensorDict) -> torch.Tensor:
    """[E] int64: the first row of each episode. Their states are samples of p_0."""
    return rows["is_init"][:, 0].nonzero()[:, 0]


def best_episodes(returns: torch.Tensor, share: float) -> torch.Tensor:
    """[E] bool: which episodes are the best by return [E]. `share` of the episodes, at least one."""
    best = torch.zeros_like(returns, dtype=torch.bool)
    best[returns.topk(max(round(share * len(returns)), 1)).indices] = True
    return best


def best_transitions(rows: TensorDict, share: float) -> torch.Tensor:
    """[T'] int64: the rows of all transitions of the best_episodes."""
    row = transition_rows(rows)
    return row[best_episodes(episode_returns(rows), share)[rows["episode"][row, 0]]]


def episode_weights(rows: TensorDict, alpha: float, f: str, neighbours: bool = False) -> torch.Tensor | None:
    """The weights with which ComaDICE draws transitions, [T]: episode_ratio of their episodes. None with alpha 0.

    alpha is in units of an episode's return, f is a key of DIVERGENCES. `neighbours`: see preferred_by.
    """
    if not alpha:
        return None
    w = episode_ratio(preferred_by(rows, neighbours)[0], alpha, DIVERGENCES[f])
    return w[rows["episode"][transition_rows(rows), 0]]


class RowSampler(Sampler):
    """Draws rows t from `drawn_from`, with replacement, on their device: [B], or as pairs (t, t + 1) [B, 2].

    It draws uniformly, or in proportion to `weights`, one for each entry of `drawn_from`. TorchRL's SliceSampler draws
    trajectories uniformly, so it would draw the steps of short episodes too often.

    With S > 1 generators each draws for one seed: [S, B] or [S, B, 2].
    """

    def __init__(
        self,
        drawn_from: torch.Tensor,
        pairs: bool = False,
        generators: list[torch.Generator] | None = None,
        weights: torch.Tensor | None = None,
    ):
        self.drawn_from, self.pairs, self.generators = drawn_from, pairs, generators or [None]
        self.cumulated = None if weights is None else (weights.double() / weights.double().sum()).cumsum(0)

    def draw(self, count: int, generator: torch.Generator | None) -> torch.Tensor:
        """Indices into `drawn_from`, [count]."""
        device, n = self.drawn_from.device, len(self.drawn_from)
        if self.cumulated is None:
            return torch.randint(n, (count,), device=device, generator=generator)
        uniform = torch.rand(count, dtype=torch.float64, device=device, generator=generator)
        return torch.searchsorted(self.cumulated, uniform, right=True).clamp(max=n - 1)

    def sample(self, storage, batch_size: int) -> tuple[torch.Tensor, dict]:
        """Row numbers, shaped as the class says, and the information that TorchRL wants beside them: none."""
        drawn = [self.draw(batch_size, generator) for generator in self.generators]
        t = self.drawn_from[torch.stack(drawn) if len(drawn) > 1 else drawn[0]]
        return torch.stack([t, t + 1], -1) if self.pairs else t, {}

    def _empty(self):
        raise NotImplementedError("a dataset is read-only")

    dumps = loads = state_dict = load_state_dict = _empty


class RowStorage(TensorStorage):
    """Reads whole rows by index_select, which is several times faster than indexing."""

    def get(self, index: torch.Tensor) -> TensorDict:
        """The rows [...] with these numbers [...]."""
        flat = index.flatten()
        return self._storage.apply(lambda x: x.index_select(0, flat).unflatten(0, index.shape), batch_size=index.shape)


def as_transition(pairs: TensorDict) -> TensorDict:
    """[..., 2] rows -> [...] transitions in TorchRL's layout: row t, and under "next" what is seen at t + 1."""
    batch, after = pairs.unbind(-1)
    batch["next"] = after.select("state", ("agents", "observation"), ("agents", "action_mask"), strict=False)
    return batch


def make_replay(
    rows: TensorDict,
    keys: list | None = None,
    *,
    pairs: bool = True,
    generators: list[torch.Generator] | None = None,
    device: torch.device | None = None,
    drawn_from: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> TensorDictReplayBuffer:
    """TorchRL replay of a dataset's transitions, or of the row numbers `drawn_from`. RowSampler draws them.

    Rows are read from the CPU's memory map or from the GPU's memory, and then moved to `device`. With `keys` only those
    entries are read (if they exist). With pairs=False nothing of the next row is read. sample(B) gives [B] transitions
    (or rows), or [S, B] for S > 1 generators.
    """
    storage = RowStorage(rows if keys is None else rows.select(*keys, strict=False), device=rows["is_init"].device)
    sampler = RowSampler(transition_rows(rows) if drawn_from is None else drawn_from, pairs, generators, weights)
    elsewhere = device is not None and device.type != rows["is_init"].device.type

    def transform(batch):
        batch = as_transition(batch) if pairs else batch
        return batch.to(device) if elsewhere else batch

    return TensorDictReplayBuffer(storage=storage, sampler=sampler, transform=transform)


def minibatches(start: int, checkpoints: set[int], *sources: tuple[TensorDictReplayBuffer, int]):
    """Yields (step, a batch of each source) for the steps from start + 1 to the last of `checkpoints`.

    A source is (replay, batch size). DRAW batches are drawn at once, which is cheaper, but never across a step in
    `checkpoints`. So a run that is resumed there draws the same batches. If a stop of the script is asked for, the
    steps end early, between two draws. The caller can tell by the step that was reached.
    """
    step = start
    for checkpoint in sorted(c for c in checkpoints if c > start):
        while step < checkpoint:
            if asked():
                return
            count = min(DRAW, checkpoint - step)
            for batches in zip(*(replay.sample(count * size).split(size, -1) for replay, size in sources)):
                step += 1
                yield step, *batches
