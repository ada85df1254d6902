"""Runs that nothing hurts: locks, durable checkpoints, stops, divergence, extension, and what the flags say."""

import dataclasses
import errno
import functools
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, remount, small_disk

import comadice_bc
import comadice_train
import environments.checks
import support.runs
import support.seeds
from baselines import cql, icq
from environments import stops
from environments.checks import BadInput
from offline_data import lock, replay, sealed
from offline_data.dataset import open_dataset
from support import flags
from support.bars import Bar
from support.runs import load_checkpoint

TINY = {"device": "cpu", "steps": 40, "evals": 2, "eval_episodes": 2, "hidden": 16, "batch_size": 32, "quiet": True}
SCRIPTS = {"comadice": comadice_train, "bc": comadice_bc, "icq": icq}
MODULES = SCRIPTS | {"cql": cql}  # it draws random numbers for its updates


def args(module, data, out, /, **kwargs):
    return module.Args(**TINY | {"data": str(data), "out": str(out)} | kwargs)


def folder(out: Path, algo: str, seed: int = 0) -> Path:
    return out / "mamujoco" / "hopper" / "random" / algo / f"seed{seed}"


def train(algo: str, data, out: Path, **kwargs) -> Path:
    MODULES[algo].main(args(MODULES[algo], data, out, **kwargs))
    return folder(out, algo)


def ends(capsys, algo: str, data, out: Path, code: int, match: str, **kwargs) -> str:
    """The script ends with this code and one last line that says this; what it printed."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        environments.checks.run_script(MODULES[algo].main, args(MODULES[algo], data, out, **kwargs))
    printed = capsys.readouterr()
    assert error.value.code == code and "Traceback" not in printed.err
    assert re.search(match, printed.err.strip().splitlines()[-1]), printed.err
    return printed.out + printed.err


def same(a, b) -> bool:
    """The same structure of values, tensors to the bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else type(a) is type(b) and a == b


def same_run(a: Path, b: Path) -> bool:
    times = ("seconds", "critic_seconds", "wall", "config", "unplayed")
    states = [{k: v for k, v in load_checkpoint(path).items() if k not in times} for path in (a, b)]
    return same(*states) and (a / "metrics.csv").read_text() == (b / "metrics.csv").read_text()


