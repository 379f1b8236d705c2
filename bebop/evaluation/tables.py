"""Tables of an evaluation, from what `bebop.evaluation.measures.describe` found for every set of rollouts."""

from collections.abc import Mapping
from typing import Any

from bebop.evaluation.engine_counts import RULES
from bebop.evaluation.page import Table

RULE_TITLES = {"rejection_sampling": "rejection sampling", "target_only": "target-only"}


def overview(described: Mapping[str, Any]) -> Table:
    rows = []
    for name, one in described.items():
        for rule, title in RULE_TITLES.items():
            of_rule = one["rules"][rule]
            best = max(of_rule["served"], key=lambda row: row["speed_up"].value)
            at_all_steps = of_rule["served"][-1]
            rows.append(
                [
                    f"{name}, {title}",
                    f"{one['target_entropy'].value:.3f}",
                    str(at_all_steps["accept_length"]),
                    f"{of_rule['accept_length_realised'].value:.3f}",
                    f"{of_rule['accept_length_eq13'].value:.3f}",
                    f"{at_all_steps['rounds_per_response'].value:.1f}",
                    f"{best['speed_up'].value:.2f} at K = {best['draft_steps']}",
                ]
            )
    columns = (
        "rollouts, rule", "entropy, nats", "accept length in an engine", "realised", "by Eq. 13",
        "rounds per response", "best speed-up",
    )  # fmt: skip
    return Table("Accept length at all draft steps", columns, rows)


def served(described: Mapping[str, Any]) -> Table:
    """What an engine will count at each K under rejection sampling, and what the reference decoder counted."""
    rows = []
    for name, one in described.items():
        counted = {d["draft_steps"]: d for d in one["decoded"]}
        for row in one["rules"]["rejection_sampling"]["served"]:
            k = row["draft_steps"]
            cells = [f"{name}, K = {k}", " ".join(f"{a.value:.3f}" for a in row["acceptance"]), str(row["accept_length"])]
            cells += [f"{row['rounds_per_response'].value:.1f}", f"{row['speed_up'].value:.2f}"]
            if counted:
                d = counted[k]
                acceptance = " ".join(f"{a:.3f}" for a in d["acceptance"])
                cells += [acceptance, f"{d['accept_length']:.3f}", f"{d['rounds']:,}"]
            rows.append(cells)
    columns = ["rollouts", "acceptance of drafts 1..K", "accept length", "rounds per response", "speed-up"]
    if any(one["decoded"] for one in described.values()):
        columns += ["counted by the decoder", "accept length", "rounds"]
    return Table("Rejection sampling at each K, as an engine counts", columns, rows)


def per_step(name: str, one: Mapping[str, Any]) -> Table:
    sampled, greedy = (one["rules"][rule] for rule in RULES)
    steps = len(one["kl"])
    measures = [
        ("acceptance, rejection sampling", sampled["alpha"]),
        ("acceptance, target-only", greedy["alpha"]),
        ("drafts 1..j all accepted, realised", sampled["realised"]),
        ("drafts 1..j all accepted, Eq. 12", sampled["cumulative"]),
        ("drafts 1..j all accepted, target-only, realised", greedy["realised"]),
        ("KL(target, draft), nats", one["kl"]),
        ("KL(draft, target), nats", one["reverse_kl"]),
        ("entropy of the draft, nats", one["draft_entropy"]),
        ("most likely tokens agree", one["top_agreement"]),
    ]
    rows = [[title, *(str(e) for e in estimates)] for title, estimates in measures]
    wins = one["sampling_beats_greedy"]
    title = (
        f"{name}: averages over {one['chains']:,} chains of {one['documents']:,} texts; rejection sampling beats "
        f"target-only at {wins.value:.1%} of drafts (Eq. 48)"
    )
    return Table(title, ("", *(f"draft {j}" for j in range(1, steps + 1))), rows)


def bins(name: str, one: Mapping[str, Any], group: str) -> Table:
    rows = []
    for row in one[f"by_{group}"]:
        cells = [f"{row['low']:g} to {row['high']:g}", f"{row['chains']:,}", f"{row['target_entropy'].value:.3f}"]
        for rule in RULES:
            of_rule = row["rules"][rule]
            cells += [str(of_rule["alpha"]), str(of_rule.get("accept_length", ""))]
        rows.append(cells)
    unit = "entropy, nats" if group == "entropy" else "tokens into the response"
    columns = (
        unit, "chains", "mean entropy", "acceptance of draft 1", "accept length", "the same, target-only", "accept length",
    )  # fmt: skip
    return Table(name, columns, rows)


def lines(described: Mapping[str, Any]) -> Table:
    """Acceptance on entropy over the positions of each set."""
    rows = []
    for name, one in described.items():
        for rule, title in RULE_TITLES.items():
            for key, what in (
                ("draft_1_by_entropy", "acceptance of draft 1"),
                ("chain_by_entropy", "accept length, Eq. 12"),
            ):
                rows.append([f"{name}, {title}, {what}", *(str(x) for x in one["rules"][rule][key])])
    return Table("Least squares on the target's entropy, over positions", ("", "slope per nat", "intercept", "R²"), rows)
