"""An engine's drafting of one chain, written down step by step: the independent statement the unroll is tested against.

One anchor at a time, with explicit keys and values. The cache is refilled with the true pairs up to the anchor, then the
chain's own entries follow. Uses the head's parts (norms, projection, layer) and nothing of bebop's unroll.
"""

import torch
from transformers import DynamicCache


def draft_chain(head, hidden, embeddings, anchor: int, steps: int) -> torch.Tensor:
    """States m_1..m_K [K, d] of the chain that starts at `anchor` of one document.

    hidden, embeddings: [T, d] of that document alone; the chain is fed the text's own tokens.
    """
    family = head.family
    cache = DynamicCache()
    # Refill: the layer over true pairs (h_i, x_{i+1}), one token after another as a decoder would.
    for i in range(anchor + 1):
        state = _forward_one(head, family, hidden[i], embeddings[i + 1], i, cache)
    chain = [state]
    for k in range(2, steps + 1):
        state = _forward_one(head, family, chain[-1], embeddings[anchor + k], anchor + k - 1, cache)
        chain.append(state)
    return torch.stack(chain)


def _forward_one(head, family, hidden, embedding, position: int, cache):
    if family.name == "mimo":
        embedding = torch.zeros_like(embedding) if position == 0 else embedding
        pair = [head.hidden_layernorm(hidden), head.token_layernorm(embedding)]
        project, layer, norm = head.input_proj, head.mtp_block, head.final_layernorm
    else:
        pair = [head.pre_fc_norm_embedding(embedding), head.pre_fc_norm_hidden(hidden)]
        project, layer, norm = head.fc, head.layers[0], head.norm
    x = project(torch.cat(pair, dim=-1))[None, None]
    positions = torch.tensor([[position]])
    x = layer(
        x,
        attention_mask=None,
        position_ids=positions,
        position_embeddings=head.rotary_emb(x, positions),
        past_key_values=cache,
    )
    return norm(x)[0, 0]
