"""An optimiser step of a training configuration, side by side with the same step as one would write it without bebop.

python -m benchmarks.training_step --config recipes/configs/demo.yaml --output benchmarks/results/training_step

Same head, documents and objective (end-to-end TV) in all variants, every step from the same weights: loss and gradient norm
must agree. The naive step pads documents to the longest of the step, runs the backbone anew, and keeps the logits of target
and drafts at every position for autograd. One step of each variant in every round, the next step's data prepared beside it
as in a run; ratios within a round, medians over the rounds. Writes OUTPUT.json and OUTPUT.png.
"""

import argparse
import copy
import importlib.metadata
import json
import os
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm
from transformers import get_constant_schedule

from bebop import E2ETVLoss
from bebop.backbone import Backbone
from bebop.data.ahead import prepared_ahead
from bebop.data.batches import Batch
from bebop.data.schedule import schedule
from bebop.data.states import StateCache
from bebop.data.validation import validate
from bebop.heads.head import MTPHead
from bebop.heads.loading import head_for
from bebop.heads.targets import chain_targets
from bebop.machine import Clock, use_all_cores
from bebop.training.config import TrainConfig, parse_config
from bebop.training.distribution import make_accelerator
from bebop.training.material import Material
from bebop.training.step import OptimiserStep, Rows, StepData
from benchmarks.linear_chain import device_name
from benchmarks.memory import peak_extra_bytes

NAIVE, COMPILED, BEBOP, CACHED = "naive", "naive, loss compiled", "bebop", "bebop, cached states"
PARTS = ("data", "backbone", "head", "loss", "optimiser")
# Largest relative difference from the naive step, whose logits have this dtype.
TOLERANCE = {torch.bfloat16: {"loss": 1e-3, "grad_norm": 3e-2}, torch.float32: {"loss": 1e-5, "grad_norm": 1e-4}}


class Variant(NamedTuple):
    """A way to make a step: its data, and loss and gradient norm from those, with the seconds by part on a clock."""

    prepare: Callable[[list[Rows]], StepData]
    run: Callable[[StepData, Clock], tuple[float, float]]


def ours(config: TrainConfig, accelerator: Accelerator, material: Material, head: MTPHead) -> Variant:
    """The step that a training run makes."""
    optimizer = adamw(head, config)
    step = OptimiserStep(
        config, accelerator, material, *accelerator.prepare(head, optimizer, get_constant_schedule(optimizer))
    )
    loss_fn = E2ETVLoss(temperature=config.temperature, chunk_bytes=config.chunk_mib * 2**20)

    def run(data: StepData, clock: Clock) -> tuple[float, float]:
        values, _ = step(0, data, loss_fn, False, clock)
        assert values is not None, "loss or gradient is not finite"
        return values["loss"], values["grad_norm"]

    return Variant(step.prepare, run)


