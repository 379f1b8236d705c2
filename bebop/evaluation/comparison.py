"""Heads trained with different objectives, compared on the same documents: paired over documents and over seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from bebop.evaluation.engine_counts import RULES
from bebop.evaluation.entropy import line_of_moments, line_through
from bebop.evaluation.measures import describe_bins
from bebop.evaluation.page import Table
from bebop.evaluation.plots import MARKERS, RULE_STYLES, legend_below, with_intervals
from bebop.evaluation.sums import DocumentSums, Resampled, estimate
from bebop.evaluation.tables import RULE_TITLES


class Compared:
    """The heads of some objectives on one set of rollouts.

    A resample draws documents, and seeds too, the same ones for every objective: a difference of two objectives is that of
    heads that started alike, saw the same batches and are judged on the same texts.

    Args:
        sums: of each objective, one `DocumentSums` a seed; all over the same documents.
        steps: K.
        resamples, seed: of the bootstrap.
    """

    def __init__(self, sums: Mapping[str, Sequence[DocumentSums]], steps: int, resamples: int = 1000, seed: int = 0):
        self.steps = steps
        self.objectives = list(sums)
        self.averages = {name: [Resampled(s, resamples, seed) for s in of_seeds] for name, of_seeds in sums.items()}
        seeds = min(len(of_seeds) for of_seeds in sums.values())
        generator = torch.Generator().manual_seed(seed + 1)
        drawn = torch.randint(seeds, (resamples, seeds), generator=generator)
        self.times = torch.ones(1 + resamples, seeds, dtype=torch.float64)
        self.times[1:] = torch.zeros(resamples, seeds, dtype=torch.float64).scatter_add_(
            1, drawn, torch.ones_like(drawn, dtype=torch.float64)
        )

    def per_seed(self, objective: str, rule: str) -> Tensor:
        """Accept length as an engine counts it, [seeds, 1 + resamples] (documents resampled)."""
        names = [f"{rule}/engine-{self.steps}/{j}" for j in range(1, self.steps + 1)]
        seeds = self.averages[objective][: self.times.shape[1]]
        return torch.stack([1 + torch.stack([a[name] for name in names]).sum(0) for a in seeds])

    def mean(self, objective: str, name: str) -> Tensor:
        """An average over chains, averaged over seeds too: [1 + resamples]."""
        seeds = self.averages[objective][: self.times.shape[1]]
        return self._over_seeds(torch.stack([a[name] for a in seeds]))

    def accept_length(self, objective: str, rule: str) -> Tensor:
        """[1 + resamples], averaged over seeds."""
        return self._over_seeds(self.per_seed(objective, rule))

    def _over_seeds(self, values: Tensor) -> Tensor:
        return (self.times * values.T).sum(1) / self.times.sum(1)

    def describe(self, baseline: str) -> dict[str, Any]:
        """For every objective, by rule: accept length, its difference from the baseline's and the values of each seed."""
        result: dict[str, Any] = {}
        for objective in self.objectives:
            result[objective] = {"kl": estimate(self.mean(objective, "kl/1"))}
            for rule in RULES:
                length = self.accept_length(objective, rule)
                result[objective][rule] = {
                    "accept_length": estimate(length),
                    "difference": estimate(length - self.accept_length(baseline, rule)),
                    "of_each_seed": self.per_seed(objective, rule)[:, 0].tolist(),
                    "alpha": [estimate(self.mean(objective, f"{rule}/alpha/{j + 1}")) for j in range(self.steps)],
                    "draft_1_by_entropy": line_of_moments(self.averages[objective][0], f"{rule}/draft_1"),
                }
        return result

    def differences(self, pairs: Sequence[tuple[str, str]]) -> dict[str, dict[str, Any]]:
        """Accept length of the first of a pair less that of the second, by rule, where both are among the objectives."""
        return {
            f"{a} - {b}": {rule: estimate(self.accept_length(a, rule) - self.accept_length(b, rule)) for rule in RULES}
            for a, b in pairs
            if a in self.objectives and b in self.objectives
        }


def lines_over_sets(sets: Sequence[Compared], objective: str) -> dict[str, Any]:
    """Accept length of an objective's heads against entropy, over three or more sets of rollouts, by rule."""
    entropy = torch.stack([one.mean(objective, "target_entropy") for one in sets])
    return {rule: line_through(entropy, torch.stack([one.accept_length(objective, rule) for one in sets])) for rule in RULES}


def lengths_table(title: str, described: Mapping[str, Any], baseline: str) -> Table:
    """A row an objective, the longest accept length under rejection sampling first."""
    rows = []
    for objective in _ranked(described):
        cells = [objective]
        for rule in RULES:
            one = described[objective][rule]
            cells += [str(one["accept_length"]), _signed(one["difference"]) if objective != baseline else ""]
        rows.append(cells)
    columns = ["objective"]
    for rule_title in RULE_TITLES.values():
        columns += [f"accept length, {rule_title}", f"less that of {baseline}"]
    return Table(title, columns, rows)


