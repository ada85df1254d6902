"""Kills the commands of this project at random moments, and checks that nothing is lost or damaged.

    python -m benchmarks.soak                   # 200 kills, SIGKILL and SIGTERM in turn
    python -m benchmarks.soak --kills 20 --jobs comadice bc

Each command runs once undisturbed, at a small size. Then it is killed up to --each times in one folder, at moments
drawn uniformly over the time that it takes. After each kill it is started again. Finally it runs to its end. Checked:

    after a kill     None of its processes is left. Files under a final name are complete. SIGTERM ends with code 143,
                     the line that says how to go on, and no traceback.
    at the end       Training gives the bits of the undisturbed run (checkpoint and metrics.csv). So do conversion and
                     download. Collecting has made all its datasets.

Each command runs in a fork of this process, which has imported everything, so no time is lost on imports. The rest is
what the command line does. Linux only.
"""

from dataclasses import dataclass, field
from pathlib import Path

import environments.cpu  # noqa: F401 -- before torch

# isort: split
import tyro

from environments import stops
from support.flags import program

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "data" / "mamujoco" / "hopper" / "demo"
SMALL = ["--data", str(DEMO), "--evals", "4", "--eval-episodes", "1", "--hidden", "16", "--device", "cpu"]
HOPPER = ["--env", "mamujoco", "--task", "hopper"]
# The command of each job, without its folder.
JOBS = {
    "comadice": ["comadice_train.py", *SMALL, "--steps", "160", "--seeds", "0", "1", "2"],
    "bc": ["comadice_bc.py", *SMALL, "--steps", "320", "--seeds", "0", "1"],
    "icq": ["baselines.icq", *SMALL, "--steps", "160", "--seeds", "0", "1"],
    "collect": ["offline_data", "collect", *HOPPER, "--steps", "2048", "--samples", "300", "--num-envs", "4",
                "--horizon", "128", "--checkpoints", "4", "--minibatch", "128", "--epochs", "1"],
    "convert": ["offline_data", "convert", "SOURCE", "--format", "omiga", *HOPPER, "--quality", "expert"],
    "download": ["offline_data", "download", *HOPPER, "--quality", "medium-expert", "--base-url", "URL"],
}  # fmt: skip


@dataclass
class Args:
    kills: int = 200
    """number of kills over all jobs"""
    jobs: list[str] = field(default_factory=lambda: list(JOBS))
    """some of comadice, bc, icq, collect, convert and download"""
    each: int = 4
    """most kills of one command before it runs to its end"""
    seed: int = 0
    """seed of the moments of the kills"""
    folder: str | None = None
    """folder for all files, deleted at the end (default: the system's temporary directory)"""


if __name__ == "__main__":  # before the slow imports, so that --help and a mistyped flag answer at once
    stops.catch(begun=False)
    ARGS = tyro.cli(Args, prog=program())

# isort: split
import functools
import hashlib
import http.server
import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
import warnings
import zipfile

import matplotlib.figure  # noqa: F401 -- what the commands import, once for all
import torch

import baselines.icq  # noqa: F401
import comadice_train  # noqa: F401
import offline_data.collect
import offline_data.download  # noqa: F401
from benchmarks.convert import write_source
from environments.checks import BadInput, check_positive, run_script
from offline_data.dataset import open_dataset
from support.report import RUN_FILES
from support.runs import has_summary, load_checkpoint

FORK = multiprocessing.get_context("fork")
PATIENCE = 600  # seconds for one command: a machine may be busy


class Hurt(Exception):
    """Something was lost or damaged."""


# ---------------------------------------------------------------- processes


def as_command(words: list[str], log: Path):
    """Does in a forked process what `python WORDS` (or `python -m WORDS`) does."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    stops.catch(begun=False)  # from the first moment, as if Python itself were stopped while it starts
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stops.SIGNALS)
    name, *sys.argv[1:] = words
    sys.orig_argv = ["python", *([] if name.endswith(".py") else ["-m"]), *words]
    os.chdir(ROOT)
    run = functools.partial(runpy.run_path, name) if name.endswith(".py") else functools.partial(runpy.run_module, name)
    warnings.simplefilter("ignore", RuntimeWarning)  # runpy warns, since the modules are already imported
    run(run_name="__main__")


def left_of(session: int) -> list[str]:
    """The processes of a session that are still running."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, rest = stat.parent.name, stat.read_text().rpartition(")")[2].split()
            if int(rest[3]) == session and rest[0] != "Z":
                found.append(f"{pid} {stat.with_name('cmdline').read_text().replace(chr(0), ' ')[:80]}")
        except (OSError, IndexError):
            pass  # it ended meanwhile
    return found


def start(words: list[str], log: Path) -> multiprocessing.Process:
    process = FORK.Process(target=as_command, args=(words, log))
    with stops.not_for_children():  # until the command sets its own handlers
        process.start()
    return process


