"""Which cold start learns fastest: acceptance after the same few steps, from each way to initialise the head.

python -m benchmarks.cold_start --backbone demo/backbone --rollouts demo/rollouts.jsonl --output cold_start.json

Trains with LK hybrid, and once with the end-to-end TV loss from the first step; the same batches for all.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from bebop.backbone import Backbone
from bebop.data.batches import make_batch
from bebop.data.rollouts import read_rollouts, split_held_out
from bebop.data.schedule import schedule
from bebop.data.states import StateCache
from bebop.evaluation.acceptance import evaluate
from bebop.heads.draft import draft
from bebop.heads.head import MTPHead
from bebop.heads.loading import cold_start
from bebop.losses import ChainLoss, E2ETVLoss, LKHybridLoss

SETTINGS = {"steps": 3, "compute_dtype": torch.bfloat16}


def as_shipped(head: MTPHead, backbone: Backbone) -> None:
    cold_start(head, backbone)


@torch.no_grad()
def hidden_scaled_only(head: MTPHead, backbone: Backbone) -> None:
    cold_start(head, backbone)
    head.part(head.family.embedding_norm).weight.sub_(backbone.residual_scale() - 1.0)


@torch.no_grad()
def nothing_scaled(head: MTPHead, backbone: Backbone) -> None:
    hidden_scaled_only(head, backbone)
    head.part(head.family.hidden_norm).weight.sub_(backbone.residual_scale() - 1.0)


@torch.no_grad()
def embedding_added(head: MTPHead, backbone: Backbone) -> None:
    cold_start(head, backbone)
    projection = head.part(head.family.projection).weight
    size = backbone.config.hidden_size
    projection.copy_(torch.eye(size).repeat(1, 2))


@torch.no_grad()
def fresh_layer(head: MTPHead, backbone: Backbone) -> None:
    cold_start(head, backbone)
    for tensor in head.part(head.family.layer).state_dict().values():
        if tensor.ndim > 1:
            tensor.normal_(std=backbone.config.initializer_range)


VARIANTS: dict[str, tuple[Callable[[MTPHead, Backbone], None], type[ChainLoss]]] = {
    "as shipped: both inputs at the residual stream's scale": (as_shipped, LKHybridLoss),
    "only the hidden state scaled": (hidden_scaled_only, LKHybridLoss),
    "nothing scaled": (nothing_scaled, LKHybridLoss),
    "as shipped, embedding added to the hidden state": (embedding_added, LKHybridLoss),
    "as shipped, decoder layer random instead of copied": (fresh_layer, LKHybridLoss),
    "as shipped, end-to-end TV from the first step": (as_shipped, E2ETVLoss),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--rollouts", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path, help="JSON file to write")
    parser.add_argument("--steps", type=int, default=30, help="optimiser steps of each variant")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    arguments = parser.parse_args()

    backbone = Backbone.load(arguments.backbone)
    header, rollouts = read_rollouts(arguments.rollouts)
    train, held_out = split_held_out(rollouts, 0.08)
    train_states, held_out_states = StateCache(backbone, train, "states"), StateCache(backbone, held_out)
    results = {}
    for name, (initialise, loss_class) in VARIANTS.items():
        torch.manual_seed(0)
        head = MTPHead(backbone.head_config, backbone.family)
        initialise(head, backbone)
        loss_fn = loss_class(temperature=header.temperature)
        optimizer = torch.optim.AdamW(head.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
        steps = schedule(
            [len(r) for r in train], tokens_per_micro_batch=2048, pack=backbone.packs_documents, accumulate=1,
            processes=1, process=0, seed=0,
        )  # fmt: skip
        for step in tqdm(range(arguments.steps), desc=name):
            for group in optimizer.param_groups:
                group["lr"] = arguments.learning_rate * min(1.0, (step + 1) / 8)
            batch = make_batch(next(steps)[0], train)
            hidden, target, targets = draft(
                head, backbone, train_states.hidden_states(batch), tokens=batch.tokens, documents=batch.documents,
                positions=batch.positions, supervised=batch.supervised, **SETTINGS,
            )  # fmt: skip
            loss_fn(hidden, target, backbone.lm_head_weight, **targets._asdict()).loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        measured = evaluate(head, backbone, held_out, temperature=header.temperature, states=held_out_states, **SETTINGS)
        results[name] = {"accept_length": measured.accept_length, "alpha": measured.alpha, "kl": measured.kl[0]}

    arguments.output.write_text(json.dumps({"steps": arguments.steps, "variants": results}, indent=2) + "\n")
    table = Table(title=f"Held-out acceptance after {arguments.steps} steps")
    for column in ("cold start", "accept length", "alpha 1 / 2 / 3", "KL, nats"):
        table.add_column(column)
    for name, r in results.items():
        table.add_row(name, f"{r['accept_length']:.3f}", " / ".join(f"{a:.3f}" for a in r["alpha"]), f"{r['kl']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
