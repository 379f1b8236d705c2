"""Draft states of a head for a batch of rollouts: what training and evaluation both start from."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bebop.backbone import Backbone
from bebop.heads.targets import ChainTargets, chain_targets


class Drafts(NamedTuple):
    """Arguments of a `ChainLoss` for all N = B*T anchors of a batch.

    draft_hidden: [K, N, d]; target_hidden: [N, d]; targets: rows, tokens and validity, each [K, N].
    """

    draft_hidden: Tensor
    target_hidden: Tensor
    targets: ChainTargets


def draft(
    head: Callable[..., Tensor],
    backbone: Backbone,
    tapped: Tensor,
    *,
    tokens: Tensor,
    documents: Tensor,
    positions: Tensor,
    supervised: Tensor,
    steps: int,
    compute_dtype: torch.dtype,
) -> Drafts:
    """Unroll the head over a batch.

    Args:
        head: an `MTPHead`, or a wrapper of one with the same call.
        backbone: the frozen model.
        tapped: [B, T, d], `backbone.hidden_states` of the batch.
        tokens, documents, positions, supervised: [B, T], see `bebop.data.batches.Batch`.
        steps: K.
        compute_dtype: bf16 runs the head under autocast, fp32 does not.
    """
    embeddings = backbone.embed(tokens)
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=compute_dtype == torch.bfloat16):
        hidden = head(tapped.to(compute_dtype), embeddings.to(compute_dtype), documents, positions, steps)
    target = backbone.target_hidden(tapped)
    return Drafts(hidden.flatten(1, 2), target.flatten(0, 1), chain_targets(tokens, documents, supervised, steps))