def end_of(process, what: str) -> int:
    """Waits for a process and those that it started. Returns its exit code."""
    process.join(PATIENCE)
    if process.exitcode is None:
        process.kill()
        raise Hurt(f"{what}: it was still running after {PATIENCE} seconds")
    deadline = time.monotonic() + 60
    while left := left_of(process.pid):
        if time.monotonic() > deadline:
            raise Hurt(f"{what}: left running: {left}")
        time.sleep(0.02)
    return process.exitcode


# ---------------------------------------------------------------- what must hold


def digest(value) -> str:
    """A hash of a nested structure of tensors and plain values."""
    hasher = hashlib.sha256()

    def add(value):
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                hasher.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            hasher.update(b"list")
            for item in value:
                add(item)
        elif isinstance(value, torch.Tensor):
            hasher.update(f"{value.dtype} {tuple(value.shape)}".encode() + value.contiguous().numpy().tobytes())
        else:
            hasher.update(repr(value).encode())

    add(value)
    return hasher.hexdigest()


def check_whole(job: str, folder: Path):
    """Raises Hurt if a file under a final name can't be used."""
    try:
        for path in folder.rglob("checkpoint.pt"):
            load_checkpoint(path.parent)
            json.loads((path.parent / "config.json").read_text())
        for path in folder.rglob("summary.json"):
            if not has_summary(path.parent):
                raise Hurt(f"{job}: {path} is incomplete")
        for path in folder.rglob("card.json"):
            if not any(".partial" in part for part in path.parts):
                open_dataset(path.parent)
    except (BadInput, OSError, ValueError) as error:
        raise Hurt(f"{job}: {error}") from None


def result(job: str, folder: Path) -> dict[str, str]:
    """The part of a job's result that must be the same however often the job was killed."""
    if job == "collect":  # a resumed one restarts its simulator, so data differ: only check that all datasets exist
        return {path.parent.name: "" for path in folder.rglob("card.json")}
    if job in ("convert", "download"):
        # A lock file that a killed command left does no harm.
        files = [path for path in (folder / "data").rglob("*") if path.is_file() and path.suffix != ".LOCK"]
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    found = {}
    for path in sorted(folder.rglob("checkpoint.pt")):
        state = load_checkpoint(path.parent)
        times = ("seconds", "critic_seconds", "wall", "config", "unplayed")  # the config names the folder
        found[str(path.relative_to(folder))] = digest({k: v for k, v in state.items() if k not in times})
        found[str(path.relative_to(folder)) + " table"] = (path.parent / "metrics.csv").read_text()
        if not has_summary(path.parent):
            raise Hurt(f"{job}: no summary in {path.parent}")
        if other := {file.name for file in path.parent.iterdir()} - RUN_FILES - {"ratio.png"}:
            raise Hurt(f"{job}: {sorted(other)} left in {path.parent}")
    return found


def was_done(job: str, printed: str) -> bool:
    """Whether a command refuses to run again because its result was complete before the last kill."""
    return job in ("convert", "download") and "is already there" in printed


# ---------------------------------------------------------------- the soak


def command(job: str, folder: Path, again: bool, source: Path, url: str) -> list[str]:
    words = [{"SOURCE": str(source), "URL": url}.get(word, word) for word in JOBS[job]]
    if job in ("comadice", "bc", "icq"):
        return [*words, "--out", str(folder), *(["--resume"] if again else [])]
    if job == "download":
        words += ["--downloads", str(folder / "zips")]
    return [*words, "--out", str(folder / "data")]


def serve(folder: Path, port):
    """Serves a folder over HTTP on this machine. It also sends parts of files, so that a download can continue."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            wanted, path = self.headers.get("Range"), Path(self.translate_path(self.path))
            if not path.is_file():
                return self.send_error(404)
            data = path.read_bytes()
            begin = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
            code = 416 if wanted and begin >= len(data) else 206 if wanted else 200
            self.send_response(code)
            if wanted:
                sent = "*" if code == 416 else f"{begin}-{len(data) - 1}"
                self.send_header("Content-Range", f"bytes {sent}/{len(data)}")
            self.send_header("Content-Length", str(len(data[begin:])))
            self.end_headers()
            for at in range(begin, len(data), 2**16):
                self.wfile.write(data[at : at + 2**16])
                time.sleep(0.01)  # so that a kill can come in the middle

        def log_message(self, *args):
            pass

    sys.stderr = open(os.devnull, "w")  # no messages about clients that are killed
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    port.value = server.server_port
    server.serve_forever()


def write_robots(path: Path) -> Path:
    """A made-up recording of hopper in OMIGA's format. Converting it takes some seconds."""
    write_source("ant", path.parent, 0.002)
    import h5py

    with h5py.File(path.parent / "source.hdf5", "r+") as file:
        for key, agents, width in (("o", 3, 14), ("s", 3, 14), ("a", 3, 1), ("r", 3, 1)):
            whole = file[key][:]
            del file[key]
            file[key] = whole[:, [0] * agents, :width]
        done = file["d"][:]
        del file["d"]
        file["d"] = done[:, [0] * 3]
    return path


