"""The dataset format: what is written is read, and what is damaged is refused and left alone."""

import errno
import hashlib
import json
import math
import multiprocessing
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, files_hash, hopper_card
from tensordict import TensorDict

import offline_data.dataset
import offline_data.writer
from environments.checks import BadInput
from offline_data.card import check_card, dataset_path, table_row
from offline_data.dataset import episodes, last_rows, open_dataset
from offline_data.durable import write_text
from offline_data.published import info
from offline_data.replay import as_transition, initial_rows, make_replay, minibatches
from offline_data.writer import DatasetWriter

FIELDS = ["state", "agents/observation", "agents/action", "reward", "terminated", "done", "is_init", "episode"]


@pytest.fixture(params=["hopper", "game"])
def recorded(request, hopper_data, hopper_episodes, discrete_data, discrete_episodes):
    """(directory, the episodes that were written) for continuous and for discrete actions."""
    return (hopper_data, hopper_episodes) if request.param == "hopper" else (discrete_data, discrete_episodes)


@pytest.fixture
def copy(hopper_data, tmp_path):
    return shutil.copytree(hopper_data, tmp_path / "copy")


@pytest.fixture
def game(discrete_data, tmp_path):
    return shutil.copytree(discrete_data, tmp_path / "game")


def key(name: str):
    return tuple(name.split("/"))


# ---------------------------------------------------------------- round trips


def test_round_trip_of_every_array(recorded):
    path, written = recorded
    rows, card = open_dataset(path)
    assert len(rows) == sum(len(e) for e in written) == card["samples"] + card["trajectories"]
    wanted = torch.cat(written)
    last = last_rows(rows)
    assert last.nonzero()[:, 0].tolist() == (np.cumsum([len(e) for e in written]) - 1).tolist()
    # The last row of an episode keeps what is seen there; its action, reward and flags count for nothing and are zero.
    for name in [n for n in FIELDS if n not in ("is_init", "episode")] + ["agents/action_mask"] * card["discrete"]:
        value = rows[key(name)]
        assert value.dtype == wanted[key(name)].dtype
        seen = name in ("state", "agents/observation", "agents/action_mask")
        ours, theirs = (value, wanted[key(name)]) if seen else (value[~last], wanted[key(name)][~last])
        assert torch.equal(ours, theirs), name
        assert seen or not value[last].any(), name
    assert ("action_mask" in rows["agents"].keys()) == card["discrete"]
    assert rows["is_init"][:, 0].nonzero()[:, 0].tolist() == [0, *(last.nonzero()[:-1, 0] + 1).tolist()]
    assert rows["episode"][:, 0].tolist() == [i for i, e in enumerate(written) for _ in range(len(e))]


def test_card_statistics(recorded):
    path, written = recorded
    _, card = open_dataset(path)
    returns = np.array([e["reward"][:-1].double().sum().item() for e in written])
    actions = torch.cat([e["agents", "action"][:-1] for e in written])
    assert card["trajectories"] == len(written) and card["samples"] == sum(len(e) - 1 for e in written)
    wanted = {"mean": returns.mean(), "std": returns.std(), "min": returns.min(), "max": returns.max()}
    for name, value in wanted.items():
        assert card[f"return_{name}"] == pytest.approx(value, rel=1e-5), name
    assert (card["action_low"], card["action_high"]) == (actions.min().item(), actions.max().item())
    sizes = [card[k] for k in ("n_agents", "obs_dim", "state_dim", "action_dim", "discrete")]
    assert sizes == ([2, 3, 5, 4, True] if card["discrete"] else [3, 14, 42, 1, False])


def test_terminated_and_done_are_kept_apart(hopper_data, hopper_episodes):
    rows, _ = open_dataset(hopper_data)
    falls, limits = rows["terminated"].sum().item(), (rows["done"] & ~rows["terminated"]).sum().item()
    assert falls == sum(e["terminated"][-2].item() for e in hopper_episodes) > 0
    assert limits == len(hopper_episodes) - falls > 0


def test_episodes_round_trip(recorded, tmp_path):
    """Writing what episodes() yields gives the same files again."""
    path, written = recorded
    rows, card = open_dataset(path)
    assert [len(e) for e in episodes(rows)] == [len(e) for e in written]
    writer = DatasetWriter(tmp_path / "again")
    for episode in episodes(rows):
        writer.append(episode)
    assert files_hash(writer.close(card)) == files_hash(path)
    assert not (tmp_path / "again.partial").exists()


def test_tensordict_reads_the_same_arrays(recorded, tmp_path):
    path, _ = recorded
    before = files_hash(path)
    rows, _ = open_dataset(path)
    loaded = TensorDict.load_memmap(str(shutil.copytree(path, tmp_path / "copy")))
    assert loaded.batch_size == rows.batch_size and set(loaded.keys(True, True)) == set(rows.keys(True, True))
    for name in rows.keys(True, True):
        assert loaded[name].dtype == rows[name].dtype and torch.equal(loaded[name], rows[name]), name
    assert files_hash(path) == before == files_hash(tmp_path / "copy")


