import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from bebop.backbone import Backbone
from bebop.errors import InputError
from bebop.heads.head import MTPHead
from bebop.heads.loading import head_for, load_native, native_state_dict, read_head, save_head
from tests.tiny_models import make_backbone, make_checkpoint, scramble


@pytest.mark.parametrize("kind", ["qwen2", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"])
def test_native_head_round_trip(kind, tmp_path):
    """Checkpoint -> head -> native tensors gives the checkpoint's tensors back bit for bit, names included."""
    backbone = make_backbone(tmp_path, kind, native_head=True)
    head, origin = head_for(backbone)
    assert origin == "checkpoint"
    stored = load_file(tmp_path / "model-00002-of-00002.safetensors")
    found = native_state_dict(head)
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], stored[name]) for name in stored)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (
            "qwen3_5_text",
            {"mtp.fc.weight": (32, 64), "mtp.layers.0.self_attn.q_proj.weight": (128, 32), "mtp.norm.weight": (32,)},
        ),
        ("qwen2", {"model.mtp_layers.0.input_proj.weight": (32, 64), "model.mtp_layers.0.self_attn.k_proj.bias": (16,)}),
        ("qwen3_next", {"mtp.layers.0.mlp.experts.3.gate_proj.weight": (16, 32), "mtp.layers.0.mlp.gate.weight": (4, 32)}),
    ],
)
def test_native_names_and_shapes(kind, names, tmp_path):
    backbone = make_backbone(tmp_path, kind)
    tensors = native_state_dict(MTPHead(backbone.head_config, backbone.family))
    assert len(tensors) == {"qwen3_5_text": 15, "qwen2": 16, "qwen3_next": 17 + 3 * 4}[kind]
    assert {name: tuple(tensors[name].shape) for name in names} == names


def test_fused_experts_are_read_too(tmp_path):
    """Both layouts exist in published checkpoints; which one it is shows in the names, not in the model's."""
    backbone = make_backbone(tmp_path, "qwen3_next")
    head = MTPHead(backbone.head_config, backbone.family)
    scramble(head)
    fused = {"mtp." + name: tensor for name, tensor in head.state_dict().items()}
    other = MTPHead(backbone.head_config, backbone.family)
    load_native(other, fused, "here")
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), other.parameters(), strict=True))


def _edit(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("mtp.fc.weight"), "mtp.fc.weight is missing"),
        (lambda t: t.update({"mtp.fc.weight": torch.zeros(32, 32)}), r"mtp.fc.weight is \(32, 32\), expected \(32, 64\)"),
        (lambda t: t.update({"mtp.layers.1.x": torch.zeros(1)}), "mtp.layers.1.x is unexpected"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, tmp_path):
    make_checkpoint(tmp_path, "qwen3_5_text", native_head=True)
    _edit(tmp_path / "model-00002-of-00002.safetensors", change)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] |= dict.fromkeys(
        load_file(tmp_path / "model-00002-of-00002.safetensors"), "model-00002-of-00002.safetensors"
    )
    index.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        head_for(Backbone.load(str(tmp_path), torch.float32))


def test_a_published_qwen3_next_head_is_found_unannounced(tmp_path):
    """Published checkpoints hold mtp.* tensors, and none of the keys that announce them."""
    make_checkpoint(tmp_path / "with", "qwen3_next", native_head=True, announced=False)
    assert head_for(Backbone.load(str(tmp_path / "with"), torch.float32))[1] == "checkpoint"
    make_checkpoint(tmp_path / "without", "qwen3_next")
    assert head_for(Backbone.load(str(tmp_path / "without"), torch.float32))[1] == "cold start"
    path = tmp_path / "with" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_nextn_predict_layers": 0}))
    with pytest.raises(InputError, match="num_nextn_predict_layers = 0, but the checkpoint has 29 tensors"):
        head_for(Backbone.load(str(tmp_path / "with"), torch.float32))


@pytest.mark.parametrize("announced", [0, None, 2])
def test_config_and_tensors_must_agree_on_the_head(announced, tmp_path):
    make_checkpoint(tmp_path, "qwen3_5_text", native_head=True)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("mtp_num_hidden_layers", "num_mtp_layers"):
        config.pop(key)
    if announced is not None:
        config["mtp_num_hidden_layers"] = announced
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"config\.json"):
        head_for(Backbone.load(str(tmp_path), torch.float32))


def test_announced_head_without_tensors_is_an_error(tmp_path):
    make_checkpoint(tmp_path, "qwen3_5_text")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"mtp_num_hidden_layers": 1}))
    with pytest.raises(InputError, match="mtp_num_hidden_layers = 1, but the checkpoint has 0 tensors named mtp"):
        head_for(Backbone.load(str(tmp_path), torch.float32))


@pytest.mark.parametrize("kind", ["qwen2", "llama", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"])
def test_cold_start_takes_the_last_full_attention_layer(kind, tmp_path):
    backbone = make_backbone(tmp_path, kind)
    head, origin = head_for(backbone)
    assert origin == "cold start"
    source = backbone.decoder.layers[-1].state_dict()
    for name, tensor in head.part(backbone.family.layer).state_dict().items():
        if name in source:
            torch.testing.assert_close(tensor, source[name], msg=name)
        else:
            assert kind == "llama"
            assert name.endswith("proj.bias")
            assert not tensor.any()


def test_saved_head_reads_back(tmp_path):
    backbone = make_backbone(tmp_path / "model", "qwen2")
    head = MTPHead(backbone.head_config, backbone.family)
    scramble(head)
    for _ in range(2):  # the second replaces the first
        save_head(head, tmp_path / "head", {"draft_steps": 3})
    _, facts = read_head(tmp_path / "head")
    assert facts == {"family": "mimo", "draft_steps": 3}
    again, origin = head_for(backbone, str(tmp_path / "head"))
    assert origin == str(tmp_path / "head")
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), again.parameters(), strict=True))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["head", "model"]


def test_head_of_another_family_or_size_is_refused(tmp_path):
    small = make_backbone(tmp_path / "small", "qwen2")
    save_head(head_for(small)[0], tmp_path / "head", {})
    with pytest.raises(InputError, match="is a mimo head, the backbone needs qwen3_5"):
        head_for(make_backbone(tmp_path / "other", "qwen3_5_text"), str(tmp_path / "head"))
    with pytest.raises(InputError, match=r"input_proj.weight is \(32, 64\), expected \(64, 128\)"):
        head_for(make_backbone(tmp_path / "large", "qwen2", hidden_size=64), str(tmp_path / "head"))