@pytest.fixture(autouse=True)
def handlers():
    """Scripts set signal handlers; pytest's come back."""
    before = {number: signal.getsignal(number) for number in stops.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def run(hopper_data, tmp_path_factory) -> Path:
    """A finished ComaDICE run. Tests that change it copy it first."""
    return train("comadice", hopper_data, tmp_path_factory.mktemp("run"))


@pytest.fixture
def copy(run, tmp_path) -> Path:
    shutil.copytree(run, folder(tmp_path, "comadice"))
    return folder(tmp_path, "comadice")


# ---------------------------------------------------------------- stops


DROPPED = """
import os, signal, weakref
from environments import stops
from environments.checks import run_script

class Thing:
    pass

def main():
    thing = Thing()
    reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    del thing
    print("the stop was dropped", flush=True)
    stops.leave()
    print("and forgotten")

run_script(main)
"""


def test_a_stop_in_a_callback_is_not_lost():
    """Python drops what a signal raises within a weak reference's callback, and prints a traceback."""
    done = subprocess.run([sys.executable, "-c", DROPPED], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 143 and done.stdout == "the stop was dropped\n"
    assert done.stderr.strip().startswith("stopped by SIGTERM") and "Traceback" not in done.stderr


def stop_in(monkeypatch, module, name: str, call: int, number=signal.SIGTERM):
    """A signal arrives in the call-th call of module.name."""
    original, calls = getattr(module, name), []

    def signalled(*a, **k):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*a, **k)

    monkeypatch.setattr(module, name, signalled)


STOPS = [
    ("comadice", comadice_train, "critic_losses", 3), ("comadice", comadice_train, "critic_losses", 20),
    ("comadice", comadice_train, "critic_losses", 40), ("comadice", comadice_train, "dataset_ratio", 1),
    ("comadice", comadice_bc, "policy_losses", 3), ("comadice", comadice_bc, "policy_losses", 24),
    ("comadice", comadice_bc, "evaluation", 1), ("comadice", comadice_bc, "evaluation", 2),
    ("comadice", support.runs, "save_checkpoint", 3),
    ("bc", comadice_bc, "policy_losses", 33), ("bc", comadice_bc, "evaluation", 1),
    ("icq", icq, "policy_loss", 7), ("icq", icq, "policy_loss", 40), ("icq", support.runs, "table", 1),
    ("cql", cql, "td_loss", 7),
]  # fmt: skip


@pytest.fixture(scope="module")
def wholes(hopper_data, run, tmp_path_factory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("wholes")
    return {"comadice": run} | {algo: train(algo, hopper_data, out) for algo in ("bc", "icq", "cql")}


@pytest.mark.parametrize("algo, module, name, call", STOPS)
def test_stop_saves_and_goes_on_to_the_same_bits(
    algo, module, name, call, hopper_data, wholes, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "orig_argv", ["python", "script.py", "--data", "a b", "--overwrite"])
    with monkeypatch.context() as patch:
        stop_in(patch, module, name, call, signal.SIGINT if call % 2 else signal.SIGTERM)
        code, who = (130, "Ctrl-C") if call % 2 else (143, "SIGTERM")
        ends(
            capsys,
            algo,
            hopper_data,
            tmp_path,
            code,
            f"^stopped by {who}; to go on: python script.py --data 'a b' --resume$",
        )
    stopped = load_checkpoint(folder(tmp_path, algo)) if (folder(tmp_path, algo) / "checkpoint.pt").exists() else None
    # the state at the end of the group of batches is kept
    if name in ("critic_losses", "policy_losses", "policy_loss", "td_loss"):
        step = stopped["critic_step"] if name == "critic_losses" else stopped["step"]
        assert step == {3: 16, 7: 16, 20: 20, 24: 36, 33: 36, 40: 40}[call]
    torch.manual_seed(1234)  # a new process has another random state
    train(algo, hopper_data, tmp_path, resume=True)
    assert same_run(folder(tmp_path, algo), wholes[algo])
    assert not list(tmp_path.rglob("LOCK")) and not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("seeds", [[0], [0, 1]], ids=len)
def test_the_row_of_an_evaluation_that_was_cut_short_leaves_the_state_alone(
    seeds, hopper_data, wholes, tmp_path, monkeypatch, capsys
):
    """Stopped in an evaluation, gone on with to the moment when its row is saved, killed there, gone on with."""
    whole = train("bc", hopper_data, tmp_path / "whole", seeds=seeds)
    with monkeypatch.context() as patch:
        stop_in(patch, comadice_bc, "evaluation", 1)
        ends(capsys, "bc", hopper_data, tmp_path, 143, "stopped by SIGTERM", seeds=seeds)
    before = load_checkpoint(folder(tmp_path, "bc"))
    assert [own["row"]["step"] for own in before["unplayed"]] == [20] and not before["metrics"]
    assert 20 <= before["step"] < 40
    saved = []
    with monkeypatch.context() as patch:
        original = support.runs.save_checkpoint
        patch.setattr(
            support.runs,
            "save_checkpoint",
            lambda *a: (
                original(*a),
                saved.append(1),
                len(saved) == len(seeds) and os.kill(os.getpid(), signal.SIGKILL),
            ),
        )
        child = multiprocessing.get_context("fork").Process(
            target=train, args=("bc", hopper_data, tmp_path), kwargs={"seeds": seeds, "resume": True}
        )
        child.start()
        child.join()
    after = load_checkpoint(folder(tmp_path, "bc"))
    assert child.exitcode == -signal.SIGKILL and [row["step"] for row in after["metrics"]] == [20]
    assert after["unplayed"] == []
    assert all(same(after[part], before[part]) for part in ("step", "policy", "eta", "policy_optimizer", "generator"))
    train("bc", hopper_data, tmp_path, resume=True, seeds=seeds)
    for seed in seeds:
        assert same_run(folder(tmp_path, "bc", seed), whole.with_name(f"seed{seed}"))


def test_a_second_stop_does_not_wait(hopper_data, wholes, tmp_path, monkeypatch, capsys):
    original = comadice_bc.policy_losses

    def twice(*a):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return original(*a)

    with monkeypatch.context() as patch:
        patch.setattr(comadice_bc, "policy_losses", twice)
        ends(capsys, "bc", hopper_data, tmp_path, 130, "stopped by Ctrl-C; to go on: ")
    assert not (folder(tmp_path, "bc") / "checkpoint.pt").exists()
    train("bc", hopper_data, tmp_path, resume=True)
    assert same_run(folder(tmp_path, "bc"), wholes["bc"])


def test_a_run_that_chose_its_dataset_names_it_in_the_command_to_go_on(tmp_path, monkeypatch, capsys):
    """Without --quality the dataset of the code stands in for a missing one, which may be there later."""
    monkeypatch.setattr(sys, "orig_argv", ["python", "comadice_bc.py", "--task", "hopper"])
    original = comadice_bc.policy_losses
    monkeypatch.setattr(
        comadice_bc, "policy_losses", lambda *a: (os.kill(os.getpid(), signal.SIGTERM), original(*a))[1]
    )
    demo = Path("mamujoco", "hopper", "demo")
    shutil.copytree(ROOT / "data" / demo, tmp_path / demo)
    monkeypatch.setattr(support.runs, "DATA_ROOT", tmp_path)
    with pytest.raises(SystemExit) as end:
        args = comadice_bc.Args(task="hopper", steps=20, evals=1, device="cpu", out=str(tmp_path / "runs"))
        environments.checks.run_script(comadice_bc.main, args)
    said = capsys.readouterr()
    assert end.value.code == 143 and "quality demo" in said.out
    assert said.err.strip().endswith("to go on: python comadice_bc.py --task hopper --quality demo --resume")


def test_a_stop_before_training_writes_nothing(hopper_data, tmp_path, monkeypatch, capsys):
    stop_in(monkeypatch, support.runs, "open_dataset", 1)
    ends(capsys, "bc", hopper_data, tmp_path / "runs", 143, "stopped by SIGTERM; to go on: ")
    assert not (tmp_path / "runs").exists()


def command(data, out, *more) -> list[str]:
    words = [f"--{k.replace('_', '-')}={v}" for k, v in TINY.items() if k != "quiet"]
    return [
        sys.executable, str(ROOT / "comadice_train.py"), "--data", str(data), "--out", str(out), "--quiet", *words,
        *more,
    ]  # fmt: skip


def test_a_terminal_s_ctrl_c_with_simulator_processes(hopper_data, tmp_path):
    """Ctrl-C goes to the whole process group: workers leave it to the script, and end with it."""
    words = command(hopper_data, tmp_path, "--workers=2", "--steps=100000", "--evals=2000")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (folder(tmp_path, "comadice") / "checkpoint.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in said and "leaked" not in said, said
    assert said.strip().splitlines()[-1].endswith("--resume")
    deadline = time.monotonic() + 10
    while True:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        left = subprocess.run(
            ["ps", "-o", "pid,stat,args", "-g", str(process.pid)], capture_output=True, text=True
        ).stdout
        assert time.monotonic() < deadline, f"left running: {left}"
        time.sleep(0.1)


def test_batches_end_where_a_stop_is_asked_for(hopper_data, monkeypatch):
    rows, _ = open_dataset(hopper_data)
    source, asked = (replay.make_replay(rows), 4), []
    monkeypatch.setattr(replay, "asked", lambda: bool(asked))
    steps = []
    for step, _ in replay.minibatches(0, {40}, source):
        steps.append(step)
        if step == 20:
            asked.append(1)
    assert steps == list(range(1, 33))


# ---------------------------------------------------------------- one process in a run directory

HOLD = (
    "import sys, time; from pathlib import Path; from offline_data.lock import lock; "
    "lock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
)


@pytest.fixture
def other():
    """Starts another process that holds a run directory."""
    started = []

    def hold(path: Path) -> subprocess.Popen:
        started.append(
            subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        )
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield hold
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("how", [{}, {"overwrite": True}, {"resume": True}])
def test_a_second_process_is_refused(how, hopper_data, copy, tmp_path, other, capsys):
    process = other(copy)
    before = {p.name: p.read_bytes() for p in copy.iterdir()}
    # seed 7 has no directory yet: it must not be left either
    ends(
        capsys,
        "comadice",
        hopper_data,
        tmp_path,
        2,
        f"seed0 is in use by process {process.pid} on .*: wait for it or stop it",
        seeds=[7, 0],
        **how,
    )
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == before and not folder(tmp_path, "comadice", 7).exists()
    process.kill()
    process.wait()
    assert (copy / "LOCK").exists()  # stale
    train("comadice", hopper_data, tmp_path, resume=True)
    assert not (copy / "LOCK").exists()


def test_lock_of_a_removed_file(tmp_path):
    lock.lock(tmp_path)
    (tmp_path / "LOCK").unlink()
    lock.lock(tmp_path)
    assert (tmp_path / "LOCK").read_text().startswith(f"process {os.getpid()} on ")
    lock.unlock(tmp_path)
    assert not tmp_path.exists()


def test_who_holds_a_run_directory(tmp_path, other):
    """Another process is named while it lives. What it leaves when it is killed counts as nobody.

    Looking takes nothing away.
    """
    assert lock.holder_of(tmp_path / "run") is None  # there is nothing
    process = other(tmp_path / "run")
    for _ in range(3):
        assert lock.holder_of(tmp_path / "run").startswith(f"process {process.pid} on ")
    with pytest.raises(BadInput, match=f"in use by process {process.pid} on "):
        lock.lock(tmp_path / "run")
    process.kill()
    process.wait()
    assert (tmp_path / "run/LOCK").exists() and lock.holder_of(tmp_path / "run") is None
    lock.lock(tmp_path / "run")
    assert lock.holder_of(tmp_path / "run") == "this process"
    code = (
        "from pathlib import Path; from offline_data.lock import holder_of; "
        f"print(holder_of(Path({str(tmp_path / 'run')!r})))"
    )
    # after that look it is still held
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith(f"process {os.getpid()} on "), done.stderr
    lock.unlock(tmp_path / "run")


# ---------------------------------------------------------------- damaged and unwritable files


def test_bit_flips_load_no_changed_state(run, tmp_path):
    data, state = (run / "checkpoint.pt").read_bytes(), load_checkpoint(run)
    chance, refused = random.Random(0), 0
    for _ in range(int(os.environ.get("FLIPS", 40))):
        bit = chance.randrange(8 * len(data))
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "checkpoint.pt").write_bytes(flipped)
        try:
            assert same(load_checkpoint(tmp_path), state), f"bit {bit} of {8 * len(data)}"
        except BadInput as error:
            assert "\n" not in str(error) and "weights_only" not in str(error)
            refused += 1
    assert refused > 35


def damaged(kind: str, data: bytes, state: dict) -> bytes | dict:
    lacking = lambda part, key: state | {part: {k: v for k, v in state[part].items() if k != key}}
    return {
        "empty": b"", "cut": data[:-1], "half": data[: len(data) // 2], "foreign": b"GIF89a" * 100,
        "zip": b"PK\x05\x06" + bytes(18), "object": state | {"policy": Path("x")}, "card": lacking("card", "obs_dim"),
        "config": lacking("config", "hidden"), "metrics": state | {"metrics": [1]},
        "seconds": state | {"seconds": None}, "step": state | {"step": -5}, "beyond": state | {"step": 10**6},
        "task": state | {"card": state["card"] | {"task": ["hopper"]}},
        "row": state | {"metrics": [state["metrics"][0] | {"step": [1]}]},
        "text": state | {"metrics": [state["metrics"][0] | {"nu_loss": "x"}]},
    }[kind]  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    [
        "empty", "cut", "half", "foreign", "zip", "object", "card", "config", "metrics", "seconds", "step", "beyond",
        "task", "row", "text",
    ],
)  # fmt: skip
def test_damaged_checkpoint_is_one_line(kind, hopper_data, copy, tmp_path, capsys):
    file = copy / "checkpoint.pt"
    content = damaged(kind, file.read_bytes(), load_checkpoint(copy))
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    printed = ends(capsys, "comadice", hopper_data, tmp_path, 2, "^error: .*is not a checkpoint", resume=True)
    assert "weights_only" not in printed


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda state: state.pop("eta"), "does not fit these networks .KeyError: 'eta'"),
        (lambda state: state.update(generator=torch.zeros(3, dtype=torch.uint8)), "does not fit these networks"),
        (lambda state: state["policy_optimizer"].update(param_groups=[]), "does not fit these networks"),
        (lambda state: state.pop("target"), "does not fit these networks .KeyError: 'target'"),
        (lambda state: state.pop("critic_step"), "the checkpoint's critic_step can't be used"),
        (lambda state: state.update(unplayed=5), "the checkpoint's unplayed can't be used"),
    ],
)
def test_a_checkpoint_of_other_networks_is_one_line(change, match, hopper_data, copy, tmp_path, capsys):
    state = load_checkpoint(copy)
    state |= {"step": TINY["steps"] // 2, "metrics": state["metrics"][:-1]}  # as if it had been stopped halfway
    change(state)
    torch.save(state, copy / "checkpoint.pt")
    ends(capsys, "comadice", hopper_data, tmp_path, 2, f"^error: .*{match}.*begin again with --overwrite", resume=True)


def test_removed_directory(hopper_data, tmp_path, monkeypatch, capsys):
    original = comadice_bc.policy_losses
    monkeypatch.setattr(
        comadice_bc, "policy_losses", lambda *a: (shutil.rmtree(tmp_path / "runs", ignore_errors=True), original(*a))[1]
    )
    ends(
        capsys,
        "bc",
        hopper_data,
        tmp_path / "runs",
        2,
        "^error: can't write .*was removed meanwhile; run the same command again with --resume",
    )


@pytest.mark.parametrize("call", [1, 2, 5, 9, 14])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS])
def test_disk_that_is_full_or_read_only(call, error, hopper_data, wholes, tmp_path, monkeypatch, capsys):
    """From the call-th flush on the disk takes nothing more: the last checkpoint is intact, and the run goes on."""
    original, calls = os.fsync, []

    def fsync(handle):
        calls.append(1)
        if len(calls) >= call:
            raise OSError(error, os.strerror(error))
        original(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        said = (
            "no space left on .*; free some and run the same command again with --resume"
            if error == errno.ENOSPC
            else "read-only"
        )
        ends(capsys, "comadice", hopper_data, tmp_path, 2, f"^error: .*{said}")
    assert not list(tmp_path.rglob("*.partial"))
    train("comadice", hopper_data, tmp_path, resume=True)
    assert same_run(folder(tmp_path, "comadice"), wholes["comadice"])


def test_a_run_without_its_config_is_left_alone(hopper_data, tmp_path, capsys):
    run = train("bc", hopper_data, tmp_path)
    (run / "config.json").unlink()
    state = (run / "checkpoint.pt").read_bytes()
    ends(capsys, "bc", hopper_data, tmp_path, 2, "^error: .* already holds a run")
    ends(capsys, "bc", hopper_data, tmp_path, 2, "^error: .*config.json is missing", resume=True)
    assert (run / "checkpoint.pt").read_bytes() == state
    train("bc", hopper_data, tmp_path, overwrite=True)
    assert (run / "config.json").exists()


FULL = "mount -t tmpfs -o size=SIZEk tmpfs OUT || exit 77; COMMAND; code=$?; cp -r OUT KEPT; exit $code"


def test_full_disks_of_8_sizes(hopper_data, tmp_path, monkeypatch, capsys):
    """From a disk that holds nothing to one that holds it all.

    With more space and --resume a run has the bits of one that had enough space all along.
    """
    monkeypatch.setattr(comadice_train, "try_eval_env", lambda *a: None)  # rollouts write nothing
    whole, disk, outcomes = train("comadice", hopper_data, tmp_path / "whole"), tmp_path / "disk", []
    needed = (
        sum(-(-file.stat().st_size // 4096) * 4 for file in whole.iterdir())
        + (whole / "checkpoint.pt").stat().st_size // 1024
    )
    for i in range(8):
        with small_disk(disk, 4 + i * needed // 6):
            try:
                train("comadice", hopper_data, disk)
                outcomes.append("finished")
            except BadInput as error:
                outcomes.append("full")
                assert re.search(
                    f"^no space left on {disk}; free some and run the same command again with --resume", str(error)
                ), error
                capsys.readouterr()
                remount(disk, "size=9m")
                if (folder(disk, "comadice") / "checkpoint.pt").exists():
                    outcomes[-1] = "checkpoint"
                    load_checkpoint(folder(disk, "comadice"))
                for path in disk.rglob("*"):
                    assert path.suffix != ".partial"
                lock.unlock(folder(disk, "comadice"))  # as the end of the process does
                train("comadice", hopper_data, disk, resume=True)
            assert same_run(folder(disk, "comadice"), whole)
    assert set(outcomes) == {"full", "checkpoint", "finished"}, outcomes
    assert outcomes == sorted(outcomes, key=["full", "checkpoint", "finished"].index), outcomes


def test_a_disk_that_is_mounted_read_only(hopper_data, tmp_path, capsys):
    with small_disk(tmp_path / "disk", 9000):
        path = train("bc", hopper_data, tmp_path / "disk", steps=20, evals=1)
        before = {p.name: p.read_bytes() for p in path.iterdir()}
        remount(tmp_path / "disk", "ro")
        ends(
            capsys,
            "bc",
            hopper_data,
            tmp_path / "disk",
            2,
            f"^error: can't write .*: {tmp_path}/disk is mounted read-only; choose another folder$",
            resume=True,
        )
        assert {p.name: p.read_bytes() for p in path.iterdir()} == before


@pytest.mark.parametrize("size", [60])
def test_full_disk(size, hopper_data, wholes, tmp_path):
    """A real one, a small tmpfs in a mount namespace of its own."""
    (tmp_path / "out").mkdir()
    (tmp_path / "kept").mkdir()
    words = shlex.join(command(hopper_data, tmp_path / "out"))
    script = (
        FULL.replace("COMMAND", words)
        .replace("SIZE", str(size))
        .replace("OUT", str(tmp_path / "out"))
        .replace("KEPT", str(tmp_path / "kept"))
    )
    try:
        done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no mount namespaces for users here")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert re.search(
        f"^error: .*no space left on {tmp_path}/out; free some and run", done.stderr.strip().splitlines()[-1]
    ), done.stderr
    kept = tmp_path / "kept" / "out"
    assert not list(kept.rglob("*.partial"))
    train("comadice", hopper_data, kept, resume=True)
    assert same_run(folder(kept, "comadice"), wholes["comadice"])


# ---------------------------------------------------------------- divergence


def diverging(monkeypatch, module, name: str, seed_index: int, step: int, value=float("nan")):
    """A parameter of one of the stacked seeds is spoilt after `step` updates."""
    original = getattr(module, name)

    def make(first, *a, **k):
        update, count = original(first, *a, **k), []

        def spoilt(*batches):
            result = update(*batches)
            count.append(1)
            parameter = next(first.parameters())
            if len(count) == step and len(parameter) == 3:  # three seeds together
                parameter.data[seed_index] = value
            return result

        return spoilt

    monkeypatch.setattr(module, name, make)


@pytest.mark.parametrize(
    "module, name, step",
    [
        (comadice_train, "make_critic_update", 10),
        (comadice_train, "make_critic_update", 25),
        (comadice_bc, "make_policy_update", 25),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), 1e9])
def test_one_of_three_seeds_diverges(module, name, step, value, hopper_data, tmp_path, monkeypatch, capsys):
    diverging(monkeypatch, module, name, 1, step, value)
    printed = ends(
        capsys,
        "comadice",
        hopper_data,
        tmp_path,
        1,
        "^error: seed 4 diverged: a parameter is not finite or above 10000 at step (20|40) of the (critics|policies); ",
        seeds=[3, 4, 5],
    )
    assert printed.count("error: ") == 1 and "nan" not in printed
    for seed in (3, 5):
        path = folder(tmp_path, "comadice", seed)
        assert (path / "summary.json").exists() and load_checkpoint(path)["step"] == 40
    lost = folder(tmp_path, "comadice", 4)
    assert not (lost / "summary.json").exists()
    if (lost / "checkpoint.pt").exists():
        state = load_checkpoint(lost)
        assert all(v.isfinite().all() for part in ("critics", "target") for v in state[part].values())


def test_the_demonstration_without_its_first_seed(hopper_data, tmp_path, monkeypatch, capsys):
    """The picture of the ratio is then that of the first seed that did not diverge."""
    diverging(monkeypatch, comadice_train, "make_critic_update", 0, 10)
    monkeypatch.setattr(comadice_train, "main", functools.partial(comadice_train.main, is_demo=True))
    printed = ends(capsys, "comadice", hopper_data, tmp_path, 1, "^error: seed 3 diverged", seeds=[3, 4, 5])
    picture = folder(tmp_path, "comadice", 4).parents[1] / "ratio.png"
    assert f"{picture}: correlation" in printed
    assert picture.read_bytes() == (folder(tmp_path, "comadice", 4) / "ratio.png").read_bytes()


def test_every_seed_diverges(hopper_data, tmp_path, monkeypatch, capsys):
    for algo, wanted in (("bc", "policies"), ("icq", "training")):
        printed = ends(
            capsys, algo, hopper_data, tmp_path, 2, "^error: every seed diverged", lr=1e6, seeds=[0, 1], lr_decay=False
        )
        assert all(f"error: seed {seed} diverged" in printed and wanted in printed for seed in (0, 1))
        assert not list(tmp_path.rglob("summary.json"))


def test_parameters_of_stacked_seeds():
    layer = torch.nn.Linear(2, 3)
    stacked = support.seeds.stack([layer, torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)])
    support.runs.check_parameters(stacked, [5, 6, 7], "")
    stacked.bias.data[1, 2], stacked.weight.data[2, 0, 0] = float("inf"), float("nan")
    with pytest.raises(support.runs.Diverged, match="seeds 6 7: ") as error:
        support.runs.check_parameters(stacked, [5, 6, 7], "")
    assert error.value.seeds == [6, 7]
    layer.bias.data[0] = -1e5
    with pytest.raises(support.runs.Diverged, match="seed 5: "):
        support.runs.check_parameters(layer, [5], "")


def test_a_run_of_an_older_version_is_left_alone(hopper_data, tmp_path, capsys):
    """A checkpoint without the state of a generator, as older versions wrote it: one line, and nothing is changed."""
    path = train("icq", hopper_data, tmp_path, steps=20, evals=1)
    state = load_checkpoint(path)
    del state["generator"]
    sealed.save(path / "checkpoint.pt", state, "")
    before = {file: file.read_bytes() for file in path.iterdir()}
    ends(capsys, "icq", hopper_data, tmp_path, 2, "was begun by an older version of this code", resume=True, steps=40)
    assert {file: file.read_bytes() for file in path.iterdir()} == before


# ---------------------------------------------------------------- going on


@pytest.mark.parametrize("algo", SCRIPTS)
def test_a_finished_run_is_extended(algo, hopper_data, tmp_path, capsys):
    path = train(algo, hopper_data, tmp_path, steps=20, evals=1)
    old = load_checkpoint(path)
    train(algo, hopper_data, tmp_path, resume=True, steps=60, evals=3)
    state, summary = load_checkpoint(path), json.loads((path / "summary.json").read_text())
    assert (
        state["step"]
        == summary["steps"]
        == 60
        == json.loads((path / "config.json").read_text())["steps"]
        == state["config"]["steps"]
    )
    assert [row["step"] for row in state["metrics"] if row["stage"] == "policy"] == [20, 40, 60]
    assert state["metrics"][: len(old["metrics"])] == old["metrics"]
    ends(capsys, algo, hopper_data, tmp_path, 2, "steps 60, not 20", resume=True, steps=20, evals=3)
    ends(capsys, algo, hopper_data, tmp_path, 2, "raise --evals by the same factor", resume=True, steps=120, evals=3)
    ends(capsys, algo, hopper_data, tmp_path, 2, r"\(lr 0.001, not 0.5\)", resume=True, steps=80, lr=0.5)


@pytest.mark.parametrize("file", ["summary.json", "metrics.csv"])
@pytest.mark.parametrize("damage", ["missing", "empty", "half"])
def test_files_are_restored_from_the_checkpoint(file, damage, hopper_data, copy, tmp_path):
    whole, before = (copy / file).read_text(), (copy / "checkpoint.pt").read_bytes()
    (copy / file).unlink() if damage == "missing" else (copy / file).write_text(
        "" if damage == "empty" else whole[: len(whole) // 2]
    )
    train("comadice", hopper_data, tmp_path, resume=True)
    if file == "metrics.csv":
        assert (copy / file).read_text() == whole
    else:
        timing = ("updates_per_second", "update_share", "peak_rss_mb", "seeds_together")
        assert [
            {k: v for k, v in json.loads(t).items() if k not in timing} for t in (whole, (copy / file).read_text())
        ] == 2 * [{k: v for k, v in json.loads(whole).items() if k not in timing}]
    assert (copy / "checkpoint.pt").read_bytes() == before


def test_config_says_what_a_result_depends_on(hopper_data, copy, tmp_path, capsys):
    config = json.loads((copy / "config.json").read_text())
    assert config["versions"]["torch"] == torch.__version__
    assert {"torchrl", "tensordict", "numpy", "mujoco"} <= config["versions"].keys()
    assert re.fullmatch(r"sha256 of the card [0-9a-f]{64}", config["dataset"]) and config["commit"] == flags.commit()
    (copy / "config.json").write_text(json.dumps(config | {"versions": "none"}))
    train("comadice", hopper_data, tmp_path, resume=True)
    (copy / "config.json").write_text(
        json.dumps(config | {"versions": config["versions"] | {"numpy": "0.1"}, "commit": "abc"})
    )
    capsys.readouterr()
    train("comadice", hopper_data, tmp_path, resume=True)  # it is finished, so nothing goes on
    assert "was begun with" not in capsys.readouterr().out
    more = {"steps": 2 * config["steps"], "evals": 2 * config["evals"], "workers": 2}
    train("comadice", hopper_data, tmp_path, resume=True, **more)
    warned = [line for line in capsys.readouterr().out.splitlines() if "was begun with" in line]
    assert len(warned) == 1 and "numpy 0.1, now " in warned[0] and "commit abc, now " in warned[0]
    assert "workers 1, now 2" in warned[0]


def test_more_evaluations_than_steps():
    """There is one after every step, and a huge number takes no time."""
    for evals in (5, 7, 2**31 - 1):
        assert support.runs.eval_steps(SimpleNamespace(steps=5, evals=evals)) == {1, 2, 3, 4, 5}


def test_no_git(monkeypatch, tmp_path):
    monkeypatch.setattr(flags, "ROOT", tmp_path)
    assert flags.commit() is None
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert flags.commit() is None


def test_place_of_the_data_is_the_recorded_one(hopper_data, copy, tmp_path):
    arguments = args(
        comadice_train, hopper_data, tmp_path, resume=True, env="mamujoco", task="hopper", quality="random"
    )
    assert support.runs.recorded_place(arguments, "comadice") == "cpu"
    config = json.loads((copy / "config.json").read_text())
    for recorded, place in (("device", "device"), ("elsewhere", None), (None, None)):
        (copy / "config.json").write_text(json.dumps(config | {"data_device": recorded}))
        assert support.runs.recorded_place(arguments, "comadice") == place
    assert support.runs.recorded_place(arguments, "bc") is None


class Rows:
    """Stands for a dataset's rows where there is no GPU to move them to."""

    place = "cpu"

    def to(self, device):
        if self.place == "full":
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.place = str(device)
        return self


@pytest.mark.parametrize("flag, resume, recorded, free, place", [
    ("auto", False, None, 1.0, "device"), ("auto", False, None, 0.1, "cpu"), ("auto", True, None, 0.1, "cpu"),
    ("auto", True, "cpu", None, "cpu"), ("auto", True, "device", None, "device"), ("auto", False, "cpu", 1.0, "device"),
    ("cpu", True, "device", None, "cpu"), ("device", True, "cpu", None, "device"),
    ("device", False, None, None, "device"),
])  # fmt: skip
def test_where_the_data_go_on_a_gpu(
    flag, resume, recorded, free, place, hopper_data, copy, tmp_path, monkeypatch, capsys
):
    """The flag decides, else the run that goes on, else the GPU's free memory.

    The free memory is asked for only for a new run.
    """
    rows, card = Rows(), open_dataset(hopper_data)[1]
    size = sum(card["bytes"].values())
    monkeypatch.setattr(support.runs, "open_dataset", lambda *a: (rows, card))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * 2 * size), 0))  # with None it fails
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"data_device": recorded}))
    arguments = args(comadice_train, hopper_data, tmp_path, resume=resume, data_device=flag)
    assert support.runs.load_dataset(arguments, torch.device("cuda"), "comadice")[0] is rows
    assert arguments.data_device == place and rows.place == ("cuda" if place == "device" else "cpu")
    assert ("stays in the computer's memory" in capsys.readouterr().out) == (free == 0.1)
    rows.place = "full"
    if place == "device":
        with pytest.raises(
            BadInput, match="does not fit into the GPU's free memory: free some, or begin a run with --data-device cpu"
        ):
            support.runs.load_dataset(arguments, torch.device("cuda"), "comadice")
    arguments.data_device = flag
    support.runs.load_dataset(arguments, torch.device("cpu"), "comadice")
    assert arguments.data_device == "cpu"


