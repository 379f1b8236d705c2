"""Rollouts: conversations in token ids the model itself produced, in files that begin with a header.

    {"bebop_rollouts": 1, "model": "...", "tokenizer_hash": "...", "vocab_size": 49152, "temperature": 0.6, ...}
    {"prompt_ids": [1, 9690, ...], "response_ids": [57, 12, ..., 2], "finish_reason": "stop"}

Ids and not text: a response that is tokenised or templated again is no longer what the model would say, and a head trained
on it drafts badly in an engine.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from bebop.backbone import load_tokenizer, read_config
from bebop.data.files import HEADER_KEY, find_files, read_header, read_records, write_file
from bebop.errors import InputError

FORMAT_VERSION = 1
_MOST_TOKENS = 2**24  # of a vocabulary; a header that says more is wrong, and would ask for gigabytes


@dataclass
class Rollout:
    """One conversation: the prompt up to where the model began, and what it said, end-of-turn token included."""

    prompt_ids: list[int]
    response_ids: list[int]
    finish_reason: str = "stop"
    source: str = ""  # domain or data set, for reports by source
    conversation: str = ""  # that it is a turn of, or a prompt that it is one of several answers to; "" if of none
    place: str = field(default="memory", compare=False, repr=False)  # file and line it was read from, for error messages

    @property
    def record(self) -> dict[str, Any]:
        """What a file holds of it."""
        named = ("finish_reason", "source", *(["conversation"] if self.conversation else []))
        return {name: getattr(self, name) for name in ("prompt_ids", "response_ids", *named)}

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def key(self) -> bytes:
        """Hash of the token ids: says which conversation this is, whatever file or order it comes in."""
        return hashlib.sha256(json.dumps([self.prompt_ids, self.response_ids]).encode()).digest()


@dataclass
class RolloutHeader:
    """Where rollouts come from: what a training run checks before it starts.

    Attributes:
        model: directory or hub id of the model that sampled them.
        tokenizer_hash: `tokenizer_hash` of its tokenizer.
        vocab_size: rows of its embedding.
        temperature: at which the responses were sampled; top-k and top-p off.
        sampling: anything else worth knowing.
    """

    model: str
    tokenizer_hash: str
    vocab_size: int
    temperature: float
    sampling: dict[str, Any] = field(default_factory=dict)

    @property
    def record(self) -> dict[str, Any]:
        """What a file holds of it."""
        return {HEADER_KEY: FORMAT_VERSION} | asdict(self)


def tokenizer_hash(tokenizer: Any) -> str:
    """Fingerprint of a tokenizer's token-to-id table, added tokens included."""
    table = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    return hashlib.sha256(table.encode()).hexdigest()[:16]


def write_rollouts(path: Path, header: RolloutHeader, rollouts: Iterable[Rollout]) -> int:
    """Write a rollout file; it appears under its name once it is complete. Returns the number of rollouts.

    Args:
        path: its ending says the format: .parquet, or JSON lines, compressed where the name ends in .gz, .bz2, .xz or .zst.
        header, rollouts: what to write.

    Raises:
        InputError: .zst without the package for it; or the file cannot be written.
    """
    return write_file(path, header.record, (r.record for r in rollouts))


def read_rollouts(paths: str | Path | Sequence[str | Path]) -> tuple[RolloutHeader, list[Rollout]]:
    """Read rollout files, in the order of their sorted names.

    Args:
        paths: of one or several files, in any of the formats that `write_rollouts` writes; glob patterns are expanded, and a
            file that is named twice is read once.

    Returns:
        The header of the first file, and the rollouts of all. The headers may differ in `model` and `sampling`.

    Raises:
        InputError: no such file, no header, a damaged or truncated line (with its number), an empty response; or files
            that differ in tokenizer, vocabulary or temperature.
    """
    files = find_files(paths)
    headers = [read_rollout_header(path) for path in files]
    for path, header in zip(files, headers, strict=True):
        for key in ("tokenizer_hash", "vocab_size", "temperature"):
            if (value := getattr(header, key)) != (first := getattr(headers[0], key)):
                raise InputError(
                    f"{path} has {key} {value!r} where {files[0]} has {first!r}; read files together only if one model "
                    "sampled them at one temperature"
                )
    # One int object for every id of the vocabulary: lists then take 8 bytes an id instead of 36.
    table = np.arange(headers[0].vocab_size).astype(object)
    rollouts: list[Rollout] = []
    for path in files:
        before = len(rollouts)
        rollouts.extend(_rollout(place, record, table) for place, record in read_records(path))
        if len(rollouts) == before:
            raise InputError(f"{path} has a header but no rollouts")
    return headers[0], rollouts


def read_rollout_header(path: Path) -> RolloutHeader:
    """The header of one rollout file.

    Raises:
        InputError: the file cannot be read, or has no header that fits.
    """
    place, found = read_header(path)
    if (version := found.pop(HEADER_KEY)) != FORMAT_VERSION or isinstance(version, bool):
        raise InputError(f'{place}: expected a header with "{HEADER_KEY}": {FORMAT_VERSION}, found {version!r}')
    try:
        header = RolloutHeader(**found)
    except TypeError:
        needed = ", ".join(f.name for f in fields(RolloutHeader) if f.name != "sampling")
        raise InputError(
            f"{place}: the header does not fit: it has {', '.join(found) or 'nothing'}; expected {needed} (and sampling)"
        ) from None
    expected = {
        "model": ("a string", lambda v: isinstance(v, str)),
        "tokenizer_hash": ("a string", lambda v: isinstance(v, str)),
        "vocab_size": (f"a number from 1 to {_MOST_TOKENS}", lambda v: isinstance(v, int) and 1 <= v <= _MOST_TOKENS),
        "temperature": ("a number from 0 on", lambda v: isinstance(v, int | float) and 0 <= v < math.inf),
        "sampling": ("an object", lambda v: isinstance(v, dict)),
    }
    for key, (kind, fits) in expected.items():
        if not fits(value := getattr(header, key)) or isinstance(value, bool):
            raise InputError(f"{place}: {key} is {value!r}, expected {kind}")
    return header


