"""Heads trained for a minute, exported, and the texts they are tried on: far from accepting nothing or everything."""

from collections.abc import Sequence
from pathlib import Path

import torch

from bebop.backbone import Backbone
from bebop.data.batches import make_batch, plan_micro_batches
from bebop.data.rollouts import Rollout
from bebop.export.writer import export_head
from bebop.heads.draft import draft
from bebop.heads.loading import head_for, save_head
from bebop.losses import LKHybridLoss
from tests.tiny_models import CONFIGS

DRAFT_STEPS = 3
# What vLLM's CPU kernels for linear attention and experts take. One head of linear keys: with more, llama.cpp wants the
# value heads in another order, and the tests' converter does not do that.
SERVABLE = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "head_dim": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
}
SERVABLE_EXPERTS = {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}


def english() -> str:
    """A text that no edit of the project changes, and with it the models that are trained on it."""
    return (Path(__file__).parents[2] / "LICENSE").read_text()


def train_tiny_backbone(directory: Path, kind: str, steps: int = 150) -> Path:
    """A tiny model that has read some English bytes."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = SERVABLE if kind == "qwen3_5_text" else SERVABLE | SERVABLE_EXPERTS
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](**sizes)).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text = torch.tensor(list(english().encode()))
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(0, len(text) - 65, (8,), generator=generator)
        ids = torch.stack([text[s : s + 64] for s in starts])
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.bfloat16().save_pretrained(directory)
    return directory


def train_and_export(
    target: Path, texts: Sequence[Rollout], folder: Path, temperature: float, steps: int, learning_rate: float
) -> None:
    """A head from its cold start, some steps of LK hybrid, exported to folder/export."""
    backbone = Backbone.load(str(target), torch.float32)
    head, _ = head_for(backbone)
    loss_fn = LKHybridLoss(temperature=temperature)
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=0.0)
    plan = plan_micro_batches([len(t) for t in texts], 768, backbone.packs_documents)
    for step in range(steps):
        batch = make_batch(plan[step % len(plan)], texts)
        hidden, states, targets = draft(
            head,
            backbone,
            backbone.hidden_states(batch.tokens, batch.documents, batch.positions),
            tokens=batch.tokens,
            documents=batch.documents,
            positions=batch.positions,
            supervised=batch.supervised,
            steps=DRAFT_STEPS,
            compute_dtype=torch.float32,
        )
        loss_fn(hidden, states, backbone.lm_head_weight, **targets._asdict()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_head(head, folder / "head", {"draft_steps": DRAFT_STEPS, "temperature": temperature})
    export_head(folder / "head", str(target), folder / "export")
