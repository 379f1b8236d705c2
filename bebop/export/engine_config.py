"""What config.json must say so that every engine of the family sees the head."""

import copy
from typing import Any

from bebop.errors import InputError
from bebop.families import Family

# Written since some engine reads them raw; where they are absent, transformers' config class, which vLLM asks, has the same.
DERIVED_KEYS = ("layer_types", "rope_parameters")


def completed_config(config: dict[str, Any], text_config: Any, family: Family) -> dict[str, Any]:
    """config.json of a target, completed for a checkpoint that holds a head.

    Engines do not agree on where they look: SGLang has no default for full_attention_interval and reads
    partial_rotary_factor at the top level of the text config, transformers has both inside others.

    Args:
        config: the target's config.json.
        text_config: the same as transformers reads it, its text part.
        family: the head's layout.

    Raises:
        InputError: the layers with full attention stand at no regular interval.
    """
    config = copy.deepcopy(config)
    text = config.get("text_config", config)
    text |= family.config_values
    layer_types = getattr(text_config, "layer_types", None)
    if layer_types and "linear_attention" in layer_types:
        text["layer_types"] = list(layer_types)
        interval = layer_types.index("full_attention") + 1 if "full_attention" in layer_types else len(layer_types) + 1
        regular = ["linear_attention"] * (interval - 1) + ["full_attention"]
        if interval > len(layer_types) or list(layer_types) != (regular * len(layer_types))[: len(layer_types)]:
            raise InputError(
                f"config.json has full attention at no regular interval ({', '.join(layer_types)}), and SGLang and "
                "llama.cpp take nothing else; correct layer_types, or train a head for another model"
            )
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
