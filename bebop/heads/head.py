"""The MTP head: two norms, a projection, one decoder layer of the backbone's own class, a final norm."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from bebop.families import Family
from bebop.heads.unroll import unroll


class MTPHead(nn.Module):
    """One multi-token-prediction layer in the layout of `family`.

    Parameter names are those of the family's checkpoints without the common prefix (`loading.native_name` adds it); where
    the checkpoint has the decoder layer's tensors directly under the prefix, they are under `mtp_block` here.
    Embedding and lm_head are the backbone's and not part of the head.

    Args:
        config: the backbone's text config (for a Llama backbone, its Qwen2 form).
        family: the layout.
        attention: "sdpa" (a dense mask) or "flex_attention" (a block mask, for long rows on a GPU).
    """

    def __init__(self, config: Any, family: Family, attention: str = "sdpa"):
        super().__init__()
        self.family = family
        self.attention = attention
        self.config = _single_layer_config(config, attention)
        norm = family.modeling_class("RMSNorm")
        size, eps = config.hidden_size, config.rms_norm_eps
        self.add_module(family.embedding_norm, norm(size, eps=eps))
        self.add_module(family.hidden_norm, norm(size, eps=eps))
        self.add_module(family.projection, nn.Linear(2 * size, size, bias=False))
        layer = family.modeling_class("DecoderLayer")(self.config, layer_idx=0)
        if family.layer is None:
            self.mtp_block = layer
        else:
            self.add_module(family.layer.removesuffix(".0"), nn.ModuleList([layer]))
        self.add_module(family.final_norm, norm(size, eps=eps))
        self.rotary_emb = family.modeling_class("RotaryEmbedding")(config=self.config)

    def part(self, name: str | None) -> Any:
        """A submodule by its name in the family; None is the decoder layer of a family that has no name for it."""
        return self.get_submodule(name or "mtp_block")

    def step(self, hidden: Tensor, embedding: Tensor, positions: Tensor, mask: Any, cache: Any) -> Tensor:
        """One draft step: states [B, T, d] and next-token embeddings [B, T, d] -> m [B, T, d], keys and values cached.

        m goes to the lm_head and, as it is, into the next step.
        """
        family = self.family
        if family.zeroes_first_embedding:
            embedding = embedding.masked_fill((positions == 0).unsqueeze(-1), 0.0)
        embedding = self.part(family.embedding_norm)(embedding)
        hidden = self.part(family.hidden_norm)(hidden)
        pair = (hidden, embedding) if family.hidden_first else (embedding, hidden)
        x = self.part(family.projection)(torch.cat(pair, dim=-1))
        x = self.part(family.layer)(
            x,
            attention_mask=mask,
            position_ids=positions,
            position_embeddings=self.rotary_emb(x, positions),
            past_key_values=cache,
            use_cache=True,
        )
        return self.part(family.final_norm)(x)

    def forward(self, hidden: Tensor, embeddings: Tensor, documents: Tensor, positions: Tensor, steps: int) -> Tensor:
        """K draft steps for all anchors: [B, T, d] states -> [K, B, T, d]. See `unroll`."""
        return unroll(self, hidden, embeddings, documents, positions, steps)


def _single_layer_config(config: Any, attention: str) -> Any:
    config = copy.deepcopy(config)
    config.num_hidden_layers = 1
    config.layer_types = ["full_attention"]
    if hasattr(config, "mlp_only_layers"):  # MTP layers of MoE models are MoE layers, whatever the index says.
        config.mlp_only_layers = []
        config.decoder_sparse_step = 1
    config._attn_implementation = attention
    return config