@pytest.mark.cuda
@pytest.mark.parametrize("begun, fits", [(0.7, 0.0), (0.0, 0.7)])
def test_place_of_the_data_does_not_follow_free_memory(begun, fits, hopper_data, tmp_path, monkeypatch):
    flags_ = {"device": "cuda", "steps": 20}
    monkeypatch.setattr(support.runs, "FITS", begun)
    path = train("bc", hopper_data, tmp_path, **flags_)
    where = load_checkpoint(path)["where"]
    monkeypatch.setattr(support.runs, "FITS", fits)
    train("bc", hopper_data, tmp_path, resume=True, **flags_ | {"steps": 40, "evals": 4})
    assert load_checkpoint(path)["where"] == where and load_checkpoint(path)["step"] == 40


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize("given, match", [
    ({"seeds": [9223372036854775807]}, "--seeds"), ({"seeds": [2**31]}, "--seeds"),
    ({"batch_size": 10**9}, r"--batch-size 1000000000 is more than the \d+ transitions of"),
])  # fmt: skip
def test_bad_numbers(given, match, hopper_data, tmp_path, capsys):
    ends(capsys, "comadice", hopper_data, tmp_path / "runs", 2, match, **given)
    assert not (tmp_path / "runs").exists()


def test_the_largest_seed(hopper_data, tmp_path):
    train("bc", hopper_data, tmp_path, seeds=[2**31 - 1], steps=2, evals=1)


