"""The tools around datasets: durable writing, listing, and what a signal leaves."""

import errno
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from conftest import ROOT, files_hash, hopper_card, remount, small_disk

import environments.__main__
import environments.checks
import environments.mamujoco
import environments.smax
import environments.starcraft
import offline_data.collect
import offline_data.convert
import offline_data.list
from environments.checks import BadInput
from environments.simulators import make_env
from offline_data import durable, lock
from offline_data.dataset import open_dataset
from offline_data.published import published
from offline_data.writer import DatasetWriter

# ---------------------------------------------------------------- durable writing


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "a.txt"
    durable.write_text(path, "old")
    durable.write_text(path, "new ±")
    assert path.read_text() == "new ±" and os.listdir(tmp_path) == ["a.txt"]


def test_files_are_flushed_before_they_are_renamed(tmp_path, monkeypatch):
    """A power cut after the rename must find the bytes: every file and folder is flushed first, the parent last."""
    calls = []
    names = lambda handle: os.readlink(f"/proc/self/fd/{handle}")
    flush, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append(names(handle)), flush(handle)))
    monkeypatch.setattr(os, "rename", lambda a, b: (calls.append(f"{a} -> {b}"), rename(a, b)))
    partial, path = tmp_path / "set.partial", tmp_path / "set"
    (partial / "agents").mkdir(parents=True)
    for name in ("one", "agents/two"):
        (partial / name).write_text(name)
    durable.replace(partial, path)
    assert sorted(calls[:4]) == sorted(
        map(str, (partial, partial / "agents", partial / "one", partial / "agents" / "two"))
    )
    assert calls[4:] == [f"{partial} -> {path}", str(tmp_path)]
    assert (path / "agents" / "two").read_text() == "agents/two"


@pytest.mark.parametrize("there", ["folder", "file"])
def test_a_folder_takes_nobodys_place(there, tmp_path):
    partial, path = tmp_path / "set.partial", tmp_path / "set"
    partial.mkdir()
    (partial / "new").write_text("")
    if there == "folder":
        path.mkdir()
        (path / "mine").write_text("precious")
    else:
        path.write_text("precious")
    with pytest.raises(BadInput, match="is already there and is left alone"):
        durable.replace(partial, path)
    assert (path / "mine" if there == "folder" else path).read_text() == "precious" and (partial / "new").exists()


