"""Offline datasets: one native format and its validation.

A dataset is a directory of TensorDict memory maps with a card beside them:

    data/mamujoco/hopper/medium-replay/
        card.json               what it is, how it was made, sizes, statistics
        meta.json, *.memmap     rows, one after another in time; `TensorDict.load_memmap` reads them too
        agents/meta.json, agents/*.memmap

An episode of T transitions is T + 1 rows, one after another. Row t holds what the team saw and did at time t:

    state [S], ("agents", "observation") [n, O], ("agents", "action") [n, A] (float32) or [n] (int64, discrete),
    ("agents", "action_mask") [n, A] bool, discrete tasks only,
    reward [1], the reward of the step from t to t + 1,
    terminated [1], this step ended the episode for good: there is no value beyond it,
    done [1], this step ended the episode, by termination or by the time limit,
    is_init [1], the episode's first row,
    episode [1] int64, the episode's number.

The last row of an episode holds only its last observation (action and reward are zero, no flag is set). It is never
sampled as a transition. The row after a transition holds its next observation, so nothing is stored twice.

    python -m offline_data info data/mamujoco/hopper/medium-replay      # the dataset's row of Table 3
"""

import math
from itertools import pairwise
from pathlib import Path

import torch
from tensordict import TensorDict

from environments.checks import BadInput
from offline_data.card import COUNTS, RETURNS, check_card, read_json, verify

CHUNK, CHUNK_BYTES = 65536, 2**26  # rows, and bytes of rows, that are read together: this bounds the memory
NEIGHBOURS, TELLING = 32, 0.2  # see policy_returns
CHECKED_AT_OPENING = 2**26  # bytes; the checksums of a smaller dataset are compared whenever it is opened


def last_rows(rows: TensorDict) -> torch.Tensor:
    """[N] bool: the rows that hold an episode's last observation. They are not transitions."""
    done = rows["done"][:, 0]
    return torch.cat([done.new_zeros(1), done[:-1]])


def _check_episodes(path: Path, rows: TensorDict, card: dict):
    done, init, last = rows["done"][:, 0], rows["is_init"][:, 0], last_rows(rows)
    starts, ends = init.nonzero()[:, 0], last.nonzero()[:, 0]
    E = card["trajectories"]
    closed = (
        len(starts) == len(ends) == E
        and bool(init[0])
        and int(ends[-1]) == len(rows) - 1
        and not bool((done & last).any())
    )
    closed = closed and torch.equal(starts[1:], ends[:-1] + 1) and bool((ends - starts >= 1).all())
    if not closed:
        raise BadInput(
            f"{path}: the episodes do not close ({len(starts)} starts and {len(ends)} ends, {E} on the card)"
        )
    if bool((rows["terminated"] & ~rows["done"]).any()):
        raise BadInput(f"{path}: a step is terminated but not done")
    length = torch.diff(starts, append=torch.tensor([len(rows)]))
    if not torch.equal(rows["episode"][:, 0], torch.repeat_interleave(torch.arange(E), length)):
        raise BadInput(f"{path}: the episode numbers do not count the episodes")


def episode_returns(rows: TensorDict) -> torch.Tensor:
    """[E] float64: undiscounted return of each episode."""
    episode = rows["episode"][:, 0]
    return torch.zeros(int(episode[-1]) + 1, dtype=torch.float64, device=episode.device).index_add_(
        0, episode, rows["reward"][:, 0].double()
    )


def clipped(returns: torch.Tensor) -> torch.Tensor:
    """Returns [E] clipped to their 10th and 90th percentile: a few episodes far from all others then count less."""
    return returns.clamp(*returns.quantile(returns.new_tensor([0.1, 0.9])))


