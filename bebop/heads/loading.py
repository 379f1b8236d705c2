"""Heads from checkpoints and back: native tensor names, checks against config.json, and the cold start."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from bebop.backbone import Backbone
from bebop.heads.families import Family
from bebop.heads.head import MTPHead

_EXPERT = re.compile(r"(.*mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


def native_name(family: Family, name: str) -> str:
    """Name of a head parameter in a checkpoint of this family."""
    return family.prefix + name.removeprefix("mtp_block.")


def native_state_dict(head: MTPHead) -> dict[str, Tensor]:
    """The head's tensors under their checkpoint names; experts one by one, as every engine reads them."""
    result = {}
    for name, tensor in head.state_dict().items():
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
    result, experts = {}, {}
    for name, tensor in tensors.items():
        if match := _EXPERT.fullmatch(name):
            stem, number, part = match.groups()
            experts.setdefault(stem, {}).setdefault(int(number), {})[part] = tensor
        else:
            result[name] = tensor
    for stem, by_number in experts.items():
        ordered = [by_number[n] for n in sorted(by_number)]
        if sorted(by_number) != list(range(len(ordered))) or any(len(parts) != 3 for parts in ordered):
            raise ValueError(f"{stem}: experts or their gate/up/down parts are missing (found experts {sorted(by_number)})")
        result[stem + ".gate_up_proj"] = torch.stack([torch.cat([e["gate_proj"], e["up_proj"]]) for e in ordered])
        result[stem + ".down_proj"] = torch.stack([e["down_proj"] for e in ordered])
    return result


def load_native(head: MTPHead, tensors: Mapping[str, Tensor], source: str) -> None:
    """Fill the head from tensors under checkpoint names.

    Raises:
        ValueError: a tensor is missing, unexpected, or of another shape than the config says; names tensor and source.
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
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError(f"{source} does not hold a {head.family.name} head for this backbone: " + "; ".join(problems[:3]) + more)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(given[name])


def read_native_tensors(directory: Path, prefix: str) -> dict[str, Tensor]:
    """All tensors of a safetensors checkpoint directory whose name starts with prefix."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text())["weight_map"]
        shards = sorted({directory / shard for name, shard in weight_map.items() if name.startswith(prefix)})
    else:
        shards = sorted(directory.glob("*.safetensors"))
    tensors = {}
    for path in shards:
        with safe_open(path, framework="pt") as shard:
            tensors |= {name: shard.get_tensor(name) for name in shard.keys() if name.startswith(prefix)}
    return tensors


def checkpoint_head_tensors(backbone: Backbone) -> dict[str, Tensor]:
    """The head's tensors in the backbone's own checkpoint; empty if it has no head.

    Raises:
        ValueError: config.json and tensors disagree on whether there is a head, or it has more than one layer.
    """
    family, directory = backbone.family, backbone.directory
    announced = family.announced_layers(backbone.config)
    tensors = read_native_tensors(directory, family.prefix)
    key = family.announced_by[0]
    if announced > 1:
        raise ValueError(f"{directory}/config.json announces {announced} MTP layers; only 1, re-used for every step, is supported")
    if bool(announced) != bool(tensors):
        raise ValueError(
            f"{directory}: config.json says {key} = {announced}, but the checkpoint has {len(tensors)} tensors named "
            f"{family.prefix}*; restore the tensors or correct {key}"
        )
    return tensors


@torch.no_grad()
def cold_start(head: MTPHead, backbone: Backbone) -> None:
    """Initialise the head from the backbone: last full-attention layer, final norm, a projection that passes h through.

    The hidden state enters at the scale it has in the residual stream, so that the copied layer sees what it was trained
    on, and the embedding half of the projection starts at zero.
    """
    family = backbone.family
    layer_types = getattr(backbone.config, "layer_types", None) or ["full_attention"] * backbone.config.num_hidden_layers
    last = max(i for i, kind in enumerate(layer_types) if kind == "full_attention")
    source = backbone.decoder.layers[last].state_dict()
    for name, tensor in head.layer.state_dict().items():
        # A Llama layer has no q/k/v bias; in its Qwen2 form the bias is zero.
        tensor.copy_(source[name]) if name in source else tensor.zero_()
    head.get_submodule(family.final_norm).weight.copy_(backbone.decoder.norm.weight)
    size = backbone.config.hidden_size
    projection = head.get_submodule(family.projection).weight
    projection.zero_()
    hidden_part = projection[:, :size] if family.hidden_first else projection[:, size:]
    hidden_part.copy_(torch.eye(size))
    for norm in (family.embedding_norm, family.hidden_norm):
        module = head.get_submodule(norm)
        module.weight.copy_(type(module)(size).weight)


def head_for(backbone: Backbone, attention: str = "sdpa") -> tuple[MTPHead, str]:
    """A head in fp32 on the backbone's device: the checkpoint's own if it has one, else a cold start.

    Returns:
        the head, and "checkpoint" or "cold start".
    """
    head = MTPHead(backbone.head_config, backbone.family, attention)
    tensors = checkpoint_head_tensors(backbone)
    if tensors:
        load_native(head, tensors, str(backbone.directory))
    else:
        cold_start(head, backbone)
    return head.to(backbone.device), "checkpoint" if tensors else "cold start"
