"""Which tokens end an answer."""

from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from bebop.backbone import read_config
from bebop.errors import InputError


def end_tokens(directory: Path, tokenizer: Any) -> list[int]:
    """Tokens at which an engine ends an answer: all of the model's generation config, and the tokenizer's.

    Args:
        directory: of the checkpoint; config.json serves where there is no generation_config.json.
        tokenizer: the model's.

    Raises:
        InputError: generation_config.json is there and cannot be read.
    """
    if (directory / "generation_config.json").exists():
        try:
            ends = GenerationConfig.from_pretrained(directory).eos_token_id
        except Exception as error:  # nonsense in it fails somewhere in transformers
            reason = str(error).partition("\n")[0]
            raise InputError(f"{directory}/generation_config.json cannot be read ({reason}); fetch it again") from error
    else:
        ends = GenerationConfig.from_model_config(read_config(directory)).eos_token_id
    found = [token for token in [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id] if token is not None]
    if not all(type(token) is int for token in found):
        raise InputError(f"{directory}: eos_token_id is {ends!r}, expected a token id or a list of them; mend its configs")
    return sorted(set(found))
