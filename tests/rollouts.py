"""Small rollouts for the tiny models (vocabulary 131), and a tokenizer to go with them."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from bebop.data.rollouts import Rollout, RolloutHeader, tokenizer_hash, write_rollouts

VOCABULARY = 131
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def self_generated(count: int, seed: int = 0, longest: int = 24) -> list[Rollout]:
    """Rollouts with structure to learn: each token is the one before plus a small random step."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(count):
        length = int(torch.randint(8, longest + 1, (1,), generator=generator))
        steps = torch.randint(1, 3, (length,), generator=generator)
        ids = ((steps.cumsum(0) + torch.randint(0, 120, (1,), generator=generator)) % 120 + 5).tolist()
        result.append(Rollout(ids[:3], ids[3:]))
    return result


def make_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(VOCABULARY - 3)} | {"<user>": 128, "<assistant>": 129, "<end>": 130}
    core = Tokenizer(WordLevel(words, unk_token="w0"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0")
    tokenizer.chat_template = chat_template
    return tokenizer


def write_tiny_rollouts(path: Path, model: Path, count: int = 40, temperature: float = 1.0, seed: int = 0) -> Path:
    """A rollout file for a tiny model's directory, whose tokenizer is written too."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(model)
    header = RolloutHeader(str(model), tokenizer_hash(tokenizer), VOCABULARY, temperature)
    write_rollouts(path, header, self_generated(count, seed))
    return path
