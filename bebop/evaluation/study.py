"""An evaluation from start to report: a head, its backbone, and one or more files of rollouts."""

import copy
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bebop.backbone import Backbone, resolve_checkpoint
from bebop.data.rollouts import Rollout, RolloutHeader, check_rollouts_of, read_rollouts
from bebop.errors import InputError
from bebop.evaluation import plots, tables
from bebop.evaluation.acceptance import chain_statistics_at
from bebop.evaluation.decoding import Decoded, speculative_decode
from bebop.evaluation.engine_counts import RULES
from bebop.evaluation.entropy import decompose, line_through
from bebop.evaluation.measures import MEASURED, add_measures, describe, describe_sources
from bebop.evaluation.page import Section, Table, terminal, write_page
from bebop.evaluation.sums import DocumentSums, Resampled
from bebop.heads.head import MTPHead
from bebop.heads.loading import head_for, read_head
from bebop.machine import compute_dtype, use_all_cores
from bebop.writing import check_new, complete

logger = logging.getLogger(__name__)


@dataclass
class Study:
    """What to evaluate; `recipes/evaluate_mtp.py --help` says what each is."""

    head: str
    rollouts: list[Path]
    output: Path
    backbone: list[str] = field(default_factory=list)
    steps: int | None = None
    temperatures: list[float] = field(default_factory=list)
    cost_ratio: float | None = None
    checkpoints: int = 0
    decode: int = 0
    resamples: int = 1000
    seed: int = 0
    dtype: str = "auto"
    tokens_per_batch: int = 4096

    def check(self) -> None:
        """Refuse what cannot be meant, and fill in what the head says of itself.

        Raises:
            InputError: names the option, what was found and what is expected.
        """
        facts = {} if self.head == "auto" else read_head(Path(self.head))[1]
        self.backbone = self.backbone or ([facts["backbone"]] if "backbone" in facts else [])
        self.steps = self.steps if self.steps is not None else facts.get("draft_steps", 3)
        if not self.backbone:
            raise InputError("--backbone is not set, and the head does not say which it was trained for; give --backbone")
        if len(self.backbone) not in (1, len(self.rollouts)):
            raise InputError(
                f"--backbone: {len(self.backbone)} for {len(self.rollouts)} rollout files; expected one, or one for each"
            )
        check_new(self.output)
        for name, value, least in (
            ("steps", self.steps, 1),
            ("resamples", self.resamples, 100),
            ("decode", self.decode, 0),
            ("tokens-per-batch", self.tokens_per_batch, 1),
        ):
            if value < least:
                raise InputError(f"--{name} is {value}, expected {least} or more")
        for name, values in (
            ("temperatures", self.temperatures),
            ("cost-ratio", [] if self.cost_ratio is None else [self.cost_ratio]),
        ):
            if not all(0 < v < math.inf for v in values):
                raise InputError(f"--{name} is {values}, expected numbers above 0")
        if self.checkpoints and not 2 <= self.checkpoints < len(self.rollouts):
            raise InputError(
                f"--checkpoints {self.checkpoints} with {len(self.rollouts)} rollout files; expected 2 or more early ones, "
                "and some after them"
            )
        if self.checkpoints and len(self.temperatures) > 1:
            raise InputError("--checkpoints takes one temperature for all files, or each file's own")


@dataclass
class _Scored:
    """A file at a temperature."""

    name: str
    path: Path
    header: RolloutHeader
    temperature: float
    sums: DocumentSums
    sources: list[str]
    decoded: list[dict[str, Any]] = field(default_factory=list)


def run_study(study: Study) -> dict[str, Any]:
    """Evaluate, print the tables, and write report.html, evaluation.json and figures. Returns what evaluation.json holds.

    Raises:
        InputError: a head, backbone, file or option that does not fit; says which, and what to do.
    """
    study.check()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    use_all_cores(device)
    files = [(path, *read_rollouts(path)) for path in study.rollouts]
    directories = [resolve_checkpoint(name, weights=False) for name in study.backbone]
    for i, (path, header, rollouts) in enumerate(files):
        _check_texts(study, path, header, rollouts)
        check_rollouts_of(directories[i if len(directories) > 1 else 0], path, header, rollouts)
    names = _names(study.rollouts)
    scored: list[_Scored] = []
    backbone, head, cost_ratio = None, None, study.cost_ratio
    for i, ((path, header, rollouts), name) in enumerate(zip(files, names, strict=True)):
        if backbone is None or len(study.backbone) > 1:
            backbone = Backbone.load(study.backbone[i], compute_dtype(study.dtype, device), device)
            head, origin = head_for(backbone, study.head, "flex_attention" if device.type == "cuda" else "sdpa")
            if origin == "cold start":
                raise InputError(
                    f"{study.backbone[i]} has no head of its own to evaluate; give --head, a run's head directory"
                )
            cost_ratio = cost_ratio or weights_ratio(head, backbone)
        assert head is not None
        scored += _score(study, name, path, header, rollouts, head, backbone)
    assert cost_ratio is not None
    return _write(study, scored, cost_ratio)


