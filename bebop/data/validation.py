"""What rollout files hold, and whether a head can be trained on them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from bebop.backbone import load_tokenizer, resolve_checkpoint
from bebop.data.batches import plan_micro_batches
from bebop.data.files import find_files
from bebop.data.rollouts import (
    Rollout,
    RolloutHeader,
    mismatches,
    read_rollout_header,
    read_rollouts,
    split_held_out,
    split_problems,
)

PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)
_DEGENERATE = 1 / 3  # share of one token in all responses from which on they are hardly text
_MOST_PLANNED = 20_000  # rollouts that are packed to measure the padding


@dataclass
class Validation:
    """Numbers of rollout files, and what is wrong with them.

    Attributes:
        files: that were read.
        header: of the first file.
        rollouts, tokens: how many; tokens of prompts and responses.
        held_out: rollouts that a run would not train on but measure with.
        supervised_share: of the tokens, those of responses.
        prompt_lengths, response_lengths: in tokens, at `PERCENTILES`.
        prompt_histogram, response_histogram: those of lengths from a power of two to below the next, by the former.
        finish_reasons, sources: rollouts of each.
        duplicates: rollouts whose ids came before.
        too_short: rollouts whose response has no room for a whole chain of drafts.
        token_counts: of every token in responses, the most frequent first.
        token_texts: of the ten most frequent tokens, if there is a tokenizer to say.
        padding_share: of the tokens of micro-batches, "packed" and with "one_a_row", as recurrent models need it.
        problems: what keeps a head from being trained on them, a line each.
        warnings: what makes it learn less than it could.
    """

    files: list[str]
    header: RolloutHeader
    rollouts: int
    tokens: int
    held_out: int
    supervised_share: float
    prompt_lengths: dict[int, int]
    response_lengths: dict[int, int]
    prompt_histogram: dict[int, int]
    response_histogram: dict[int, int]
    finish_reasons: dict[str, int]
    sources: dict[str, int]
    duplicates: int
    too_short: int
    token_counts: dict[int, int]
    token_texts: dict[int, str]
    padding_share: dict[str, float]
    problems: list[str]
    warnings: list[str]


def validate(
    paths: Sequence[str | Path],
    *,
    draft_steps: int,
    tokens_per_micro_batch: int,
    held_out_share: float,
    max_length: int = 0,
    model: str | None = None,
) -> Validation:
    """Measure rollout files.

    Args:
        paths: of files, or patterns, as `read_rollouts` takes them.
        draft_steps, tokens_per_micro_batch, held_out_share, max_length: of the run, as `TrainConfig` documents them.
        model: directory or hub id of the model to train a head for: tokenizer, vocabulary and length are compared.

    Raises:
        InputError: the files cannot be read or do not belong together; the model cannot be found.
    """
    directory = None if model is None else resolve_checkpoint(model, weights=False)
    tokenizer = None if directory is None else load_tokenizer(directory)
    header, rollouts = read_rollouts(paths)
    files = find_files(paths)
    prompts, responses = (np.array([len(getattr(r, ids)) for r in rollouts]) for ids in ("prompt_ids", "response_ids"))
    train, held_out = split_held_out(rollouts, held_out_share)
    tokens = _token_counts(rollouts, header.vocab_size)
    result = Validation(
        files=[str(path) for path in files],
        header=header,
        rollouts=len(rollouts),
        tokens=int(prompts.sum() + responses.sum()),
        held_out=len(held_out),
        supervised_share=float(responses.sum() / (prompts.sum() + responses.sum())),
        prompt_lengths=_percentiles(prompts),
        response_lengths=_percentiles(responses),
        prompt_histogram=_histogram(prompts),
        response_histogram=_histogram(responses),
        finish_reasons=dict(Counter(r.finish_reason for r in rollouts).most_common()),
        sources=dict(Counter(r.source for r in rollouts).most_common()),
        duplicates=len(rollouts) - len({r.key for r in rollouts}),
        too_short=int((responses <= draft_steps).sum()),
        token_counts=tokens,
        token_texts={} if tokenizer is None else {i: str(tokenizer.decode([i])) for i in islice(tokens, 10)},
        padding_share=_padding((prompts + responses).tolist(), tokens_per_micro_batch),
        problems=[],
        warnings=[],
    )
    names = " ".join(result.files)
    if directory is not None:
        result.problems += mismatches(directory, names, header, rollouts, max_length)
    result.problems += split_problems(names, train, held_out, draft_steps)
    token, count = next(iter(tokens.items()))
    if (share := count / responses.sum()) > _DEGENERATE:
        text = repr(result.token_texts.get(token, ""))
        result.warnings.append(f"token {token} {text} is {share:.0%} of all responses, which are hardly text")
    if converted := [str(path) for path in files if "converted_from" in read_rollout_header(path).sampling]:
        result.warnings.append(f"{' '.join(converted)}: converted from chats, which the model may not have sampled itself")
    return result


def _percentiles(lengths: np.ndarray) -> dict[int, int]:
    """Lengths that occur, so that there is no fraction of a token."""
    values = np.percentile(lengths, PERCENTILES, method="inverted_cdf")
    return dict(zip(PERCENTILES, values.tolist(), strict=True))


def _histogram(lengths: np.ndarray) -> dict[int, int]:
    exponents, counts = np.unique(np.log2(lengths).astype(int), return_counts=True)
    return {2**e: n for e, n in zip(exponents.tolist(), counts.tolist(), strict=True)}


def _token_counts(rollouts: Sequence[Rollout], vocab_size: int) -> dict[int, int]:
    counts = np.zeros(vocab_size, dtype=np.int64)
    for rollout in rollouts:
        np.add.at(counts, rollout.response_ids, 1)
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    return dict(zip(order.tolist(), counts[order].tolist(), strict=True))


def _padding(lengths: Sequence[int], tokens: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    some = [lengths[i] for i in torch.randperm(len(lengths), generator=generator)[:_MOST_PLANNED].tolist()]
    shares = {}
    for name, pack in (("packed", True), ("one_a_row", False)):
        plan = plan_micro_batches(some, tokens, pack, torch.Generator().manual_seed(0))
        taken = sum(len(rows) * max(sum(some[i] for i in row) for row in rows) for rows in plan)
        shares[name] = 1 - sum(some) / taken
    return shares