def test_nothing_done_to_the_rows_reaches_the_files(copy):
    before = files_hash(copy)
    rows, _ = open_dataset(copy)
    for name in FIELDS:
        rows[key(name)].fill_(1)
    assert rows["state"].eq(1).all()
    with pytest.raises(RuntimeError):
        rows["state"] = torch.zeros_like(rows["state"])
    batch = make_replay(rows).sample(8)
    batch["state"].zero_()
    del rows, batch
    assert files_hash(copy) == before
    assert open_dataset(copy)[0]["state"].ne(1).any()


def test_read_only_files_can_be_opened(copy):
    """Datasets may lie on a volume that nobody can write to (root can, so this says little where tests run as root)."""
    for file in [*copy.rglob("*"), copy]:
        file.chmod(0o555 if file.is_dir() else 0o444)
    try:
        assert open_dataset(copy)[1]["task"] == "hopper"
    finally:
        for file in [copy, *copy.rglob("*")]:
            file.chmod(0o755)


def test_writer_refuses_an_episode_that_does_not_end(hopper_episodes, tmp_path):
    writer = DatasetWriter(tmp_path / "data")
    for step in (-2, 0):
        episode = hopper_episodes[0].clone()
        episode["done"][step] = not episode["done"][step]
        with pytest.raises(ValueError, match="must be done"):
            writer.append(episode)


def test_writer_leaves_no_dataset_before_close_and_replaces_one_after(copy, hopper_episodes):
    before = files_hash(copy)
    writer = DatasetWriter(copy, overwrite=True)
    writer.append(hopper_episodes[0])
    assert files_hash(copy) == before
    writer.close(hopper_card())
    assert open_dataset(copy)[1]["trajectories"] == 1
    assert [p.name for p in copy.parent.iterdir()] == ["copy"]


