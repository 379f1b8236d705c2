"""Which tokens end an answer."""

from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from bebop.backbone import read_config


def end_tokens(directory: Path, tokenizer: Any) -> list[int]:
    """Tokens at which an engine ends an answer: all of the model's generation config, and the tokenizer's.

    Args:
        directory: of the checkpoint; config.json serves where there is no generation_config.json.
        tokenizer: the model's.
    """
    try:
        config = GenerationConfig.from_pretrained(directory)
    except OSError:
        config = GenerationConfig.from_model_config(read_config(directory))
    ends = config.eos_token_id
    found = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id}
    return sorted(token for token in found if token is not None)
