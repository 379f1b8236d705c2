"""Rollout files: JSON lines, a header and then one conversation a line, in token ids the model itself produced.

    {"bebop_rollouts": 1, "model": "...", "tokenizer_hash": "...", "vocab_size": 49152, "temperature": 0.6, ...}
    {"prompt_ids": [1, 9690, ...], "response_ids": [57, 12, ..., 2], "finish_reason": "stop"}

Ids and not text: a response that is tokenised or templated again is no longer what the model would say, and a head trained
on it drafts badly in an engine.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bebop.backbone import Backbone, load_tokenizer
from bebop.errors import InputError

FORMAT_VERSION = 1


@dataclass
class Rollout:
    """One conversation: the prompt up to where the model began, and what it said, end-of-turn token included."""

    prompt_ids: list[int]
    response_ids: list[int]
    finish_reason: str = "stop"
    source: str = ""  # domain or data set, for reports by source

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


def tokenizer_hash(tokenizer: Any) -> str:
    """Fingerprint of a tokenizer's token-to-id table, added tokens included."""
    table = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    return hashlib.sha256(table.encode()).hexdigest()[:16]


def write_rollouts(path: Path, header: RolloutHeader, rollouts: Iterable[Rollout]) -> int:
    """Write a rollout file; it appears under its name once it is complete. Returns the number of rollouts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    count = 0
    try:
        with partial.open("w") as file:
            file.write(json.dumps({"bebop_rollouts": FORMAT_VERSION} | asdict(header)) + "\n")
            for rollout in rollouts:
                file.write(json.dumps(asdict(rollout)) + "\n")
                count += 1
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
    return count


def read_rollouts(path: Path) -> tuple[RolloutHeader, list[Rollout]]:
    """Read a rollout file.

    Raises:
        InputError: no such file, no header, a damaged or truncated line (with its number), an empty response.
    """
    if not path.is_file():
        raise InputError(f"rollout file {path} does not exist; write one with recipes/generate_rollouts.py")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a text file; expected JSON lines") from None
    first = _parse(path, 1, lines[0])
    if first.get("bebop_rollouts") != FORMAT_VERSION:
        raise InputError(f'{path}:1: expected a header with "bebop_rollouts": {FORMAT_VERSION}, found {lines[0][:60]!r}')
    try:
        header = RolloutHeader(**{k: v for k, v in first.items() if k != "bebop_rollouts"})
    except TypeError as error:
        raise InputError(f"{path}:1: the header does not fit: {error}") from None
    for key, kind in (("vocab_size", int), ("temperature", int | float)):
        if not isinstance(value := getattr(header, key), kind) or isinstance(value, bool):
            raise InputError(f"{path}:1: {key} is {value!r}, expected a number")
    if lines.pop():
        raise InputError(f"{path}:{len(lines) + 1}: the last line has no line end; the file is truncated, write it again")
    rollouts = [_rollout(path, number, line, header) for number, line in enumerate(lines[1:], start=2)]
    if not rollouts:
        raise InputError(f"{path} has a header but no rollouts")
    return header, rollouts


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{number}: not JSON ({error.msg}); the file is damaged or truncated") from None
    if not isinstance(record, dict):
        raise InputError(f"{path}:{number}: expected a JSON object, found {line[:40]!r}")
    return record


def _rollout(path: Path, number: int, line: str, header: RolloutHeader) -> Rollout:
    record = _parse(path, number, line)
    for key in ("prompt_ids", "response_ids"):
        ids = record.get(key)
        if not isinstance(ids, list) or not ids:
            raise InputError(
                f"{path}:{number}: {key} is {'empty' if ids == [] else 'missing'}; expected a list of token ids"
            )
        if not all(type(i) is int and 0 <= i < header.vocab_size for i in ids):
            raise InputError(f"{path}:{number}: {key} has an id that is no integer from 0 to {header.vocab_size - 1}")
    texts = {key: record.get(key, default) for key, default in (("finish_reason", "stop"), ("source", ""))}
    for key, value in texts.items():
        if not isinstance(value, str):
            raise InputError(f"{path}:{number}: {key} is {value!r}, expected a string")
    return Rollout(record["prompt_ids"], record["response_ids"], **texts)


def check_rollouts_of(
    backbone: Backbone, path: Path, header: RolloutHeader, rollouts: Sequence[Rollout], max_length: int = 0
) -> None:
    """`check_rollouts` against a backbone; `max_length` 0 means what it takes."""
    check_rollouts(
        path,
        header,
        rollouts,
        vocab_size=len(backbone.lm_head_weight),
        tokenizer=load_tokenizer(backbone.directory),
        max_length=min(max_length or backbone.max_length, backbone.max_length),
    )


def check_rollouts(
    path: Path,
    header: RolloutHeader,
    rollouts: Sequence[Rollout],
    *,
    vocab_size: int,
    tokenizer: Any,
    max_length: int,
) -> None:
    """Refuse rollouts that are not this model's own.

    Raises:
        InputError: another vocabulary or tokenizer, or a conversation longer than the model takes.
    """
    if header.vocab_size != vocab_size:
        raise InputError(
            f"{path} was sampled with a vocabulary of {header.vocab_size}, the backbone has {vocab_size}; "
            "sample rollouts from this backbone"
        )
    if header.tokenizer_hash != (own := tokenizer_hash(tokenizer)):
        raise InputError(
            f"{path} was written with another tokenizer (hash {header.tokenizer_hash}, the backbone's is {own}); "
            "sample rollouts from this backbone"
        )
    for number, rollout in enumerate(rollouts, start=2):
        if len(rollout) > max_length:
            raise InputError(
                f"{path}:{number}: {len(rollout)} tokens, longer than the {max_length} of the backbone or `max_length`; "
                "leave it out or raise max_length"
            )


def digest(rollouts: Iterable[Rollout]) -> str:
    """Fingerprint of rollouts and their order."""
    whole = hashlib.sha256()
    for rollout in rollouts:
        whole.update(rollout.key)
    return whole.hexdigest()[:16]


def split_held_out(rollouts: Sequence[Rollout], share: float) -> tuple[list[Rollout], list[Rollout]]:
    """Training and held-out rollouts; which side one falls on depends on its token ids and nothing else."""
    bound = int(share * 2**32)
    held_out = [int.from_bytes(r.key[:4], "big") < bound for r in rollouts]
    train = [r for r, out in zip(rollouts, held_out, strict=True) if not out]
    return train, [r for r, out in zip(rollouts, held_out, strict=True) if out]
