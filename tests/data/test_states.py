"""Backbone states kept on disk are those kept in memory, bit for bit, whatever happened to the run that wrote them."""

import errno
import itertools
import json
import os
import re
import shutil
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from bebop.backbone import Backbone
from bebop.data import state_shards, states
from bebop.data.batches import make_batch, plan_micro_batches
from bebop.data.state_shards import StateShards, describe
from bebop.data.states import StateCache
from bebop.errors import InputError
from tests.rollouts import self_generated
from tests.tiny_models import make_backbone, make_checkpoint

ROLLOUTS = self_generated(40)
TOKENS_PER_FORWARD = 60
BYTES_PER_SHARD = 150 * 32 * 4  # two or three micro-batches


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(states, "_TOKENS_PER_FORWARD", TOKENS_PER_FORWARD)
    monkeypatch.setattr(state_shards, "_BYTES_PER_SHARD", BYTES_PER_SHARD)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen2")


@pytest.fixture
def backbone(model) -> Backbone:
    return count_passes(Backbone.load(str(model), torch.float32))


def count_passes(backbone: Backbone, also=lambda: None) -> Backbone:
    """Counts forward passes in `backbone.passes`, and does something else before each."""
    forward = type(backbone).hidden_states
    backbone.passes = 0

    def counted(*arguments):
        also()
        backbone.passes += 1
        return forward(backbone, *arguments)

    backbone.hidden_states = counted
    return backbone


def shards_of(backbone: Backbone, directory: Path, rollouts=ROLLOUTS) -> StateShards:
    lengths = [len(r) for r in rollouts]
    plan = plan_micro_batches(lengths, TOKENS_PER_FORWARD, backbone.packs_documents)
    return StateShards(directory, describe(backbone, rollouts, TOKENS_PER_FORWARD), plan, lengths, 32 * 4)


def passes_of(shards: StateShards, numbers) -> int:
    return sum(len(shards.micro_batches[number]) for number in numbers)


def assert_same(found: StateCache, backbone: Backbone) -> None:
    expected = StateCache(backbone, ROLLOUTS)
    assert all(torch.equal(mine, other) for mine, other in zip(found.states, expected.states, strict=True))


@pytest.mark.parametrize("kind", ["qwen2", "qwen3_5_text"])
def test_states_on_disk_are_those_in_memory_and_are_computed_once(kind, tmp_path):
    backbone = count_passes(make_backbone(tmp_path / "model", kind))
    in_memory = StateCache(backbone, ROLLOUTS)
    once = backbone.passes
    StateCache(backbone, ROLLOUTS, directory=tmp_path / "states")
    assert backbone.passes == 2 * once
    on_disk = StateCache(backbone, ROLLOUTS, directory=tmp_path / "states")
    assert backbone.passes == 2 * once

    assert len(list((tmp_path / "states").rglob("*.safetensors"))) > 2
    assert sum(s.nbytes for s in on_disk.states) == StateCache.size_in_bytes(backbone, ROLLOUTS)
    generator = torch.Generator().manual_seed(0)
    for rows in plan_micro_batches([len(r) for r in ROLLOUTS], 100, backbone.packs_documents, generator):
        batch = make_batch(rows, ROLLOUTS)
        hidden = on_disk.hidden_states(batch)
        assert torch.equal(hidden, in_memory.hidden_states(batch))
        computed = backbone.hidden_states(batch.tokens, batch.documents, batch.positions)
        torch.testing.assert_close(hidden, computed.masked_fill((batch.documents < 0).unsqueeze(-1), 0.0))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_states_on_disk_are_mapped_and_not_read_into_memory(backbone, tmp_path):
    cache = StateCache(backbone, ROLLOUTS, directory=tmp_path)
    regions = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    bounds = [[int(address, 16) for address in region[0].split("-")] for region in regions]
    assert all(any(start <= s.data_ptr() < end for start, end in bounds) for s in cache.states)


def test_the_manifest_says_what_the_states_are_of(backbone, tmp_path):
    StateCache(backbone, ROLLOUTS, directory=tmp_path)
    (manifest,) = tmp_path.glob("*/manifest.json")
    assert json.loads(manifest.read_text()) == describe(backbone, ROLLOUTS, TOKENS_PER_FORWARD)


def test_an_interrupted_computation_goes_on_with_the_shards_that_are_missing(backbone, tmp_path):
    shards = shards_of(backbone, tmp_path)
    first_two = passes_of(shards, range(2))

    def interrupt():
        if backbone.passes == first_two + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        StateCache(count_passes(backbone, interrupt), ROLLOUTS, directory=tmp_path)
    assert sorted(p.stem for p in shards.directory.glob("*.safetensors")) == ["states-00000", "states-00001"]

    count_passes(backbone)
    cache = StateCache(backbone, ROLLOUTS, directory=tmp_path)
    assert backbone.passes == passes_of(shards, range(2, len(shards)))
    assert_same(cache, backbone)


