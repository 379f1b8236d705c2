"""The command that serves an exported directory."""

import json


def vllm_command(directory: str, draft_steps: int) -> str:
    """vLLM with speculative decoding and drafts sampled from the head's distribution.

    The sampling method is spelt out: vLLM's default, "greedy", makes the draft distribution one-hot, and then a head
    trained to match the target's distribution has nothing to gain.
    """
    speculative = {"method": "mtp", "num_speculative_tokens": draft_steps, "draft_sample_method": "probabilistic"}
    return f"vllm serve {directory} --speculative-config '{json.dumps(speculative)}'"
