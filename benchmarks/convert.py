"""Measures memory and time of conversion and training, on made-up sources with Table 3's sizes.

    python -m benchmarks.convert                        # hopper, ant, corridor at full size: 17 GB, some minutes
    python -m benchmarks.convert --scale 0.02           # a fiftieth of the episodes
    python -m benchmarks.convert --names corridor --folder /mnt/big

The sources hold noise: hopper medium-expert as a vault, ant medium-expert as OMIGA's HDF5, corridor medium as the
authors' padded .npz. Each is converted, and 200 updates are trained on the result. The script prints the peak of
anonymous memory (RssAnon) of both, minus that of Python with torch. It compares the speed of the conversion with a
plain copy of the same bytes in the same run (both start with a warm page cache if memory allows).
"""

import environments.cpu  # noqa: F401 -- before torch

# isort: split
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from environments.checks import BadInput, check_positive, run_script

ROOT = Path(__file__).parent.parent

# name -> task, format, rows, episodes, step limit, agents, state, observation, actions (Table 3, OG-MARL's rows)
SOURCES = {
    "hopper": (("mamujoco", "hopper", "medium-expert"), "vault", 1_919_782, 5481, 1000, 3, 42, 14, 1),
    "ant": (("mamujoco", "ant", "medium-expert"), "omiga", 2_002_000, 2000, 1000, 2, 226, 113, 4),
    "corridor": (("smacv1", "corridor", "medium"), "npz", 126_012, 1001, 400, 6, 435, 346, 30),
}


@dataclass
class Args:
    scale: float = 1.0
    """share of the episodes"""
    names: list[str] = field(default_factory=lambda: list(SOURCES))
    """which of hopper, ant and corridor"""
    folder: str | None = None
    """folder for the sources and datasets, deleted at the end (default: the system's temporary directory)"""
    steps: int = 200
    """updates of each of the two stages"""
    threads: int = 1
    """CPU threads of training"""


