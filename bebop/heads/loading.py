"""Heads from checkpoints and back: native tensor names, checks against config.json, and the cold start."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bebop.backbone import Backbone, checkpoint_shards
from bebop.errors import InputError
from bebop.families import Family
from bebop.heads.head import MTPHead
from bebop.sharding import whole
from bebop.writing import complete

_EXPERT = re.compile(r"(.*mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


def native_name(family: Family, name: str) -> str:
    """Name of a head parameter in a checkpoint of this family."""
    return family.prefix + name.removeprefix("mtp_block.")


def native_state_dict(head: MTPHead, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The head's tensors under their checkpoint names; experts one by one, as every engine reads them.

    Args:
        head: says what the names are.
        state: its state dict, where the head itself holds only parts of the tensors.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in (head.state_dict() if state is None else state).items():
        name = native_name(head.family, name)
        if name.endswith("mlp.experts.gate_up_proj"):  # [E, 2I, H], gate first
            for n, expert in enumerate(tensor):
                gate, up = expert.chunk(2)
                stem = name.removesuffix("gate_up_proj") + f"{n}."
                result |= {stem + "gate_proj.weight": gate.contiguous(), stem + "up_proj.weight": up.contiguous()}
        elif name.endswith("mlp.experts.down_proj"):  # [E, H, I]
            stem = name.removesuffix("down_proj")
            result |= {f"{stem}{n}.down_proj.weight": expert.contiguous() for n, expert in enumerate(tensor)}
        else:
            result[name] = tensor
    return result


def _fuse_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of one expert each -> the fused tensors that transformers' layer holds; anything else passes through."""
    result: dict[str, Tensor] = {}
    experts: dict[str, dict[int, dict[str, Tensor]]] = {}  # by stem, number and part
    for name, tensor in tensors.items():
        if match := _EXPERT.fullmatch(name):
            stem, number, part = match.groups()
            experts.setdefault(stem, {}).setdefault(int(number), {})[part] = tensor
        else:
            result[name] = tensor
    for stem, by_number in experts.items():
        ordered = [by_number[n] for n in sorted(by_number)]
        if sorted(by_number) != list(range(len(ordered))) or any(len(parts) != 3 for parts in ordered):
            raise InputError(f"{stem}: experts or their gate/up/down parts are missing (found experts {sorted(by_number)})")
        result[stem + ".gate_up_proj"] = torch.stack([torch.cat([e["gate_proj"], e["up_proj"]]) for e in ordered])
        result[stem + ".down_proj"] = torch.stack([e["down_proj"] for e in ordered])
    return result


