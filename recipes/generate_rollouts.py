"""Let a model write rollouts: python recipes/generate_rollouts.py --model MODEL --output FILE.jsonl --count 1000.

The model answers prompts of its own or those of --prompts, in process or on a server that runs it (--server). A run that was
stopped goes on when the same command is given again.
"""

import argparse
import logging
import math
import sys
from pathlib import Path
from typing import Any

import torch

from bebop.backbone import Backbone, load_tokenizer, read_config, resolve_checkpoint
from bebop.data.answer import answer_prompts
from bebop.data.append import GrowingRolloutFile, check_output
from bebop.data.end_tokens import end_tokens
from bebop.data.generate import check_openings, generate_rollouts
from bebop.data.prompts import Prompt, prompts_hash, read_prompts
from bebop.data.rollouts import RolloutHeader, tokenizer_hash
from bebop.data.served import ServerSampling, answer_prompts_on_server, generate_rollouts_on_server
from bebop.data.server import Server, find_server
from bebop.errors import InputError, errors_as_one_line

# Options, the one that decides whether they have a meaning, and whether that must be given or left out.
_ONLY = [
    (("prompt_column", "samples_per_prompt"), "prompts", True),
    (("prompt_temperature", "max_prompt_tokens"), "prompts", False),
    (("served_model", "concurrency"), "server", True),
    (("batch_size",), "server", False),
]


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="directory or hub id of an instruction-tuned model")
    parser.add_argument("--output", required=True, type=Path, help="rollout file to write, *.jsonl; must not exist")
    parser.add_argument("--count", type=int, help="rollouts to write; if left out 1000, or all of --prompts")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the answers")
    parser.add_argument("--max-response-tokens", type=int, default=256, help="answers are cut off there")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling; SGLang goes by its own")
    own = parser.add_argument_group("prompts that the model writes")
    own.add_argument("--prompt-temperature", type=float, default=1.0, help="of the prompts")
    own.add_argument("--max-prompt-tokens", type=int, default=64, help="longest prompt kept")
    given = parser.add_argument_group("prompts that are given")
    given.add_argument("--prompts", help="*.jsonl, *.txt, or data set (directory or hub id, with :SPLIT if not train)")
    given.add_argument("--prompt-column", help="where the prompts are; if left out prompt_ids, messages or prompt")
    given.add_argument("--samples-per-prompt", type=int, default=1, help="answers to each")
    here = parser.add_argument_group("sampling in this process")
    here.add_argument("--batch-size", type=int, default=128, help="dialogues sampled at once, and kept when all have ended")
    there = parser.add_argument_group("sampling on a server")
    there.add_argument("--server", help="URL of a vLLM or SGLang server")
    there.add_argument("--served-model", help="name of the model on the server, if it has several")
    there.add_argument("--concurrency", type=int, default=128, help="requests at once")
    arguments = parser.parse_args()
    with errors_as_one_line():
        _check(arguments, parser)
        _write(arguments)


def _write(arguments: argparse.Namespace) -> None:
    if arguments.count is None and not arguments.prompts:
        arguments.count = 1000
    server = find_server(arguments.server, arguments.served_model) if arguments.server else None
    directory = resolve_checkpoint(arguments.model, weights=False)  # what is refused costs no download of them
    config = read_config(directory).get_text_config()
    tokenizer = load_tokenizer(directory)
    max_length = config.max_position_embeddings
    if server is not None and server.max_length is not None:
        max_length = min(max_length, server.max_length)

    prompts = None
    if arguments.prompts:
        prompts = _prompts(arguments, tokenizer, config.vocab_size, max_length - arguments.max_response_tokens)
    else:
        check_openings(tokenizer, arguments.max_prompt_tokens, arguments.max_response_tokens, max_length)
    stop = end_tokens(directory, tokenizer)
    header = _header(arguments, tokenizer, config.vocab_size, prompts, server)
    with GrowingRolloutFile(arguments.output, header) as file:
        if there := file.written.total():
            print(f"{there} rollouts are in {file.partial}; going on from there")
        try:
            if server is None:
                backbone = Backbone.load(arguments.model, device="cuda" if torch.cuda.is_available() else "cpu")
                _sample(arguments, backbone, tokenizer, stop, prompts, file)
            else:
                _sample_on_server(arguments, server, config.vocab_size, tokenizer, stop, prompts, file)
        except (InputError, OSError, KeyboardInterrupt):
            if kept := file.written.total():
                print(f"{kept} rollouts are kept in {file.partial}; the same command goes on from there", file=sys.stderr)
            raise
        file.complete()
    print(f"wrote {file.written.total()} rollouts to {arguments.output}")


