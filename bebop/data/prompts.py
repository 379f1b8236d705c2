"""Prompts that are given: from a file or a Hugging Face data set, rendered as the model's own token ids."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bebop.data.data_sets import read_data_set, without_none
from bebop.data.rollouts import Rollout, conversation_id
from bebop.errors import InputError

_COLUMNS = ("prompt_ids", "messages", "prompt")  # where a prompt is looked for, in this order


@dataclass
class Prompt:
    """What a model is to answer.

    Attributes:
        number: of the record in the file or data set, from 0.
        ids: its tokens, up to where the model begins.
        source: domain or data set, for reports by source.
    """

    number: int
    ids: list[int]
    source: str = ""

    def answered(self, response: list[int], stop: Sequence[int]) -> Rollout:
        """The rollout with this answer, of which `stop` are the tokens that end one."""
        reason = "stop" if response[-1] in stop else "length"
        return Rollout(self.ids, response, reason, self.source, conversation_id(self.ids))


def read_prompts(
    name: str,
    tokenizer: Any,
    *,
    vocab_size: int,
    max_tokens: int,
    column: str | None = None,
    most: int | None = None,
) -> tuple[list[Prompt], int]:
    """Prompts of a file or data set, and how many were left out because they are too long.

    A prompt is a list of token ids, a list of messages with "role" and "content" (an assistant's at the end are dropped), or
    a text, which becomes a user's message. Messages are rendered with the tokenizer's chat template. A record may have a
    "source".

    Args:
        name: a file of JSON lines (*.jsonl), a text file with a prompt a line (*.txt), or a data set: a hub id, a directory
            or another file that datasets reads, with ":SPLIT" behind it if not "train" is meant.
        tokenizer: the model's.
        vocab_size: ids are below it.
        max_tokens: longer prompts are left out.
        column: where the prompts are; the first of prompt_ids, messages, prompt that a record has if None.
        most: no more prompts than this are read; all if None.

    Raises:
        InputError: nothing is found under the name, or a record has no prompt, or one that cannot be rendered.
    """
    prompts: list[Prompt] = []
    left_out = 0
    for number, (where, record) in enumerate(tqdm(_records(name), desc="prompts", unit="prompt", leave=False)):
        source = record.get("source") or ""
        if not isinstance(source, str):
            raise InputError(f"{where}: source is {source!r}, expected a string")
        ids = _prompt_ids(where, _prompt_of(where, record, column), tokenizer, vocab_size)
        if len(ids) > max_tokens:
            left_out += 1
            continue
        prompts.append(Prompt(number, ids, source))
        if len(prompts) == most:
            break
    if not prompts:
        raise InputError(
            f"{name} has no prompt of {max_tokens} tokens or less ({left_out} are longer); "
            "give other prompts or lower the length of the answers"
        )
    return prompts, left_out


def prompts_hash(prompts: Iterable[Prompt]) -> str:
    """Fingerprint of prompts and their order."""
    whole = hashlib.sha256()
    for prompt in prompts:
        whole.update(json.dumps([prompt.number, prompt.ids, prompt.source]).encode())
    return whole.hexdigest()[:16]


def unanswered(prompts: Sequence[Prompt], written: Counter[int]) -> list[bool]:
    """Which of `prompts` are left to answer.

    Args:
        prompts: each as often as it is to be answered.
        written: answers there are, by prompt number.
    """
    left = written.copy()
    result = []
    for prompt in prompts:
        answered = left[prompt.number] > 0
        left[prompt.number] -= answered
        result.append(not answered)
    return result


def _records(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Records, each with words that say where it stands."""
    path = Path(name).expanduser()
    if path.suffix in (".jsonl", ".txt"):
        if not path.is_file():
            raise InputError(f"prompt file {path} does not exist")
        yield from _file_records(path)
        return
    data_set, _, split = name.partition(":")
    # Streaming: of a large data set no more is fetched than is asked for.
    for place, row in read_data_set([data_set], split=split or "train", streaming=True):
        yield place, without_none(row)


def _file_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not (text := line.strip()):
                    continue
                where = f"{path}:{number}"
                try:
                    record = {"prompt": text} if path.suffix == ".txt" else json.loads(text)
                except json.JSONDecodeError as error:
                    raise InputError(f"{where}: not JSON ({error.msg}); expected an object a line") from None
                if not isinstance(record, dict):
                    raise InputError(f"{where}: expected a JSON object, found {text[:40]!r}")
                yield where, record
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None


def _prompt_of(where: str, record: dict[str, Any], column: str | None) -> Any:
    columns = _COLUMNS if column is None else (column,)
    found = next((record[key] for key in columns if record.get(key) is not None), None)
    if found is None:
        raise InputError(f"{where}: no {' or '.join(columns)}, only {', '.join(islice(record, 8))}; name the column")
    return found


def _prompt_ids(where: str, prompt: Any, tokenizer: Any, vocab_size: int) -> list[int]:
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not prompt:
        raise InputError(f"{where}: the prompt is {str(prompt)[:40]!r}, expected token ids, messages or a text")
    if all(type(i) is int for i in prompt):
        if not all(0 <= i < vocab_size for i in prompt):
            raise InputError(f"{where}: the prompt has an id that is not from 0 to {vocab_size - 1}")
        return prompt
    if not all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in prompt):
        raise InputError(f'{where}: the prompt is no list of token ids, nor one of messages with "role" and "content"')
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(f"{where}: the tokenizer has no chat template to render messages with; give prompt_ids")
    while prompt and prompt[-1]["role"] == "assistant":
        prompt = prompt[:-1]
    if not prompt:
        raise InputError(f"{where}: no message but the assistant's; expected one to answer")
    try:
        return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    except Exception as error:  # templates raise what they like
        raise InputError(f"{where}: the chat template does not take the messages ({error})") from error
