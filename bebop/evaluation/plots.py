"""Figures of an evaluation, readable in black and white: a marker for each set of rollouts, a line style for each rule."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bebop.evaluation.entropy import Line

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
# Line style, grey and title.
RULE_STYLES = {"rejection_sampling": ("-", "black", "rejection sampling"), "target_only": ("--", "0.45", "target-only")}


def served(described: Mapping[str, Any]) -> Figure:
    """Accept length and speed-up against the draft steps of a round, for every set of rollouts."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for marker, (name, one) in zip(cycle(MARKERS), described.items(), strict=False):
        for rule, (line, color, title) in RULE_STYLES.items():
            rows = one["rules"][rule]["served"]
            depth = [row["draft_steps"] for row in rows]
            for axes, key in ((left, "accept_length"), (right, "speed_up")):
                with_intervals(axes, depth, [row[key] for row in rows], marker + line, color, f"{name}, {title}")
                axes.set_xticks(depth)
    left.set(xlabel="draft steps of a round, K", ylabel="tokens per target pass", title="Accept length in an engine")
    right.set(xlabel="draft steps of a round, K", ylabel="times as fast as without drafts", title="Expected speed-up")
    right.axhline(1.0, color="0.7", linewidth=0.8)
    legend_below(figure, left)
    return figure


def by_bin(described: Mapping[str, Any], group: str) -> Figure:
    """Acceptance of the first draft, and accept length, by the target's entropy or by the place in the response."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for marker, (name, one) in zip(cycle(MARKERS), described.items(), strict=False):
        for rule, (line, color, title) in RULE_STYLES.items():
            for axes, key in ((left, "alpha"), (right, "accept_length")):
                rows = [row for row in one[f"by_{group}"] if key in row["rules"][rule] and row["chains"] >= 20]
                x = [row["target_entropy"].value if group == "entropy" else _middle(row) for row in rows]
                estimates = [row["rules"][rule][key] for row in rows]
                with_intervals(axes, x, estimates, marker + line, color, f"{name}, {title}")
    label = (
        "target's entropy at the first draft, nats (mean of the bin)" if group == "entropy" else "tokens into the response"
    )
    left.set(xlabel=label, ylabel="acceptance probability", title="Acceptance of the first draft")
    left.set_ylim(bottom=0)
    right.set(xlabel=label, ylabel="tokens per target pass", title="Accept length, realised")
    if group == "position":
        for axes in (left, right):
            axes.set_xscale("symlog", base=2, linthresh=8)
            axes.xaxis.set_major_formatter("{x:.0f}")
    legend_below(figure, left)
    return figure


def over_sets(
    names: Sequence[str], entropy: Sequence[float], lengths: Mapping[str, Sequence[Any]], lines: Mapping[str, Line]
) -> Figure:
    """Accept length of every set of rollouts against its entropy, with the line through them, for each rule."""
    figure = Figure(figsize=(6.5, 4.4), layout="constrained")
    axes = figure.subplots()
    for rule, (style, color, title) in RULE_STYLES.items():
        line = lines[rule]
        label = f"{title}: slope {line.slope.value:+.3f} per nat, R² {line.r_squared.value:.2f}"
        ends = [min(entropy), max(entropy)]
        axes.plot(ends, [line.at(x) for x in ends], style, color=color, label=label)
        for marker, x, y in zip(cycle(MARKERS), entropy, lengths[rule], strict=False):
            with_intervals(axes, [x], [y], marker, color, None)
    for name, x, y in zip(names, entropy, lengths["rejection_sampling"], strict=True):
        axes.annotate(name, (x, y.value), textcoords="offset points", xytext=(6, 6), fontsize="small")
    axes.set(xlabel="target's entropy, nats", ylabel="tokens per target pass", title="Accept length against entropy")
    axes.margins(x=0.2)
    axes.legend(fontsize="small")
    return figure


def decomposition(names: Sequence[str], entropy_driven: Sequence[float], mismatch_driven: Sequence[float]) -> Figure:
    """Change of acceptance since the first checkpoint: entropy-driven and mismatch-driven parts (Eq. 16)."""
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    x = range(len(names))
    axes.bar([i - 0.2 for i in x], entropy_driven, 0.4, color="0.35", label="entropy-driven, b (H - H0)")
    axes.bar(
        [i + 0.2 for i in x], mismatch_driven, 0.4, color="white", edgecolor="black", hatch="//", label="mismatch-driven"
    )
    total = [e + m for e, m in zip(entropy_driven, mismatch_driven, strict=True)]
    axes.plot(x, total, "ko-", label="change of acceptance rate")
    axes.axhline(0, color="0.7", linewidth=0.8)
    axes.set_xticks(list(x), names, rotation=20)
    axes.set(xlabel="checkpoint", ylabel="acceptance rate, change since the first", title="Where the change comes from")
    axes.legend(fontsize="small")
    return figure


def legend_below(figure: Figure, axes: Axes) -> None:
    """Below the figure, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), fontsize="small")


def with_intervals(
    axes: Axes, x: Sequence[float], estimates: Sequence[Any], style: str, color: str, label: str | None
) -> None:
    y = [e.value for e in estimates]
    below = [max(0.0, e.value - e.low) for e in estimates]
    above = [max(0.0, e.high - e.value) for e in estimates]
    axes.errorbar(x, y, [below, above], fmt=style, color=color, label=label, capsize=3, markersize=5, linewidth=1.2)


def _middle(row: Mapping[str, Any]) -> float:
    return row["low"] if math.isinf(row["high"]) else (row["low"] + row["high"]) / 2
