"""The report of a run, from its metrics: a table, JSON and a plot of what training did to acceptance."""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from bebop.writing import complete


def write_report(run: Path) -> None:
    """Write report.json and report.png into the run's directory from its metrics.jsonl, and print the table."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    training = [r for r in records if r["kind"] == "training"]
    evaluations = [r for r in records if r["kind"] == "evaluation"]
    before, after = evaluations[0], evaluations[-1]
    report = {"before": before, "after": after, "time": _time(training)}
    with complete(run / "report.json") as partial:
        partial.write_text(json.dumps(report, indent=2) + "\n")
    _plot(training, evaluations, run / "report.png")
    console = Console()
    console.print(_table(before, after))
    parts = ", ".join(f"{name} {share:.0%}" for name, share in _time(training)["share"].items())
    console.print(f"time per step {_time(training)['seconds_per_step']:.2f} s: {parts}")
    console.print(f"report: {run}/report.json, {run}/report.png; head: {run}/head")


def _time(training: list[dict[str, Any]]) -> dict[str, Any]:
    """Median step, and the share of each part in all steps but the first (which compiles)."""
    steps = training[1:] or training
    total = sum(r["seconds"] for r in steps)
    parts = [key for key in steps[0] if key.startswith("seconds_")]
    return {
        "seconds_per_step": sorted(r["seconds"] for r in steps)[len(steps) // 2],
        "training_seconds": sum(r["seconds"] for r in training),
        "share": {key.removeprefix("seconds_"): sum(r[key] for r in steps) / total for key in parts},
    }


def _table(before: dict[str, Any], after: dict[str, Any]) -> Table:
    table = Table(title=f"Acceptance on {after['chains']} held-out chains, before and after {after['step']} steps")
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    for name, title in (("", "rejection sampling"), ("_target_only", "target-only (greedy drafts)")):
        table.add_section()
        table.add_row(f"[bold]{title}", "", "")
        for j, (x, y) in enumerate(zip(before[f"alpha{name}"], after[f"alpha{name}"], strict=True), start=1):
            table.add_row(f"acceptance of draft {j}, alpha", f"{x:.3f}", f"{y:.3f}")
        for j, (x, y) in enumerate(zip(before[f"realised{name}"], after[f"realised{name}"], strict=True), start=1):
            table.add_row(f"drafts 1..{j} all accepted", f"{x:.3f}", f"{y:.3f}")
        key = f"accept_length{name}"
        table.add_row("accept length (with bonus token)", f"{before[key]:.3f}", f"{after[key]:.3f}")
        if not name:
            key = "accept_length_eq13"
            table.add_row("accept length by Eq. 13", f"{before[key]:.3f}", f"{after[key]:.3f}")
    table.add_section()
    table.add_row("KL(target, draft), draft 1, nats", f"{before['kl'][0]:.3f}", f"{after['kl'][0]:.3f}")
    table.add_row("target entropy, nats", f"{before['target_entropy']:.3f}", f"{after['target_entropy']:.3f}")
    return table


def _plot(training: list[dict[str, Any]], evaluations: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(14, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    # Objectives have scales of their own: the cold start's on the left axis, the one after it on the right.
    objectives = list(dict.fromkeys(r["objective"] for r in training))
    axes = [left, *(left.twinx() for _ in objectives[1:])]
    for objective, style, axis in zip(objectives, ("-", "--"), axes, strict=False):
        own = [r for r in training if r["objective"] == objective]
        axis.plot([r["step"] for r in own], [r["loss"] for r in own], style, color="black")
        axis.set_ylabel(f"{objective} loss per pair ({'solid' if style == '-' else 'dashed'})")
    left.set(xlabel="optimiser step", title="Training loss")

    middle.plot([r["step"] for r in training], [r["accept_length"] for r in training], color="0.7", label="training batches")
    steps = [r["step"] for r in evaluations]
    middle.plot(steps, [r["accept_length"] for r in evaluations], "o-", color="black", label="held out, rejection sampling")
    middle.plot(
        steps,
        [r["accept_length_target_only"] for r in evaluations],
        "s--",
        color="black",
        label="held out, target-only",
    )
    middle.set(xlabel="optimiser step", ylabel="tokens per target pass", title="Accept length")
    middle.legend()

    depth = range(1, len(evaluations[0]["alpha"]) + 1)
    series = (("alpha", "o", "rejection sampling"), ("alpha_target_only", "s", "target-only"))
    for record, style, when in ((evaluations[0], ":", "before"), (evaluations[-1], "-", "after")):
        for key, marker, rule in series:
            right.plot(depth, record[key], marker + style, color="black", label=f"{rule}, {when}")
    right.set(xlabel="draft step", ylabel="acceptance probability alpha", title="Acceptance per draft step", ylim=(0, 1))
    right.set_xticks(list(depth))
    right.legend()
    with complete(path) as partial:
        figure.savefig(partial, format="png", dpi=130)
