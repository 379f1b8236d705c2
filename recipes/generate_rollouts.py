"""Let a model write rollouts: python recipes/generate_rollouts.py --model MODEL --output FILE.jsonl --count 1000."""

import argparse
import logging
import sys
from pathlib import Path

import torch

from bebop.backbone import Backbone, load_tokenizer
from bebop.data.generate import chat_openings, generate_rollouts
from bebop.data.rollouts import RolloutHeader, tokenizer_hash, write_rollouts
from bebop.errors import InputError


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or hub id of an instruction-tuned model")
    parser.add_argument("--output", required=True, type=Path, help="rollout file to write; must not exist")
    parser.add_argument("--count", type=int, default=1000, help="rollouts to write")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the answers")
    parser.add_argument("--prompt-temperature", type=float, default=1.0, help="of the prompts, which the model writes too")
    parser.add_argument("--max-prompt-tokens", type=int, default=64, help="longest prompt kept")
    parser.add_argument("--max-response-tokens", type=int, default=256, help="answers are cut off there")
    parser.add_argument("--batch-size", type=int, default=128, help="dialogues sampled at once")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    arguments = parser.parse_args()
    try:
        _write(arguments)
    except InputError as error:
        sys.exit(f"error: {error}")


def _write(arguments: argparse.Namespace) -> None:
    if arguments.output.exists():
        raise InputError(f"output {arguments.output} exists; choose another name or remove it")
    for key in ("count", "temperature", "prompt_temperature", "max_prompt_tokens", "max_response_tokens", "batch_size"):
        if not getattr(arguments, key) > 0:
            raise InputError(f"--{key.replace('_', '-')} is {getattr(arguments, key)}, expected a number above 0")
    backbone = Backbone.load(arguments.model, device="cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(backbone.directory)
    options = {
        "prompt_temperature": arguments.prompt_temperature,
        "max_prompt_tokens": arguments.max_prompt_tokens,
        "max_response_tokens": arguments.max_response_tokens,
        "seed": arguments.seed,
    }
    chat_openings(tokenizer)  # refuse a model that cannot write prompts before anything is written
    header = RolloutHeader(
        model=arguments.model,
        tokenizer_hash=tokenizer_hash(tokenizer),
        vocab_size=backbone.lm_head_weight.shape[0],
        temperature=arguments.temperature,
        sampling=options | {"batch_size": arguments.batch_size},
    )
    rollouts = generate_rollouts(
        backbone.model,
        tokenizer,
        count=arguments.count,
        temperature=arguments.temperature,
        batch_size=arguments.batch_size,
        **options,
    )
    count = write_rollouts(arguments.output, header, rollouts)
    print(f"wrote {count} rollouts to {arguments.output}")


if __name__ == "__main__":
    main()