def test_config_runs_again(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["comadice_train.py", "--config", str(run / "config.json"), "--out", str(tmp_path)]
    )
    again = flags.parse(comadice_train.Args)
    recorded = load_checkpoint(run)["config"]
    assert dataclasses.asdict(again) == recorded | {"out": str(tmp_path), "resume": False, "overwrite": False}
    comadice_train.main(again)
    assert same_run(folder(tmp_path, "comadice"), run)
    for file, said in (
        (run / "config.json", "--config .*: it is of another script or version, this one has no --"),
        (tmp_path, "give the config.json of a run"),
    ):
        monkeypatch.setattr(sys, "argv", ["comadice_bc.py", f"--config={file}"])
        with pytest.raises(SystemExit, match="2"):
            flags.parse(comadice_bc.Args)
        assert re.search(said, capsys.readouterr().err)


def test_an_older_config_asks_for_the_flag_that_it_lacks(run, tmp_path, monkeypatch, capsys):
    """What the flag's default is now need not be what the older code did."""
    config, file = json.loads((run / "config.json").read_text()), tmp_path / "config.json"
    file.write_text(json.dumps({name: value for name, value in config.items() if name != "policy_alpha"}))
    words = ["comadice_train.py", "--config", str(file)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="2"):
        flags.parse(comadice_train.Args)
    assert "it is older than these flags, so give them, too: --policy-alpha\n" in capsys.readouterr().err
    for flag in (["--policy-alpha", "1"], ["--policy-alpha=1"]):
        monkeypatch.setattr(sys, "argv", words + flag)
        assert flags.parse(comadice_train.Args).policy_alpha == 1