def rss_anon() -> int:
    """This process's anonymous memory in bytes."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon"))


def measure(job: dict):
    """Runs in a separate process: converts or trains, and prints a line of JSON with seconds and peak memory."""
    import torch

    torch.set_num_threads(job["threads"])
    base, peak, running = rss_anon(), 0, True

    def watch():
        nonlocal peak
        while running:
            peak = max(peak, rss_anon() - base)
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        if job["stage"] == "convert":
            from offline_data import formats

            start = time.perf_counter()
            formats.convert_here(**job["convert"])
        else:
            import comadice_train

            start = time.perf_counter()
            args = comadice_train.Args(
                data=job["convert"]["out"], out=job["runs"], steps=job["steps"], evals=1, eval_episodes=1, device="cpu"
            )
            comadice_train.main(args)
        seconds = time.perf_counter() - start
    finally:
        running = False
        watcher.join()
    print(json.dumps({"seconds": seconds, "peak": peak}))


def lengths(rows: int, count: int, longest: int) -> list[int]:
    """The number of rows of each episode, about `rows` together. Some have the greatest length, all others the same."""
    mean = rows / count
    full = count if mean >= longest else max(round(0.5 * count * mean / longest), 1)
    rest = max(round((rows - full * longest) / max(count - full, 1)), 2)
    return [longest] * full + [rest] * (count - full)


def write_source(name: str, folder: Path, scale: float) -> Path:
    """Writes a source of noise, a few episodes at a time."""
    import numpy as np

    _, format, rows, count, limit, n, S, O, A = SOURCES[name]
    generator, noise = np.random.default_rng(0), {}

    def normal(*shape):
        """Noise cut from one long array, since drawing gigabytes would take longer than what is measured."""
        size = int(np.prod(shape))
        if noise.get("strip") is None or len(noise["strip"]) < 2 * size:
            noise["strip"] = generator.standard_normal(2 * size, dtype="f4")
        start = generator.integers(size)
        return noise["strip"][start : start + size].reshape(shape)

    count = max(round(scale * count), 2)
    sizes = lengths(round(rows * count / SOURCES[name][3]), count, limit + (format != "npz"))
    N = sum(sizes)
    if format == "npz":
        shapes = {
            "obs": (limit + 1, n, O),
            "states": (limit + 1, n, S),
            "avails": (limit + 1, n, A),
            "actions": (limit, n, 1),
        }
        shapes |= {"rewards": (limit, n, 1), "dones": (limit, n), "actives": (limit + 1, n, 1)}
        with zipfile.ZipFile(folder / "source.npz", "w") as archive:
            for key, shape in shapes.items():
                dtype = {"actions": "i8", "dones": "?"}.get(key, "f4")
                with archive.open(f"{key}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array_header_2_0(
                        file, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (count, *shape)}
                    )
                    for T in sizes:
                        array = np.zeros(shape, dtype)
                        if key in ("obs", "states"):
                            array[: T + 1] = normal(T + 1, *shape[1:])
                        elif key in ("avails", "actives"):
                            array[: T + 1] = 1
                        elif key == "actions":
                            array[:T] = generator.integers(A, size=(T, n, 1))
                        elif key == "rewards":
                            array[:T] = normal(T, 1, 1)
                        else:
                            array[T - 1 :] = True
                        file.write(array.tobytes())
        return folder / "source.npz"
    done = np.zeros(N, "f4")
    done[np.cumsum(sizes) - 1] = 1
    block = 25_000
    if format == "omiga":
        import h5py

        with h5py.File(folder / "source.hdf5", "w") as file:
            shapes = {"o": (n, O), "s": (n, O), "a": (n, A), "r": (n, 1), "d": (n,)}
            arrays = {key: file.create_dataset(key, (N, *shape), "f4") for key, shape in shapes.items()}
            for start in range(0, N, block):
                b = min(block, N - start)
                for key in ("o", "s", "a"):
                    arrays[key][start : start + b] = normal(b, *shapes[key])
                arrays["r"][start : start + b] = np.repeat(normal(b, 1, 1), n, 1)
                arrays["d"][start : start + b] = np.repeat(done[start : start + b, None], n, 1)
        return folder / "source.hdf5"
    import tensorstore as ts

    path = folder / "3hopper.vlt" / "Medium-Expert"
    path.mkdir(parents=True)
    shapes = {"observations.": (n, O), "infos.state.": (S,), "actions.": (n, A)} | dict.fromkeys(
        ("rewards.", "terminals.", "truncations."), (n,)
    )
    shapes["vault_index"] = None
    for key, shape in shapes.items():
        spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": f"file://{path}", "path": key}}
        if shape is None:
            ts.open(spec, shape=(1,), dtype="int32", create=True).result().write(np.array([N], "i4")).result()
            continue
        spec["metadata"] = {"compressor": {"id": "gzip", "level": 5}}
        array = ts.open(spec, shape=(1, 10**13, *shape), dtype="float32", create=True).result()
        step = max(array.chunk_layout.read_chunk.shape[1], 1)
        for start in range(0, N, step):
            b = min(step, N - start)
            if key == "rewards.":
                value = np.repeat(normal(b, 1), n, 1)
            elif key in ("terminals.", "truncations."):
                value = np.repeat(done[start : start + b, None] * (key == "terminals."), n, 1)
            else:
                value = normal(b, *shape)
            array[0, start : start + b].write(value).result()
    (path / "metadata.json").write_text(json.dumps({"version": 1.2}))
    return path


def main(args: Args):
    unknown = sorted(set(args.names) - set(SOURCES))
    if unknown or not 0 < args.scale <= 1:
        raise BadInput(f"--names are of {', '.join(SOURCES)}, --scale is above 0 and at most 1")
    check_positive(args, "steps", "threads")
    if args.folder and not Path(args.folder).is_dir():
        raise BadInput(f"--folder {args.folder} is not a folder: make it first")
    print(
        "| source | source GB | dataset GB | converting | MB/s | plain copy | MB/s | share of a copy's speed | RssAnon "
        "converting | RssAnon training |"
    )
    print("| --- " * 10 + "|")
    for name in args.names:
        (env, task, quality), format, *_ = SOURCES[name]
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            folder = Path(folder)
            source = write_source(name, folder, args.scale)
            files = [source] if source.is_file() else [file for file in source.rglob("*") if file.is_file()]
            size = sum(file.stat().st_size for file in files)
            (folder / "copy").mkdir()
            start = time.perf_counter()
            for i, file in enumerate(files):
                shutil.copyfile(file, folder / "copy" / str(i))
            copying = time.perf_counter() - start
            shutil.rmtree(folder / "copy")
            convert = {"source": str(source), "format": format, "env": env, "task": task, "quality": quality}
            convert["out"] = str(folder / "out")
            job = {"convert": convert, "runs": str(folder / "runs"), "steps": args.steps, "threads": args.threads}
            measured = {}
            for stage in ("convert", "train"):
                command = [sys.executable, "-m", "benchmarks.convert", "--measure", json.dumps(job | {"stage": stage})]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
                if done.returncode:
                    raise BadInput(f"{name}: the process of stage {stage} ended with code {done.returncode}, see above")
                measured[stage] = json.loads(done.stdout.strip().splitlines()[-1])
            written = sum(file.stat().st_size for file in (folder / "out").rglob("*") if file.is_file())
        seconds, peaks = measured["convert"]["seconds"], [m["peak"] / 1e6 for m in measured.values()]
        speed, copy = size / seconds / 1e6, size / copying / 1e6
        print(
            f"| {task} {quality} ({format}) | {size / 1e9:.2f} | {written / 1e9:.2f} | {seconds:.1f} s | {speed:.0f} | "
            f"{copying:.1f} s "
            f"| {copy:.0f} | {speed / copy:.2f} | {peaks[0]:.0f} MB | {peaks[1]:.0f} MB |",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(json.loads(sys.argv[2]))
    else:
        import tyro

        from support.flags import program

        run_script(main, tyro.cli(Args, prog=program()))
