"""Writes a new dataset, episode by episode. dataset.py describes the format."""

import errno
import json
import math
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from tensordict import TensorDict

from environments.checks import BadInput
from offline_data.card import FIELDS, MASK, card_text, check_free, partial_of, read_json, remove_partial
from offline_data.durable import disk_errors, fsync_folder, fsync_tree, replace


class DatasetWriter:
    """Appends whole episodes to a new dataset. Memory stays bounded. Before close() nothing is at `path`.

        writer = DatasetWriter(path)
        writer.append(episode)    # TensorDict [T + 1], see dataset.py's docstring; flags and "episode" are added
        writer.close(card)        # completes the card and moves the dataset into place

    If something is already at `path`, it stays and BadInput is raised. With `overwrite`, close() replaces an old
    dataset, but nothing else. If `path` is a link to it, the link stays, and the dataset that it leads to is replaced.
    """

    def __init__(self, path: str | Path, overwrite: bool = False):
        check_free(Path(path), overwrite)
        self.path, self.overwrite = Path(path).resolve(), overwrite
        self.partial = partial_of(path)
        remove_partial(self.partial)
        with self._writing():
            (self.partial / "agents").mkdir(parents=True)
        self.files, self.template = {}, None
        self.rows, self.returns = 0, []
        self.action_low, self.action_high = math.inf, -math.inf

    @contextmanager
    def _writing(self):
        """On a full disk: raises BadInput with one line, and deletes what was written so far."""
        try:
            with disk_errors(self.path):
                try:
                    yield
                except RuntimeError as error:  # PyTorch's type for a full disk
                    if os.strerror(errno.ENOSPC) in str(error):
                        raise OSError(errno.ENOSPC, "") from None
                    raise
        except BadInput:
            shutil.rmtree(self.partial, ignore_errors=True)
            raise

    def append(self, episode: TensorDict):
        """Adds an episode of T transitions, as T + 1 rows. Raises ValueError if it does not end with its T-th one."""
        T = episode.shape[0] - 1
        episode = episode.clone(recurse=False)
        episode["is_init"] = torch.zeros(T + 1, 1, dtype=torch.bool)
        episode["is_init"][0] = True
        episode["episode"] = torch.full((T + 1, 1), len(self.returns))
        for key in ("reward", "terminated", "done", ("agents", "action")):
            episode[key] = episode[key].clone()
            episode[key][T] = 0
        if not episode["done"][T - 1] or episode["done"][: T - 1].any():
            raise ValueError("an episode's last transition, and only that one, must be done")
        for key in (*FIELDS, MASK):
            value = episode.get(tuple(key.split("/")), None)
            if value is not None:
                with self._writing():
                    if key not in self.files:
                        self.files[key] = open(self.partial / f"{key}.raw", "wb")
                    self.files[key].write(value.contiguous().numpy().tobytes())
        self.template = episode[:1].select(*(tuple(k.split("/")) for k in self.files))
        self.rows += T + 1
        self.returns.append(episode["reward"].double().sum().item())
        action = episode["agents", "action"][:T]
        self.action_low, self.action_high = (
            min(self.action_low, action.min().item()),
            max(self.action_high, action.max().item()),
        )

    def close(self, card: dict) -> Path:
        """`card` has env, task, quality, engine, interface and made (how). The rest is filled in here."""
        with self._writing():
            for file in self.files.values():
                file.close()
            # TensorDict writes its meta.json and arrays of one row. The recorded arrays replace these.
            self.template.memmap_like(str(self.partial))
            for folder in (self.partial, self.partial / "agents"):
                meta = read_json(folder / "meta.json")
                for entry in [meta, *meta.values()]:
                    if isinstance(entry, dict) and "shape" in entry:
                        entry["shape"][0] = self.rows
                (folder / "meta.json").write_text(json.dumps(meta))
            for key in self.files:
                (self.partial / f"{key}.raw").replace(self.partial / f"{key}.memmap")
        action = self.template["agents", "action"]
        discrete = not action.is_floating_point()
        returns = torch.tensor(self.returns, dtype=torch.float64)
        card = card | {
            "n_agents": action.shape[1],
            "state_dim": self.template["state"].shape[-1],
            "obs_dim": self.template["agents", "observation"].shape[-1],
            "action_dim": self.template["agents", "action_mask"].shape[-1] if discrete else action.shape[-1],
            "discrete": discrete,
            "action_low": self.action_low,
            "action_high": self.action_high,
            "trajectories": len(self.returns),
            "samples": self.rows - len(self.returns),
            "return_mean": returns.mean().item(),
            "return_std": returns.std(correction=0).item(),
            "return_min": returns.min().item(),
            "return_max": returns.max().item(),
            "bytes": {key: (self.partial / f"{key}.memmap").stat().st_size for key in self.files},
        }
        with self._writing():
            (self.partial / "card.json").write_text(card_text(card, self.partial))
            self._move()
        return self.path

    def _move(self):
        """Gives the new dataset its name. An old one is moved aside first. If this fails, it gets its name back."""
        check_free(self.path, self.overwrite)  # something may have appeared meanwhile
        aside, old = self.path.with_name(self.path.name + ".replaced"), self.path.exists()
        fsync_tree(self.partial)  # before the old one is moved, since this may take long
        if old:
            if aside.exists():
                check_free(aside, overwrite=True)  # a dataset that a killed process left, and nothing else
                shutil.rmtree(aside)
            self.path.rename(aside)
        try:
            replace(self.partial, self.path)
        except BaseException:
            with suppress(OSError):
                if old:
                    aside.rename(self.path)
            raise
        if self.overwrite and (aside / "card.json").is_file():  # also one that a killed process left
            shutil.rmtree(aside)
            fsync_folder(aside.parent)