def test_hostile_configs(run, hopper_data, tmp_path, monkeypatch, capsys):
    """Each field of a config.json is spoilt in turn: in --config FILE, and in a run to go on with.

    The answer is one line, and nothing is written.
    """
    config, tried, before = json.loads((run / "config.json").read_text()), 0, sorted(tmp_path.rglob("*"))
    config |= {"data": str(hopper_data), "out": str(tmp_path / "runs")}
    texts = ["a\x1b[2J", "a\nb", "a\0b", "\u202ex"]
    wrong = {
        int: [1.5, "3", True, None, [], {}, 10**400, -1],
        float: [True, "3", [], {}, math.nan, math.inf, 10**400],
        bool: [1, "true", [], {}],
        str: [*texts, 3, [], {}],
        list: ["0", 0, [None], ["../x"], [[0]], {}, None],
    }
    names = ["../../x", "/tmp/x", "", "..", "a/b", "a\\b"]
    tries = [
        (name, bad)
        for name, value in config.items()
        if name in comadice_train.Args.__dataclass_fields__ and value is not None and name not in flags.NOT_AGAIN
        for bad in wrong[type(value)] + (names if name in ("env", "task", "quality") else [])
    ]
    tries += [(f"{name}\x1b[2J", 1) for name in ("x", "../x")]
    for name, bad in tries:
        (tmp_path / "config.json").write_text(json.dumps(config | {name: bad}))
        monkeypatch.setattr(sys, "argv", ["comadice_train.py", "--config", str(tmp_path / "config.json")])
        with pytest.raises(SystemExit, match="2"):
            environments.checks.run_script(lambda: comadice_train.main(flags.parse(comadice_train.Args)))
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and said[:-1].isprintable(), (name, bad, said)
        tried += 1
        (tmp_path / "config.json").unlink()
        assert sorted(tmp_path.rglob("*")) == before, (name, bad)
    assert tried > 100
    path = shutil.copytree(run, folder(tmp_path / "runs", "comadice"))
    for name, bad in (
        (n, b) for n in ("steps", "lr", "versions", "seeds", "x\x1b") for b in [*texts, [texts[0]], {texts[0]: 1}]
    ):
        (path / "config.json").write_text(json.dumps(config | {name: bad}))
        ends(
            capsys,
            "comadice",
            hopper_data,
            tmp_path / "runs",
            2,
            "^error: .*config.json is not that of a run$",
            resume=True,
        )


