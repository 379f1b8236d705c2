"""Write a directory that an engine serves: the target's files, the head's tensors as one more shard, config and index."""

import itertools
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import CHAT_TEMPLATE_DIR

from bebop.backbone import (
    INDEX_FILE,
    checkpoint_shards,
    fingerprint,
    load_tokenizer,
    read_config,
    refuse_quantised,
    resolve_checkpoint,
)
from bebop.errors import InputError
from bebop.export.check import check_export
from bebop.export.engine_config import completed_config
from bebop.families import family_of
from bebop.heads.head import MTPHead
from bebop.heads.loading import load_native, native_state_dict, read_head
from bebop.llama_as_qwen2 import as_qwen2, qwen2_config
from bebop.writing import check_new, complete

logger = logging.getLogger(__name__)

# Other forms of the target's weights, which do not hold the head.
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack"}


def export_head(head_directory: Path, target: str, output: Path, copy: bool = False) -> dict[str, Any]:
    """Write `output`: the target with the head beside its weights, as the family's engines load it.

    An MTP head that the target has is replaced; a Llama target is stored as the exactly equal Qwen2 model. The directory
    appears once everything was written, read back and compared.

    Args:
        head_directory: a head that a training run saved.
        target: directory or hub id of the model it was trained for.
        output: must not exist.
        copy: copy the target's weights too; else they are hard-linked where the file system allows it.

    Returns:
        the facts in head.json.

    Raises:
        InputError: output exists or cannot be written, head and target do not belong together, or the target's family cannot
            be exported.
    """
    check_new(output)
    tensors, facts = read_head(head_directory)
    directory = resolve_checkpoint(target)
    if (directory / "tokenizer.json").is_file():
        load_tokenizer(directory)
    config = read_config(directory)
    text_config = config.get_text_config()
    family = family_of(text_config)
    refuse_quantised(config, directory)
    if facts.get("family") != family.name:
        raise InputError(f"{head_directory} is a {facts.get('family')} head, the target needs {family.name}")
    if facts.get("fingerprint") not in (None, fingerprint(directory)):
        logger.warning(
            f"{head_directory} was trained for {facts.get('backbone')}, whose weights are not those of {target}; acceptance "
            "will be lower than measured there"
        )
    is_llama = text_config.model_type == "llama"
    if not is_llama:
        completed_config(json.loads((directory / "config.json").read_text()), text_config, family)  # refuse before writing
    head = MTPHead(qwen2_config(text_config) if is_llama else text_config, family)
    load_native(head, tensors, str(head_directory))
    dtype = _stored_dtype(directory)
    expected = {name: tensor.to(dtype) for name, tensor in native_state_dict(head).items()}

    with complete(output) as partial:
        partial.mkdir()
        _take_other_files(directory, partial)
        if is_llama:
            as_qwen2(AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)).save_pretrained(partial)
            for shard in partial.glob("*.safetensors"):
                shutil.copymode(partial / "config.json", shard)
        else:
            for shard in checkpoint_shards(directory):
                _link(shard, partial / shard.name, copy)
        _add_shard(partial, expected, family.prefix)
        written = json.loads((partial / "config.json").read_text())
        text_config = read_config(partial).get_text_config()
        _write_json(partial / "config.json", completed_config(written, text_config, family))
        report = check_export(partial)
        if problems := [*report.problems, *itertools.chain(*report.problems_of.values())]:
            raise InputError(f"{target} cannot be exported with this head: {problems[0]}")
        _compare(partial, expected, set() if is_llama else _names(directory, family.prefix))
    return facts


def _stored_dtype(directory: Path) -> torch.dtype:
    """Of the target's embedding: the head is stored in the same."""
    for shard in checkpoint_shards(directory):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():
                if name.endswith("embed_tokens.weight"):
                    return file.get_slice(name)[:1].dtype
    raise InputError(f"{directory} holds no embed_tokens.weight; is it a language model's checkpoint?")


def _link(source: Path, destination: Path, copy: bool) -> None:
    """A second name for a file, or a copy where one is asked for or the file system has no links."""
    real = source.resolve()  # hub snapshots are symbolic links
    try:
        if copy:
            raise OSError
        os.link(real, destination)
    except OSError:
        shutil.copy2(real, destination)


def _take_other_files(source: Path, destination: Path) -> None:
    """Copy, as someone may edit them: tokenizer, templates, generation settings; no weights, which the head is not in."""
    for path in source.iterdir():
        if path.is_dir() and path.name == CHAT_TEMPLATE_DIR:
            shutil.copytree(path, destination / path.name, dirs_exist_ok=True)
        elif path.suffix not in _WEIGHTS and path.name != INDEX_FILE and path.is_file():
            shutil.copy2(path, destination / path.name)


def _add_shard(directory: Path, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Take out what the target has under `prefix`, number the shards anew with the head's last, and write the index.

    Taken out, not only left out of the index: vLLM reads every tensor of a shard. Renumbered, since loaders that find a
    model.safetensors look at no index.
    """
    shards = [shard for shard in checkpoint_shards(directory) if _without(shard, prefix)]
    total = len(shards) + 1
    weight_map: dict[str, str] = {}
    size = 0
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{total:05d}.safetensors"
        shard.rename(directory / name)
        with safe_open(directory / name, framework="pt") as file:
            weight_map |= dict.fromkeys(file.keys(), name)
        size += _size_of_tensors(directory / name)
    name = f"model-{total:05d}-of-{total:05d}.safetensors"
    _save_shard({k: v.contiguous() for k, v in tensors.items()}, directory / name)
    weight_map |= dict.fromkeys(tensors, name)
    size += _size_of_tensors(directory / name)
    _write_json(directory / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _save_shard(tensors: dict[str, Tensor], path: Path) -> None:
    """A shard that whoever may read config.json may read: safetensors itself lets nobody else."""
    save_file(tensors, path, metadata={"format": "pt"})
    shutil.copymode(path.with_name("config.json"), path)


def _size_of_tensors(shard: Path) -> int:
    """Bytes behind the header of a safetensors file, whose length the first eight bytes hold."""
    with shard.open("rb") as file:
        return shard.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def _without(shard: Path, prefix: str) -> bool:
    """Rewrite a shard without the tensors under prefix, if it has any; False if nothing else is in it."""
    with safe_open(shard, framework="pt") as file:
        keep = [name for name in file.keys() if not name.startswith(prefix)]
        if len(keep) == len(file.keys()):
            return True
        kept = {name: file.get_tensor(name) for name in keep}
    shard.unlink()  # it may be a link to the target's
    if kept:
        _save_shard(kept, shard)
    return bool(kept)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _names(directory: Path, prefix: str) -> set[str]:
    """Names of the checkpoint's tensors that are not under prefix."""
    names: set[str] = set()
    for shard in checkpoint_shards(directory):
        with safe_open(shard, framework="pt") as file:
            names |= {name for name in file.keys() if not name.startswith(prefix)}
    return names


def _compare(directory: Path, expected: Mapping[str, Tensor], kept: set[str]) -> None:
    """Read everything back: every tensor is where the index has it, the target's are all there, the head's as meant."""
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
    if missing := (weight_map.keys() | expected.keys() | kept) - found:
        raise RuntimeError(f"{sorted(missing)[0]} was not written")
