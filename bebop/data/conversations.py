"""Conversations of messages as data sets hold them: on the hub, in a directory, or in files."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path
from typing import Any

from datasets import load_dataset

from bebop.errors import InputError

_ENDINGS = (".json", ".jsonl", ".parquet", ".gz", ".bz2", ".xz", ".zst")


@dataclass
class Conversation:
    """Messages, each with "role" and mostly "content", as chat templates take them.

    Attributes:
        messages: in order.
        tools: schemas of functions that the model may call, if the data set has a column of that name.
        source: domain or data set, for reports by source.
        place: data set and row, for error messages.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    source: str = ""
    place: str = "conversation"


def read_conversations(
    names: Sequence[str],
    *,
    config: str | None = None,
    split: str = "train",
    column: str = "messages",
    source: str = "",
    streaming: bool = False,
) -> Iterator[Conversation]:
    """The conversations of a data set, in its order.

    Args:
        names: a hub id or a directory; or JSON, JSON-lines or parquet files, or patterns of such.
        config: of a hub data set that has several.
        split: of the data set; files are all in "train".
        column: with the messages.
        source: column with each conversation's source; or, where there is no such column, the source of all.
        streaming: read as the rows are needed, instead of fetching and preparing all first.

    Raises:
        InputError: the data set cannot be read, or a row has no messages under `column`; names the columns there are.
    """
    with _refusing(names):
        data_set = _load(names, config, split, streaming)
    return _conversations(names, data_set, column, source)


def _conversations(names: Sequence[str], data_set: Any, column: str, source: str) -> Iterator[Conversation]:
    for number, row in enumerate(_rows(names, data_set)):
        place = f"{' '.join(names)}, row {number}"
        if column not in row:
            raise InputError(f"{place} has no column {column!r}, only {', '.join(row)}; name the one with the messages")
        if not _are_messages(messages := without_none(row[column])):
            raise InputError(
                f'{place}: {column} is {str(row[column])[:60]!r}, expected a list of messages with "role" and "content"; '
                f"the columns are {', '.join(row)}"
            )
        yield Conversation(messages, _tools(place, row.get("tools")), str(row.get(source, source) or ""), place)


def _load(names: Sequence[str], config: str | None, split: str, streaming: bool) -> Any:
    if len(names) == 1 and not has_magic(names[0]) and Path(names[0]).suffix not in _ENDINGS:
        return load_dataset(names[0], config, split=split, streaming=streaming)
    builders = {"parquet" if name.endswith(".parquet") else "json" for name in names}
    if len(builders) > 1:
        raise InputError(f"{' '.join(names)} are of several formats; give JSON files or parquet files")
    if missing := [name for name in names if not has_magic(name) and not Path(name).is_file()]:
        raise InputError(
            f"data set file {missing[0]} does not exist; expected a hub id, a directory, or JSON or parquet files"
        )
    return load_dataset(builders.pop(), data_files=list(names), split=split, streaming=streaming)


def _rows(names: Sequence[str], data_set: Any) -> Iterator[dict[str, Any]]:
    with _refusing(names):
        yield from data_set


@contextmanager
def _refusing(names: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # datasets raises many kinds, those of the formats' readers among them
        cause = error.__cause__ or error  # what the reader of the format said
        reason = str(cause).strip().partition("\n")[0] or type(cause).__name__
        raise InputError(
            f"data set {' '.join(names)} cannot be read ({reason}); expected a hub id, a directory, or JSON or parquet files"
        ) from error


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in value)
    )


def _tools(place: str, value: Any) -> list[dict[str, Any]] | None:
    """Tools, which some data sets hold as JSON, since the schemas of functions have no columns in common."""
    try:
        tools = json.loads(value) if isinstance(value, str) and value else value
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: tools is not JSON ({error.msg}); expected a list of function schemas") from None
    return without_none(tools) or None


def without_none(value: Any) -> Any:
    """Without the keys that only other rows have, which columns of records hold as None: templates ask if they are there."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value
