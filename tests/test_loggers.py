"""--logger: what csv, TensorBoard and wandb have of a run is what metrics.csv has, once, over stops and resumes too."""

import csv
import importlib.util
import json
import time
from pathlib import Path

import numpy as np
import pytest

import comadice_bc
import comadice_train
from environments.checks import BadInput
from support import loggers

KINDS = ["csv", "tensorboard"]  # these are read back here


def needs(kind: str):
    if kind != "csv" and importlib.util.find_spec(kind) is None:
        pytest.skip(f"{kind} is not installed")


def table(run: Path) -> list[tuple]:
    """metrics.csv as sorted (name, step, float32 value); TensorBoard has no more digits."""
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    cells = [
        (f"{row['stage']}/{k}", int(row["step"]), v)
        for row in rows
        for k, v in row.items()
        if k not in ("stage", "step")
    ]
    return sorted((name, step, np.float32(v)) for name, step, v in cells if v != "")


def record(run: Path, kind: str) -> list[tuple]:
    """The same of a record, read by other code than that of support/loggers.py; duplicates are kept."""
    if kind == "csv":
        found = [
            (f"{f.parent.name}/{f.stem}", *line.split(","))
            for f in (run / "csv/scalars").rglob("*.csv")
            for line in f.read_text().split()
        ]
        return sorted((name, int(step), np.float32(v)) for name, step, v in found)
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    events = [event for f in sorted((run / "tensorboard").glob("events*")) for event in EventFileLoader(str(f)).Load()]
    values = [(v.tag, e.step, make_ndarray(v.tensor)[()]) for e in events for v in e.summary.value]
    return sorted((tag, step, np.float32(value)) for tag, step, value in values)


def train(data: Path, out: Path, kind: str, module=comadice_bc, **flags) -> Path:
    flags = {"steps": 4, "evals": 2, "eval_episodes": 2, "hidden": 8, "quiet": True, "device": "cpu"} | flags
    module.main(module.Args(data=str(data), out=str(out), logger=kind, **flags))
    return out / "mamujoco/hopper/random" / ("bc" if module is comadice_bc else "comadice") / "seed0"


@pytest.mark.parametrize("kind", KINDS)
def test_the_record_is_metrics_csv(kind, hopper_data, tmp_path):
    """Of both stages, and after the run was extended."""
    needs(kind)
    run = train(hopper_data, tmp_path, kind, comadice_train)
    assert record(run, kind) == table(run) and {name for name, *_ in table(run)} >= {"critics/nu_init", "policy/return"}
    train(hopper_data, tmp_path, kind, comadice_train, steps=6, evals=3, resume=True)
    assert record(run, kind) == table(run) and max(step for _, step, _ in table(run)) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_that_is_begun_later_and_anew(kind, hopper_data, tmp_path):
    needs(kind)
    run = train(hopper_data, tmp_path, "none")
    assert not (run / kind).exists()
    train(hopper_data, tmp_path, kind, steps=6, evals=3, resume=True)
    assert record(run, kind) == table(run) and min(step for _, step, _ in record(run, kind)) == 2
    train(hopper_data, tmp_path, kind, overwrite=True)
    assert record(run, kind) == table(run) and max(step for _, step, _ in record(run, kind)) == 4


ROWS = [
    {"stage": stage, "step": step, "loss": step / 7, "return": None if stage == "critics" else 3.0 * step}
    for stage in ("critics", "policy")
    for step in (10, 20, 30)
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("written", [0, 1, 4, 6])
def test_after_a_kill_nothing_lacks_or_is_there_twice(kind, written, tmp_path):
    """A process wrote some of the checkpoint's rows, and was killed: its logger is never closed."""
    needs(kind)
    killed = loggers.open_logger(kind, tmp_path, [])
    for row in ROWS[:written]:
        loggers.log_row(killed, row)
    loggers.open_logger(kind, tmp_path, ROWS).close()
    wanted = [
        (f"{r['stage']}/{k}", r["step"], np.float32(r[k])) for r in ROWS for k in ("loss", "return") if r[k] is not None
    ]
    assert record(tmp_path, kind) == sorted(wanted)


def test_a_csv_record_whose_last_line_is_cut(tmp_path):
    """It is written again. A line that is no line of a record is said."""
    loggers.open_logger("csv", tmp_path, ROWS).close()
    wanted, file = record(tmp_path, "csv"), tmp_path / "csv/scalars/policy/return.csv"
    for text in (file.read_text()[:-4], "2"):
        file.write_text(text)
        loggers.open_logger("csv", tmp_path, ROWS).close()
        assert record(tmp_path, "csv") == wanted
    file.write_text("nothing\n")
    with pytest.raises(BadInput, match=r"return.csv is damaged: remove the folder"):
        loggers.open_logger("csv", tmp_path, ROWS)


def wandb_history(file: Path) -> list[dict]:
    """The rows of a .wandb file: LevelDB's log format, whose records are wandb's protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts, rows = file.read_bytes(), 7, b"", []  # 7 bytes are wandb's own
    while at + 7 <= len(data):
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one; 0 pads a block
            record = Record.FromString(parts)
            parts = b""
            if record.WhichOneof("record_type") == "history":
                rows.append(
                    {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                )
    return rows


def test_wandb_goes_on_offline_in_the_same_run(tmp_path, monkeypatch):
    needs("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = tmp_path / "seed0"
    first = loggers.open_logger("wandb", run, ROWS[:1])  # the record begins late: a row is there already
    for row in ROWS[1:3]:
        loggers.log_row(first, row)
    first.close()
    second = loggers.open_logger("wandb", run, ROWS[:3])
    for row in ROWS[3:]:
        loggers.log_row(second, row)
    second.close()
    files = sorted(run.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2 and len({f.name for f in files}) == 1, "two parts of one run"
    until = time.monotonic() + 60  # wandb's own process writes the last of it
    while sum(len(wandb_history(f)) for f in files) < len(ROWS) and time.monotonic() < until:
        time.sleep(0.2)
    found = [{k: v for k, v in row.items() if not k.startswith("_")} for f in files for row in wandb_history(f)]
    assert found == [loggers.values_of(row) | {f"{row['stage']}/step": row["step"]} for row in ROWS]


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_package_that_is_missing(kind, hopper_data, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=f"--logger {kind} needs a package that is not installed: pip install {kind}"):
        train(hopper_data, tmp_path / "runs", kind)
    assert not (tmp_path / "runs").exists()