def test_hostile_checkpoints(hopper_data, copy, tmp_path, capsys):
    state = load_checkpoint(copy)
    for part in ("card", "config"):
        for bad in ("a\x1b[2J", ["a\nb"], {"a\0": 1}, 10**400, math.nan):
            sealed.save(copy / "checkpoint.pt", state | {part: state[part] | {"task": bad}})
            ends(
                capsys,
                "comadice",
                hopper_data,
                tmp_path,
                2,
                "^error: .*is not a checkpoint of this project: its (card|config) holds control characters",
                resume=True,
            )


TRAINING = [
    "comadice_train.py",
    "comadice_bc.py",
    *(f"baselines.{name}" for name in ("bcq", "cql", "icq", "omar", "omiga")),
]
OTHERS = [
    "comadice_eval.py",
    "comadice_eval.py report",
    "benchmarks.soak",
    "benchmarks.convert",
    "benchmarks.smax_speed",
] + [f"offline_data {name}" for name in ("list", "collect", "download", "convert", "info", "plot")]
RUN_ALL = """
import contextlib, io, json, runpy, sys
results = []
for words in json.loads(sys.argv[1]):
    name, *sys.argv[1:] = words
    said, code = io.StringIO(), None
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            (runpy.run_path if name.endswith(".py") else runpy.run_module)(name, run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
    results.append((code, said.getvalue(), "torch" in sys.modules))
print(json.dumps(results))
"""