def _check(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    check_output(arguments.output)
    numbers = ("temperature", "prompt_temperature", "max_prompt_tokens", "max_response_tokens", "batch_size")
    for key in (*numbers, "samples_per_prompt", "concurrency", *(["count"] if arguments.count is not None else [])):
        if not 0 < getattr(arguments, key) < math.inf:
            raise InputError(f"--{key.replace('_', '-')} is {getattr(arguments, key)}, expected a number above 0")
    for keys, other, needed in _ONLY:
        for key in keys:
            if bool(getattr(arguments, other)) != needed and getattr(arguments, key) != parser.get_default(key):
                found = f"--{key.replace('_', '-')} has no meaning {'without' if needed else 'with'} --{other}"
                raise InputError(f"{found}; {'give that too' if needed else 'leave one of them out'}")


def _prompts(arguments: argparse.Namespace, tokenizer: Any, vocab_size: int, max_tokens: int) -> list[Prompt]:
    """Every prompt as often as it is to be answered."""
    samples = arguments.samples_per_prompt
    prompts, left_out = read_prompts(
        arguments.prompts,
        tokenizer,
        vocab_size=vocab_size,
        max_tokens=max_tokens,
        column=arguments.prompt_column,
        most=arguments.count and math.ceil(arguments.count / samples),
    )
    if left_out:
        print(
            f"left out {left_out} prompts that are longer than {max_tokens} tokens, which is what the answers leave room for"
        )
    repeated = [prompt for prompt in prompts for _ in range(samples)][: arguments.count]
    if arguments.count and len(repeated) < arguments.count:
        print(
            f"{arguments.prompts} has {len(prompts)} prompts: {len(repeated)} rollouts will be written instead of "
            f"{arguments.count} (--samples-per-prompt asks for several answers to each)"
        )
    return repeated


def _header(
    arguments: argparse.Namespace, tokenizer: Any, vocab_size: int, prompts: list[Prompt] | None, server: Server | None
) -> RolloutHeader:
    sampling = {"max_response_tokens": arguments.max_response_tokens, "seed": arguments.seed}
    if prompts is None:
        sampling |= {
            "count": arguments.count,
            "prompt_temperature": arguments.prompt_temperature,
            "max_prompt_tokens": arguments.max_prompt_tokens,
        }
    else:
        sampling |= {
            "prompts": arguments.prompts,
            "samples_per_prompt": arguments.samples_per_prompt,
            "count": len(prompts),
            "prompts_hash": prompts_hash(prompts),
        }
    sampling |= {"batch_size": arguments.batch_size} if server is None else {"served_model": server.model}
    return RolloutHeader(
        model=arguments.model,
        tokenizer_hash=tokenizer_hash(tokenizer),
        vocab_size=vocab_size,
        temperature=arguments.temperature,
        sampling=sampling,
    )


def _sample(
    arguments: argparse.Namespace,
    backbone: Backbone,
    tokenizer: Any,
    stop: list[int],
    prompts: list[Prompt] | None,
    file: GrowingRolloutFile,
) -> None:
    options = {
        "temperature": arguments.temperature,
        "stop": stop,
        "max_response_tokens": arguments.max_response_tokens,
        "batch_size": arguments.batch_size,
        "seed": arguments.seed,
        "written": file.written,
    }
    if prompts is None:
        rollouts = generate_rollouts(
            backbone.model,
            tokenizer,
            count=arguments.count,
            prompt_temperature=arguments.prompt_temperature,
            max_prompt_tokens=arguments.max_prompt_tokens,
            **options,
        )
    else:
        rollouts = answer_prompts(backbone.model, prompts, **options)
    for number, rollout in rollouts:
        file.append(number, rollout)


def _sample_on_server(
    arguments: argparse.Namespace,
    server: Server,
    vocab_size: int,
    tokenizer: Any,
    stop: list[int],
    prompts: list[Prompt] | None,
    file: GrowingRolloutFile,
) -> None:
    sampling = ServerSampling(
        server=server,
        vocab_size=vocab_size,
        temperature=arguments.temperature,
        stop=stop,
        max_response_tokens=arguments.max_response_tokens,
        concurrency=arguments.concurrency,
        seed=arguments.seed,
    )
    if prompts is None:
        generate_rollouts_on_server(
            sampling,
            tokenizer,
            count=arguments.count,
            prompt_temperature=arguments.prompt_temperature,
            max_prompt_tokens=arguments.max_prompt_tokens,
            written=file.written,
            keep=file.append,
        )
    else:
        answer_prompts_on_server(sampling, prompts, file.written, file.append)


if __name__ == "__main__":
    main()