def details_table(title: str, described: Mapping[str, Any]) -> Table:
    rows = []
    for objective in _ranked(described):
        one = described[objective]
        sampled, greedy = (one[rule] for rule in RULES)
        alpha = " ".join(f"{a.value:.3f}" for a in sampled["alpha"])
        seeds = [" ".join(f"{x:.3f}" for x in of_rule["of_each_seed"]) for of_rule in (sampled, greedy)]
        rows.append([objective, *seeds, alpha, f"{one['kl'].value:.3f}"])
    columns = ["objective", *(f"accept length of each seed, {t}" for t in RULE_TITLES.values())]
    return Table(title, [*columns, "acceptance of drafts 1..K", "KL of draft 1, nats"], rows)


def _ranked(described: Mapping[str, Any]) -> list[str]:
    return sorted(described, key=lambda name: -described[name]["rejection_sampling"]["accept_length"].value)


def differences_table(title: str, differences: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = [[pair, *(_signed(by_rule[rule]) for rule in RULES)] for pair, by_rule in differences.items()]
    return Table(title, ["accept length of one less the other's", *RULE_TITLES.values()], rows)


def slopes_table(slopes: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = [
        [f"{objective}, {RULE_TITLES[rule]}", *(str(x) for x in line)]
        for objective, by_rule in slopes.items()
        for rule, line in by_rule.items()
    ]
    return Table("Accept length on entropy, over sets of rollouts", ["", "slope per nat", "intercept", "R²"], rows)


def plot_lengths(described: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Accept length of every objective on every set: filled under rejection sampling, open for target-only."""
    objectives = list(next(iter(described.values())))
    figure = Figure(figsize=(4.2 * len(described) + 2, 0.42 * len(objectives) + 1.8), layout="constrained")
    panels = figure.subplots(1, len(described), sharey=True, squeeze=False)[0]
    for axes, (name, one) in zip(panels, described.items(), strict=True):
        for rule, offset, face in (("rejection_sampling", -0.12, "black"), ("target_only", 0.12, "white")):
            for i, objective in enumerate(objectives):
                e = one[objective][rule]["accept_length"]
                around = [[max(0.0, e.value - e.low)], [max(0.0, e.high - e.value)]]
                label = RULE_TITLES[rule] if i == 0 else None
                axes.errorbar(
                    e.value, i + offset, xerr=around, fmt="o", color="black", mfc=face, capsize=3, markersize=5, label=label
                )
        axes.set(xlabel="tokens per target pass", title=name)
        axes.set_yticks(range(len(objectives)), objectives)
        axes.grid(axis="x", color="0.9")
    panels[0].invert_yaxis()
    legend_below(figure, panels[0])
    return figure


def plot_against_entropy(averages: Mapping[str, Resampled]) -> Figure:
    """Acceptance of the first draft against the target's entropy there, by objective: one panel a rule."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    for axes, rule in zip(figure.subplots(1, 2, sharey=True), RULES, strict=True):
        for marker, (objective, one) in zip(MARKERS, averages.items(), strict=False):
            rows = [row for row in describe_bins(one, "entropy") if row["chains"] >= 20]
            line = line_of_moments(one, f"{rule}/draft_1")
            label = f"{objective}: slope {line.slope.value:+.3f} per nat, R² {line.r_squared.value:.2f}"
            style = "-" if marker == MARKERS[0] else "--"
            color = "black" if marker == MARKERS[0] else "0.4"
            x = [row["target_entropy"].value for row in rows]
            with_intervals(axes, x, [row["rules"][rule]["alpha"] for row in rows], marker + style, color, label)
        axes.set(xlabel="target's entropy, nats (mean of the bin)", ylabel="acceptance probability of the first draft")
        axes.set(title=RULE_STYLES[rule][2])
        axes.legend(fontsize="small")
    figure.axes[0].set_ylim(bottom=0)  # of both
    return figure


def plot_training(curves: Mapping[str, Sequence[float]]) -> Figure:
    """Accept length on the training batches, by optimiser step: mean over seeds and a running mean over five steps."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots()
    styles = [(line, color) for color in ("black", "0.55") for line in ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))]
    for (line, color), (objective, curve) in zip(styles, curves.items(), strict=False):
        window = min(5, len(curve))
        smooth = torch.tensor(curve).unfold(0, window, 1).mean(1).tolist()
        axes.plot(range(window, len(curve) + 1), smooth, linestyle=line, color=color, label=objective)
    axes.set(
        xlabel="optimiser step", ylabel="tokens per target pass", title="Accept length on the training batches, realised"
    )
    legend_below(figure, axes)
    return figure


def _signed(e: Any) -> str:
    return f"{e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}]"
