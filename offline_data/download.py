"""Downloads the published datasets (OG-MARL's vaults) and converts them.

    python -m offline_data download --env mamujoco --task hopper --quality medium-replay

The authors' own copies are on another server. Get them with a browser, then use `python -m offline_data convert`:

    MaMuJoCo    https://cloud.tsinghua.edu.cn/d/dcf588d659214a28a777
    SMACv1      https://cloud.tsinghua.edu.cn/d/f3c509d7a9d54ccd89c4

To get their SMACv2 data, contact the authors.
"""

import http.client
import shutil
import stat
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from environments import stops
from environments.checks import BadInput
from offline_data.card import DATA_ROOT, check_free, dataset_path
from offline_data.convert import convert
from offline_data.durable import disk_errors, replace
from offline_data.lock import locked
from offline_data.published import REPLAYS, downloadable, published

BASE_URL = "https://huggingface.co/datasets/InstaDeepAI/og-marl/resolve/main"
TRIES, WAIT = 5, 2  # attempts at one download, seconds between them
BUSY = (429, 500, 502, 503, 504)  # answers of a server that may have time again soon
# OG-MARL's names of the benchmark's MuJoCo tasks.
VAULTS = {"hopper": "3hopper", "ant": "2ant", "halfcheetah": "6halfcheetah"}


def uid(quality: str) -> str:
    """OG-MARL's name of a quality: medium-replay -> Medium-Replay."""
    return "-".join(word.capitalize() for word in quality.split("-"))


def vault_url(env: str, task: str, quality: str, base_url: str = BASE_URL) -> str:
    """The web address of OG-MARL's copy of a published dataset.

    Raises BadInput for a dataset that nobody published. The message says how to make it.
    """
    if (env, quality) == ("mamujoco", "replay") and task in REPLAYS:
        return f"{base_url.rstrip('/')}/core/gymnasium_mamujoco/{REPLAYS[task]}.zip"
    qualities = [q for (e, t, q), parts in published().items() if (e, t) == (env, task) and parts[2]]
    qualities += ["replay"] if env == "mamujoco" and task in REPLAYS else []
    if not qualities:
        tasks = sorted({f"{e} {t}" for e, t, _ in downloadable()})
        how = (
            f"make it with `python -m offline_data collect --env {env} --task {task}`"
            if env in ("smacv2", "smax", "mamujoco")
            else "there is no public copy"
        )
        raise BadInput(f"nobody published data of {env} {task}: {how}; published are {', '.join(tasks)}")
    if quality not in qualities:
        how = (
            "; the paper's own were not published, make them with `python -m offline_data collect --env smacv2 --task "
            f"{task}`"
            if env == "smacv2"
            else ""
        )
        raise BadInput(f"{env} {task} was published as {', '.join(qualities)}, not as '{quality}'{how}")
    folder = {"mamujoco": "prior_work/omiga/mamujoco", "smacv1": "prior_work/omiga/smac_v1", "smacv2": "core/smac_v2"}[
        env
    ]
    return f"{base_url.rstrip('/')}/{folder}/{VAULTS.get(task, task)}.zip"


def room(folder: Path, wanted: int):
    """Raises BadInput if the disk has less than `wanted` bytes left."""
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise BadInput(
            f"no space in {folder}: {wanted / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; make room and run "
            "the command again"
        )


def fetch(url: str, path: Path):
    """Downloads a zip to `path`. Until all its bytes are there and checked it is called PATH.partial.

    A broken transfer continues where it stopped, in this call or in the next. Raises BadInput if it fails.
    """
    partial = path.with_name(path.name + ".partial")
    if not url.startswith(("http://", "https://")):
        raise BadInput(f"{url} is not an http address: check --base-url")
    total, why = None, ""
    for attempt in range(TRIES):
        time.sleep(WAIT if attempt else 0)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            have = partial.stat().st_size if partial.exists() else 0
            request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
            with urllib.request.urlopen(request, timeout=60) as response:
                if response.status != 206 or not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                    have = 0  # the server sends the whole file
                length = response.headers.get("Content-Length")
                total = have + int(length) if length and length.isdigit() else None
                room(path.parent, (total or 0) - have)
                bar = tqdm(desc=path.name, initial=have, total=total, unit="B", unit_scale=True, mininterval=1)
                with open(partial, "ab" if have else "wb") as file, bar:
                    while data := response.read(2**20):
                        stops.leave()
                        file.write(data)
                        bar.update(len(data))
        except urllib.error.HTTPError as error:
            if error.code in BUSY:
                why, total = f" (the server answered {error.code})", -1
            elif error.code != 416:
                raise BadInput(f"{url}: the server answered {error.code} {error.reason}") from None
            else:  # the server has nothing left to send: PATH.partial is complete, or belongs to another file
                total = have if error.headers.get("Content-Range") == f"bytes */{have}" else -1
                if total < 0:
                    partial.unlink()
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            why, total = f" ({getattr(error, 'reason', error)})", total or -1
        except ValueError as error:
            raise BadInput(f"{url} is not an http address ({error}): check --base-url") from None
        except OSError as error:
            with disk_errors(partial):
                raise error
        size = partial.stat().st_size if partial.exists() else 0
        if total is None or size == total:
            break
    else:
        if not size and why:
            raise BadInput(f"{url} can't be reached{why}: check the network and run the command again")
        of = f"{total:,}" if total and total > 0 else "?"
        raise BadInput(
            f"{url} broke off{why}: {size:,} of {of} bytes are here; run the command again to go on from there"
        )
    try:
        with zipfile.ZipFile(partial) as archive:
            broken = archive.testzip()
            if broken:
                raise zipfile.BadZipFile(f"{broken} is damaged")
    except Exception as error:  # zipfile and zlib raise many types for a damaged archive
        start = partial.read_bytes()[:20] if size < 2**20 else b""
        partial.unlink()
        what = f"{error}, it starts with {start!r}" if start else error
        raise BadInput(
            f"{url} did not give a sound zip ({what}): what came was deleted, run the command again"
        ) from None
    replace(partial, path)