def policy_returns(returns: torch.Tensor) -> torch.Tensor | None:
    """An estimate of what the policy that played an episode returns on average: [E] float64 -> [E], or None.

    It is the mean return of the NEIGHBOURS episodes before the episode and of as many after it, fewer at the ends.
    Usually a dataset is in the order of recording, so nearly the same policy played them. The episode itself is left
    out, so its own luck does not count.

    None if neighbours tell nothing: the estimate's correlation with the clipped returns is below TELLING, or there are
    too few episodes. One policy may have played all of them, or they may be in another order.
    """
    count = len(returns)
    if count <= 2 * NEIGHBOURS:
        return None
    index, before = torch.arange(count, device=returns.device), returns.new_zeros(count + 1)
    before[1:] = returns.cumsum(0)  # before[i] is the sum of the first i returns
    first, end = (index - NEIGHBOURS).clamp(min=0), (index + NEIGHBOURS + 1).clamp(max=count)
    estimate = (before[end] - before[first] - returns) / (end - first - 1)
    correlation = torch.corrcoef(torch.stack([estimate, clipped(returns)]))[0, 1]
    return estimate if correlation >= TELLING else None  # equal returns give nan, which fails this too


def preferred_by(rows: TensorDict, neighbours: bool) -> tuple[torch.Tensor, bool]:
    """The scores that the ratio between episodes goes by, [E] float64, and whether they are policy_returns.

    Without `neighbours`, or if these tell nothing, a score is the episode's own return.
    """
    returns = episode_returns(rows)
    estimate = policy_returns(returns) if neighbours else None
    return (returns, False) if estimate is None else (estimate, True)


