"""What rollout files hold, and whether a head can be trained on them.

    python recipes/validate_rollouts.py 'rollouts/*.jsonl' --model Qwen/Qwen2.5-7B-Instruct

Ends with exit code 0 if it can, else with 1 and a line for each problem.
"""

import argparse
import json
import sys
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from bebop.data.validation import Validation, validate
from bebop.errors import InputError, errors_as_one_line
from bebop.training.config import TrainConfig
from bebop.writing import complete


def main() -> None:
    defaults = TrainConfig()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("files", nargs="+", help="rollout files or patterns of such")
    parser.add_argument(
        "--model", help="directory or hub id: compare tokenizer, vocabulary and length, and show tokens as text"
    )
    parser.add_argument(
        "--tokens-per-micro-batch", type=int, default=defaults.tokens_per_micro_batch, help="to measure the padding at"
    )
    parser.add_argument("--draft-steps", type=int, default=defaults.draft_steps, help="K")
    parser.add_argument("--held-out-share", type=float, default=defaults.held_out_share, help="kept for evaluation by a run")
    parser.add_argument("--max-length", type=int, default=0, help="longest conversation; 0 means what the model takes")
    parser.add_argument("--json", type=Path, help="file to write the numbers to, every token's count among them; replaced")
    parser.add_argument("--plot", type=Path, help="PNG file to draw lengths and token frequencies in; replaced")
    arguments = parser.parse_args()
    with errors_as_one_line():
        found = _validate(arguments)
    _print(found, Console(markup=False))
    if found.problems:
        sys.exit("\n".join(f"error: {problem}" for problem in found.problems))


def _validate(arguments: argparse.Namespace) -> Validation:
    for key in ("tokens_per_micro_batch", "draft_steps"):
        if getattr(arguments, key) < 1:
            raise InputError(f"--{key.replace('_', '-')} is {getattr(arguments, key)}, expected 1 or more")
    if not 0 <= arguments.held_out_share < 1:
        raise InputError(f"--held-out-share is {arguments.held_out_share}, expected a share from 0 to below 1")
    if arguments.max_length < 0:
        raise InputError(f"--max-length is {arguments.max_length}, expected 0 or more")
    found = validate(
        arguments.files,
        draft_steps=arguments.draft_steps,
        tokens_per_micro_batch=arguments.tokens_per_micro_batch,
        held_out_share=arguments.held_out_share,
        max_length=arguments.max_length,
        model=arguments.model,
    )
    if arguments.json:
        with complete(arguments.json) as partial:
            partial.write_text(json.dumps(asdict(found), indent=2) + "\n")
    if arguments.plot:
        with complete(arguments.plot) as partial:
            _plot(found).savefig(partial, format="png", dpi=130)
    return found


def _print(found: Validation, console: Console) -> None:
    facts = Table(title="Rollouts", show_header=False)
    rows = {
        "files": "\n".join(found.files),
        "sampled by": f"{found.header.model} at temperature {found.header.temperature}",
        "rollouts": f"{found.rollouts:,}, of which {found.held_out:,} are held out",
        "tokens": f"{found.tokens:,}",
        "supervised": f"{found.supervised_share:.1%} of the tokens",
        "finish reasons": _counts(found.finish_reasons),
        "sources": _counts(found.sources),
        "duplicates": f"{found.duplicates:,}",
        "too short for a whole chain": f"{found.too_short:,}",
        "padding": f"{found.padding_share['packed']:.1%} packed, {found.padding_share['one_a_row']:.1%} one document a row",
    }
    for row in rows.items():
        facts.add_row(*row)

    lengths = Table("", *("min" if p == 0 else "max" if p == 100 else f"{p}%" for p in found.prompt_lengths), title="Tokens")
    for name, values in (("prompt", found.prompt_lengths), ("response", found.response_lengths)):
        lengths.add_row(name, *(f"{value:,}" for value in values.values()))

    histogram = Table("tokens", "responses", "", title="Response lengths")
    most = max(found.response_histogram.values())
    for low, count in found.response_histogram.items():
        histogram.add_row(f"{low:,} to {2 * low - 1:,}", f"{count:,}", "█" * -(-40 * count // most))

    counts = list(found.token_counts.values())
    tokens = Table(
        "id",
        "text" if found.token_texts else "",
        "share",
        title=f"Response tokens: {len(counts):,} of {found.header.vocab_size:,} occur",
    )
    for token, count in islice(found.token_counts.items(), 10):
        text = found.token_texts.get(token)
        tokens.add_row(str(token), "" if text is None else repr(text), f"{count / sum(counts):.2%}")
    for most in (n for n in (10, 100, 1000, 10_000) if n < len(counts)):
        tokens.add_row(f"the {most:,} most frequent", "", f"{sum(counts[:most]) / sum(counts):.2%}")

    for table in (facts, lengths, histogram, tokens):
        console.print(table)
    for warning in found.warnings:
        console.print(f"warning: {warning}", soft_wrap=True)


def _plot(found: Validation) -> Figure:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, histogram, style in (
        ("prompts", found.prompt_histogram, "s--"),
        ("responses", found.response_histogram, "o-"),
    ):
        left.plot(list(histogram), list(histogram.values()), style, color="black", label=name)
    left.set_xscale("log", base=2)
    left.set(xlabel="tokens, from this to below twice as many", ylabel="rollouts", title="Lengths")
    left.legend()
    counts = list(found.token_counts.values())
    right.loglog(range(1, len(counts) + 1), counts, color="black")
    right.set(xlabel="rank of the token", ylabel="times in responses", title="Response tokens by frequency")
    return figure


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name or '(none)'} {count:,}" for name, count in counts.items())


if __name__ == "__main__":
    main()
