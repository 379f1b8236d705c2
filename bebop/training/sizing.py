"""What a run would take, from the model's config alone: parameters, memory of a process by part, work of a step by part.

Formulas, per process of P; "split" is said of FSDP2 and ZeRO-3 (docs/training.md):

    backbone          (layers / P if split, else layers, + embedding, norm, lm_head) x bytes of its dtype
    head              4 bytes a weight, / P and gathered if split; gradient 4; AdamW 8, / P if split or with ZeRO-2
    loss              chunk_mib, and the gradient of K N draft states
    activations       of the head, about K N (90 d + 16 I) bytes in fp32, I what one token uses of the MLP's width
    work              backbone 2 A N flop (A: weights a token uses); head 6 A K N; loss 2 (2K + 1) N d V
"""

from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from bebop.backbone import read_config, refuse_quantised, resolve_checkpoint
from bebop.families import family_of
from bebop.heads.head import MTPHead
from bebop.llama_as_qwen2 import qwen2_config
from bebop.machine import compute_dtype
from bebop.training.config import TrainConfig

# By strategy: over how many of P processes weights are split, and gradients and optimiser.
STRATEGIES = {"DDP": (False, False), "ZeRO-2": (False, True), "FSDP2, ZeRO-3": (True, True)}


@dataclass
class Sizing:
    """Of one process of a run.

    Attributes:
        parameters: weights, by part.
        memory: bytes of each part, for every strategy.
        tokens: of a step over all processes, padding included.
        flop: of a token of a step, by part.
    """

    parameters: dict[str, int]
    memory: dict[str, dict[str, float]]
    tokens: int
    flop: dict[str, float]


def read_model_config(name: str) -> Any:
    """The config of a directory or hub id, without its weights.

    Raises:
        InputError: there is none, or the model is one that no head can be trained for.
    """
    directory = resolve_checkpoint(name, weights=False)
    config = read_config(directory)
    family_of(config.get_text_config())
    refuse_quantised(config, directory)
    return config


def size(model_config: Any, config: TrainConfig, dtype: torch.dtype, processes: int) -> Sizing:
    """Sizes of a run.

    Args:
        model_config: of `read_model_config`.
        config: the run's; model and rollouts are not looked at.
        dtype: of backbone and compute.
        processes: of the run.
    """
    text = model_config.get_text_config()
    family = family_of(text)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text)
        head = MTPHead(qwen2_config(text) if text.model_type == "llama" else text, family)
    layers, active = _count(model.get_decoder().layers, text)
    head_size, head_active = _count(head, text)
    d, vocabulary, k = text.hidden_size, text.vocab_size, config.draft_steps
    whole = d * vocabulary * (1 if text.tie_word_embeddings else 2) + d
    n, item = config.tokens_per_micro_batch, dtype.itemsize
    gathered = 2 * layers / len(model.get_decoder().layers)  # a layer that runs, and the next
    return Sizing(
        {"backbone, layers": layers, "backbone, embedding, norm and lm_head": whole, "head": head_size},
        {
            name: {
                "backbone": ((layers / processes + gathered if split else layers) + whole) * item,
                # What is split is gathered whole to run, and its gradient is whole until it has been reduced.
                "head": (head_size / processes + head_size if split else head_size) * 4.0,
                "head's gradient": head_size * 4.0,
                "head's AdamW": head_size * 8 / (processes if split_optimiser else 1),
                "activations of the head, about": k * n * (90 * d + 16 * _mlp_width(text)) * (1.0 if item == 4 else 0.7),
                "loss: logits of a chunk": config.chunk_mib * 2.0**20,
                "loss: draft and target states, gradient": (2.0 * k + 2) * n * d * item,
            }
            for name, (split, split_optimiser) in STRATEGIES.items()
        },
        n * config.accumulate * processes,
        {
            "backbone, forward": 2.0 * active,
            "head, forward and backward": 6.0 * head_active * k,
            "loss, 2K+1 products with the lm_head": 2.0 * (2 * k + 1) * d * vocabulary,
        },
    )


def _count(module: torch.nn.Module, config: Any) -> tuple[int, int]:
    """Weights, and those of them that a token uses: of routed experts a few."""
    every, used = 0, 0.0
    for name, weight in module.named_parameters():
        routed = ".experts." in f".{name}"
        every += weight.numel()
        used += weight.numel() * (config.num_experts_per_tok / config.num_experts if routed else 1)
    return every, round(used)


def _mlp_width(config: Any) -> int:
    if getattr(config, "num_experts", 0):
        return config.num_experts_per_tok * config.moe_intermediate_size + config.shared_expert_intermediate_size
    return config.intermediate_size


def print_sizing(config: TrainConfig, device: torch.device) -> None:
    """Print what a run on `config.dry_run` processes with devices like this one would take."""
    dtype, processes = compute_dtype(config.dtype, device), config.dry_run
    sizing = size(read_model_config(config.backbone), config, dtype, processes)
    table = Table(title=f"{config.backbone} in {str(dtype).removeprefix('torch.')}, one of {processes} processes")
    table.add_column("GiB")
    for name in STRATEGIES:
        table.add_column(name, justify="right")
    for part in sizing.memory["DDP"]:
        table.add_row(part, *(f"{sizing.memory[name][part] / 2**30:,.2f}" for name in STRATEGIES))
    table.add_section()
    table.add_row("together", *(f"{sum(sizing.memory[name].values()) / 2**30:,.2f}" for name in STRATEGIES))
    console = Console()
    console.print(table)
    total = sum(sizing.flop.values())
    for name, count in sizing.parameters.items():
        console.print(f"{name}: {count / 1e6:,.1f} million weights")
    for name, flop in sizing.flop.items():
        console.print(f"{name}: {flop / 1e9:,.2f} Gflop a token, {flop / total:.0%}")
    console.print(f"a step takes up to {sizing.tokens:,} tokens, padding included; nothing was loaded or written")