def _rollout(place: str, record: dict[str, Any], table: np.ndarray) -> Rollout:
    prompt, response = (_ids(place, key, record.get(key), table) for key in ("prompt_ids", "response_ids"))
    defaults = {"finish_reason": "stop", "source": "", "conversation": ""}
    texts = {key: record.get(key, default) for key, default in defaults.items()}
    for key, value in texts.items():
        if not isinstance(value, str):
            raise InputError(f"{place}: {key} is {value!r}, expected a string")
    return Rollout(prompt, response, **texts, place=place)


def _ids(place: str, key: str, ids: Any, table: np.ndarray) -> list[int]:
    if not isinstance(ids, list | np.ndarray) or not len(ids):
        found = "missing" if ids is None else "empty" if isinstance(ids, list | np.ndarray) else repr(ids)[:40]
        raise InputError(f"{place}: {key} is {found}; expected a list of token ids")
    if isinstance(ids, np.ndarray) or set(map(type, ids)) == {int}:
        array = np.asarray(ids)
        if array.min() >= 0 and array.max() < len(table):
            return table[array].tolist()
    raise InputError(f"{place}: {key} has an id that is no integer from 0 to {len(table) - 1}")


def check_rollouts_of(
    directory: Path, path: Path | str, header: RolloutHeader, rollouts: Sequence[Rollout], max_length: int = 0
) -> None:
    """Refuse rollouts that are not a backbone's own, by its config and tokenizer alone.

    Args:
        directory: of the backbone that shall be trained for, or evaluated on, these rollouts.
        path, header, rollouts: what was read, and from where.
        max_length: longest conversation in tokens; 0 means what the backbone takes.

    Raises:
        InputError: another vocabulary or tokenizer, or a conversation that is too long.
    """
    if problem := next(mismatches(directory, path, header, rollouts, max_length), None):
        raise InputError(problem)


def mismatches(
    directory: Path, path: Path | str, header: RolloutHeader, rollouts: Sequence[Rollout], max_length: int = 0
) -> Iterator[str]:
    """What `check_rollouts_of` refuses, a line each."""
    config, tokenizer = read_config(directory).get_text_config(), load_tokenizer(directory)
    vocab_size, longest = config.vocab_size, config.max_position_embeddings
    max_length = min(max_length or longest, longest)
    if header.vocab_size != vocab_size:
        yield (
            f"{path} was sampled with a vocabulary of {header.vocab_size}, the backbone has {vocab_size}; "
            "sample rollouts from this backbone"
        )
    if header.tokenizer_hash != (own := tokenizer_hash(tokenizer)):
        yield (
            f"{path} was written with another tokenizer (hash {header.tokenizer_hash}, the backbone's is {own}); "
            "sample rollouts from this backbone"
        )
    if too_long := [r for r in rollouts if len(r) > max_length]:
        yield (
            f"{too_long[0].place}: {len(too_long[0])} tokens, longer than the {max_length} of the backbone or `max_length` "
            f"({len(too_long)} of {len(rollouts)} rollouts are); leave such out or raise max_length"
        )


def digest(rollouts: Iterable[Rollout]) -> str:
    """Fingerprint of rollouts and their order."""
    whole = hashlib.sha256()
    for rollout in rollouts:
        whole.update(rollout.key)
    return whole.hexdigest()[:16]


def split_held_out(rollouts: Sequence[Rollout], share: float) -> tuple[list[Rollout], list[Rollout]]:
    """Training and held-out rollouts; which side one falls on is a hash of its conversation or, without one, its ids."""
    bound = int(share * 2**32)
    keys = [hashlib.sha256(r.conversation.encode()).digest() if r.conversation else r.key for r in rollouts]
    held_out = [int.from_bytes(key[:4], "big") < bound for key in keys]
    train = [r for r, out in zip(rollouts, held_out, strict=True) if not out]
    return train, [r for r, out in zip(rollouts, held_out, strict=True) if out]


def split_problems(
    path: Path | str, train: Sequence[Rollout], held_out: Sequence[Rollout], draft_steps: int
) -> Iterator[str]:
    """What keeps a head from being trained on one part of the rollouts and measured on the other, a line each."""
    for side, documents in (("training", train), ("held-out", held_out)):
        if not documents:
            yield (
                f"{path}: of {len(train) + len(held_out)} rollouts none is {side} at this held_out_share; "
                "sample more rollouts or change the share"
            )
        elif (longest := max(len(r.response_ids) for r in documents)) <= draft_steps:
            yield (
                f"{path}: the longest {side} response has {longest} tokens, too few for {draft_steps} draft steps, which "
                f"take {draft_steps + 1}; sample longer responses or lower draft_steps"
            )


def conversation_id(prompt_ids: Sequence[int]) -> str:
    """What `Rollout.conversation` says of the turns behind an opening prompt, or of several answers to it."""
    return hashlib.sha256(json.dumps(list(prompt_ids)).encode()).hexdigest()[:16]
