"""The command that serves an exported directory."""

import json
from pathlib import Path

from transformers import AutoTokenizer

from bebop.backbone import load_tokenizer

_SAMPLE = "In 2024, it's 12345 things:\n\n  - they've   spent $3.50\n\tdef f(x): return x**2\n\n\nÜber-naïve 你好 don't"


def splits_text_differently(directory: Path) -> bool:
    """Whether engines, which ask transformers' AutoTokenizer, would split text otherwise than tokenizer.json says.

    For model_type qwen2 AutoTokenizer builds Qwen2's own pre-tokeniser, whatever tokenizer.json holds. This concerns targets
    with another tokenizer, such as a Llama model stored as Qwen2.
    """
    return AutoTokenizer.from_pretrained(directory).encode(_SAMPLE) != load_tokenizer(directory).encode(_SAMPLE)


def vllm_command(directory: str, draft_steps: int) -> str:
    """vLLM with speculative decoding and drafts sampled from the head's distribution.

    The sampling method is spelt out: vLLM's default, "greedy", makes the draft distribution one-hot, and then a head
    trained to match the target's distribution has nothing to gain.
    """
    speculative = {"method": "mtp", "num_speculative_tokens": draft_steps, "draft_sample_method": "probabilistic"}
    return f"vllm serve {directory} --speculative-config '{json.dumps(speculative)}'"