def flip_a_byte(shard: Path, other: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)


def truncate(shard: Path, other: Path) -> None:
    os.truncate(shard, shard.stat().st_size - 1)


def replace_by_other_data(shard: Path, other: Path) -> None:
    for suffix in (".safetensors", ".json"):
        shutil.copy(other.with_suffix(suffix), shard.with_suffix(suffix))


def replace_by_another_shard(shard: Path, other: Path) -> None:
    replace_by_other_data(shard, shard.with_name("states-00002"))


def remove(shard: Path, other: Path) -> None:
    shard.unlink()


def damage_the_record(shard: Path, other: Path) -> None:
    os.truncate(shard.with_suffix(".json"), 10)


@pytest.mark.parametrize(
    "damage", [flip_a_byte, truncate, replace_by_other_data, replace_by_another_shard, remove, damage_the_record]
)
def test_a_damaged_or_foreign_shard_is_named_and_computed_anew(damage, backbone, tmp_path, caplog):
    StateCache(backbone, ROLLOUTS, directory=tmp_path)
    others = [replace(r, prompt_ids=r.prompt_ids[::-1]) for r in ROLLOUTS]  # as long, so that shards hold the same documents
    StateCache(backbone, others, directory=tmp_path)
    shards = shards_of(backbone, tmp_path)
    damage(shards.path(1), shards_of(backbone, tmp_path, others).path(1))

    backbone.passes = 0
    cache = StateCache(backbone, ROLLOUTS, directory=tmp_path)
    assert backbone.passes == passes_of(shards, [1])
    assert [record.args[0] for record in caplog.records] == [shards.path(1)]
    assert_same(cache, backbone)

    backbone.passes = 0
    StateCache(backbone, ROLLOUTS, directory=tmp_path)
    assert backbone.passes == 0, "what was computed anew is whole"


def test_everything_that_decides_the_states_decides_the_directory(model, tmp_path, monkeypatch):
    """So that no states are ever taken for others."""

    def name(directory=model, dtype=torch.float32, rollouts=ROLLOUTS, tokens=TOKENS_PER_FORWARD, **changes) -> str:
        backbone = Backbone.load(str(directory), dtype)
        for key, value in changes.items():
            setattr(backbone, key, value)
        return StateShards(tmp_path, describe(backbone, rollouts, tokens), [], [], 1).directory.name

    def edited(part: str) -> Path:
        directory = shutil.copytree(model, tmp_path / part)
        if part == "config.json":
            config = json.loads((directory / part).read_text())
            (directory / part).write_text(json.dumps(config | {"rope_theta": 20000.0}))
        else:
            tensors = load_file(directory / "model.safetensors")
            tensors[part][0] += 0.125
            save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory

    moved = shutil.copytree(model, tmp_path / "moved")
    assert name() == name(moved), "where the checkpoint lies does not matter"
    loaded = Backbone.load(str(model), torch.float32)
    changed_rollout = [replace(ROLLOUTS[0], response_ids=[*ROLLOUTS[0].response_ids[:-1], 3]), *ROLLOUTS[1:]]
    names = [
        name(),
        name(edited("config.json")),
        name(edited("model.layers.1.mlp.down_proj.weight")),
        name(edited("model.layers.0.self_attn.q_proj.bias")),
        name(edited("model.embed_tokens.weight")),
        name(config=SimpleNamespace(model_type="llama")),
        name(dtype=torch.bfloat16),
        name(family=replace(loaded.family, tap="post_norm")),
        name(rollouts=ROLLOUTS[::-1]),
        name(rollouts=ROLLOUTS[:-1]),
        name(rollouts=changed_rollout),
        name(tokens=TOKENS_PER_FORWARD + 1),
    ]
    for module, attribute, value in (
        (torch, "__version__", "99.0.0"),
        (state_shards.transformers, "__version__", "99.0.0"),
        (state_shards, "_BYTES_PER_SHARD", BYTES_PER_SHARD + 1),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, attribute, value)
            names.append(name())
    assert len(set(names)) == len(names)


def test_runs_that_write_the_same_states_at_the_same_time_leave_them_whole(backbone, model, tmp_path):
    other = count_passes(Backbone.load(str(model), torch.float32))
    turns = itertools.count()

    def let_the_other_run():
        if next(turns) == 3:
            StateCache(other, ROLLOUTS, directory=tmp_path)

    cache = StateCache(count_passes(backbone, let_the_other_run), ROLLOUTS, directory=tmp_path)
    assert_same(cache, other)
    other.passes = 0
    StateCache(other, ROLLOUTS, directory=tmp_path)
    assert other.passes == 0