@pytest.mark.parametrize("when", ["before", "meanwhile"])
@pytest.mark.parametrize("what", ["a dataset", "a folder", "a file", "a dead link"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_writer_replaces_nothing_unless_it_is_a_dataset_and_told_to(
    when, what, overwrite, hopper_data, hopper_episodes, tmp_path
):
    path = tmp_path / "there"

    def put():
        if what == "a dataset":
            shutil.copytree(hopper_data, path)
        elif what == "a folder":
            path.mkdir()
            (path / "thesis.tex").write_text("precious")
        elif what == "a file":
            path.write_text("precious")
        else:
            path.symlink_to(tmp_path / "nowhere")

    def write():
        writer = DatasetWriter(path, overwrite)
        writer.append(hopper_episodes[0])
        if when == "meanwhile":
            put()
        writer.close(hopper_card())

    if when == "before":
        put()
    if overwrite and what == "a dataset":
        write()
        assert open_dataset(path)[1]["trajectories"] == 1
    else:
        before = files_hash(tmp_path) if when == "before" else None
        with pytest.raises(BadInput, match="is no dataset and is left alone" if overwrite else "is already there"):
            write()
        assert before is None or files_hash(tmp_path) == before
        assert (
            path.is_symlink() or path.is_file() or sorted(p.name for p in path.iterdir())[0] in ("agents", "thesis.tex")
        )
        assert what != "a dataset" or open_dataset(path)[1]["trajectories"] == 12


def test_writer_leaves_folders_alone_that_only_look_like_its_own(hopper_data, hopper_episodes, tmp_path):
    for name, match in (("set.partial", "is in the way of a dataset"), ("set.replaced", "is no dataset")):
        shutil.copytree(hopper_data, tmp_path / "set")
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("precious")
        before = files_hash(tmp_path)
        with pytest.raises(BadInput, match=match):
            writer = DatasetWriter(tmp_path / "set", overwrite=True)
            writer.append(hopper_episodes[0])
            writer.close(hopper_card())
        assert {key: files_hash(tmp_path)[key] for key in before} == before
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()


def test_writer_clears_what_a_killed_one_left(hopper_episodes, tmp_path):
    DatasetWriter(tmp_path / "set").append(hopper_episodes[0])
    assert (tmp_path / "set.partial" / "state.raw").exists()
    writer = DatasetWriter(tmp_path / "set")
    writer.append(hopper_episodes[1])
    assert len(open_dataset(writer.close(hopper_card()))[0]) == len(hopper_episodes[1])
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("name", ["fsync_tree", "replace"])
def test_an_old_dataset_stays_if_the_new_one_cannot_take_its_place(name, copy, hopper_episodes, monkeypatch):
    before = files_hash(copy)
    writer = DatasetWriter(copy, overwrite=True)
    writer.append(hopper_episodes[0])

    def full(*args):
        raise OSError(errno.ENOSPC, "")

    monkeypatch.setattr(offline_data.writer, name, full)
    with pytest.raises(BadInput, match="no space left"):
        writer.close(hopper_card())
    assert files_hash(copy) == before and [p.name for p in copy.parent.iterdir()] == ["copy"]


def test_overwriting_a_link_replaces_what_it_leads_to(copy, hopper_episodes, tmp_path):
    link = tmp_path / "elsewhere" / "set"
    link.parent.mkdir()
    link.symlink_to(copy)
    for _ in range(2):
        writer = DatasetWriter(link, overwrite=True)
        writer.append(hopper_episodes[0])
        writer.close(hopper_card())
    assert link.is_symlink() and open_dataset(link)[1]["trajectories"] == 1 == open_dataset(copy)[1]["trajectories"]
    assert [p.name for p in link.parent.iterdir()] == ["set"]
    assert sorted(p.name for p in copy.parent.iterdir()) == ["copy", "elsewhere"]


def test_returns_on_the_card_are_summed_in_float64(hopper_episodes, tmp_path):
    """Large returns that differ by less than a float32 sum can tell: what is written can be opened again."""
    writer = DatasetWriter(tmp_path / "set")
    for more in (0.0, 0.05):
        episode = hopper_episodes[0].clone()
        episode["reward"].fill_(1e5 + more)
        writer.append(episode)
    assert open_dataset(writer.close(hopper_card()))[1]["trajectories"] == 2


def test_a_file_that_cannot_be_mapped_is_one_line(copy, monkeypatch):
    def denied(*args, **kwargs):
        raise RuntimeError("unable to open file: Permission denied (13)")

    monkeypatch.setattr(torch, "from_file", denied)
    with pytest.raises(BadInput, match=r"state.memmap can't be read \(.*Permission denied"):
        open_dataset(copy)


def test_writer_does_not_change_the_episodes(hopper_episodes, tmp_path):
    before = hopper_episodes[0].clone()
    DatasetWriter(tmp_path / "data").append(hopper_episodes[0])
    assert set(before.keys(True, True)) == set(hopper_episodes[0].keys(True, True))
    assert all(torch.equal(before[k], hopper_episodes[0][k]) for k in before.keys(True, True))


def test_unwritable_place(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"can't write .*data: Not a directory"):
        DatasetWriter(tmp_path / "file" / "data")


def write_often(path, text):
    for _ in range(50):
        write_text(path, text, shared=True)


def test_processes_may_write_one_shared_file(tmp_path):
    """The last one wins, no one fails, and nothing else is left."""
    path, texts = tmp_path / "plan.json", [f"{i}" * 1000 for i in range(4)]
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_often, args=(path, text)) for text in texts]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert path.read_text() in texts and [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_dataset_path():
    assert str(dataset_path(None, "mamujoco", "ant", "expert", "root")) == "root/mamujoco/ant/expert"
    assert str(dataset_path("there", "mamujoco", "ant", "expert", "root")) == "there"


# ---------------------------------------------------------------- replay


def test_samples_are_transitions_and_never_last_rows(recorded):
    path, _ = recorded
    rows, card = open_dataset(path)
    # The row's number travels along in a key of its own.
    rows = rows.clone(recurse=False).unlock_()
    rows["number"] = torch.arange(len(rows))
    replay = make_replay(rows, generators=[torch.Generator().manual_seed(0)])
    last = last_rows(rows)
    for _ in range(5):
        batch = replay.sample(4096)
        number = batch["number"]
        assert batch.batch_size == (4096,) and not last[number].any()
        for name in (
            "state", ("agents", "observation"), ("agents", "action"), "reward", "terminated", "done", "is_init",
            "episode",
        ):  # fmt: skip
            assert torch.equal(batch[name], rows[name][number]), name
        assert torch.equal(batch["next", "state"], rows["state"][number + 1])
        assert torch.equal(batch["next", "agents", "observation"], rows["agents", "observation"][number + 1])
        assert (rows["episode"][number + 1] == batch["episode"]).all()
        if card["discrete"]:
            assert torch.equal(batch["next", "agents", "action_mask"], rows["agents", "action_mask"][number + 1])
    assert batch["done"].any()


def test_sampling_is_uniform_over_transitions(discrete_data):
    """Chi-square of 34,000 draws over 17 transitions.

    Its mean is 16 and its standard deviation 5.7. 45 is beyond the 99.98th percentile.
    """
    rows, card = open_dataset(discrete_data)
    rows = rows.clone(recurse=False).unlock_()
    rows["number"] = torch.arange(len(rows))
    replay = make_replay(rows, generators=[torch.Generator().manual_seed(0)])
    counts = torch.zeros(len(rows))
    for _ in range(34):
        counts += torch.bincount(replay.sample(1000)["number"], minlength=len(rows))
    counts = counts[~last_rows(rows)]
    assert len(counts) == card["samples"] == 17
    assert ((counts - 2000) ** 2 / 2000).sum() < 45


def test_a_generator_makes_sampling_repeatable(hopper_data):
    rows, _ = open_dataset(hopper_data)
    draws = [
        make_replay(rows, generators=[torch.Generator().manual_seed(seed)]).sample(64)["state"] for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_replay_draws_where_the_rows_lie(hopper_data):
    """Rows on another device ("meta" stands for a GPU) are drawn there, by index tensors that never leave it."""
    rows, _ = open_dataset(hopper_data)
    there, drawn_from = rows.to("meta"), torch.arange(100, device="meta")
    for pairs in (True, False):
        batch = make_replay(there, pairs=pairs, drawn_from=drawn_from).sample(8)
        assert {value.device.type for value in batch.values(True, True)} == {"meta"} and batch.batch_size == (8,)


def test_layout_of_a_transition(recorded):
    path, _ = recorded
    rows, card = open_dataset(path)
    batch = as_transition(rows[torch.tensor([[0, 1], [3, 4]])])
    mask = {("agents", "action_mask")} if card["discrete"] else set()
    seen = {"state", ("agents", "observation")} | mask
    here = {key(n) if "/" in n else n for n in FIELDS} | mask
    assert set(batch.keys(True, True)) == here | {("next", *((k,) if isinstance(k, str) else k)) for k in seen}
    assert batch.batch_size == (2,) and batch["next"].batch_size == (2,)
    assert torch.equal(batch["state"], rows["state"][[0, 3]])
    assert torch.equal(batch["next", "state"], rows["state"][[1, 4]])


def test_initial_rows(recorded):
    path, written = recorded
    rows = open_dataset(path)[0]
    first = rows[initial_rows(rows)]
    assert len(first) == len(written)
    assert torch.equal(first["state"], torch.stack([e["state"][0] for e in written]))
    assert torch.equal(first["agents", "observation"], torch.stack([e["agents", "observation"][0] for e in written]))


# ---------------------------------------------------------------- damage


def refused(path, match: str, **kwargs):
    """open_dataset raises BadInput with one line that says `match`, and leaves every file as it was."""
    before = files_hash(path)
    with pytest.raises(BadInput, match=match) as error:
        open_dataset(path, **kwargs)
    assert "\n" not in str(error.value) and files_hash(path) == before


def poke(path, name: str, index: int, value, dtype=np.float32):
    """Overwrites one number of an array's file in place."""
    data = np.fromfile(path / f"{name}.memmap", dtype)
    data[index] = value
    data.tofile(path / f"{name}.memmap")


def edit(file, **changes):
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | changes))