def _check_values(path: Path, rows: TensorDict, card: dict):
    low, high = card["action_low"], card["action_high"]
    all_last = last_rows(rows)
    together = max(min(CHUNK, CHUNK_BYTES * len(rows) // sum(card["bytes"].values())), 1)
    for start in range(0, len(rows), together):
        chunk, last = rows[start : start + together], all_last[start : start + together]
        for key in ("state", ("agents", "observation"), ("agents", "action"), "reward"):
            finite = torch.isfinite(chunk[key])
            if not finite.all():
                row = start + int((~finite).reshape(len(chunk), -1).any(-1).nonzero()[0])
                raise BadInput(f"{path}: {key if isinstance(key, str) else '/'.join(key)} is not finite at row {row}")
        action = chunk["agents", "action"][~last]
        if len(action) and not (low <= action.min() and action.max() <= high):
            raise BadInput(
                f"{path}: actions from {action.min():g} to {action.max():g} leave the card's bounds [{low}, {high}]"
            )
        if card["discrete"]:
            if len(action) and not (0 <= action.min() and action.max() < card["action_dim"]):
                raise BadInput(f"{path}: an action is outside of 0 to {card['action_dim'] - 1}")
            action = chunk["agents", "action"].where(~last[:, None], 0)
            allowed = chunk["agents", "action_mask"].gather(-1, action.unsqueeze(-1))[..., 0].all(-1) | last
            if not allowed.all():
                raise BadInput(
                    f"{path}: the action at row {start + int((~allowed).nonzero()[0])} is one that its mask forbids"
                )
    returns = episode_returns(rows)
    found = (returns.mean(), returns.std(correction=0), returns.min(), returns.max())
    for name, value in zip(RETURNS, found):
        if not math.isclose(value, card[name], rel_tol=1e-4, abs_tol=1e-3):
            raise BadInput(f"{path}: the card says {name} {card[name]}, the rewards give {value:.4f}")


def open_dataset(
    path: str | Path, env: str | None = None, task: str | None = None, quality: str | None = None
) -> tuple[TensorDict, dict]:
    """Validates a dataset and maps it read-only: (rows [N], card).

    Sizes are checked before anything is mapped, since TensorDict's own loader fills a truncated file up with zeros. The
    files are not changed, and nothing is unpickled. Raises BadInput with one line that says what is wrong: a missing or
    truncated file, another dtype or shape, a value that is not finite, an episode without its end, an action out of the
    card's bounds or forbidden by its mask, statistics that differ from the card's, a dataset of another task or
    quality.
    """
    path = Path(path)
    if not path.is_dir():
        how = "`python -m offline_data list` shows what is here and what can be downloaded"
        raise BadInput(f"no dataset at {path}: {how}")
    card = read_json(path / "card.json")
    check_card(path, card)
    for name, value in (("env", env), ("task", task), ("quality", quality)):
        if value is not None and card.get(name) != value:
            raise BadInput(
                f"{path} is a dataset of {name} '{card.get(name)}', not '{value}': give the matching --{name} or --data"
            )

    # Layout: card.json, TensorDict's meta.json and the sizes on disk must agree.
    meta, agents = read_json(path / "meta.json"), read_json(path / "agents" / "meta.json")
    counts = {name: card[name] for name in COUNTS}
    N, n, A = counts["samples"] + counts["trajectories"], counts["n_agents"], counts["action_dim"]
    expected = {
        "state": (torch.float32, (N, counts["state_dim"])),
        "agents/observation": (torch.float32, (N, n, counts["obs_dim"])),
        "agents/action": (torch.int64, (N, n)) if card["discrete"] else (torch.float32, (N, n, A)),
        "reward": (torch.float32, (N, 1)),
        "terminated": (torch.bool, (N, 1)),
        "done": (torch.bool, (N, 1)),
        "is_init": (torch.bool, (N, 1)),
        "episode": (torch.int64, (N, 1)),
    }
    if card["discrete"]:
        expected["agents/action_mask"] = (torch.bool, (N, n, A))
    for key, (dtype, shape) in expected.items():
        entry = (agents if key.startswith("agents/") else meta).get(key.removeprefix("agents/"))
        if not isinstance(entry, dict) or entry.get("dtype") != str(dtype) or entry.get("shape") != list(shape):
            raise BadInput(f"{path}: meta.json does not describe {key} as {dtype} {list(shape)}, which the card says")
        file = path / f"{key}.memmap"
        size = file.stat().st_size if file.is_file() else None
        wanted = math.prod(shape) * dtype.itemsize
        if size is None:
            raise BadInput(f"{file} is missing: make or copy the dataset again")
        if size != wanted or card["bytes"][key] != wanted:
            said = card["bytes"][key]
            raise BadInput(
                f"{file} has {size} bytes, {wanted} are needed (the card says {said}): the file was cut, make or copy "
                "the dataset again"
            )

    # A private mapping, opened only for reading: changes of the tensors can't reach the files.
    rows = TensorDict({"agents": TensorDict({}, [N, n])}, [N])
    for key, (dtype, shape) in expected.items():
        name, stored = path / f"{key}.memmap", torch.uint8 if dtype is torch.bool else dtype
        try:
            mapped = torch.from_file(str(name), shared=False, size=math.prod(shape), dtype=stored)
        except RuntimeError as error:
            raise BadInput(f"{name} can't be read ({error})") from None
        if dtype is torch.bool:
            for start in range(0, len(mapped), CHUNK):
                if (mapped[start : start + CHUNK] > 1).any():
                    raise BadInput(f"{path}: {key} has a byte that is neither 0 nor 1: make or copy the dataset again")
            mapped = mapped.view(torch.bool)
        rows[tuple(key.split("/"))] = mapped.view(shape)
    _check_episodes(path, rows, card)
    _check_values(path, rows, card)
    # Checksums come last, since the checks above say more precisely what is wrong.
    if sum(card["bytes"].values()) <= CHECKED_AT_OPENING:
        verify(path, card, whole=False)
    return rows.lock_(), card


def episodes(data: TensorDict):
    """Yields each episode of an opened dataset, [T + 1] rows."""
    starts = [*data["is_init"][:, 0].nonzero()[:, 0].tolist(), len(data)]
    for start, end in pairwise(starts):
        yield data[start:end]