def _check_texts(study: Study, path: Path, header: RolloutHeader, rollouts: list[Rollout]) -> None:
    assert study.steps is not None
    if (longest := max(len(r.response_ids) for r in rollouts)) <= study.steps:
        raise InputError(
            f"{path}: the longest response has {longest} tokens, too few for {study.steps} draft steps, which take "
            f"{study.steps + 1}; use longer responses or fewer steps"
        )
    if not study.temperatures and not header.temperature > 0:
        raise InputError(
            f"{path} was sampled at temperature {header.temperature}, at which acceptance is not a matter of probability; "
            "give --temperatures to score it at others"
        )


def weights_ratio(head: MTPHead, backbone: Backbone) -> float:
    """Cost of a draft step over a target pass where reading weights is what takes time: small batches on a GPU.

    Both read the lm_head; the embedding is a look-up. Experts count as read, as they are over a batch of any size.
    """
    lm_head = backbone.lm_head_weight.numel()
    body = sum(p.numel() for p in backbone.decoder.parameters()) - lm_head  # the embedding is of the same size
    return (sum(p.numel() for p in head.parameters()) + lm_head) / (body + lm_head)


def _names(paths: list[Path]) -> list[str]:
    """Short names of files, told apart."""
    stems = [path.stem for path in paths]
    return stems if len(set(stems)) == len(stems) else [f"{i}: {path}" for i, path in enumerate(paths, start=1)]


def _score(
    study: Study,
    name: str,
    path: Path,
    header: RolloutHeader,
    rollouts: list[Rollout],
    head: MTPHead,
    backbone: Backbone,
) -> list[_Scored]:
    assert study.steps is not None
    temperatures = study.temperatures or [header.temperature]
    if other := [t for t in temperatures if t != header.temperature]:
        logger.warning(
            "%s was sampled at temperature %s and is scored at %s: what follows the text (accept lengths, realised "
            "acceptance, rounds) is biased there",
            path,
            header.temperature,
            ", ".join(map(str, other)),
        )
    found = [
        _Scored(
            name if len(temperatures) == 1 else f"{name} at {t}",
            path, header, t, DocumentSums(len(rollouts)), [r.source for r in rollouts],
        )
        for t in temperatures
    ]  # fmt: skip
    batches = chain_statistics_at(
        head,
        backbone,
        rollouts,
        steps=study.steps,
        temperatures=temperatures,
        compute_dtype=backbone.lm_head_weight.dtype,
        statistics=MEASURED,
        tokens_per_micro_batch=study.tokens_per_batch,
        progress=name,
    )
    for batch in batches:
        for one, stats in zip(found, batch, strict=True):
            add_measures(one.sums, stats)
    if study.decode:
        served = copy.deepcopy(head).to(backbone.lm_head_weight.dtype)
        for one in found:
            one.decoded = [_decode(study, one, rollouts, served, backbone, k) for k in range(1, study.steps + 1)]
    return found


def _decode(
    study: Study, one: _Scored, rollouts: list[Rollout], head: MTPHead, backbone: Backbone, steps: int
) -> dict[str, Any]:
    """Rounds counted by the reference decoder on fresh texts, from the prompts of the rollouts."""
    prompts = [r.prompt_ids for r in rollouts[: study.decode]]
    longest = max(len(r.response_ids) for r in rollouts)
    ends = sorted({r.response_ids[-1] for r in rollouts if r.finish_reason == "stop"})
    decoded: Decoded = speculative_decode(
        head,
        backbone,
        prompts,
        steps=steps,
        max_tokens=min(max(longest, steps + 2), backbone.max_length - max(map(len, prompts))),
        temperature=one.temperature,
        stop=ends,
        seed=study.seed + steps,
        progress=f"decoding {one.name}, K = {steps}",
    )
    return {
        "draft_steps": steps,
        "rounds": decoded.rounds[0],
        "acceptance": decoded.acceptance,
        "accept_length": decoded.accept_length,
    }