@pytest.mark.parametrize("change", ["half", "one byte less", "one byte more", "empty"])
@pytest.mark.parametrize("name", FIELDS)
def test_file_of_another_size(copy, name, change):
    file = copy / f"{name}.memmap"
    data = file.read_bytes()
    half = data[: len(data) // 2]
    others = {"half": half, "one byte less": data[:-1], "one byte more": data + b"\0", "empty": b""}
    file.write_bytes(others[change])
    refused(copy, rf"{name}.memmap has {file.stat().st_size} bytes, {len(data)} are needed")


def test_mask_of_another_size(game):
    file = game / "agents" / "action_mask.memmap"
    file.write_bytes(file.read_bytes()[:-1])
    refused(game, "action_mask.memmap has .* bytes")


@pytest.mark.parametrize("name", FIELDS)
def test_missing_array(copy, name):
    (copy / f"{name}.memmap").unlink()
    refused(copy, rf"{name}.memmap is missing")


@pytest.mark.parametrize("name", ["card.json", "meta.json", "agents/meta.json"])
def test_missing_json(copy, name):
    (copy / name).unlink()
    refused(copy, rf"{name} is missing")


@pytest.mark.parametrize("content", ["", "{", "not json", "\xff\xfe", '{"env": "mamujoco",'])
@pytest.mark.parametrize("name", ["card.json", "meta.json", "agents/meta.json"])
def test_json_that_is_not_json(copy, name, content):
    (copy / name).write_bytes(content.encode("latin-1"))
    refused(copy, rf"{name} can't be read as JSON")


@pytest.mark.parametrize("content", ["[]", "3", "null", '"text"'])
@pytest.mark.parametrize("name", ["card.json", "meta.json", "agents/meta.json"])
def test_json_of_another_type(copy, name, content):
    (copy / name).write_text(content)
    refused(copy, rf"{name} does not hold a JSON object")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["state", "agents/observation", "agents/action", "reward"])
def test_number_that_is_not_finite(copy, name, value):
    rows = open_dataset(copy)[0]
    width = rows[key(name)][0].numel()
    poke(copy, name, 5 * width + width - 1, value)
    refused(copy, f"{name} is not finite at row 5")


def test_number_that_is_not_finite_in_a_last_row(copy):
    last = int(last_rows(open_dataset(copy)[0]).nonzero()[-1])
    poke(copy, "state", last * 42, math.nan)
    refused(copy, f"state is not finite at row {last}")


