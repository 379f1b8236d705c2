"""Train the same head with every objective and compare what an engine would accept.

    python recipes/compare_losses.py --config recipes/configs/demo.yaml --output comparison --seeds 3 \
        --held-out sampled-at-0.6.jsonl sampled-at-1.0.jsonl

Any key of the training configuration can be given too. All runs start from one head and see the same batches for the same
number of steps; a seed is another order of the data. What is done is kept: the same command goes on where it was stopped.
"""

import argparse
import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from bebop.data.rollouts import Rollout, RolloutHeader, check_rollouts_of, digest, read_rollouts
from bebop.data.states import StateCache
from bebop.errors import InputError, errors_as_one_line
from bebop.evaluation.acceptance import chain_statistics_at
from bebop.evaluation.comparison import (
    Compared,
    details_table,
    differences_table,
    lengths_table,
    lines_over_sets,
    plot_against_entropy,
    plot_lengths,
    plot_training,
    slopes_table,
)
from bebop.evaluation.measures import MEASURED, add_measures
from bebop.evaluation.page import Section, terminal, write_page, write_whole
from bebop.evaluation.sums import DocumentSums, Resampled, joined
from bebop.heads.loading import head_for
from bebop.machine import use_all_cores
from bebop.training.config import TrainConfig, parse_config
from bebop.training.distribution import make_accelerator
from bebop.training.material import Material
from bebop.training.metrics import METRICS_FILE
from bebop.training.trainer import train
from bebop.writing import check_parents

COLD_START = "lk_hybrid, then e2e_tv"
RANGE = "e2e_tv over temperatures"
OBJECTIVES = (
    "ce", "kl", "reverse_kl", "tv", "e2e_tv", "realised_e2e_tv", "expected_rounds", "lk_hybrid", COLD_START, RANGE,
)  # fmt: skip
# What the paper finds under rejection sampling: each is ahead of the next. Under target-only they are alike.
PAPER_ORDER = (("e2e_tv", "tv"), ("tv", "kl"), ("tv", "ce"), ("e2e_tv", "ce"))


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--objectives", nargs="+", default=OBJECTIVES, help=f"of: {'; '.join(OBJECTIVES)}")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each objective")
    parser.add_argument("--cold-start-share", type=float, default=0.4, help=f"of the steps, for {COLD_START!r}")
    parser.add_argument("--range", type=float, nargs=2, default=(0.4, 1.2), metavar=("LOW", "HIGH"), help=f"for {RANGE!r}")
    parser.add_argument("--baseline", default="ce", help="objective that the others are compared with")
    parser.add_argument("--held-out", nargs="+", type=Path, required=True, help="rollout files to compare the heads on")
    arguments, rest = parser.parse_known_args()
    with errors_as_one_line():
        _compare(arguments, parse_config(rest))


def variant(config: TrainConfig, objective: str, seed: int, arguments: argparse.Namespace) -> TrainConfig:
    """The run of one objective and seed."""
    directory = Path(config.output) / "runs" / f"{objective.replace(', ', '-').replace(' ', '-')}-seed-{seed}"
    changes: dict[str, Any] = {"loss": objective, "cold_start_steps": 0}
    if objective == COLD_START:
        changes = {"loss": "e2e_tv", "cold_start_steps": round(arguments.cold_start_share * config.max_steps)}
    elif objective == RANGE:
        low, high = arguments.range
        changes = {"loss": "e2e_tv", "cold_start_steps": 0, "temperature_low": low, "temperature_high": high}
    resume = "auto" if any(directory.glob("checkpoints/step-*")) else ""
    return replace(config, output=str(directory), seed=seed, resume=resume, **changes)