def soak(args: Args, folder: Path) -> int:
    """Makes all kills and returns their number. Raises Hurt at the first check that fails."""
    chance, log = random.Random(args.seed), folder / "log"
    source, zipped = folder / "source", folder / "served" / "prior_work" / "omiga" / "mamujoco" / "3hopper.zip"
    if {"convert", "download"} & set(args.jobs):
        source.mkdir()
        source = write_robots(source / "source.hdf5")
    url = ""
    if "download" in args.jobs:
        (folder / "vault").mkdir()
        write_source("hopper", folder / "vault", 0.002)
        zipped.parent.mkdir(parents=True)
        with zipfile.ZipFile(zipped, "w") as archive:
            for file in sorted((folder / "vault").rglob("*")):
                archive.write(file, file.relative_to(folder / "vault"))
        port = FORK.Value("i", 0)
        server = FORK.Process(target=serve, args=(folder / "served", port), daemon=True)
        server.start()
        while not port.value:
            time.sleep(0.01)
        url = f"http://127.0.0.1:{port.value}"
    wanted, takes = {}, {}
    for job in args.jobs:
        whole, begun = folder / f"{job} whole", time.monotonic()
        code = end_of(start(command(job, whole, False, source, url), log), job)
        takes[job] = time.monotonic() - begun
        if code != 0:
            raise Hurt(f"{job} fails undisturbed, with code {code}: {log.read_text()[-2000:]}")
        wanted[job] = result(job, whole)
        print(f"{job}: {takes[job]:.1f} s undisturbed", flush=True)
    kills, round = 0, 0
    while kills < args.kills:
        job = args.jobs[round % len(args.jobs)]
        place, said, again = folder / f"{job} {round}", [], False
        for _ in range(min(args.each, args.kills - kills)):
            number, moment = (signal.SIGKILL, signal.SIGTERM)[kills % 2], chance.uniform(0, 0.9 * takes[job])
            what = f"{job}, round {round}, {signal.Signals(number).name} after {moment:.2f} s"
            begun, process = time.monotonic(), start(command(job, place, again, source, url), log)
            process.join(moment)
            ended = process.exitcode is not None
            if ended and not again:
                takes[job] = time.monotonic() - begun  # the machine has become faster
            again = True
            if not ended:
                os.kill(process.pid, number)
            code, printed = end_of(process, what), log.read_text()
            if ended and (code == 0 or was_done(job, printed)):
                said.append("done")
                break
            kills += 1
            said.append(f"{signal.Signals(number).name} {code}")
            expected = (0, -9) if number == signal.SIGKILL else (0, 143, -15)  # -15: before the script began
            if (code not in expected and not was_done(job, printed)) or "Traceback" in printed or "leaked" in printed:
                raise Hurt(f"{what}: code {code}, it said {printed[-3000:]}")
            if code == 143 and "stopped by SIGTERM" not in printed:
                raise Hurt(f"{what}: it did not say how to go on: {printed[-500:]}")
            check_whole(job, place)
        code = end_of(start(command(job, place, True, source, url), log), f"{job}, round {round}")
        if code != 0 and not was_done(job, log.read_text()):
            raise Hurt(f"{job}, round {round}: when run again it ends with code {code}: {log.read_text()[-3000:]}")
        check_whole(job, place)
        if result(job, place) != wanted[job]:
            raise Hurt(f"{job}, round {round}, {said}: the result in {place} differs from the undisturbed one")
        print(f"{kills} kills: {job} {', '.join(said)}: as undisturbed", flush=True)
        shutil.rmtree(place)
        round += 1
    if url:
        server.terminate()
    return kills


def main(args: Args):
    if unknown := sorted(set(args.jobs) - JOBS.keys()):
        raise BadInput(f"--jobs {' '.join(unknown)}: there are {', '.join(JOBS)}")
    if not args.jobs:
        raise BadInput("give at least one job to --jobs")
    check_positive(args, "kills", "each")
    if args.folder and not Path(args.folder).is_dir():
        raise BadInput(f"--folder {args.folder} is not a folder: make it first")
    folder = Path(tempfile.mkdtemp(prefix="soak", dir=args.folder))
    begun = time.monotonic()
    try:
        kills = soak(args, folder)
    except Hurt as hurt:
        raise BadInput(f"{hurt} (everything is in {folder})") from None
    shutil.rmtree(folder)
    print(f"{kills} kills in {time.monotonic() - begun:.0f} s: every result is that of an undisturbed run")


if __name__ == "__main__":
    run_script(main, ARGS)