@pytest.mark.parametrize("name", ["n_agents", "state_dim", "obs_dim", "action_dim", "samples", "trajectories"])
@pytest.mark.parametrize("value", [7, 0, -1, 2.0, "3", None, True, 10**30])
def test_card_with_other_sizes(copy, name, value):
    edit(copy / "card.json", **{name: value})
    refused(
        copy,
        f"'{name}' is"
        if type(value) is not int or not 1 <= value <= 2**40
        else "does not describe|episodes do not close",
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"samples": 1, "trajectories": 12},
        {"discrete": True},
        {"discrete": "no"},
        {"bytes": {}},
        {"bytes": None},
        {"bytes": []},
    ],
)
def test_card_with_another_layout(copy, changes):
    edit(copy / "card.json", **changes)
    refused(copy, "card.json|meta.json")


def test_card_with_other_byte_counts(copy):
    card = json.loads((copy / "card.json").read_text())
    edit(copy / "card.json", bytes=card["bytes"] | {"reward": 4})
    refused(copy, r"reward.memmap has .*the card says 4")


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("change", ["dtype", "shape", "missing", "not an object"])
def test_meta_that_describes_something_else(copy, name, change):
    file = copy / ("agents/meta.json" if "/" in name else "meta.json")
    leaf = name.split("/")[-1]
    meta = json.loads(file.read_text())
    shape = meta[leaf]["shape"]
    if change == "missing":
        del meta[leaf]
    else:
        other = {
            "dtype": {"dtype": "torch.float64"},
            "shape": {"shape": [2 * shape[0], *shape[1:]]},
            "not an object": 3,
        }[change]
        meta[leaf] = other if change == "not an object" else meta[leaf] | other
    file.write_text(json.dumps(meta))
    refused(copy, rf"meta.json does not describe {name} as")


def test_meta_of_a_type_that_would_be_unpickled(copy):
    """A meta.json that sends TensorDict's loader to a pickle: ours never follows it."""
    edit(copy / "meta.json", _type="<class 'tensordict._pytree.Unknown'>")
    (copy / "other.pickle").write_bytes(b"cos\nsystem\n(S'touch " + str(copy / "pwned").encode() + b"'\ntR.")
    try:
        open_dataset(copy)
    except BadInput:
        pass
    assert not (copy / "pwned").exists()


@pytest.mark.parametrize("value", [None, 3, ["hopper"]])
@pytest.mark.parametrize("name", ["env", "task", "quality"])
def test_card_without_names(copy, name, value):
    """Run directories are called after them."""
    edit(copy / "card.json", **{name: value})
    refused(copy, f"card.json.*'{name}'")


@pytest.mark.parametrize("value", [3, "agent_obsk=", "agent_obsk=x", "other", None])
def test_card_with_an_interface_that_does_not_exist(copy, value):
    edit(copy / "card.json", interface=value)
    refused(copy, "card.json.*'interface'")


@pytest.mark.parametrize("name", ["return_mean", "return_std"])
@pytest.mark.parametrize("value", [100.0, None, "5", math.nan, True])
def test_card_with_other_statistics(copy, name, value):
    edit(copy / "card.json", **{name: value})
    refused(copy, f"the card says {name}")


def test_rewards_that_are_not_those_of_the_card(copy):
    poke(copy, "reward", 3, 50.0)
    refused(copy, "the rewards give")


def test_done_flag_flipped(copy):
    rows = open_dataset(copy)[0]
    end = int(rows["done"][:, 0].nonzero()[2])
    poke(copy, "done", end, 0, np.uint8)
    poke(copy, "terminated", end, 0, np.uint8)
    refused(copy, "the episodes do not close")


def test_done_too_early(copy):
    poke(copy, "done", 4, 1, np.uint8)
    refused(copy, "the episodes do not close")


@pytest.mark.parametrize("episode", [0, -1])
def test_done_in_a_last_row(copy, episode):
    poke(copy, "done", int(last_rows(open_dataset(copy)[0]).nonzero()[episode]), 1, np.uint8)
    refused(copy, "the episodes do not close")


def test_terminated_without_done(copy):
    poke(copy, "terminated", 4, 1, np.uint8)
    refused(copy, "terminated but not done")


@pytest.mark.parametrize("row", [0, 4, "second episode"])
def test_is_init_flipped(copy, row):
    init = open_dataset(copy)[0]["is_init"][:, 0]
    row = int(init.nonzero()[1]) if row == "second episode" else row
    poke(copy, "is_init", row, not init[row], np.uint8)
    refused(copy, "the episodes do not close")


@pytest.mark.parametrize("value", [99, -1, 2**62])
def test_episode_number_changed(copy, value):
    poke(copy, "episode", 4, value, np.int64)
    refused(copy, "the episode numbers do not count the episodes")


@pytest.mark.parametrize("value", [2, 255])
@pytest.mark.parametrize("name", ["terminated", "done", "is_init"])
def test_bool_that_is_no_bool(copy, name, value):
    poke(copy, name, 3, value, np.uint8)
    refused(copy, f"{name} has a byte that is neither 0 nor 1")


def test_mask_that_is_no_bool(game):
    poke(game, "agents/action_mask", 3, 2, np.uint8)
    refused(game, "action_mask has a byte that is neither 0 nor 1")