def _compare(arguments: argparse.Namespace, config: TrainConfig) -> None:
    if unknown := set(arguments.objectives) - set(OBJECTIVES):
        raise InputError(f"--objectives has {sorted(unknown)}; expected some of: {'; '.join(OBJECTIVES)}")
    if len({path.stem for path in arguments.held_out}) < len(arguments.held_out):
        raise InputError("--held-out has files of the same name; results are kept by name, rename one")
    check_parents(Path(config.output) / "runs")
    if arguments.seeds < 1:
        raise InputError(f"--seeds is {arguments.seeds}, expected 1 or more")
    low, high = arguments.range
    if not 0 < low <= high:
        raise InputError(f"--range is {low} {high}, expected two temperatures above 0, the lower one first")
    if not 0 <= arguments.cold_start_share <= 1:
        raise InputError(f"--cold-start-share is {arguments.cold_start_share}, expected a share from 0 to 1")
    accelerator = make_accelerator(config)
    use_all_cores(accelerator.device)
    material = Material.read(config, accelerator)
    held_out = {path.stem: _read_held_out(path, config, material) for path in arguments.held_out}
    material.load_backbone(accelerator)
    objectives = list(arguments.objectives)
    if COLD_START in objectives and (origin := head_for(material.backbone, config.head)[1]) != "cold start":
        print(f"{COLD_START!r} is left out: the head starts from {origin}, which has no cold start")
        objectives.remove(COLD_START)
    if arguments.baseline not in objectives:
        raise InputError(f"--baseline {arguments.baseline!r} is not among the objectives: {'; '.join(objectives)}")
    runs = {o: [variant(config, o, seed, arguments) for seed in range(arguments.seeds)] for o in objectives}
    # Seed by seed, so that all objectives can be compared early.
    ordered = [(o, runs[o][seed]) for seed in range(arguments.seeds) for o in objectives]
    for _, run in ordered:
        _check_earlier(run)
    for number, (objective, run) in enumerate(ordered, start=1):
        if not (Path(run.output) / "report.json").exists():
            print(f"== run {number} of {len(ordered)}: {objective}, seed {run.seed}")
            train(run, material)
    states: dict[str, StateCache] = {}
    for number, (_, run) in enumerate(ordered, start=1):
        _measure(f"head {number} of {len(ordered)}", run, material, held_out, states)
    _report(arguments, config, material, held_out, runs)


def _check_earlier(run: TrainConfig) -> None:
    """A run that is there, whole or in part, must be the run that is wanted."""
    path = Path(run.output) / "config.yaml"
    if not path.exists():
        return
    # A key that is newer than the run had its default.
    there, wanted = asdict(TrainConfig()) | yaml.safe_load(path.read_text()), asdict(run)
    if other := [key for key in wanted if key != "resume" and there[key] != wanted[key]]:
        found = ", ".join(f"{key} {there[key]!r}" for key in other)
        asked = ", ".join(f"{key} {wanted[key]!r}" for key in other)
        raise InputError(f"{run.output} was trained with {found}, now asked for {asked}; choose another output")


def _read_held_out(path: Path, config: TrainConfig, material: Material) -> tuple[RolloutHeader, list[Rollout]]:
    header, rollouts = read_rollouts(path)
    check_rollouts_of(material.directory, path, header, rollouts)
    trained_on = {r.key for r in material.train}
    if seen := sum(r.key in trained_on for r in rollouts):
        raise InputError(
            f"{path}: {seen} of {len(rollouts)} rollouts are in {' '.join(config.rollouts)}, which is trained on"
        )
    return header, rollouts


def _sums_file(run: TrainConfig, name: str, rollouts: list[Rollout]) -> Path:
    return Path(run.output) / f"measured-{name}-{digest(rollouts)}.safetensors"


def _measure(
    title: str,
    run: TrainConfig,
    material: Material,
    held_out: dict[str, tuple[RolloutHeader, list[Rollout]]],
    states: dict[str, StateCache],
) -> None:
    """Sums of a run's head on every held-out set, each kept in a file of the run."""
    missing = [name for name, (_, rollouts) in held_out.items() if not _sums_file(run, name, rollouts).exists()]
    if not missing:
        return
    head, _ = head_for(material.backbone, str(Path(run.output) / "head"))
    for name in missing:
        header, rollouts = held_out[name]
        if name not in states:
            states[name] = StateCache(material.backbone, rollouts, f"states of {name}")
        sums = DocumentSums(len(rollouts))
        for (stats,) in chain_statistics_at(
            head,
            material.backbone,
            rollouts,
            steps=run.draft_steps,
            temperatures=(header.temperature,),
            compute_dtype=material.dtype,
            statistics=MEASURED,
            tokens_per_micro_batch=run.tokens_per_micro_batch,
            states=states[name],
            progress=f"{title}, {name}",
        ):
            add_measures(sums, stats)
        sums.save(_sums_file(run, name, rollouts))