def test_flags_are_read_before_torch_is_loaded():
    words, scripts = [], {name: name.split() for name in TRAINING + OTHERS}
    words += [(script, "--help", 0, "--help") for script in scripts]
    words += [(script, "--stepps=1", 2, "") for script in scripts]
    words += [(script, "--version", 0, "torch 2") for script in TRAINING] + [
        (script, "--config=no", 2, "error: --config no") for script in TRAINING
    ]
    asked = json.dumps([[*scripts[script], word] for script, word, _, _ in words])
    done = subprocess.run([sys.executable, "-c", RUN_ALL, asked], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    for (script, word, code, said), (found, printed, torch_is_loaded) in zip(
        words, json.loads(done.stdout), strict=True
    ):
        assert found == code and said in printed and not torch_is_loaded, f"{script} {word}: {found}, {printed}"
        assert "Args(" not in printed, f"{script} {word} shows a signature instead of a text: {printed[:500]}"


# ---------------------------------------------------------------- bars


def test_lines_where_there_is_no_terminal(capsys, monkeypatch):
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr("support.bars.time.monotonic", lambda: next(clock))
    bar = Bar("critics seed 0", 20, 4)
    for step, batch in bar((step, "batch") for step in range(5, 13)):
        assert batch == "batch"
        bar.say([{"nu_loss": step, "ess": 0.5}, {"nu_loss": step + 1.0, "return": None}])
    lines = capsys.readouterr().err.splitlines()
    assert 1 < len(lines) < 8
    assert all(
        re.fullmatch(r"critics seed 0: step \d+ of 20, \d+ per second, loss [\d.]+, ess 0.5", line) for line in lines
    )
    quiet = Bar("critics seed 0", 20, quiet=True)
    assert list(quiet([(1, "batch")])) == [(1, "batch")]
    quiet.say([{"nu_loss": 1.0}])
    assert capsys.readouterr().err == ""


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        stops.catch()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