@pytest.mark.parametrize("value", [1000.0, -1000.0])
def test_action_out_of_the_cards_bounds(copy, value):
    poke(copy, "agents/action", 6, value)
    refused(copy, r"actions from .* leave the card's bounds")


@pytest.mark.parametrize("value", [0.0, None, "high", [1.0], math.nan])
def test_card_with_other_action_bounds(copy, value):
    edit(copy / "card.json", action_high=value)
    refused(copy, "bounds|action_high")


@pytest.mark.parametrize("value", [4, -1, 2**40])
def test_discrete_action_that_does_not_exist(game, value):
    edit(game / "card.json", action_low=-(2**41), action_high=2**41)
    poke(game, "agents/action", 6, value, np.int64)
    refused(game, "an action is outside of 0 to 3")


@pytest.mark.parametrize("value", [4, -1, 2**40])
def test_discrete_action_in_a_last_row_that_does_not_exist(game, value):
    """Never sampled, but read when masks are checked."""
    last = int(last_rows(open_dataset(game)[0]).nonzero()[0])
    poke(game, "agents/action", 2 * last, value, np.int64)
    before = files_hash(game)
    try:
        open_dataset(game)
    except BadInput:
        pass
    assert files_hash(game) == before


def test_masked_action_chosen(game):
    rows = open_dataset(game)[0]
    transition = int((~last_rows(rows)).nonzero()[4])
    chosen = rows["agents", "action"][transition, 1]
    poke(game, "agents/action_mask", transition * 8 + 4 + int(chosen), 0, np.uint8)
    refused(game, f"the action at row {transition} is one that its mask forbids")


def test_dataset_in_the_repository():
    path = ROOT / "data" / "mamujoco" / "hopper" / "demo"
    if not path.is_dir():
        pytest.skip("the demo dataset is not here")
    _, card = open_dataset(path, "mamujoco", "hopper")
    assert card["quality"] == "demo"
    assert (card["n_agents"], card["obs_dim"], card["state_dim"], card["action_dim"]) == (3, 14, 42, 1)
    assert card["made"]["arguments"] and card["engine"]


def test_dataset_of_another_task(copy):
    refused(copy, "is a dataset of task 'hopper', not 'ant'", env="mamujoco", task="ant")
    refused(copy, "is a dataset of env 'mamujoco', not 'smacv2'", env="smacv2", task="hopper")
    open_dataset(copy, "mamujoco", "hopper")


def test_no_dataset(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "nothing", tmp_path / "file"):
        with pytest.raises(BadInput, match="no dataset at"):
            open_dataset(path)
    refused(tmp_path, "card.json is missing")


def test_fuzz(game, hopper_data, tmp_path):
    """Whatever happens to a file, open_dataset returns or raises BadInput with one line, and changes nothing."""
    rng = random.Random(0)
    outcomes = {"opened": 0, "refused": 0}
    for path in (game, shutil.copytree(hopper_data, tmp_path / "hopper")):
        without_checksums(path)  # an older dataset: the other checks are on their own
        files = [p for p in sorted(path.rglob("*")) if p.is_file()]
        for _ in range(100):
            file = rng.choice(files)
            original = file.read_bytes()
            data = bytearray(original)
            kind = rng.random()
            if kind < 0.25:
                data = data[: rng.randrange(len(data))]
            elif kind < 0.35:
                data += rng.randbytes(rng.randrange(1, 9))
            else:
                for _ in range(rng.choice((1, 1, 4))):
                    data[rng.randrange(len(data))] = rng.randrange(256)
            file.write_bytes(data)
            before = files_hash(path)
            try:
                open_dataset(path)
                outcomes["opened"] += 1
            except BadInput as error:
                assert "\n" not in str(error)
                outcomes["refused"] += 1
            assert files_hash(path) == before
            file.write_bytes(original)
    assert outcomes["refused"] > 100 and outcomes["opened"] > 5, outcomes


# ---------------------------------------------------------------- hostile cards