def _report(
    arguments: argparse.Namespace,
    config: TrainConfig,
    material: Material,
    held_out: dict[str, tuple[RolloutHeader, list[Rollout]]],
    runs: dict[str, list[TrainConfig]],
) -> None:
    output, names, steps = Path(config.output), list(held_out), config.draft_steps
    sums = {
        n: {o: [DocumentSums.load(_sums_file(run, n, rollouts)) for run in of] for o, of in runs.items()}
        for n, (_, rollouts) in held_out.items()
    }
    sets = {name: Compared(sums[name], steps) for name in names}
    described = {name: one.describe(arguments.baseline) for name, one in sets.items()}
    ordering = {name: one.differences(PAPER_ORDER) for name, one in sets.items()}
    shown = [o for o in ("e2e_tv", "ce") if o in runs] or list(runs)[:2]
    together = {o: Resampled(joined([sums[n][o][0] for n in names])) for o in shown}
    slopes = {}
    remark = "With three or more files of held-out rollouts there would be a line through them here."
    if len(names) > 2:
        try:
            slopes = {o: lines_over_sets(list(sets.values()), o) for o in runs}
            remark = ""
        except InputError as error:
            remark = f"No line through the sets: {error}."
    curves = {o: _training_curve(of) for o, of in runs.items()}
    lengths = ", ".join(f"{n} ({len(r)} texts sampled at {h.temperature})" for n, (h, r) in held_out.items())
    sections = [
        Section(
            "Accept length",
            [
                f"{len(runs)} objectives, {arguments.seeds} seeds, {config.max_steps} steps, K = {steps}; trained at "
                f"temperature {config.temperature}, measured on {lengths}. Accept length as an engine counts it, with 95 "
                "percent intervals over documents and seeds; differences are paired over both.",
            ],
            [lengths_table(name, described[name], arguments.baseline) for name in names]
            + [differences_table(f"{name}: the order of arXiv 2606.12370", ordering[name]) for name in names],
            [("accept_length", "Accept length; bars: 95 percent intervals.", plot_lengths(described))],
        ),
        Section("Details", [], [details_table(name, described[name]) for name in names]),
        Section(
            "Acceptance against entropy",
            ["The first seed's heads on all sets together; slopes in the figure are least squares over positions.", remark],
            [slopes_table(slopes)] if slopes else [],
            [("entropy", "Bars: 95 percent intervals over documents.", plot_against_entropy(together))],
        ),
        Section("Training", [], [], [("training", "Mean over seeds, running mean over five steps.", plot_training(curves))]),
    ]
    result = {
        "settings": asdict(config) | {"seeds": arguments.seeds, "held_out": [str(p) for p in arguments.held_out]},
        "estimates": "value and 95 percent interval over documents and seeds",
        "sets": described,
        "ordering": ordering,
        "accept_length_on_entropy": slopes,
    }
    write_whole(output / "comparison.json", (json.dumps(result, indent=2) + "\n").encode())
    page = write_page(output, "Comparison of objectives", sections)
    console = terminal()
    for table in sections[0].tables:
        console.print(table.for_terminal())
    console.print(f"report: {page}, {output}/comparison.json")


def _training_curve(runs: list[TrainConfig]) -> list[float]:
    """Accept length on the training batch at every step, averaged over runs."""
    curves = []
    for run in runs:
        records = [json.loads(line) for line in (Path(run.output) / METRICS_FILE).read_text().splitlines()]
        curves.append([r["accept_length"] for r in records if r["kind"] == "training"])
    return torch.tensor(curves).mean(0).tolist()


if __name__ == "__main__":
    main()
