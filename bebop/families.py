"""What differs between the MTP layouts that engines know, as data.

A family fixes the tensor names, the order of the concatenation, which of the backbone's hidden states enters the head and
how `config.json` announces the head. Everything else is the backbone's own decoder layer.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from bebop.errors import InputError


@dataclass(frozen=True)
class Family:
    """One MTP layout.

    Attributes:
        name: what configuration files and head directories call it.
        modeling: transformers module with the decoder layer, norm and rotary classes.
        class_prefix, rotary_class: names of those classes.
        prefix: of the head's tensors in a checkpoint.
        embedding_norm, hidden_norm, projection, final_norm: module names, as in the checkpoint.
        layer: module path of the decoder layer, as in the checkpoint; None if its parts lie directly under `prefix`.
        hidden_first: order of the projection's input; embedding first if False.
        tap: which backbone state enters the head, before or after the backbone's final norm.
        zeroes_first_embedding: the engine zeroes the embedding of the pair at position 0.
        announced_by: config.json keys that may hold the number of MTP layers, the one to write first.
        loads_unannounced: engines take the head where config.json has none of those keys.
        config_values: keys of the text config that engines read, to be written as they are.
        only_read_by: of the keys written, those that a single program reads, and which.
        architecture: what config.json's `architectures` must say for an engine to see the head; None: the target's own.
        stores_lm_head: lm_head.weight must be in the checkpoint, whether or not it is tied to the embedding.
        engines: those that load the layout.
    """

    name: str
    modeling: str
    class_prefix: str
    rotary_class: str
    prefix: str
    embedding_norm: str
    hidden_norm: str
    projection: str
    final_norm: str
    layer: str | None
    hidden_first: bool
    tap: Literal["pre_norm", "post_norm"]
    zeroes_first_embedding: bool
    announced_by: tuple[str, ...]
    loads_unannounced: bool
    config_values: Mapping[str, Any]
    only_read_by: Mapping[str, str]
    architecture: str | None
    stores_lm_head: bool
    engines: tuple[str, ...]

    def modeling_class(self, suffix: str) -> Any:
        """A class of the family's transformers module, e.g. "DecoderLayer"."""
        name = self.rotary_class if suffix == "RotaryEmbedding" else self.class_prefix + suffix
        return getattr(importlib.import_module(self.modeling), name)

    def announced_layers(self, config: dict[str, Any]) -> int | None:
        """Number of MTP layers that a config.json announces, at its top level or in text_config; None if it says nothing."""
        merged = config | config.get("text_config", {})
        return next((merged[key] for key in self.announced_by if merged.get(key) is not None), None)


_QWEN_NAMES: dict[str, Any] = {
    "prefix": "mtp.",
    "embedding_norm": "pre_fc_norm_embedding",
    "hidden_norm": "pre_fc_norm_hidden",
    "projection": "fc",
    "final_norm": "norm",
    "layer": "layers.0",
    "hidden_first": False,
    "tap": "post_norm",
    "zeroes_first_embedding": False,
    "architecture": None,
    "engines": ("vLLM", "SGLang", "llama.cpp"),
}
# Keys of transformers' own MtpModel, from 5.23 on.
_TRANSFORMERS_KEYS: dict[str, Any] = {"num_mtp_layers": 1, "mtp_layer_types": ["full_attention"]}
_ONLY_READ_BY = {
    "num_mtp_layers": "transformers",
    "mtp_layer_types": "transformers",
    "full_attention_interval": "SGLang",
    "partial_rotary_factor": "SGLang",
}
_QWEN3_5_KEYS: dict[str, Any] = {
    **_TRANSFORMERS_KEYS,
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
    "attn_output_gate": True,
}

QWEN3_5 = Family(
    name="qwen3_5",
    modeling="transformers.models.qwen3_5.modeling_qwen3_5",
    class_prefix="Qwen3_5",
    rotary_class="Qwen3_5TextRotaryEmbedding",
    announced_by=("mtp_num_hidden_layers", "num_mtp_layers"),
    loads_unannounced=False,
    config_values=_QWEN3_5_KEYS,
    only_read_by=_ONLY_READ_BY,
    stores_lm_head=False,
    **_QWEN_NAMES,
)

QWEN3_5_MOE = replace(
    QWEN3_5,
    name="qwen3_5_moe",
    modeling="transformers.models.qwen3_5_moe.modeling_qwen3_5_moe",
    class_prefix="Qwen3_5Moe",
    rotary_class="Qwen3_5MoeTextRotaryEmbedding",
)

QWEN3_NEXT = Family(
    name="qwen3_next",
    modeling="transformers.models.qwen3_next.modeling_qwen3_next",
    class_prefix="Qwen3Next",
    rotary_class="Qwen3NextRotaryEmbedding",
    announced_by=("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers"),
    # Published checkpoints have a head and none of the keys.
    loads_unannounced=True,
    config_values={**_TRANSFORMERS_KEYS, "num_nextn_predict_layers": 1, "mtp_num_hidden_layers": 1},
    only_read_by={**_ONLY_READ_BY, "mtp_num_hidden_layers": "llama.cpp"},
    stores_lm_head=True,
    **_QWEN_NAMES,
)

# A head for backbones that were not trained with one. vLLM serves it with a Qwen2 target; a Llama target is stored as one.
MIMO = Family(
    name="mimo",
    modeling="transformers.models.qwen2.modeling_qwen2",
    class_prefix="Qwen2",
    rotary_class="Qwen2RotaryEmbedding",
    prefix="model.mtp_layers.0.",
    embedding_norm="token_layernorm",
    hidden_norm="hidden_layernorm",
    projection="input_proj",
    final_norm="final_layernorm",
    layer=None,
    hidden_first=True,
    tap="pre_norm",
    zeroes_first_embedding=True,
    announced_by=("num_nextn_predict_layers",),
    loads_unannounced=False,
    config_values={"num_nextn_predict_layers": 1},
    only_read_by={},
    architecture="MiMoForCausalLM",
    stores_lm_head=False,
    engines=("vLLM",),
)

_BY_MODEL_TYPE = {
    "qwen2": MIMO,
    "llama": MIMO,
    "qwen3_5_text": QWEN3_5,
    "qwen3_5_moe_text": QWEN3_5_MOE,
    "qwen3_next": QWEN3_NEXT,
}


def family_of(text_config: Any) -> Family:
    """The layout that engines expect beside a backbone with this (text) config.

    Raises:
        InputError: no engine has an MTP layout for this model type.
    """
    model_type = text_config.model_type
    if model_type not in _BY_MODEL_TYPE:
        reason = " (no unmodified engine has an MTP path for it)" if model_type == "qwen3" else ""
        raise InputError(
            f"model_type {model_type!r} has no MTP head family here{reason}; supported: {', '.join(_BY_MODEL_TYPE)}"
        )
    return _BY_MODEL_TYPE[model_type]


def family_by_name(name: str) -> Family:
    """The layout that head directories call `name`."""
    return next(family for family in _BY_MODEL_TYPE.values() if family.name == name)