def hostile_cards(card: dict):
    """Cards that somebody could send: (field, the card)."""
    names = [
        "", ".", "..", "../../../etc", "/tmp/x", "a/b", "a\\b", "C:", "~", "a b", "hopper\n", "\x1b[31mred", "a\0b",
        "é", "\u202ehopper", "٣", "x" * 65, "x" * 100_000, "$(id)", "%s", "{0}", 3, None, True, ["hopper"],
        {"env": "hopper"}, 10**30,
    ]  # fmt: skip
    for field in ("env", "task", "quality"):
        yield from ((field, card | {field: name}) for name in names)
    interfaces = [
        "agent_obsk=99999999999", "agent_obsk=100", "agent_obsk=-1", "agent_obsk=٣", "agent_obsk=1\n",
        "agent_obsk=1.5", "standard/..", "", 1, [],
    ]  # fmt: skip
    yield from (("interface", card | {"interface": interface}) for interface in interfaces)
    counts = [0, -1, 2**41, 10**4000, 1.5, math.nan, math.inf, "12", None, True, [], {}]
    for field in ("n_agents", "state_dim", "obs_dim", "action_dim", "trajectories", "samples"):
        yield from ((field, card | {field: count}) for count in counts)
    numbers = [math.nan, math.inf, -math.inf, 1e39, 10**400, -(10**4000), "0", None, True, [0.0], {}]
    for field in ("action_low", "action_high", "return_mean", "return_std", "return_min", "return_max"):
        yield from ((field, card | {field: number}) for number in numbers)
    yield from (("discrete", card | {"discrete": value}) for value in (None, 1, "true", []))
    sizes = card["bytes"]
    others = [
        None,
        [],
        {},
        3,
        "bytes",
        sizes | {"../../etc/passwd": 4},
        dict.fromkeys(sizes, -1),
        dict.fromkeys(sizes, 10**4000),
        dict.fromkeys(sizes, 1.0),
        dict.fromkeys(sizes, True),
        dict.fromkeys(sizes),
    ]
    yield from (("bytes", card | {"bytes": value}) for value in others)
    sums = card["sha256"]
    others = [
        None,
        [],
        3,
        "sha256",
        {"../../../etc/passwd": "0" * 64},
        {"card.json": "0"},
        {"card.json": 0},
        {"card.json": ["0" * 64]},
        {},
        {"card.json": "0" * 63 + "\n"},
        sums | {"state.memmap": "0" * 64},
        {k: v for k, v in sums.items() if k != "reward.memmap"},
    ]
    yield from (("sha256", card | {"sha256": value}) for value in others)
    yield from (("engine", card | {"engine": value}) for value in (3, [], "\x1b]0;title\x07", "a\nb", "x" * 1001, {}))
    deep = "bottom"
    for _ in range(50):
        deep = [deep]
    for value in (
        "\x1b[2J",
        {"by": "a\nb"},
        {"by\x07": "a"},
        {"x": 10**400},
        {"x": math.nan},
        {"x": [[math.inf]]},
        deep,
        {"a": {"b": deep}},
    ):
        yield "made", card | {"made": value}


def test_hostile_cards_are_refused_in_one_line(hopper_data, tmp_path):
    """Each field in turn; the rest of the card, and every other file, is as it was."""
    folder = shutil.copytree(hopper_data, tmp_path / "out" / "set")
    card, tried = json.loads((folder / "card.json").read_text()), 0
    sys.set_int_max_str_digits(0)
    texts = [(field, json.dumps(other)) for field, other in hostile_cards(card)]
    sys.set_int_max_str_digits(4300)
    texts += [
        ("card.json", text)
        for text in ("[" * 100_000, '{"env":' * 50_000, '{"a": "' + "x" * 2**20 + '"}', '{"env": "\\ud800"}')
    ]
    for field, text in texts:
        (folder / "card.json").write_text(text)
        with pytest.raises(BadInput) as caught:
            open_dataset(folder)
        said = str(caught.value)
        assert "card.json" in said or "differs from the card's checksum" in said, (field, said)
        assert said.isprintable() and len(said) < 600 + len(str(tmp_path)), said
        tried += 1
    print(tried, "hostile cards")
    assert tried > 250 and sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["set"]


def test_the_generator_of_hostile_cards_starts_from_a_sound_one(hopper_data):
    card = json.loads((hopper_data / "card.json").read_text())
    check_card(hopper_data, card)
    assert all(repr(other) != repr(card) for _, other in hostile_cards(card))


@pytest.mark.parametrize(
    "names",
    [
        ("..", "hopper", "x"),
        ("mamujoco", "../hopper", "x"),
        ("mamujoco", "hopper", "/tmp/x"),
        ("mamujoco", "hopper", ""),
    ],
)
def test_names_that_are_paths_make_no_path(names):
    with pytest.raises(BadInput, match="not a name of letters"):
        dataset_path(None, *names)


@pytest.mark.parametrize("data", ["", "a\0b"])
def test_data_that_names_no_folder(data):
    with pytest.raises(BadInput, match="names no folder"):
        dataset_path(data, None, None, None)


# ---------------------------------------------------------------- checksums


def without_checksums(path):
    """What an older version wrote."""
    card = json.loads((path / "card.json").read_text())
    del card["sha256"]
    (path / "card.json").write_text(json.dumps(card, indent=2) + "\n")


def test_the_card_has_a_checksum_of_every_file(recorded):
    path, _ = recorded
    sums, files = json.loads((path / "card.json").read_text())["sha256"], files_hash(path)
    assert sums.keys() == files.keys() and len(files) >= 11
    assert {k: v for k, v in sums.items() if k != "card.json"} == {k: v for k, v in files.items() if k != "card.json"}
    text = (path / "card.json").read_text().replace(sums["card.json"], "0" * 64)
    assert hashlib.sha256(text.encode()).hexdigest() == sums["card.json"]


FLIPS = int(os.environ.get("FLIPS", 40))


