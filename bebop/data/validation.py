"""What rollout files hold, and whether a head can be trained on them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bebop.backbone import load_tokenizer, read_config, resolve_checkpoint
from bebop.data.batches import plan_micro_batches
from bebop.data.files import find_files
from bebop.data.rollouts import Rollout, RolloutHeader, mismatches, read_rollout_header, read_rollouts

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
        supervised_share: of the tokens, those of responses.
        prompt_lengths, response_lengths: in tokens, at `PERCENTILES`.
        response_histogram: responses of lengths from a power of two to below the next, by the former.
        finish_reasons, sources: rollouts of each.
        duplicates: rollouts whose ids came before.
        too_short: rollouts whose response has no room for a whole chain of drafts.
        frequent_tokens: (id, text or "", share of all response tokens), the most frequent first.
        padding_share: of the tokens of micro-batches, "packed" and with "one_a_row", as recurrent models need it.
        problems: what keeps a head from being trained on them, a line each.
        warnings: what makes it learn less than it could.
    """

    files: list[str]
    header: RolloutHeader
    rollouts: int
    tokens: int
    supervised_share: float
    prompt_lengths: dict[int, int]
    response_lengths: dict[int, int]
    response_histogram: dict[int, int]
    finish_reasons: dict[str, int]
    sources: dict[str, int]
    duplicates: int
    too_short: int
    frequent_tokens: list[tuple[int, str, float]]
    padding_share: dict[str, float]
    problems: list[str]
    warnings: list[str]


def validate(
    paths: Sequence[str | Path], *, draft_steps: int, tokens_per_micro_batch: int, model: str | None = None
) -> Validation:
    """Measure rollout files.

    Args:
        paths: of files, or patterns, as `read_rollouts` takes them.
        draft_steps: K.
        tokens_per_micro_batch: for the padding.
        model: directory or hub id of the model to train a head for: tokenizer, vocabulary and length are compared.

    Raises:
        InputError: the files cannot be read or do not belong together; the model cannot be found.
    """
    directory = None if model is None else resolve_checkpoint(model, weights=False)
    tokenizer = None if directory is None else load_tokenizer(directory)
    header, rollouts = read_rollouts(paths)
    files = find_files(paths)
    prompts, responses = (np.array([len(getattr(r, ids)) for r in rollouts]) for ids in ("prompt_ids", "response_ids"))
    exponents, counts = np.unique(np.log2(responses).astype(int), return_counts=True)
    frequent = _frequent_tokens(rollouts, header.vocab_size, tokenizer)
    result = Validation(
        files=[str(path) for path in files],
        header=header,
        rollouts=len(rollouts),
        tokens=int(prompts.sum() + responses.sum()),
        supervised_share=float(responses.sum() / (prompts.sum() + responses.sum())),
        prompt_lengths=_percentiles(prompts),
        response_lengths=_percentiles(responses),
        response_histogram={2**e: n for e, n in zip(exponents.tolist(), counts.tolist(), strict=True)},
        finish_reasons=dict(Counter(r.finish_reason for r in rollouts).most_common()),
        sources=dict(Counter(r.source for r in rollouts).most_common()),
        duplicates=len(rollouts) - len({r.key for r in rollouts}),
        too_short=int((responses <= draft_steps).sum()),
        frequent_tokens=frequent,
        padding_share=_padding((prompts + responses).tolist(), tokens_per_micro_batch),
        problems=[],
        warnings=[],
    )
    names = " ".join(result.files)
    if result.too_short == result.rollouts:
        result.problems.append(
            f"{names}: the longest response has {responses.max()} tokens, too few for {draft_steps} draft steps, which take "
            f"{draft_steps + 1}; sample longer responses or lower draft_steps"
        )
    if directory is not None:
        config = read_config(directory).get_text_config()
        result.problems += mismatches(
            names,
            header,
            rollouts,
            vocab_size=config.vocab_size,
            tokenizer=tokenizer,
            max_length=config.max_position_embeddings,
        )
    token, text, share = frequent[0]
    if share > _DEGENERATE:
        result.warnings.append(f"token {token} {text} is {share:.0%} of all responses, which are hardly text")
    if converted := [str(path) for path in files if "converted_from" in read_rollout_header(path).sampling]:
        result.warnings.append(f"{' '.join(converted)}: converted from chats, which the model may not have sampled itself")
    return result


def _percentiles(lengths: np.ndarray) -> dict[int, int]:
    """Lengths that occur, so that there is no fraction of a token."""
    values = np.percentile(lengths, PERCENTILES, method="inverted_cdf")
    return dict(zip(PERCENTILES, values.tolist(), strict=True))


def _frequent_tokens(rollouts: Sequence[Rollout], vocab_size: int, tokenizer: Any) -> list[tuple[int, str, float]]:
    counts = np.zeros(vocab_size, dtype=np.int64)
    for rollout in rollouts:
        np.add.at(counts, rollout.response_ids, 1)
    most = np.argsort(-counts, kind="stable")[:10]
    return [
        (i, "" if tokenizer is None else repr(tokenizer.decode([i])), float(counts[i] / counts.sum()))
        for i in most.tolist()
        if counts[i]
    ]


def _padding(lengths: Sequence[int], tokens: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    some = [lengths[i] for i in torch.randperm(len(lengths), generator=generator)[:_MOST_PLANNED].tolist()]
    shares = {}
    for name, pack in (("packed", True), ("one_a_row", False)):
        plan = plan_micro_batches(some, tokens, pack, torch.Generator().manual_seed(0))
        taken = sum(len(rows) * max(sum(some[i] for i in row) for row in rows) for rows in plan)
        shares[name] = 1 - sum(some) / taken
    return shares