def load_native(head: MTPHead, tensors: Mapping[str, Tensor], source: str) -> None:
    """Fill the head from tensors under checkpoint names.

    Raises:
        InputError: a tensor is missing, unexpected, of another shape than the config says, or not of finite numbers; names
            tensor and source.
    """
    own = {native_name(head.family, name): tensor for name, tensor in head.state_dict().items()}
    given = _fuse_experts(tensors)
    problems = [f"{name} is missing" for name in sorted(own.keys() - given.keys())]
    problems += [f"{name} is unexpected" for name in sorted(given.keys() - own.keys())]
    problems += [
        f"{name} is {tuple(given[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in given and given[name].shape != tensor.shape
    ]
    problems += [
        f"{name} holds {'NaN or inf' if tensor.is_floating_point() else tensor.dtype}, expected finite numbers"
        for name, tensor in given.items()
        if not (tensor.is_floating_point() and tensor.isfinite().all())
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise InputError(
            f"{source} does not hold a {head.family.name} head for this backbone: " + "; ".join(problems[:3]) + more
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(given[name])


def read_native_tensors(directory: Path, prefix: str) -> dict[str, Tensor]:
    """All tensors of a safetensors checkpoint directory whose name starts with prefix."""
    tensors: dict[str, Tensor] = {}
    for path in checkpoint_shards(directory):
        with safe_open(path, framework="pt") as shard:
            tensors |= {name: shard.get_tensor(name) for name in shard.keys() if name.startswith(prefix)}
    return tensors


def checkpoint_head_tensors(backbone: Backbone) -> dict[str, Tensor]:
    """The head's tensors in the backbone's own checkpoint; empty if it has no head.

    Raises:
        InputError: config.json and tensors disagree on whether there is a head, or it has more than one layer.
    """
    family, directory = backbone.family, backbone.directory
    announced = family.announced_layers(json.loads((directory / "config.json").read_text()))
    tensors = read_native_tensors(directory, family.prefix)
    key = family.announced_by[0]
    if announced is None:
        announced = int(bool(tensors) and family.loads_unannounced)
    if not isinstance(announced, int):
        raise InputError(f"{directory}/config.json: {key} is {announced!r}, expected the number of MTP layers")
    if announced > 1:
        raise InputError(
            f"{directory}/config.json announces {announced} MTP layers; only 1, re-used for every step, is supported"
        )
    if bool(announced) != bool(tensors):
        raise InputError(
            f"{directory}: config.json says {key} = {announced}, but the checkpoint has {len(tensors)} tensors named "
            f"{family.prefix}*; restore the tensors or correct {key}"
        )
    return tensors


@torch.no_grad()
def cold_start(head: MTPHead, backbone: Backbone) -> None:
    """Initialise the head from the backbone: last full-attention layer, final norm, a projection that passes h through.

    Both inputs of the projection are scaled to the residual stream that the copied layer was trained on, and the embedding's
    half of it starts at zero. With the embedding left at scale 1 its half learns too slowly beside the hidden state's:
    benchmarks/RESULTS.md.
    """
    family = backbone.family
    layer_types = getattr(backbone.config, "layer_types", None) or ["full_attention"] * backbone.config.num_hidden_layers
    last = max(i for i, kind in enumerate(layer_types) if kind == "full_attention")
    source = backbone.decoder.layers[last].state_dict()
    for name, tensor in head.part(family.layer).state_dict().items():
        if name in source:
            tensor.copy_(whole(source[name]))
        elif name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")):
            tensor.zero_()  # a Llama layer has none; in its Qwen2 form they are zero
        else:
            raise InputError(f"layer {last} of {backbone.directory} has no {name} to start the head from")
    head.part(family.final_norm).weight.copy_(backbone.decoder.norm.weight)
    size = backbone.config.hidden_size
    projection = head.part(family.projection).weight
    projection.zero_()
    hidden_part = projection[:, :size] if family.hidden_first else projection[:, size:]
    hidden_part.copy_(torch.eye(size))
    scale = backbone.residual_scale()
    for norm in (family.embedding_norm, family.hidden_norm):
        # A fresh norm scales by 1, whether its class writes that as weight 1 or, zero-centred, as weight 0.
        head.part(norm).weight.add_(scale - 1.0)


def head_for(backbone: Backbone, source: str = "auto", attention: str = "sdpa") -> tuple[MTPHead, str]:
    """A head in fp32 on the backbone's device.

    Args:
        backbone: the frozen model.
        source: a head directory of an earlier run, or "auto": the checkpoint's own head if it has one, else a cold start.
        attention: see `MTPHead`.

    Returns:
        the head, and where it comes from: the directory, "checkpoint", or "cold start".

    Raises:
        InputError: tensors that do not fit this backbone or its config.json.
    """
    head = MTPHead(backbone.head_config, backbone.family, attention)
    if source != "auto":
        tensors, facts = read_head(Path(source))
        if facts.get("family") != backbone.family.name:
            raise InputError(f"{source} is a {facts.get('family')} head, the backbone needs {backbone.family.name}")
        load_native(head, tensors, source)
        origin = source
    elif tensors := checkpoint_head_tensors(backbone):
        load_native(head, tensors, str(backbone.directory))
        origin = "checkpoint"
    else:
        cold_start(head, backbone)
        origin = "cold start"
    return head.to(backbone.device), origin


def save_head(head: MTPHead, directory: Path, facts: dict[str, Any], state: Mapping[str, Tensor] | None = None) -> None:
    """Write head.safetensors (native names, fp32) and head.json (family and `facts`); the directory appears complete.

    `state` as for `native_state_dict`.

    Raises:
        InputError: it cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in native_state_dict(head, state).items()}
    with complete(directory) as partial:
        partial.mkdir()
        save_file(tensors, partial / "head.safetensors", metadata={"format": "pt"})
        (partial / "head.json").write_text(json.dumps({"family": head.family.name} | facts, indent=2) + "\n")
        shutil.copymode(partial / "head.json", partial / "head.safetensors")  # safetensors lets nobody else read its files


def read_head(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors under native names, and facts, of a head directory that `save_head` wrote.

    Raises:
        InputError: a file is missing or damaged.
    """
    for name in ("head.safetensors", "head.json"):
        if not (directory / name).is_file():
            hint = f"; is it {directory / 'head'}?" if (directory / "head" / name).is_file() else ""
            raise InputError(f"{directory} has no {name}; expected a head directory that a training run wrote{hint}")
    try:
        tensors = load_file(directory / "head.safetensors")
    except SafetensorError as error:
        raise InputError(f"{directory}/head.safetensors is damaged or truncated ({error}); use another checkpoint") from None
    try:
        facts = json.loads((directory / "head.json").read_text())
    except ValueError as error:
        raise InputError(f"{directory}/head.json is not JSON ({error}); write it again, or use another checkpoint") from None
    if not isinstance(facts, dict):
        raise InputError(f"{directory}/head.json holds {facts!r}; expected an object with the head's family")
    for key, kind in {"family": str, "backbone": str, "draft_steps": int}.items():
        if not isinstance(value := facts.get(key), kind) and (key in facts or key == "family"):
            raise InputError(f"{directory}/head.json: {key} is {value!r}, expected {kind.__name__}")
    return tensors, facts
