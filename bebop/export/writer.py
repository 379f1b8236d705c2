"""Write a directory that an engine serves: the target's files, the head's tensors as one more shard, config and index."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bebop.backbone import INDEX_FILE, Backbone, checkpoint_shards, resolve_checkpoint
from bebop.errors import InputError
from bebop.families import MIMO
from bebop.heads.head import MTPHead
from bebop.heads.loading import load_native, native_state_dict, read_head
from bebop.llama_as_qwen2 import as_qwen2


def export_head(head_directory: Path, target: str, output: Path) -> dict[str, Any]:
    """Write `output`: the target with the head beside its weights, as vLLM loads it.

    The target's files are hard-linked where the file system allows it, else copied; a Llama target is stored as the exactly
    equal Qwen2 model. The directory appears once everything was written, read back and compared.

    Args:
        head_directory: a head that a training run saved.
        target: directory or hub id of the model it was trained for.
        output: must not exist.

    Returns:
        the facts in head.json.

    Raises:
        InputError: output exists, head and target do not belong together, or the target's family cannot be exported.
    """
    if output.exists():
        raise InputError(f"output {output} exists; choose another directory or remove it")
    tensors, facts = read_head(head_directory)
    directory = resolve_checkpoint(target)
    backbone = Backbone.load(str(directory), dtype=_stored_dtype(directory))
    if backbone.family is not MIMO:
        raise InputError(f"export of {backbone.family.name} heads is not implemented; only Qwen2 and Llama targets are")
    if facts.get("family") != backbone.family.name:
        raise InputError(f"{head_directory} is a {facts.get('family')} head, the target needs {backbone.family.name}")
    head = MTPHead(backbone.head_config, backbone.family)
    load_native(head, tensors, str(head_directory))
    expected = {name: tensor.to(backbone.model.dtype) for name, tensor in native_state_dict(head).items()}

    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        if backbone.config.model_type == "llama":
            as_qwen2(backbone.model).save_pretrained(partial)
            _link_files(directory, partial, without={p.name for p in directory.glob("*.safetensors")} | {INDEX_FILE})
        else:
            _link_files(directory, partial, without=set())
        _add_shard(partial, expected)
        _complete_config(partial)
        _compare(partial, expected)
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return facts


def _stored_dtype(directory: Path) -> torch.dtype:
    """Of the target's weights: the head is stored in the same."""
    config = json.loads((directory / "config.json").read_text())
    config |= config.get("text_config", {})
    name = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    return getattr(torch, name)


def _link_files(source: Path, destination: Path, without: set[str]) -> None:
    for path in source.iterdir():
        if not path.is_file() or path.name in without or (destination / path.name).exists():
            continue
        path = path.resolve()  # hub snapshots are symbolic links
        try:
            os.link(path, destination / path.name)
        except OSError:
            shutil.copy2(path, destination / path.name)


def _add_shard(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Number the shards anew with the head's last, and write the index.

    Renumbered, since loaders that find a model.safetensors look at no index.
    """
    shards = checkpoint_shards(directory)
    total = len(shards) + 1
    weight_map: dict[str, str] = {}
    size = 0
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{total:05d}.safetensors"
        shard.rename(directory / name)
        with safe_open(directory / name, framework="pt") as file:
            stored = list(file.keys())
        if own := tensors.keys() & set(stored):
            raise InputError(f"the target already holds {sorted(own)[0]}; export onto a target without an MTP head")
        weight_map |= dict.fromkeys(stored, name)
        size += (directory / name).stat().st_size
    name = f"model-{total:05d}-of-{total:05d}.safetensors"
    save_file({k: v.contiguous() for k, v in tensors.items()}, directory / name, metadata={"format": "pt"})
    weight_map |= dict.fromkeys(tensors, name)
    size += sum(t.numel() * t.itemsize for t in tensors.values())
    _replace(directory / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _complete_config(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config |= {"architectures": ["MiMoForCausalLM"], "model_type": "qwen2", MIMO.announced_by[0]: 1}
    _replace(directory / "config.json", config)


def _replace(path: Path, content: dict[str, Any]) -> None:
    """Write JSON to a new file: the old one may be a link to the target's."""
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def _compare(directory: Path, expected: Mapping[str, Tensor]) -> None:
    """Read everything back: the index names every tensor where it is, and the head's tensors hold what was meant."""
    weight_map = json.loads((directory / INDEX_FILE).read_text())["weight_map"]
    found = set()
    for shard in sorted(set(weight_map.values())):
        with safe_open(directory / shard, framework="pt") as file:
            for name in file.keys():
                if weight_map.get(name) != shard:
                    raise RuntimeError(f"{name} is in {shard}, the index says {weight_map.get(name)}")
                if name in expected and not torch.equal(file.get_tensor(name), expected[name]):
                    raise RuntimeError(f"{name} read back from {shard} differs from what was written")
                found.add(name)
    if missing := (weight_map.keys() | expected.keys()) - found:
        raise RuntimeError(f"{sorted(missing)[0]} was not written")
