"""Conversations of messages as data sets hold them: on the hub, in a directory, or in files."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bebop.data.data_sets import read_data_set, without_none
from bebop.errors import InputError


@dataclass
class Conversation:
    """Messages, each with "role" and mostly "content", as chat templates take them.

    Attributes:
        messages: in order.
        tools: schemas of functions that the model may call, if the data set has a column of that name.
        source: domain or data set, for reports by source.
        place: data set and row, for error messages.
        problem: what is wrong with the row, "" if nothing is.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    source: str = ""
    place: str = "conversation"
    problem: str = ""


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
        InputError: the data set cannot be read, or has no such column; names those there are. What is wrong with a single
            row is its `Conversation.problem`.
    """
    return _conversations(read_data_set(names, config=config, split=split, streaming=streaming), column, source)


def _conversations(rows: Iterator[tuple[str, dict[str, Any]]], column: str, source: str) -> Iterator[Conversation]:
    for place, row in rows:
        if column not in row:
            raise InputError(f"{place} has no column {column!r}, only {', '.join(row)}; name the one with the messages")
        problem, messages, tools = "", without_none(row[column]), None
        if not _are_messages(messages):
            problem = (
                f'{place}: {column} is {str(row[column])[:60]!r}, expected a list of messages with "role" and "content"; '
                f"the columns are {', '.join(row)}"
            )
        try:
            tools = _tools(row.get("tools"))
        except json.JSONDecodeError as error:
            problem = f"{place}: tools is not JSON ({error.msg}); expected a list of function schemas"
        yield Conversation(messages, tools, str(row.get(source, source) or ""), place, problem)


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in value)
    )


def _tools(value: Any) -> list[dict[str, Any]] | None:
    """Tools, which some data sets hold as JSON, since the schemas of functions have no columns in common."""
    tools = json.loads(value) if isinstance(value, str) and value else value
    return without_none(tools) or None
