"""The commands that serve an exported directory."""

import json
from pathlib import Path

from transformers import AutoTokenizer

from bebop.backbone import load_tokenizer
from bebop.families import Family

_SAMPLE = "In 2024, it's 12345 things:\n\n  - they've   spent $3.50\n\tdef f(x): return x**2\n\n\nÜber-naïve 你好 don't"


def splits_text_differently(directory: Path) -> bool:
    """Whether engines, which ask transformers' AutoTokenizer, would split text otherwise than tokenizer.json says.

    For model_type qwen2 AutoTokenizer builds Qwen2's own pre-tokeniser, whatever tokenizer.json holds. This concerns targets
    with another tokenizer, such as a Llama model stored as Qwen2.
    """
    return AutoTokenizer.from_pretrained(directory).encode(_SAMPLE) != load_tokenizer(directory).encode(_SAMPLE)


def serve_commands(family: Family, directory: str, draft_steps: int) -> dict[str, str]:
    """How each engine that loads the family serves a directory with drafts sampled from the head's distribution.

    The sampling method is spelt out: by default engines draft greedily, which makes the draft distribution one-hot, and then
    a head trained to match the target's distribution has nothing to gain.
    """
    speculative = {"method": "mtp", "num_speculative_tokens": draft_steps, "draft_sample_method": "probabilistic"}
    commands = {
        "vLLM": f"vllm serve {directory} --speculative-config '{json.dumps(speculative)}'",
        "SGLang": (
            f"python -m sglang.launch_server --model-path {directory} --speculative-algorithm NEXTN "
            f"--speculative-num-steps {draft_steps} --speculative-eagle-topk 1 "
            f"--speculative-num-draft-tokens {draft_steps + 1} --speculative-use-rejection-sampling"
        ),
        "llama.cpp": (
            f"python convert_hf_to_gguf.py {directory} --outfile model.gguf && llama-server -m model.gguf "
            f"--spec-type draft-mtp --spec-draft-n-max {draft_steps} --spec-draft-sampling probabilistic"
        ),
    }
    return {engine: commands[engine] for engine in family.engines}
