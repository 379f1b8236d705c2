"""K draft steps for all anchors of a batch at once, exactly as an engine drafts one chain.

An engine that starts a chain at position t has in the head's KV cache the true pairs (h_i, x_{i+1}), i <= t, of the same
document, and after them only the chain's own entries. So step 1 runs causally over each document, and step k > 1 has one
query per anchor, at position t+k-1, that sees step-1 entries up to t and its own chain's entries of steps 2..k: with
Hugging Face layers, cached decoding with T queries at a time under the mask [causal | diagonal | ... | diagonal].
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from transformers import DynamicCache

if TYPE_CHECKING:
    from bebop.heads.head import MTPHead


def unroll(head: "MTPHead", hidden: Tensor, embeddings: Tensor, documents: Tensor, positions: Tensor, steps: int) -> Tensor:
    """The head's outputs m_k(t) for every anchor t and step k, teacher-forced on the text's own tokens.

    Args:
        hidden: [B, T, d], the backbone's state at each position, from the family's tap.
        embeddings: [B, T, d], embedding of the token at each position.
        documents: [B, T] int64, equal for tokens of one document within a row, -1 for padding.
        positions: [B, T] int64, position within the document.
        steps: K.

    Returns:
        [K, B, T, d]. Step k (from 1) of anchor t predicts token t+k+1; where that lies outside the document the row is
        finite but meaningless.
    """
    cache = DynamicCache()
    outputs = []
    for k in range(steps):
        # Step k pairs the state of the step before with the embedding of x_{t+k}; k counts from 0 here.
        next_embeddings = embeddings.roll(-(k + 1), dims=1)
        hidden = head.step(hidden, next_embeddings, positions + k, _chain_mask(head, documents, k + 1), cache)
        outputs.append(hidden)
    return torch.stack(outputs)


def _chain_mask(head: "MTPHead", documents: Tensor, step: int):
    """Who sees whom at a step, [B, 1, T, step*T]: dense and boolean, or FlexAttention's block mask."""
    batch, length = documents.shape

    def sees(b, h, query, key):
        first_step = (key <= query) & (documents[b, query] == documents[b, key % length])
        return torch.where(key < length, first_step, key % length == query)

    create: Any = create_block_mask if head.attention == "flex_attention" else create_mask
    if head.attention == "flex_attention" and documents.is_cuda:
        create = torch.compile(create_block_mask)  # uncompiled it would build the dense mask first
    return create(sees, batch, None, length, step * length, device=documents.device)
