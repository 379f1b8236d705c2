"""Make rollouts of conversations that are there already, by the model's chat template.

    python recipes/convert_chats.py --dataset HuggingFaceH4/ultrachat_200k --split train_sft --streaming --count 20000 \
        --model Qwen/Qwen2.5-7B-Instruct --temperature 1.0 --output chats.jsonl

Only for answers that this model sampled at this temperature. With others the head learns texts that it will not draft, and
the acceptance that is reported is biased; recipes/generate_rollouts.py lets the model answer itself.
"""

import argparse
import logging
import math
from pathlib import Path

from bebop.backbone import load_tokenizer, read_config, resolve_checkpoint
from bebop.data.chat import ChatConverter, closing_tokens
from bebop.data.conversations import read_conversations
from bebop.data.rollouts import RolloutHeader, tokenizer_hash, write_rollouts
from bebop.errors import InputError, errors_as_one_line
from bebop.writing import check_new

logger = logging.getLogger(__name__)

CONVERTED = "text that the model did not sample at this temperature, for all that is known"


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--dataset", nargs="+", required=True, help="hub id, directory, or files: JSON, JSON lines or parquet"
    )
    parser.add_argument("--config", help="configuration of the data set, if it has several")
    parser.add_argument("--split", default="train", help="of the data set (default: train, in which files are)")
    parser.add_argument("--column", default="messages", help="with the messages (default: messages)")
    parser.add_argument("--source", default="", help="column with each conversation's source, or the source of all")
    parser.add_argument("--streaming", action="store_true", help="read as needed, instead of fetching the data set first")
    parser.add_argument(
        "--skip-unfit", action="store_true", help="leave out conversations that cannot be converted, instead of ending there"
    )
    parser.add_argument("--count", type=int, help="most rollouts to write (default: all)")
    parser.add_argument("--model", required=True, help="directory or hub id of the model that wrote the answers")
    parser.add_argument("--temperature", type=float, required=True, help="at which it sampled them")
    parser.add_argument(
        "--output", type=Path, required=True, help="rollout file to write, *.jsonl, *.jsonl.gz or *.parquet; must not exist"
    )
    arguments = parser.parse_args()
    with errors_as_one_line():
        _convert(arguments)


def _convert(arguments: argparse.Namespace) -> None:
    check_new(arguments.output)
    if not {".jsonl", ".parquet"} & set(arguments.output.suffixes[-2:]):
        raise InputError(
            f"output {arguments.output} ends in neither .jsonl, .jsonl.gz (or the like) nor .parquet; choose one"
        )
    if not 0 < arguments.temperature < math.inf:
        raise InputError(f"--temperature is {arguments.temperature}, expected a number above 0")
    if arguments.count is not None and arguments.count < 1:
        raise InputError(f"--count is {arguments.count}, expected 1 or more")
    directory = resolve_checkpoint(arguments.model, weights=False)
    tokenizer, config = load_tokenizer(directory), read_config(directory).get_text_config()
    converter = ChatConverter(
        tokenizer, closing_tokens(directory, tokenizer), config.max_position_embeddings, arguments.skip_unfit
    )
    options = {key: getattr(arguments, key) for key in ("config", "split", "column", "source")}
    conversations = read_conversations(arguments.dataset, streaming=arguments.streaming, **options)
    logger.warning(
        "%s (%s at temperature %s): it would train the head on other texts than it will draft, and bias every acceptance "
        "that is measured; recipes/generate_rollouts.py lets the model answer itself",
        CONVERTED,
        arguments.model,
        arguments.temperature,
    )
    header = RolloutHeader(
        model=arguments.model,
        tokenizer_hash=tokenizer_hash(tokenizer),
        vocab_size=config.vocab_size,
        temperature=arguments.temperature,
        sampling={"converted_from": arguments.dataset, "note": CONVERTED} | options,
    )
    count = write_rollouts(arguments.output, header, converter.convert(conversations, arguments.count))
    print(
        f"wrote {count} rollouts to {arguments.output}; left out of {converter.turns} turns: {converter.too_long} longer "
        f"than {converter.max_length} tokens, {converter.merged} with a token across the start of the answer"
    )
    if converter.unfit:
        print(f"left out {converter.unfit} conversations that do not fit, the first because: {converter.reason}")


if __name__ == "__main__":
    main()
