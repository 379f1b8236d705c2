"""A folder in which everything is right, the commands that use it, and ways to spoil it."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

from bebop.backbone import Backbone
from bebop.data.rollouts import RolloutHeader, tokenizer_hash, write_rollouts
from bebop.export.writer import export_head
from bebop.heads.loading import head_for, save_head
from bebop.training.config import parse_config
from bebop.training.trainer import train
from tests.rollouts import CHAT_TEMPLATE, VOCABULARY, make_tokenizer, self_generated
from tests.tiny_models import make_checkpoint

CONFIG = """backbone: model
rollouts: rollouts.jsonl
output: new
max_steps: 1
dtype: fp32
learning_rate: 1e-3
tokens_per_micro_batch: 200
held_out_share: 0.2
"""
TRAIN = "train_mtp --config train.yaml"
RESUME = f"{TRAIN} --output run --max_steps 2 --resume"
EVALUATE = "evaluate_mtp --head head --rollouts rollouts.jsonl --output new --dtype fp32"
COMPARE = "compare_losses --config train.yaml --objectives ce --held-out held-out.jsonl"
EXPORT = "export_mtp --head head --target model --output new"
GENERATE = "generate_rollouts --model model --count 4 --max-response-tokens 8 --output new.jsonl"
CONVERT = "convert_chats --dataset chats.jsonl --model model --temperature 1 --streaming --output new.jsonl"
VALIDATE = "validate_rollouts rollouts.jsonl --model model"
CHECK = "check exported"

Spoil = Callable[[], object]


def prepare() -> None:
    """What the commands need, in the current directory."""
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    for name, kind, native in (("model", "qwen2", False), ("native", "qwen3_5_text", True)):
        tokenizer.save_pretrained(make_checkpoint(Path(name), kind, native_head=native))
    save_head(head_for(Backbone.load("model", torch.float32))[0], Path("head"), {"backbone": "model", "draft_steps": 3})
    export_head(Path("head"), "model", Path("exported"), copy=True)
    header = RolloutHeader("model", tokenizer_hash(tokenizer), VOCABULARY, 1.0)
    for name in ("rollouts.jsonl", "rollouts.parquet", "rollouts.jsonl.gz"):
        write_rollouts(Path(name), header, self_generated(40))
    write_rollouts(Path("held-out.jsonl"), header, self_generated(12, seed=5))
    chat("w1 w2", "w3 w4")()
    Path("train.yaml").write_text(CONFIG)
    train(parse_config(["--config", "train.yaml", "--output", "run"]))


def nothing() -> None:
    """The mistake is in the command."""


def removed(name: str) -> Spoil:
    return lambda: Path(name).unlink()


def truncated(name: str) -> Spoil:
    return lambda: os.truncate(name, Path(name).stat().st_size // 2)


def written(name: str, content: str | bytes) -> Spoil:
    return lambda: Path(name).write_bytes(content.encode() if isinstance(content, str) else content)


def renamed(name: str, to: str) -> Spoil:
    return lambda: Path(name).rename(to)


def made_a_directory(name: str) -> Spoil:
    return lambda: (Path(name).unlink(), Path(name).mkdir())


def replaced(name: str, old: str, new: str) -> Spoil:
    """The first occurrence of a text in a file."""

    def spoil() -> None:
        text = Path(name).read_text()
        assert old in text
        Path(name).write_text(text.replace(old, new, 1))

    return spoil


def json_with(name: str, **changes: object) -> Spoil:
    return lambda: Path(name).write_text(json.dumps(json.loads(Path(name).read_text()) | changes))


def tensors_with(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def spoil() -> None:
        tensors = load_file(name)
        change(tensors)
        save_file(tensors, name, metadata={"format": "pt"})

    return spoil


def parquet_with(columns: dict[str, list], header: bool = True) -> Spoil:
    def spoil() -> None:
        metadata = pq.read_schema("rollouts.parquet").metadata if header else None
        pq.write_table(pa.table(columns).replace_schema_metadata(metadata), "rollouts.parquet")

    return spoil


def chat(*contents: str, template: str | None = None) -> Spoil:
    """A conversation, user and assistant in turn, and perhaps another chat template of the model."""

    def spoil() -> None:
        talk = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
        Path("chats.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
        if template is not None:
            Path("model/chat_template.jinja").write_text(template)

    return spoil
