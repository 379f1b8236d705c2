"""What every draft step of every anchor is judged against, and which of those pairs count."""

from typing import NamedTuple

import torch
from torch import Tensor


class ChainTargets(NamedTuple):
    """For K steps of the N = B*T anchors of a batch, each [K, N].

    target_rows: int64, index of the target's state that predicts the same token, in the batch flattened to [B*T, d].
    tokens: int64, that token in the text.
    valid: bool, which pairs count.
    """

    target_rows: Tensor
    tokens: Tensor
    valid: Tensor


def chain_targets(tokens: Tensor, documents: Tensor, supervised: Tensor, steps: int) -> ChainTargets:
    """Targets of K draft steps for every position of a batch as anchor.

    Step k of the chain anchored at t predicts x_{t+k+1} and is judged against the target's state at t+k. The pair counts
    if x_{t+1}, which starts the chain, and everything up to x_{t+k+1} are supervised tokens of t's document. So anchors run
    from the last prompt position on, as in an engine, and chains at the end of a document are cut short, not dropped.

    Args:
        tokens, documents, supervised: [B, T]; document numbers as for `unroll`, supervised is True on response tokens.
        steps: K.
    """
    batch, length = tokens.shape
    position = torch.arange(length, device=tokens.device)
    offset = (torch.arange(batch, device=tokens.device) * length).unsqueeze(1)
    rows, next_tokens, valid = [], [], []

    def continues(distance: int) -> Tensor:
        """Whether x_{t+distance} is a supervised token of t's document."""
        ahead = (position + distance).clamp(max=length - 1)
        inside = (position + distance < length) & (documents >= 0)
        return inside & (documents[:, ahead] == documents) & supervised[:, ahead]

    reached = continues(1)
    for k in range(1, steps + 1):
        reached = reached & continues(k + 1)
        rows.append(offset + (position + k).clamp(max=length - 1))
        next_tokens.append(tokens[:, (position + k + 1).clamp(max=length - 1)])
        valid.append(reached)
    return ChainTargets(*(torch.stack(x).reshape(steps, -1) for x in (rows, next_tokens, valid)))
