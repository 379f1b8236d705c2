"""A frozen model whose decoder layers are split over processes, as FSDP2 does it.

A layer's weights are gathered when it runs and dropped behind it. Embedding, final norm and lm_head stay whole on every
process. The loss takes the whole lm_head for most of a step, so that splitting it would not lower the peak; an embedding of
its own costs V d numbers, and in return is not gathered for every micro-batch.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from bebop.processes import from_first


def load_sharded(load: Callable[[], Any], skeleton: Callable[[], Any], device: torch.device) -> Any:
    """A model that process 0 alone reads, in its main memory, and sends to all others layer by layer.

    Args:
        load: the model with its weights on the CPU; called on process 0.
        skeleton: the same on the meta device.
        device: of this process.

    Raises:
        InputError: what `load` raised on process 0, on every process.
    """
    loaded: list[Any] = []
    from_first(lambda: loaded.append(load()))
    sharded = skeleton()
    decoder = sharded.get_decoder()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh)
    in_layers = set(decoder.layers.parameters())
    # The root manages no weights; it lets the layers share streams, so that one is gathered while another runs.
    fully_shard(decoder, mesh=mesh, ignored_params=set(decoder.parameters()) - in_layers)
    sharded.to_empty(device=device)
    state = loaded[0].state_dict() if loaded else {}
    set_model_state_dict(sharded, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    sharded.tie_weights()
    # Its buffers are in no state dict; they depend on the config alone.
    decoder.rotary_emb = type(decoder.rotary_emb)(config=decoder.config).to(device)
    return sharded


def whole(tensor: Tensor) -> Tensor:
    """A weight gathered from all processes if it is split over them; then all of them must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def checksums(module: nn.Module) -> dict[str, str]:
    """A hash of every parameter, of the part that lies on this process: says whether anything changed them."""
    for part_of_it in module.modules():
        if isinstance(part_of_it, FSDPModule):
            part_of_it.reshard()  # it may have been left gathered behind its last forward pass
    found = {}
    for name, parameter in module.named_parameters():
        # ZeRO-3 empties a parameter that it has split, and keeps its part beside it.
        part = parameter.to_local() if isinstance(parameter, DTensor) else getattr(parameter, "ds_tensor", parameter)
        # A copy: memory that numpy has seen cannot be freed by FSDP.
        content: Any = part.detach().to("cpu", copy=True).contiguous().view(-1).view(torch.uint8).numpy()
        found[name] = hashlib.sha256(content).hexdigest()
    return found