def _write(study: Study, scored: list[_Scored], cost_ratio: float) -> dict[str, Any]:
    options: dict[str, Any] = {"cost_ratio": cost_ratio, "resamples": study.resamples, "seed": study.seed}
    described: dict[str, dict[str, Any]] = {}
    for one in scored:
        described[one.name] = {
            "rollouts": str(one.path),
            "sampled_at": one.header.temperature,
            "temperature": one.temperature,
            **describe(one.sums, **options),
            "decoded": one.decoded,
            "by_source": describe_sources(one.sums, one.sources, **options) if len(set(one.sources)) > 1 else {},
        }
    result: dict[str, Any] = {
        "head": study.head,
        "backbone": study.backbone,
        "cost_ratio": cost_ratio,
        "estimates": "value and 95 percent interval over documents",
        "sets": described,
    }
    sections = [
        Section(
            "Accept length and speed-up",
            [
                "Accept length is the tokens that a target pass emits, its own included. An engine counts the average over "
                "rounds; rounds start behind rejections, so it lies below the average over all anchors (realised) and "
                "differs from Eq. 13, which multiplies expected acceptances along one text.",
                f"Speed-up assumes that a draft step costs {cost_ratio:.3f} of a target pass.",
            ],
            [tables.overview(described), tables.served(described)],
            [
                (
                    "served",
                    "Accept length and speed-up against draft steps; bars: 95 percent intervals.",
                    plots.served(described),
                )
            ],
        ),
        Section("Per draft step", [], [tables.per_step(name, one) for name, one in described.items()]),
    ]
    for group, title in (("entropy", "By the target's entropy"), ("position", "By place in the response")):
        caption = "Bins of 20 chains or more; bars: 95 percent intervals."
        shown = [tables.bins(name, one, group) for name, one in described.items()]
        if group == "entropy":
            shown.insert(0, tables.lines(described))
        sections.append(Section(title, [], shown, [(f"by_{group}", caption, plots.by_bin(described, group))]))
    if any(one["by_source"] for one in described.values()):
        by_source = {f"{n}, {s}": x for n, one in described.items() for s, x in one["by_source"].items()}
        sections.append(Section("By source", [], [tables.overview(by_source)]))
    if len(scored) > 2:
        try:
            sections.append(_over_sets(study, scored, described, result))
        except InputError as error:  # nothing else depends on it
            sections.append(Section("Over sets of rollouts", [f"Not computed: {error}."]))

    with complete(study.output) as partial:
        partial.mkdir()
        (partial / "evaluation.json").write_text(json.dumps(_plain(result), indent=2) + "\n")
        page = study.output / write_page(partial, f"Acceptance of {study.head}", sections).name
    console = terminal()
    for table in sections[0].tables:
        console.print(table.for_terminal())
    console.print(f"report: {page}, {study.output}/evaluation.json")
    return result


def _over_sets(study: Study, scored: list[_Scored], described: Mapping[str, Any], result: dict[str, Any]) -> Section:
    """The line through sets of rollouts, and with --checkpoints the decomposition of Eq. 16."""
    assert study.steps is not None
    averages = [Resampled(one.sums, study.resamples, study.seed + i) for i, one in enumerate(scored)]
    entropy = torch.stack([a["target_entropy"] for a in averages])
    lines, lengths = {}, {}
    for rule in RULES:
        drafts = [f"{rule}/engine-{study.steps}/{j}" for j in range(1, study.steps + 1)]
        accepted = torch.stack([torch.stack([a[name] for name in drafts]).sum(0) for a in averages])
        lines[rule] = line_through(entropy, 1 + accepted)
        lengths[rule] = [one["rules"][rule]["served"][-1]["accept_length"] for one in described.values()]
    result["over_sets"] = {rule: line._asdict() for rule, line in lines.items()}
    names = list(described)
    rows = [[tables.RULE_TITLES[rule], *(str(x) for x in lines[rule])] for rule in RULES]
    table = Table(
        f"Accept length at K = {study.steps} on entropy, over sets", ("rule", "slope per nat", "intercept", "R²"), rows
    )
    figure = plots.over_sets(names, entropy[:, 0].tolist(), lengths, lines)
    figures = [("over_sets", "A point for each set of rollouts; bars: 95 percent intervals.", figure)]
    shown = [table]
    if study.checkpoints:
        rate = [(x.value - 1) / study.steps for x in lengths["rejection_sampling"]]
        parts = decompose(entropy[:, 0].tolist(), rate, study.checkpoints)
        result["decomposition"] = vars(parts)
        rows = [
            [name, f"{h:.3f}", f"{a:.3f}", f"{e:+.3f}", f"{m:+.3f}"]
            for name, h, a, e, m in zip(
                names, entropy[:, 0].tolist(), rate, parts.entropy_driven, parts.mismatch_driven, strict=True
            )
        ]
        shown.append(
            Table(
                f"Change of the acceptance rate (accepted drafts / K), b = {parts.slope:+.3f} per nat from the first "
                f"{study.checkpoints} (Eq. 16)",
                ("checkpoint", "entropy, nats", "acceptance rate", "entropy-driven", "mismatch-driven"),
                rows,
            )
        )
        figure = plots.decomposition(names, parts.entropy_driven, parts.mismatch_driven)
        figures.append(("decomposition", "Parts of the change since the first checkpoint (Eq. 16).", figure))
    return Section("Over sets of rollouts", [], shown, figures)


def _plain(value: Any) -> Any:
    """For JSON, which has neither infinity (the last bin has no upper end) nor NaN (a resample without chains)."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
