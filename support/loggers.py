"""--logger: writes the rows of metrics.csv for other tools too, with TorchRL's own loggers.

    none         metrics.csv alone
    csv          RUN/csv/scalars/STAGE/NAME.csv, a line "step,value" for each row
    tensorboard  RUN/tensorboard; `tensorboard --logdir runs` shows it
    wandb        RUN/wandb, offline; `wandb sync RUN/wandb/offline-run-*` uploads it. WANDB_MODE=online uploads at once

A value is called STAGE/NAME, for example policy/return. A resumed run continues its record: rows that the record holds
are not written twice, and rows of metrics.csv that it lacks are added first. An offline record of wandb can't be read
back, so it may lack one row if the process was killed just before writing it.
"""

import importlib.util
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from environments.checks import BadInput
from offline_data.durable import write_bytes

if TYPE_CHECKING:
    from torchrl.record.loggers import Logger

Kind = Literal["none", "csv", "tensorboard", "wandb"]
FOLDERS = ("csv", "tensorboard", "wandb")  # of a run directory


def check(kind: Kind):
    """Raises BadInput for a logger whose package is not installed."""
    if kind in ("tensorboard", "wandb") and importlib.util.find_spec(kind) is None:
        raise BadInput(f"--logger {kind} needs a package that is not installed: pip install {kind}")


def values_of(row: dict) -> dict[str, float]:
    """The numbers of a row of metrics.csv by their names in the record. Missing ones (no rollouts) are left out."""
    return {f"{row['stage']}/{k}": v for k, v in row.items() if k not in ("stage", "step") and v is not None}


def recorded(kind: Kind, run: Path) -> set[tuple[str, int]] | None:
    """(name, step) of all that a run's record holds already; None if it can't be read back."""
    folder = run / kind
    if not folder.is_dir():
        return set()
    if kind == "csv":
        known = set()
        for file in folder.glob("scalars/*/*.csv"):
            data = file.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if whole != data:  # the last line was being written when the process was killed
                write_bytes(file, whole)
            steps = [line.split(b",")[0] for line in whole.splitlines()]
            if not all(step.isdigit() for step in steps):
                raise BadInput(f"{file} is damaged: remove the folder {folder}, and the record is made again")
            known |= {(f"{file.parent.name}/{file.stem}", int(step)) for step in steps}
        return known
    if kind == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder), {"scalars": 0}).Reload()  # 0: all of them
        return {(name, event.step) for name in events.Tags()["scalars"] for event in events.Scalars(name)}
    return None


def open_wandb(run: Path) -> "Logger":
    """A wandb logger, of which a process may open several. It prints and captures nothing. By default it is offline."""
    import wandb
    from torchrl.record.loggers import WandbLogger

    os.environ.setdefault("WANDB_MODE", "offline")
    before = sorted(run.glob("wandb/*run-*/run-*.wandb"))
    name = before[-1].stem.removeprefix("run-") if before else secrets.token_hex(4)
    settings = wandb.Settings(console="off", silent=True)
    return WandbLogger(
        " ".join(run.parts[-5:]), log_dir=str(run), id=name, project="comadice", log_env_packages=False,
        reinit="create_new", settings=settings,
    )  # fmt: skip


def log_row(logger: "Logger | None", row: dict, known: set[tuple[str, int]] = frozenset()):
    """Adds a row of metrics.csv to the record, without the (name, step) in `known`, which it holds already."""
    if logger is None:
        return
    new = {name: value for name, value in values_of(row).items() if (name, row["step"]) not in known}
    if new:
        logger.log_metrics(new, row["step"])
        logger.flush()  # otherwise TensorBoard's writer waits two minutes, and loses its rows if it is killed


def open_logger(kind: Kind, run: Path, rows: list[dict]) -> "Logger | None":
    """Opens a run's logger; None with --logger none. It first adds those of `rows` that the record lacks (not for
    wandb, whose record can't be read). Raises BadInput as check does."""
    check(kind)
    if kind == "none":
        return None
    known = recorded(kind, run)
    if kind == "csv":
        from torchrl.record.loggers import CSVLogger

        logger = CSVLogger("csv", str(run))
    elif kind == "tensorboard":
        from torchrl.record.loggers import TensorboardLogger

        logger = TensorboardLogger("tensorboard", str(run))
    else:
        logger = open_wandb(run)
    for row in rows if known is not None else []:
        log_row(logger, row, known)
    return logger
