"""What a dry run says, against models that are there."""

import pytest
import torch

from bebop.errors import InputError
from bebop.heads.loading import head_for
from bebop.training.config import TrainConfig
from bebop.training.sizing import read_model_config, size
from bebop.training.trainer import train
from tests.tiny_models import make_backbone, make_model, make_wrapper

KINDS = ["qwen2", "llama", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_of_the_model(kind, tied, tmp_path):
    backbone = make_backbone(tmp_path, kind, tie_word_embeddings=tied)
    head, _ = head_for(backbone)
    found = size(read_model_config(str(tmp_path)), TrainConfig(), torch.float32, 1)
    assert found.parameters["head"] == sum(p.numel() for p in head.parameters())
    in_backbone = found.parameters["backbone, layers"] + found.parameters["backbone, embedding, norm and lm_head"]
    assert in_backbone == sum(p.numel() for p in backbone.model.parameters())
    layers = sum(p.numel() for p in backbone.decoder.layers.parameters())
    assert found.parameters["backbone, layers"] == layers
    if kind in ("qwen2", "llama", "qwen3_5_text"):
        assert found.flop["backbone, forward"] == 2 * layers
    else:
        routed = sum(p.numel() for name, p in backbone.decoder.layers.named_parameters() if ".experts." in name)
        assert routed > 0
        assert found.flop["backbone, forward"] == 2 * (layers - routed + routed * 2 / 4)


@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_about_what_autograd_keeps(kind, tmp_path):
    backbone = make_backbone(tmp_path, kind, hidden_size=128, intermediate_size=256)
    head, _ = head_for(backbone)
    steps, length = 3, 96
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hidden, embeddings = torch.randn(2, 1, length, 128)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # Held, so that no two tensors are kept at the same address.
        held = head(hidden, embeddings, torch.zeros(1, length).long(), torch.arange(length).unsqueeze(0), steps)
    weights = {p.untyped_storage().data_ptr() for p in head.parameters()}
    measured = sum(size for at, size in kept.items() if at not in weights)
    config = TrainConfig(draft_steps=steps, tokens_per_micro_batch=length)
    said = size(read_model_config(str(tmp_path)), config, torch.float32, 1).memory["DDP"]["activations of the head, about"]
    assert held.requires_grad
    assert 0.6 < said / measured < 1.4


def test_what_is_split_shrinks_with_the_processes(tmp_path):
    make_backbone(tmp_path, "qwen3_5_moe_text")
    config = read_model_config(str(tmp_path))
    one, eight = (size(config, TrainConfig(), torch.bfloat16, processes) for processes in (1, 8))
    assert eight.memory["DDP"] == one.memory["DDP"]
    optimiser = "head's AdamW"
    assert eight.memory["ZeRO-2"][optimiser] == one.memory["ZeRO-2"][optimiser] / 8
    assert eight.memory["ZeRO-2"]["backbone"] == one.memory["ZeRO-2"]["backbone"]
    assert eight.memory["FSDP2, ZeRO-3"]["backbone"] < one.memory["FSDP2, ZeRO-3"]["backbone"]
    assert eight.tokens == 8 * one.tokens


def test_a_dry_run_needs_a_config_and_writes_nothing(tmp_path, capsys):
    make_wrapper(tmp_path / "model", make_model("qwen3_5_text"))
    for shard in (tmp_path / "model").glob("*.safetensors"):
        shard.unlink()
    before = sorted(tmp_path.rglob("*"))
    train(TrainConfig(backbone=str(tmp_path / "model"), dry_run=8))
    assert "one of 8 processes" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(InputError, match=r"nowhere' does not exist"):
        train(TrainConfig(backbone=str(tmp_path / "nowhere"), dry_run=8))