def test_a_disk_that_fills_up_ends_the_run_and_leaves_no_half_of_a_file(backbone, tmp_path, monkeypatch):
    calls = itertools.count(1)

    def full(descriptor: int) -> None:
        if next(calls) == 4:  # after the manifest and a shard of two files
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    size = StateCache.size_in_bytes(backbone, ROLLOUTS)
    with pytest.raises(InputError, match=rf"too full: these states take {size:,} bytes in all, [\d,]+ bytes are free"):
        StateCache(backbone, ROLLOUTS, directory=tmp_path)
    names = sorted(p.name for p in tmp_path.glob("*/*"))
    assert names == ["manifest.json", "states-00000.json", "states-00000.safetensors"]


def test_states_that_will_not_fit_are_refused_before_any_is_computed(backbone, tmp_path, monkeypatch):
    free = StateCache.size_in_bytes(backbone, ROLLOUTS) - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(InputError, match=f"{free + 1:,} bytes in all, {free:,} bytes are free"):
        StateCache(backbone, ROLLOUTS, directory=tmp_path)
    assert backbone.passes == 0


def test_a_directory_that_cannot_be_written_is_refused_before_any_state_is_computed(backbone, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/\w+ cannot be written \(Not a directory\)"):
        StateCache(backbone, ROLLOUTS, directory=tmp_path / "file")
    assert backbone.passes == 0


def test_what_killed_runs_left_half_written_goes_after_a_day(backbone, tmp_path):
    directory = shards_of(backbone, tmp_path).directory
    directory.mkdir()
    old, new = (directory / f"states-00000.safetensors.host-{pid}.partial" for pid in (1, 2))
    for path, hours in ((old, 25), (new, 0)):
        path.write_text("")
        os.utime(path, (path.stat().st_mtime - hours * 3600,) * 2)
    StateCache(backbone, ROLLOUTS, directory=tmp_path)
    assert list(directory.glob("*.partial")) == [new]


def test_a_shard_that_another_process_wrote_and_this_one_does_not_see_is_named(backbone, tmp_path):
    StateCache(backbone, ROLLOUTS, directory=tmp_path)
    shards = shards_of(backbone, tmp_path)
    shards.path(2).unlink()
    with pytest.raises(InputError, match=rf"{re.escape(str(shards.path(2)))} .* all processes share"):
        shards.map()


def process(rank: int, model: Path, output: Path, threads: int) -> None:
    """One of two: from nothing, then from a directory that lacks the first shard and two more, then in two directories."""
    torch.set_num_threads(threads)  # products are rounded by how they are shared out
    states._TOKENS_PER_FORWARD, state_shards._BYTES_PER_SHARD = TOKENS_PER_FORWARD, BYTES_PER_SHARD
    dist.init_process_group(
        "gloo", init_method=f"file://{output / 'store'}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    # As where the weights are split over the processes: a forward pass waits for the others to make it too.
    backbone = count_passes(Backbone.load(str(model), torch.float32), lambda: dist.all_reduce(torch.zeros(1)))
    shards = shards_of(backbone, output / "states")
    found = {}
    for start in ("empty", "half done"):
        if start == "half done" and rank == 0:
            for number in (0, 1, len(shards) - 1):
                shards.path(number).with_suffix(".json").unlink()
        dist.barrier()
        before = {p.name: p.stat().st_mtime_ns for p in shards.directory.glob("*.safetensors")}
        dist.barrier()
        backbone.passes = 0
        cache = StateCache(backbone, ROLLOUTS, directory=output / "states")
        after = {p.name: p.stat().st_mtime_ns for p in shards.directory.glob("*.safetensors")}
        written = sorted(name for name in after if after[name] != before.get(name))
        found[start] = {"passes": backbone.passes, "written": written, "states": [s.clone() for s in cache.states]}
    try:
        StateCache(backbone, ROLLOUTS, directory=output / f"node{rank}")
    except InputError as error:
        found["not shared"] = str(error)
    torch.save(found, output / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_share_the_work_in_step(backbone, model, tmp_path):
    mp.spawn(process, (model, tmp_path, torch.get_num_threads()), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    shards = shards_of(backbone, tmp_path / "states")
    expected = StateCache(backbone, ROLLOUTS).states
    missing = {"empty": range(len(shards)), "half done": (0, 1, len(shards) - 1)}
    for start, numbers in missing.items():
        share = [passes_of(shards, numbers[rank::2]) for rank in range(2)]
        assert share[0] != share[1], "the shares differ, or this would show nothing"
        for rank in range(2):
            assert found[rank][start]["passes"] == max(share)
            assert found[rank][start]["written"] == [shards.path(number).name for number in numbers]
            assert all(torch.equal(a, b) for a, b in zip(found[rank][start]["states"], expected, strict=True))
    for rank in range(2):
        assert re.search(r"node\d/\w+/manifest.json .* all processes share", found[rank]["not shared"])