def test_every_flipped_bit_is_found(game, tmp_path, capsys):
    """One bit is flipped anywhere in a dataset, card included. `info --verify` names the file. FLIPS=500 tries more."""
    rng = random.Random(1)
    info(str(game), verify=True)
    assert "checksums: all 12 files" in capsys.readouterr().out
    files = [p for p in sorted(game.rglob("*")) if p.is_file()]
    for i in range(FLIPS):
        file = files[i % len(files)]
        data = bytearray(file.read_bytes())
        original, place = bytes(data), rng.randrange(len(data))
        data[place] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
        with pytest.raises(BadInput, match=file.name) as caught:
            info(str(game), verify=True)
        assert "\n" not in str(caught.value), (file, place)
        file.write_bytes(original)
    info(str(game), verify=True)


def test_a_small_dataset_is_compared_when_it_is_opened_and_a_large_one_is_not(copy, monkeypatch):
    poke(copy, "state", 0, 1.25)  # finite, and nothing else of it is on the card
    refused(copy, "state.memmap differs from the card's checksum")
    monkeypatch.setattr(offline_data.dataset, "CHECKED_AT_OPENING", 1000)
    assert open_dataset(copy)[0]["state"][0, 0] == 1.25
    with pytest.raises(BadInput, match=r"state\.memmap differs"):
        info(str(copy), verify=True)


def test_a_note_in_the_card_may_be_changed_by_hand(copy):
    edit(copy / "card.json", made={"by": "somebody", "note": "the good one"})
    assert open_dataset(copy)[1]["made"]["note"] == "the good one"
    with pytest.raises(BadInput, match=r"card\.json differs"):
        info(str(copy), verify=True)


def test_a_dataset_without_checksums_opens_but_is_not_verified(copy):
    without_checksums(copy)
    assert open_dataset(copy)[1]["trajectories"] == 12
    with pytest.raises(BadInput, match="has no checksums"):
        info(str(copy), verify=True)


def test_the_datasets_in_the_repository_are_as_their_cards_say(capsys):
    for name in ("mamujoco/hopper", "smax/zerg_5_vs_5"):
        info(str(ROOT / "data" / name / "demo"), verify=True)
    assert capsys.readouterr().out.count("files are as they were written") == 2


# ---------------------------------------------------------------- command line


def command(*args) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "offline_data", *map(str, args)], capture_output=True, text=True, timeout=120, cwd=ROOT
    )


def test_info_prints_the_row_of_table_3(hopper_data):
    done = command("info", hopper_data)
    card = json.loads((hopper_data / "card.json").read_text())
    assert done.returncode == 0, done.stderr
    header, _, row = done.stdout.splitlines()[:3]
    assert header == (
        "| Instance | Quality | Trajectories | Samples | Agents | State dim | Obs dim | Action dim | Average returns |"
    )
    returns = f"{card['return_mean']:.1f} ± {card['return_std']:.1f}"
    assert row == f"| hopper | random | 12 | {card['samples']} | 3 | 42 | 14 | 1 | {returns} |"
    assert row == table_row(card).splitlines()[2] and card["engine"] in done.stdout and '"by": "tests"' in done.stdout


def test_info_of_a_bad_path(tmp_path):
    done = command("info", tmp_path / "nothing")
    assert done.returncode == 2 and done.stdout == ""
    how = "`python -m offline_data list` shows what is here and what can be downloaded"
    assert done.stderr == f"error: no dataset at {tmp_path / 'nothing'}: {how}\n"


def test_replay_of_some_keys_of_row_t_alone(hopper_data):
    rows, _ = open_dataset(hopper_data)
    some = [("agents", "action"), "reward", ("agents", "action_mask")]
    seeded = lambda: [torch.Generator().manual_seed(0)]
    both = [make_replay(rows, keys, pairs=keys is None, generators=seeded()).sample(64) for keys in (None, some)]
    assert {k for k in both[1].keys(True, True) if k != "index"} == {("agents", "action"), "reward"}
    for key in (("agents", "action"), "reward"):
        assert torch.equal(both[0][key], both[1][key])


def test_minibatches_that_go_on_from_a_stop_are_those_of_a_run_without_one(hopper_data):
    rows, _ = open_dataset(hopper_data)

    def draw(start: int, state=None):
        generator = torch.Generator().manual_seed(0)
        if state is not None:
            generator.set_state(state)
        how = {"generators": [generator]}
        replays = make_replay(rows, **how), make_replay(rows, ["reward"], pairs=False, **how)
        states = {}
        for step, batch, other in minibatches(start, {5, 40, 41}, (replays[0], 8), (replays[1], 4)):
            assert batch.batch_size == (8,) and other.batch_size == (4,)
            drawn[step] = batch["state"], other["reward"]
            states[step] = generator.get_state()
        return states

    drawn = {}
    states = draw(0)
    assert list(drawn) == list(range(1, 42))
    for stop in (5, 40):
        whole, drawn = drawn, {}
        draw(stop, states[stop])
        assert list(drawn) == list(range(stop + 1, 42))
        assert all(torch.equal(a, b) for step in drawn for a, b in zip(drawn[step], whole[step]))
        drawn = whole