@pytest.mark.parametrize(
    "number, said",
    [
        (errno.ENOSPC, "^no space left on /.*; free some and run again with --resume"),
        (errno.EDQUOT, "^your quota on /.* is used up; free some and run again with --resume"),
        (errno.EROFS, "is mounted read-only"),
        (errno.EACCES, "not allowed"),
        (errno.EIO, "can't write .*: Input/output error"),
    ],
)
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_what_the_disk_refuses_is_one_line(number, said, call, tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    durable.write_text(path, "old")

    def fail(*args):
        raise OSError(number, os.strerror(number))

    if call == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(durable.Path, "write_bytes", fail)
    with pytest.raises(BadInput, match=said) as caught:
        durable.write_text(path, "new", "run again with --resume")
    assert "\n" not in str(caught.value) and path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_that_was_removed(tmp_path):
    with pytest.raises(BadInput, match="was removed meanwhile"):
        durable.write_text(tmp_path / "gone" / "a.txt", "new")


def test_a_disk_that_is_full(tmp_path):
    """A real small disk, where this may be mounted."""
    disk = tmp_path / "disk"
    with small_disk(disk, 64):
        durable.write_bytes(disk / "a", b"x" * 1000)
        with pytest.raises(BadInput, match=f"^no space left on {disk}; free some"):
            durable.write_bytes(disk / "a", b"x" * 100_000)
        remount(disk, "ro")
        with pytest.raises(
            BadInput, match=f"^can't write {disk}/a: {disk} is mounted read-only; choose another folder"
        ):
            durable.write_bytes(disk / "a", b"y")
        assert (disk / "a").read_bytes() == b"x" * 1000 and os.listdir(disk) == ["a"]


def test_datasets_on_a_disk_that_is_full(hopper_episodes, tmp_path):
    """20 sizes of a disk, from one that holds nothing to one that holds it all.

    There is a whole dataset in the end, or one line and nothing.
    """
    disk, outcomes = tmp_path / "disk", []
    for kib in range(8, 168, 8):
        with small_disk(disk, kib):
            try:
                writer = DatasetWriter(disk / "set")
                for episode in hopper_episodes:
                    writer.append(episode)
                open_dataset(writer.close(hopper_card()))
                outcomes.append("written")
            except BadInput as error:
                assert str(error).startswith(f"no space left on {disk}; free some and run the command again"), error
                assert not (disk / "set").exists() and not (disk / "set.partial").exists()
                outcomes.append("no space")
    assert set(outcomes) == {"written", "no space"} and outcomes == sorted(outcomes), outcomes


# ---------------------------------------------------------------- lists


def run(*arguments, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, cwd=ROOT, **kwargs)


def test_list_of_datasets(hopper_data, tmp_path, capsys):
    here = shutil.copytree(hopper_data, tmp_path / "mamujoco" / "hopper" / "random")
    damaged = shutil.copytree(hopper_data, tmp_path / "mamujoco" / "hopper" / "cut\n")
    (damaged / "card.json").write_text((damaged / "card.json").read_text()[:50])
    shutil.copytree(hopper_data, tmp_path / "mamujoco" / "hopper" / "new.partial")
    offline_data.list.list_datasets(str(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    card = json.loads((here / "card.json").read_text())
    (found,) = [line for line in lines if str(here) in line]
    assert found.split()[:3] == ["mamujoco", "hopper", "random"] and f"{card['return_mean']:.1f}" in found
    assert " 12 " in found
    assert sum("comes with the code" in line for line in lines) == len(offline_data.list.SHIPPED) == 3
    assert sum("unusable: can't be read as JSON" in line for line in lines) == 1
    assert not any("partial" in line for line in lines)
    for env, task, quality in (
        ("mamujoco", "ant", "expert"),
        ("smacv2", "zerg_5_vs_5", "replay"),
        ("mamujoco", "walker2d_2x3", "replay"),
    ):
        assert any(line.split()[:3] == [env, task, quality] and line.endswith("download") for line in lines)
    assert any("1,000" in line and "1.9 GB" in line and "2055.07" in line for line in lines)
    assert sum("cloud.tsinghua.edu.cn" in line for line in lines) == 1


@pytest.mark.parametrize("root", ["", "nowhere"])
def test_list_of_no_folder(root):
    with pytest.raises(BadInput, match="is no directory"):
        offline_data.list.list_datasets(root)


@pytest.mark.parametrize(
    "module",
    [
        "offline_data.list",
        "offline_data.collect_args",
        "offline_data.convert",
        "offline_data.download",
        "offline_data.published",
        "offline_data.card",
        "offline_data.durable",
        "environments.__main__",
    ],
)
def test_lists_and_flags_load_no_torch(module):
    """This is what makes --help and the lists quick."""
    code = f"import sys, {module}; sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'mujoco', 'jax')))"
    assert run("-c", code).returncode == 0


@pytest.mark.parametrize(
    "module",
    [
        "offline_data list",
        "offline_data collect --help",
        "offline_data convert --help",
        "offline_data download --help",
        "offline_data info --help",
        "environments",
    ],
)
def test_commands_that_only_print_import_no_torch(module):
    done = run("-X", "importtime", "-m", *module.split())
    assert done.returncode == 0 and done.stdout and "torchrl" not in done.stderr and " torch\n" not in done.stderr


def test_tasks_are_those_of_the_simulators():
    rows = environments.__main__.tasks()
    names = {env: [task for e, task, _ in rows if e == env] for env, _, _ in rows}
    assert names == {
        "mamujoco": list(environments.mamujoco.MAMUJOCO_TASKS),
        "smax": environments.smax.TASKS,
        "smacv1": environments.starcraft.SMACV1_TASKS,
        "smacv2": names["smacv2"],
    }
    assert sorted(names["smacv2"]) == sorted(environments.starcraft.SMACV2_TASKS)
    known = {(env, task): list(map(int, sizes)) for (env, task, _), (sizes, *_) in published().items()}
    for env, task, sizes in rows:
        assert known.get((env, task), sizes) == sizes


@pytest.mark.parametrize(
    "env, task",
    [("mamujoco", task) for task in environments.mamujoco.MAMUJOCO_TASKS]
    + [("smax", "zerg_10_vs_11"), ("smax", "3s5z_vs_3s6z"), ("smax", "corridor")],
)
def test_listed_sizes_are_those_of_the_built_environment(env, task):
    if env == "smax" and importlib.util.find_spec("jaxmarl") is None:
        pytest.skip("jaxmarl is not installed")
    made = make_env(env, task, 1)
    spec = made.observation_spec
    n, O = spec["agents", "observation"].shape[-2:]
    action = spec["agents", "action_mask"] if env == "smax" else made.full_action_spec["agents", "action"]
    assert [n, spec["state"].shape[-1], O, action.shape[-1]] == next(
        s for e, t, s in environments.__main__.tasks() if (e, t) == (env, task)
    )
    made.close()


def test_listed_tasks_say_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(
        environments.__main__, "find_spec", lambda name: None if name in ("jaxmarl", "smacv2") else True
    )
    environments.__main__.main()
    said = capsys.readouterr().out
    assert "smax needs jaxmarl: pip install -r requirements-smax.txt" in said
    assert "smacv2 needs smacv2: " in said and "mamujoco needs" not in said
    assert [line.split()[-2:] for line in said.splitlines() if "27m_vs_30m" in line] == [["needs", "jaxmarl"]]


def test_the_notice_about_adroit_hands_is_not_shown():
    done = run("-c", "from environments.mamujoco import mamujoco_scenario; print(mamujoco_scenario('hopper'))")
    assert done.stdout == "('Hopper', '3x1')\n" and "Adroit" not in done.stderr


def test_other_notices_of_gymnasium_robotics_stay():
    code = (
        "from farama_notifications import notifications as n; import importlib.metadata as m; "
        "v = m.version('gymnasium_robotics'); n.setdefault('gymnasium_robotics', {})[v] = 'a notice of weight'; "
        "from environments.mamujoco import import_robotics; import_robotics()"
    )
    if importlib.util.find_spec("farama_notifications") is None:
        pytest.skip("farama_notifications is not installed")
    assert "a notice of weight" in run("-c", code).stderr


# ---------------------------------------------------------------- collect: what is there, and signals

COLLECT = offline_data.collect.Args(
    steps=1024, samples=100, num_envs=4, horizon=128, checkpoints=2, minibatch=128, epochs=1
)


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    out = tmp_path_factory.mktemp("collected")
    offline_data.collect.main(replace(COLLECT, out=str(out)))
    return out


@pytest.fixture
def copied(collected, tmp_path):
    return shutil.copytree(collected, tmp_path / "data") / "mamujoco" / "hopper"


def collect_again(copied, monkeypatch, **changes):
    """Runs the command again; training must not start where it is refused."""
    offline_data.collect.main(replace(COLLECT, out=str(copied.parent.parent), **changes))


def test_a_finished_collection_is_kept(copied, monkeypatch, capsys):
    before = files_hash(copied)
    monkeypatch.setattr(offline_data.collect, "train", None)  # not even called
    collect_again(copied, monkeypatch)
    assert files_hash(copied) == before
    said = capsys.readouterr().out
    assert all(
        f"{copied / quality} is there already and is kept" in said
        for quality in ("medium", "expert", "medium-replay", "medium-expert")
    )


def test_a_finished_collection_without_its_behaviour_policy_is_kept(copied, monkeypatch, capsys):
    shutil.rmtree(copied / "behaviour")
    test_a_finished_collection_is_kept(copied, monkeypatch, capsys)


@pytest.mark.parametrize("quality", ["medium", "expert", "medium-replay", "medium-expert"])
@pytest.mark.parametrize("what", ["downloaded", "other arguments", "a folder", "a file", "a dead link", "a bad card"])
def test_what_is_in_the_way_is_refused_before_training(what, quality, copied, monkeypatch):
    shutil.rmtree(copied / "behaviour")
    path = copied / quality
    if what in ("downloaded", "other arguments", "a bad card"):
        card = json.loads((path / "card.json").read_text())
        card["made"] = (
            {"by": "python -m offline_data convert"}
            if what == "downloaded"
            else card["made"] | {"arguments": card["made"]["arguments"] | {"lr": 1.0}}
        )
        (path / "card.json").write_text("{" if what == "a bad card" else json.dumps(card))
    else:
        shutil.rmtree(path)
        if what == "a folder":
            path.mkdir()
            (path / "thesis.tex").write_text("precious")
        elif what == "a file":
            path.write_text("precious")
        else:
            path.symlink_to("/nowhere/at/all")
    before = files_hash(copied)
    monkeypatch.setattr(offline_data.collect, "train", None)
    said = {
        "downloaded": "was not made by this command",
        "other arguments": "made with other arguments \\(--lr 1.0\\)",
        "a bad card": "can't be read",
    }
    with pytest.raises(BadInput, match=said.get(what, "is no dataset and is left alone")) as caught:
        collect_again(copied, monkeypatch)
    assert "\n" not in str(caught.value) and files_hash(copied) == before and not (copied / "behaviour").exists()
    if what not in ("downloaded", "other arguments", "a bad card"):
        with pytest.raises(BadInput, match="is no dataset and is left alone"):
            collect_again(copied, monkeypatch, overwrite=True)
        assert files_hash(copied) == before


def test_a_shard_of_somebody_else_is_refused(copied, monkeypatch):
    (copied / "behaviour" / "state.pt").unlink()
    card = copied / "behaviour" / "episodes-000" / "card.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"made": {"by": "somebody"}}))
    before = files_hash(copied)
    with pytest.raises(BadInput, match="episodes-000 was not made by this command"):
        collect_again(copied, monkeypatch)
    assert files_hash(copied) == before


def test_overwrite_replaces_the_datasets_and_the_training_of_another_command(copied, monkeypatch):
    (copied / "behaviour" / "notes.txt").write_text("mine")
    collect_again(copied, monkeypatch, overwrite=True, lr=1e-3, steps=512, checkpoints=1)
    for quality in ("medium", "expert", "medium-replay", "medium-expert"):
        assert open_dataset(copied / quality)[1]["made"]["arguments"]["lr"] == 1e-3
    kept = sorted(p.name for p in (copied / "behaviour").iterdir())
    assert kept == ["actor-000.pt", "curve.csv", "curve.png", "episodes-000", "notes.txt", "state.pt"]


def collect_on(disk, capsys, **changes) -> str:
    """How collecting on this disk ends: "done", or "no space" in one line."""
    capsys.readouterr()
    try:
        environments.checks.run_script(offline_data.collect.main, replace(COLLECT, out=str(disk), **changes))
        return "done"
    except SystemExit as end:
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert end.code == 2, said
        assert re.search(f"^error: no space left on {disk}; free some and run the command again", said), said
        return "no space"


@pytest.mark.parametrize("share", [float(x) for x in os.environ.get("SHARES", "0.02 0.3 0.7").split()])
def test_collecting_on_a_disk_that_is_full(share, collected, tmp_path, capsys):
    """It ends in one line, and goes on with more space. SHARES of what it needs: more of them can be tried."""
    disk, needed = (
        tmp_path / "disk",
        sum(-(-file.stat().st_size // 4096) * 4 for file in collected.rglob("*") if file.is_file()),
    )
    with small_disk(disk, max(int(share * needed), 4)):
        assert collect_on(disk, capsys) == "no space"
        for file in disk.rglob("card.json"):
            open_dataset(file.parent)
        assert not list(disk.rglob("LOCK"))
        remount(disk, "size=100m")
        assert collect_on(disk, capsys) == "done"
        assert {file.parent.name for file in disk.rglob("card.json")} >= {
            "medium",
            "expert",
            "medium-replay",
            "medium-expert",
        }
        assert not list(disk.rglob("*.partial")) and not list(disk.rglob("LOCK"))
        remount(disk, "ro")
        before = files_hash(disk)
        assert collect_on(disk, capsys) == "done" and files_hash(disk) == before  # it only says what is there


def test_a_folder_removed_under_collect(tmp_path, monkeypatch):
    original = offline_data.collect.update
    monkeypatch.setattr(offline_data.collect, "update", lambda *a: (shutil.rmtree(tmp_path / "data"), original(*a)))
    with pytest.raises(BadInput, match="is not there, or was removed meanwhile; run the command again"):
        offline_data.collect.main(replace(COLLECT, out=str(tmp_path / "data")))


HOLD = (
    "import sys, time; from pathlib import Path; from offline_data.lock import lock; "
    "lock(Path(sys.argv[1]), sys.argv[2] == 'beside'); print('held', flush=True); time.sleep(60)"
)


@pytest.mark.parametrize("name", ["collect", "convert"])
def test_a_second_command_that_writes_the_same_data_is_refused(name, tmp_path):
    folder = tmp_path / "mamujoco" / "hopper" / ("behaviour" if name == "collect" else "expert")
    (tmp_path / "source").write_text("")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder, "" if name == "collect" else "beside"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(
            BadInput, match=f"^{folder} is in use by process {holder.pid} on .*: wait for it or stop it"
        ):
            if name == "collect":
                offline_data.collect.main(replace(COLLECT, out=str(tmp_path)))
            else:
                offline_data.convert.convert(
                    str(tmp_path / "source"), "omiga", "mamujoco", "hopper", "expert", str(folder)
                )
        assert sorted(tmp_path.rglob("*")) == before
    finally:
        holder.kill()
        holder.wait()
    # the stale LOCK is in nobody's way
    with (
        lock.locked(folder, beside=name == "convert"),
        lock.locked(folder, beside=name == "convert"),
    ):
        assert folder.absolute() in lock.HELD
    assert not list(tmp_path.rglob("*LOCK")) and folder.absolute() not in lock.HELD
    above = tmp_path / "new" / "folders"  # a command that fails leaves no empty folders, and keeps those with files
    with lock.locked(above / "data", beside=True):
        (tmp_path / "new" / "file").write_text("kept")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


def test_flipped_bits_in_the_training_state_are_found(copied, monkeypatch):
    """torch.load alone takes most of them."""
    rng, path = random.Random(0), copied / "behaviour" / "state.pt"
    original, refused = path.read_bytes(), 0
    for _ in range(int(os.environ.get("FLIPS", 40))):
        data = bytearray(original)
        place = rng.randrange(len(data))
        data[place] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            state = offline_data.collect.load_state(
                offline_data.collect.fill_in(replace(COLLECT, out="x")), copied / "behaviour"
            )
            path.write_bytes(original)
            sound = offline_data.collect.load_state(
                offline_data.collect.fill_in(replace(COLLECT, out="x")), copied / "behaviour"
            )
            assert all((a == b).all() for a, b in zip(state["loss"].values(), sound["loss"].values())), place
            assert state["curve"] == sound["curve"] and state["args"] == sound["args"]
        except BadInput as error:
            assert "can't be read" in str(error)
            refused += 1
    assert refused > 25


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    "body", ["time.sleep(60)", "try: time.sleep(60)\n    finally: raise RuntimeError('a library, surprised')"]
)
def test_signals_end_a_script_in_one_line(body, number, code):
    script = (
        "import time\nfrom environments.checks import run_script\n"
        f"def main():\n    print('now', flush=True)\n    {body}\nrun_script(main, go_on='again')"
    )
    command = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert command.stdout.readline() == "now\n"
    command.send_signal(number)
    said = command.communicate(timeout=20)[1]
    assert command.returncode == code
    assert said == f"\nstopped by {'Ctrl-C' if code == 130 else 'SIGTERM'}; to go on: again\n"


def test_a_scripts_own_bug_is_still_a_traceback():
    done = run("-c", "from environments.checks import run_script; run_script(lambda: 1 / 0)")
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


def session(pid: int) -> list[str]:
    """The processes of a session that still live."""
    lines = subprocess.run(
        ["ps", "-o", "stat=,args=", "-s", str(pid)], capture_output=True, text=True
    ).stdout.splitlines()
    return [line for line in lines if not line.startswith("Z")]


@pytest.mark.parametrize(
    "workers, number, everybody, code",
    [
        (1, signal.SIGTERM, False, 143),
        (2, signal.SIGINT, True, 130),
    ],
)
def test_signals_end_collect_in_one_line(workers, number, everybody, code, tmp_path):
    """Ctrl-C goes to every process of the terminal (`everybody`), a cluster's SIGTERM often to one."""
    arguments = [
        "collect", "--steps", "1000000", "--num-envs", "2", "--horizon", "64", "--workers", str(workers),
        "--out", str(tmp_path / "data"),
    ]  # fmt: skip
    with open(tmp_path / "said", "w") as file:
        command = subprocess.Popen(
            [sys.executable, "-m", "offline_data", *arguments, "--checkpoints", "8000"],
            cwd=ROOT,
            stdout=file,
            stderr=file,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    try:
        end = time.monotonic() + 200
        while not (tmp_path / "data" / "mamujoco" / "hopper" / "behaviour" / "state.pt").exists():
            assert time.monotonic() < end and command.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.2)
        (os.killpg if everybody else os.kill)(command.pid, number)
        assert command.wait(60) == code
        time.sleep(0.5)
        said = (tmp_path / "said").read_text()
        assert session(command.pid) == []
    finally:
        command.kill()
    lines = [
        line for line in said.replace("\r", "\n").splitlines() if line.strip() and not line.startswith("MAPPO hopper:")
    ]
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    assert lines == [f"stopped by {name}; to go on: python -m offline_data {' '.join(arguments)} --checkpoints 8000"], (
        said
    )
