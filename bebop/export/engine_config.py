"""What config.json must say so that every engine of the family sees the head."""

import copy
from typing import Any

from bebop.errors import InputError
from bebop.families import Family


def completed_config(config: dict[str, Any], text_config: Any, family: Family) -> dict[str, Any]:
    """config.json of a target, completed for a checkpoint that holds a head.

    Engines do not agree on where they look: SGLang has no default for full_attention_interval and reads
    partial_rotary_factor at the top level of the text config, transformers has both inside others.

    Args:
        config: the target's config.json.
        text_config: the same as transformers reads it, its text part.
        family: the head's layout.

    Raises:
        InputError: full-attention layers that stand at no regular interval.
    """
    config = copy.deepcopy(config)
    text = config.get("text_config", config)
    text |= family.config_values
    layer_types = getattr(text_config, "layer_types", None)
    if layer_types and "linear_attention" in layer_types:
        text["layer_types"] = list(layer_types)
        interval = layer_types.index("full_attention") + 1
        if any((kind == "full_attention") != ((i + 1) % interval == 0) for i, kind in enumerate(layer_types)):
            raise InputError(f"layer_types have full attention at no regular interval, which SGLang needs: {layer_types}")
        text["full_attention_interval"] = interval
    rope = getattr(text_config, "rope_parameters", None) or {}
    if "partial_rotary_factor" in rope:
        text["rope_parameters"] = dict(rope)
        text["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if family.architecture is not None:
        config |= {"architectures": [family.architecture], "model_type": text_config.model_type}
    elif not config.get("architectures"):
        config["architectures"] = [
            family.class_prefix + ("ForConditionalGeneration" if text is not config else "ForCausalLM")
        ]
    return config