def naive(config: TrainConfig, backbone: Backbone, dtype: torch.dtype, head: MTPHead, compiled: bool) -> Callable:
    """`Variant.run` in plain transformers and PyTorch; `dtype` is that of backbone, logits and the head's products."""
    optimizer, model = adamw(head, config), backbone.model
    lm_head, embed = model.get_output_embeddings(), model.get_input_embeddings()
    tv = torch.compile(tv_of_logits, dynamic=True) if compiled else tv_of_logits

    def run(data: StepData, clock: Clock) -> tuple[float, float]:
        total = 0.0
        for batch in data.batches:
            batch = batch.to(backbone.device)
            with clock("backbone"):
                tapped, post_norm = backbone_states(backbone, batch)
            with clock("head"), torch.autocast(backbone.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                hidden = head(tapped, embed(batch.tokens), batch.documents, batch.positions, config.draft_steps)
            with clock("loss"):
                rows, _, valid = chain_targets(batch.tokens, batch.documents, batch.supervised, config.draft_steps)
                with torch.no_grad():
                    target_logits = lm_head(post_norm).flatten(0, 1)
                leaf = hidden.detach().requires_grad_()  # where the loss's backward ends and the head's begins
                draft_logits = lm_head(leaf.to(dtype)).flatten(1, 2)
                loss = tv(draft_logits, target_logits, rows, valid, config.temperature) / data.pairs
                loss.backward()
                total += loss.item()
            with clock("head"):
                hidden.backward(leaf.grad)
        with clock("optimiser"):
            norm = torch.nn.utils.clip_grad_norm_(head.parameters(), config.max_grad_norm).item()
            optimizer.step()
            optimizer.zero_grad()
        return total, norm

    return run


@torch.no_grad()
def backbone_states(backbone: Backbone, batch: Batch) -> tuple[Tensor, Tensor]:
    """At the head's tap and after the final norm, each [B, T, d]; output_hidden_states would give only the latter."""
    pre_norm: list[Tensor] = []
    handle = backbone.decoder.norm.register_forward_pre_hook(lambda _, inputs: pre_norm.append(inputs[0]))
    mask = (batch.documents >= 0).long()
    post_norm = backbone.decoder(input_ids=batch.tokens, attention_mask=mask, use_cache=False).last_hidden_state
    handle.remove()
    return pre_norm[0] if backbone.family.tap == "pre_norm" else post_norm, post_norm


def tv_of_logits(draft: Tensor, target: Tensor, rows: Tensor, valid: Tensor, temperature: float) -> Tensor:
    """End-to-end TV, summed over valid pairs, from the logits at all positions, [K, N, V] and [N, V]."""
    p = (target.float() / temperature).softmax(-1)[rows]
    q = (draft.float() / temperature).softmax(-1)
    alpha = torch.minimum(q, p).sum(-1)
    return torch.where(valid, 1.0 - alpha.cumprod(0), 0.0).sum()


def adamw(head: MTPHead, config: TrainConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(head.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)


def one_document_a_row(step: list[Rows]) -> list[Rows]:
    return [[[i] for row in rows for i in row] for rows in step]


def first_steps(config: TrainConfig, material: Material, count: int) -> list[list[Rows]]:
    """Of the run; `material` keeps the documents of these steps, so that no other states need be computed."""
    all_steps = schedule(
        [len(r) for r in material.train], tokens_per_micro_batch=config.tokens_per_micro_batch,
        pack=material.backbone.packs_documents, accumulate=config.accumulate, processes=1, process=0, seed=config.seed,
    )  # fmt: skip
    steps = list(islice(all_steps, count))
    documents = sorted({i for step in steps for rows in step for row in rows for i in row})
    place = {i: n for n, i in enumerate(documents)}
    material.train = [material.train[i] for i in documents]
    return [[[[place[i] for i in row] for row in rows] for rows in step] for step in steps]


def timed(variant: Variant, step: list[Rows], following: list[Rows], device: torch.device) -> dict[str, Any]:
    """A step in the midst of a run: the next one's data are prepared beside it, and waited for at its end."""
    clock = Clock(device)
    with closing(prepared_ahead([step, following], variant.prepare)) as ahead:
        data = next(ahead)
        started = time.perf_counter()
        loss, norm = variant.run(data, clock)
        with clock("data"):
            next(ahead)
        seconds = time.perf_counter() - started
    counts = {"tokens": data.tokens, "places": data.places, "pairs": data.pairs}
    parts = {part: clock.spent.get(part, 0.0) for part in PARTS}
    return counts | {"loss": loss, "grad_norm": norm, "seconds": seconds, "parts": parts}


def check_same_work(found: dict[str, dict[str, Any]], dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Relative difference of loss and gradient norm from the naive step, by variant.

    Raises:
        RuntimeError: it is more than rounding, or other pairs were counted.
    """
    differences = {}
    for name, values in found.items():
        differences[name] = {key: abs(values[key] / found[NAIVE][key] - 1) for key in ("loss", "grad_norm")}
        same = all(differences[name][key] <= bound for key, bound in TOLERANCE[dtype].items())
        if not same or values["pairs"] != found[NAIVE]["pairs"] or values["tokens"] != found[NAIVE]["tokens"]:
            raise RuntimeError(f"{name!r} does not do the work of {NAIVE!r}: {values} and {found[NAIVE]}")
    return differences


def summarise(rounds: list[dict[str, dict[str, Any]]], name: str) -> dict[str, Any]:
    """The median step; speed-ups over the naive steps as medians of the ratios within a round."""
    mine = [found[name] for found in rounds]
    median = sorted(mine, key=lambda found: found["tokens"] / found["seconds"])[len(mine) // 2]
    seconds = [found["seconds"] for found in mine]
    over = {
        f"x_{other}": statistics.median(found[other]["seconds"] / found[name]["seconds"] for found in rounds)
        for other in (NAIVE, COMPILED)
    }
    return over | {
        "tokens_per_second": median["tokens"] / median["seconds"], "seconds": median["seconds"], "parts": median["parts"],
        "fastest": min(seconds), "slowest": max(seconds),
        "waiting_share": sum(found["parts"]["data"] for found in mine) / sum(seconds),
        "padding": 1 - sum(found["tokens"] for found in mine) / sum(found["places"] for found in mine),
    }  # fmt: skip


def draw(result: dict[str, dict[str, Any]], title: str, path: Path) -> None:
    names = list(result)
    figure, (time_axis, memory_axis) = plt.subplots(1, 2, figsize=(11, 0.45 * len(names) + 1.7), sharey=True)
    start = [0.0] * len(names)
    for part, shade in zip(PARTS, ("black", "0.85", "0.7", "0.5", "0.3"), strict=True):
        values = [result[name]["parts"][part] for name in names]
        time_axis.barh(names, values, left=start, color=shade, edgecolor="black", label=part)
        start = [a + b for a, b in zip(start, values, strict=True)]
    for n, name in enumerate(names):
        time_axis.text(start[n], n, f" {result[name]['tokens_per_second']:.0f} tokens/s", va="center", fontsize=8)
    time_axis.set_xlabel("seconds a step")
    time_axis.legend(fontsize=7)
    peaks = [result[name]["peak_bytes"] / 2**30 for name in names]
    bars = memory_axis.barh(names, peaks, color="0.75", edgecolor="black")
    memory_axis.bar_label(bars, [f"{peak:.2f}" for peak in peaks], padding=3, fontsize=8)
    memory_axis.set_xlabel("peak extra memory, GiB")
    for axis in (time_axis, memory_axis):
        axis.margins(x=0.25)
    time_axis.invert_yaxis()
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def measure(config: TrainConfig, accelerator: Accelerator, count: int) -> dict[str, Any]:
    """Everything that is reported."""
    device, load = accelerator.device, os.getloadavg()
    material = Material.read(config, accelerator)
    material.load_backbone(accelerator)
    backbone, dtype = material.backbone, material.dtype
    steps = first_steps(config, material, 2 + count + 1)
    head, origin = head_for(backbone, config.head, "flex_attention" if device.type == "cuda" else "sdpa")
    start = copy.deepcopy(head.state_dict())
    plain = ours(config, accelerator, material, head)

    def padded(step: list[Rows]) -> StepData:
        return plain.prepare(one_document_a_row(step))

    states = StateCache(backbone, material.train, "backbone states")
    variants = {
        NAIVE: Variant(padded, naive(config, backbone, dtype, head, compiled=False)),
        COMPILED: Variant(padded, naive(config, backbone, dtype, head, compiled=True)),
        BEBOP: plain,
        CACHED: ours(config, accelerator, replace(material, train_states=states), head),
    }
    prepare_seconds, peaks = {}, {}
    for name, variant in tqdm(variants.items(), desc="warm-up, memory"):
        variant.run(variant.prepare(steps[0]), Clock(device))  # compiles
        began = time.perf_counter()
        data = variant.prepare(steps[1])
        prepare_seconds[name] = time.perf_counter() - began
        peaks[name] = peak_extra_bytes(partial(variant.run, data, Clock(device)), device.type)
    rounds: list[dict[str, dict[str, Any]]] = []
    differences = []
    for step, following in tqdm(list(pairwise(steps[2:])), desc="rounds"):
        found, order, first = {}, list(variants), len(rounds) % len(variants)
        for name in order[first:] + order[:first]:  # so that a load that rises or falls favours none
            head.load_state_dict(start)
            found[name] = timed(variants[name], step, following, device)
        differences.append(check_same_work(found, dtype))
        rounds.append(found)
    result = {
        name: summarise(rounds, name)
        | {
            "prepare_seconds": prepare_seconds[name], "peak_bytes": peaks[name],
            "differs_by": {key: max(d[name][key] for d in differences) for key in ("loss", "grad_norm")},
        }
        for name in variants
    }  # fmt: skip
    run = {key: getattr(config, key) for key in ("draft_steps", "tokens_per_micro_batch", "held_out_share", "max_length")}
    padding = validate(config.rollouts, **run).padding_share
    return {
        "device": device_name(device.type),
        "load": {"before": load, "after": os.getloadavg()},
        "versions": {package: importlib.metadata.version(package) for package in ("torch", "transformers", "accelerate")},
        "config": asdict(config),
        "dtype": str(dtype).removeprefix("torch."),
        "head_from": origin,
        "padding": padding,
        "variants": result,
        "rounds": rounds,
    }


def show(report: dict[str, Any], title: str) -> None:
    times = Table("variant", "tokens/s", "x naive", "x compiled", "fastest .. slowest, s", *PARTS, title=title)
    rest = Table("variant", "padding", "peak MiB", "prepares, ms", "waits", "loss differs by", "gradient norm by")
    for variant, r in report["variants"].items():
        spread = f"{r['fastest']:.2f} .. {r['slowest']:.2f}"
        ratios = [f"{r[f'x_{other}']:.2f}" for other in (NAIVE, COMPILED)]
        parts = [f"{r['parts'][part]:.3f}" for part in PARTS]
        times.add_row(variant, f"{r['tokens_per_second']:.0f}", *ratios, spread, *parts)
        rest.add_row(
            variant, f"{r['padding']:.1%}", f"{r['peak_bytes'] / 2**20:.0f}", f"{1e3 * r['prepare_seconds']:.0f}",
            f"{r['waiting_share']:.2%}", *(f"{r['differs_by'][key]:.1e}" for key in ("loss", "grad_norm")),
        )  # fmt: skip
    console = Console(width=130)
    console.print(times, rest)
    packed, single = report["padding"]["packed"], report["padding"]["one_a_row"]
    console.print(f"padding of all rollouts: packed {packed:.1%}, one document a row {single:.1%}")
    console.print(f"{report['device']}; load average {report['load']['before'][0]:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Any option of recipes/train_mtp.py may follow; --head RUN/head measures with a trained head.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--steps", type=int, default=5, help="rounds, each of one step of every variant")
    parser.add_argument("--output", type=Path, required=True, help="path without suffix for the .json and the .png")
    arguments, of_the_run = parser.parse_known_args()
    config = parse_config(of_the_run)
    accelerator = make_accelerator(config)
    use_all_cores(accelerator.device)
    report = measure(config, accelerator, arguments.steps)
    title = (
        f"{config.backbone}, {config.accumulate} x {config.tokens_per_micro_batch} tokens a step, K = {config.draft_steps}"
    )
    show(report, title)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".json").write_text(json.dumps(report, indent=1))
    draw(report["variants"], f"{title}; {report['device']}", arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
