"""A Llama-type model as an exact Qwen2 checkpoint: Qwen2 with zero q/k/v biases is Llama, to the last bit.

Engines have an MTP layout for Qwen2 targets and none for Llama, so this is how a Llama backbone gets a head that loads.
"""

from typing import Any

import torch
from transformers import LlamaConfig, Qwen2Config, Qwen2ForCausalLM

from bebop.errors import InputError

_SHARED_KEYS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "max_position_embeddings initializer_range rms_norm_eps tie_word_embeddings rope_parameters attention_dropout "
    "bos_token_id eos_token_id pad_token_id dtype"
).split()


def qwen2_config(config: LlamaConfig) -> Qwen2Config:
    """The Qwen2 config of the same architecture.

    Raises:
        InputError: the model has something Qwen2 cannot express.
    """
    head_dim = config.hidden_size // config.num_attention_heads
    if config.attention_bias or config.mlp_bias:
        raise InputError(
            "this Llama model has attention_bias or mlp_bias; Qwen2 has no o_proj or MLP bias, so it cannot be stored as one"
        )
    if config.head_dim not in (None, head_dim):
        raise InputError(f"head_dim is {config.head_dim}, Qwen2 needs hidden_size / num_attention_heads = {head_dim}")
    return Qwen2Config(architectures=["Qwen2ForCausalLM"], **{key: getattr(config, key) for key in _SHARED_KEYS})


def as_qwen2(model: Any) -> Qwen2ForCausalLM:
    """The same model (a LlamaForCausalLM) as Qwen2ForCausalLM, weights shared, biases zero."""
    with torch.device("meta"):
        result = Qwen2ForCausalLM(qwen2_config(model.config))
    state = dict(model.state_dict())
    for name, parameter in result.named_parameters():
        if name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")):
            state[name] = torch.zeros(parameter.shape, dtype=model.dtype, device=model.device)
    result.load_state_dict(state, assign=True)
    result.tie_weights()
    # Meta construction leaves the rotary buffers empty; they depend on the config alone.
    result.model.rotary_emb = type(result.model.rotary_emb)(config=result.config)
    result.generation_config = model.generation_config
    return result
