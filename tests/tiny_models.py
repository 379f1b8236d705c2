"""Small random models of every supported type, in fp32, with norms and biases away from their defaults."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
)

from bebop.backbone import Backbone
from bebop.families import family_of
from bebop.heads.head import MTPHead
from bebop.heads.loading import native_name, native_state_dict
from bebop.llama_as_qwen2 import qwen2_config

_COMMON = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LINEAR = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}

CONFIGS = {
    "qwen2": lambda **k: Qwen2Config(**(_COMMON | {"num_hidden_layers": 2} | k)),
    "llama": lambda **k: LlamaConfig(**(_COMMON | {"num_hidden_layers": 2} | k)),
    "qwen3_5_text": lambda **k: Qwen3_5TextConfig(**(_COMMON | _LINEAR | k)),
    "qwen3_5_moe_text": lambda **k: Qwen3_5MoeTextConfig(**(_COMMON | _LINEAR | _MOE | k)),
    "qwen3_next": lambda **k: Qwen3NextConfig(**(_COMMON | _LINEAR | _MOE | k)),
}


def scramble(module: torch.nn.Module, seed: int = 0) -> None:
    """Random parameters that leave no term at 0 or 1, so that a forgotten norm, bias or gate shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise * (1.0 / p.shape[-1] ** 0.5))
            elif "norm" in name:
                p.add_(0.3 * noise)
            else:
                p.copy_(0.3 * noise)


def make_model(kind: str, seed: int = 0, **overrides) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](**overrides)).float()
    scramble(model, seed)
    return model


def make_checkpoint(
    directory: Path,
    kind: str,
    seed: int = 0,
    native_head: bool = False,
    announced: bool = True,
    fused_experts: bool = False,
    **overrides,
) -> Path:
    """A checkpoint directory, with a random native head if asked for."""
    model = make_model(kind, seed, **overrides)
    model.save_pretrained(directory)
    if native_head:
        text = qwen2_config(model.config) if kind == "llama" else model.config
        _add_native_head(directory, text, seed + 1, announced, fused_experts)
    return directory


def _add_native_head(directory: Path, text_config, seed: int, announced: bool = True, fused_experts: bool = False) -> None:
    family = family_of(text_config)
    head = MTPHead(text_config, family)
    scramble(head, seed)
    tensors = native_state_dict(head)
    if fused_experts:
        tensors = {native_name(family, name): tensor for name, tensor in head.state_dict().items()}
    # transformers reads no index where a file is called model.safetensors.
    first, second = (directory / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    (directory / "model.safetensors").rename(first)
    save_file(tensors, second, metadata={"format": "pt"})
    with safe_open(first, framework="pt") as f:
        weight_map = dict.fromkeys(f.keys(), first.name) | dict.fromkeys(tensors, second.name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((directory / "config.json").read_text())
    if announced:
        text = config.get("text_config", config)
        text |= {family.announced_by[0]: 1, "num_mtp_layers": 1, "mtp_layer_types": ["full_attention"]}
    (directory / "config.json").write_text(json.dumps(config))


_WRAPPERS = {
    "qwen3_5_text": (Qwen3_5Config, Qwen3_5ForConditionalGeneration),
    "qwen3_5_moe_text": (Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration),
}


def make_wrapper(directory: Path, text: PreTrainedModel, native_head: bool = False, fused_experts: bool = False) -> Path:
    """A Qwen3.5 text model in the multimodal wrapper that published checkpoints have."""
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config_class, model_class = _WRAPPERS[text.config.model_type]
    wrapper = model_class(config_class(text_config=text.config.to_dict(), vision_config=vision)).float()
    wrapper.model.language_model.load_state_dict(text.model.state_dict())
    wrapper.lm_head.load_state_dict(text.lm_head.state_dict())
    wrapper.save_pretrained(directory)
    if native_head:
        _add_native_head(directory, text.config, seed=1, fused_experts=fused_experts)
    return directory


def make_backbone(directory: Path, kind: str, **options) -> Backbone:
    return Backbone.load(str(make_checkpoint(directory, kind, **options)), dtype=torch.float32)