def extract(archive_path: Path, name: str, folder: Path) -> Path:
    """Unpacks the vault called `name` from a zip into `folder` and returns the vault's path. Raises BadInput.

    Nothing is written outside of `folder`: a zip with absolute paths, "..", links or special files is refused. So is a
    zip that would unpack to more than 100 times its size.
    """
    with zipfile.ZipFile(archive_path) as archive:
        members = archive.infolist()
        for member in members:
            path = PurePosixPath(member.filename)
            kind = stat.S_IFMT(member.external_attr >> 16)
            if (
                path.is_absolute()
                or ".." in path.parts
                or set(":\\") & set(member.filename)
                or not member.filename.isprintable()
                or kind not in (0, stat.S_IFREG, stat.S_IFDIR)
            ):
                raise BadInput(
                    f"{archive_path} has an unsafe member {member.filename!r}: it is not a dataset, delete it"
                )
        if len({member.filename for member in members}) < len(members):
            raise BadInput(f"{archive_path} has two members of one name: it is not a dataset, delete it")
        size = sum(member.file_size for member in members)
        if size > max(100 * archive_path.stat().st_size, 2**20):
            raise BadInput(f"{archive_path} would unpack to {size:,} bytes: it is not a dataset, delete it")
        roots = {
            PurePosixPath(m.filename).parent
            for m in members
            if PurePosixPath(m.filename).name == "metadata.json" and "__MACOSX" not in m.filename
        }
        chosen = [root for root in roots if root.name == name]
        if len(chosen) != 1:
            raise BadInput(
                f"{archive_path} has no vault '{name}': it has "
                f"{', '.join(sorted(root.name for root in roots)) or 'none'}"
            )
        wanted = [
            member
            for member in members
            if PurePosixPath(member.filename).is_relative_to(chosen[0]) and not member.is_dir()
        ]
        there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
        if folder.is_symlink() or not there <= {member.filename for member in wanted}:
            raise BadInput(f"{folder} is in the way and is left alone: move it away")
        shutil.rmtree(folder, ignore_errors=True)  # a killed download left it
        folder.mkdir(parents=True)
        try:
            room(folder, sum(member.file_size for member in wanted))
            for member in wanted:
                target = folder / member.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, open(target, "xb") as file:
                    shutil.copyfileobj(source, file, 2**20)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return folder / chosen[0]


def download(
    env: str,
    task: str,
    quality: str,
    out: str | None = None,
    base_url: str = BASE_URL,
    downloads: str = str(DATA_ROOT / "downloads"),
    return_to_go: bool = False,
    overwrite: bool = False,
) -> Path:
    """Download a published dataset (OG-MARL's vaults), check it and convert it into the native format.

    The zip holds all qualities of a task. It stays in --downloads, for the next quality. Delete it when you have all.

    Args:
        env: mamujoco, smacv1 or smacv2
        task: hopper, ant, halfcheetah (replay: ant_4x2, halfcheetah_2x3, walker2d_2x3 too); 2c_vs_64zg, 5m_vs_6m,
            6h_vs_8z, corridor; terran_5_vs_5, terran_10_vs_10, zerg_5_vs_5
        quality: expert, medium, medium-replay, medium-expert; good, medium, poor; replay, random. mamujoco's replay was
            recorded in the simulator used here, with interface agent_obsk=1; nobody published its statistics
        out: directory to write, instead of data/ENV/TASK/QUALITY
        base_url: web address of the zips
        downloads: directory of the zips
        return_to_go: replace the reward by the return-to-go, as the released code does in SMAC
        overwrite: replace a dataset that is already there
    """
    url = vault_url(env, task, quality, base_url)
    path = dataset_path(out, env, task, quality, str(DATA_ROOT))
    check_free(path, overwrite)
    from offline_data.formats import need  # here, so that torch is not loaded for --help

    need("tensorstore")  # before hours of download
    replay = (env, quality) == ("mamujoco", "replay")
    archive = Path(downloads, "gymnasium_mamujoco" if replay else env, url.rsplit("/", 1)[1])
    if not archive.exists():
        with locked(archive, beside=True):
            fetch(url, archive)
    unpacked = path.with_name(path.name + ".vault.partial")
    with locked(path, beside=True):
        try:
            with disk_errors(unpacked):
                vault = extract(archive, uid(quality), unpacked)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            raise BadInput(f"{archive} is damaged ({error}): delete it and run the command again") from error
        try:
            last_row = "observation" if env == "mamujoco" else "transition"  # see formats.py
            last_row = "auto" if replay else last_row
            return convert(
                str(vault),
                "vault",
                env,
                task,
                quality,
                str(path),
                interface="agent_obsk=1" if replay else None,
                last_row=last_row,
                return_to_go=return_to_go,
                overwrite=overwrite,
            )
        finally:
            shutil.rmtree(unpacked, ignore_errors=True)
