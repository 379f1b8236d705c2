import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bebop.backbone import Backbone
from bebop.errors import InputError
from bebop.export import writer
from bebop.export.serving import splits_text_differently, vllm_command
from bebop.export.writer import export_head
from bebop.heads.loading import head_for, save_head
from tests.rollouts import make_tokenizer
from tests.tiny_models import make_backbone, make_checkpoint, scramble


@pytest.fixture(params=["qwen2", "llama"])
def target(request, tmp_path) -> Path:
    directory = make_checkpoint(tmp_path / "target", request.param)
    make_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def head(target, tmp_path):
    head, _ = head_for(Backbone.load(str(target), torch.float32))
    scramble(head, seed=9)
    save_head(head, tmp_path / "head", {"draft_steps": 3, "temperature": 0.6})
    return head


def test_exported_directory_is_what_engines_read(target, head, tmp_path):
    output = tmp_path / "export"
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    facts = export_head(tmp_path / "head", str(target), output)
    assert facts["draft_steps"] == 3
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before, "the target was touched"

    config = json.loads((output / "config.json").read_text())
    assert config["architectures"] == ["MiMoForCausalLM"]
    assert config["model_type"] == "qwen2"
    assert config["num_nextn_predict_layers"] == 1
    assert (output / "tokenizer.json").is_file()
    index = json.loads((output / "model.safetensors.index.json").read_text())
    stored = {}
    for shard in sorted(output.glob("*.safetensors")):
        assert shard.name.startswith("model-0000")
        with safe_open(shard, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert {index["weight_map"][name] for name in file.keys()} == {shard.name}
            stored |= {name: file.get_slice(name).get_shape() for name in file.keys()}
    assert index["weight_map"].keys() == stored.keys()
    mtp = {name: shape for name, shape in stored.items() if name.startswith("model.mtp_layers.0.")}
    assert len(mtp) == 16
    assert mtp["model.mtp_layers.0.input_proj.weight"] == [32, 64]
    assert sum(name.endswith("proj.bias") for name in mtp) == 3


def test_exported_target_and_head_are_the_trained_ones(target, head, tmp_path):
    """Read back by transformers and by our own loader: same logits as the target, same head as was trained."""
    output = tmp_path / "export"
    export_head(tmp_path / "head", str(target), output)
    ids = torch.arange(3, 15).unsqueeze(0)
    expected = AutoModelForCausalLM.from_pretrained(target)(ids).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(output)(ids).logits, expected)
    again, origin = head_for(Backbone.load(str(output), torch.float32))
    assert origin == "checkpoint"
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), again.parameters(), strict=True))


def test_weights_are_linked_not_copied(tmp_path):
    target = make_checkpoint(tmp_path / "target", "qwen2")
    save_head(head_for(Backbone.load(str(target), torch.float32))[0], tmp_path / "head", {})
    export_head(tmp_path / "head", str(target), tmp_path / "export")
    first = tmp_path / "export" / "model-00001-of-00002.safetensors"
    assert os.path.samefile(first, target / "model.safetensors")


def test_head_takes_the_targets_dtype(tmp_path):
    target = tmp_path / "target"
    model = AutoModelForCausalLM.from_pretrained(make_checkpoint(tmp_path / "fp32", "qwen2"), dtype=torch.bfloat16)
    model.save_pretrained(target)
    save_head(head_for(Backbone.load(str(target), torch.float32))[0], tmp_path / "head", {})
    export_head(tmp_path / "head", str(target), tmp_path / "export")
    tensors = load_file(tmp_path / "export" / "model-00002-of-00002.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(tmp_path):
    target = make_checkpoint(tmp_path / "target", "qwen2")
    save_head(head_for(Backbone.load(str(target), torch.float32))[0], tmp_path / "head", {})
    other = make_checkpoint(tmp_path / "other", "qwen2", hidden_size=64)
    native = make_checkpoint(tmp_path / "native", "qwen3_5_text")
    with_head = make_checkpoint(tmp_path / "with_head", "qwen2", native_head=True)
    (tmp_path / "there").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for arguments, message in (
        ((tmp_path / "head", str(target), tmp_path / "there"), "there exists"),
        ((tmp_path / "nothing", str(target), tmp_path / "out"), "has no head.safetensors"),
        ((tmp_path / "head", str(tmp_path / "nothing"), tmp_path / "out"), "does not exist"),
        ((tmp_path / "head", str(other), tmp_path / "out"), "expected \\(64, 128\\)"),
        ((tmp_path / "head", str(native), tmp_path / "out"), "export of qwen3_5 heads is not implemented"),
        ((tmp_path / "head", str(with_head), tmp_path / "out"), "already holds model.mtp_layers.0"),
    ):
        with pytest.raises(InputError, match=message):
            export_head(*arguments)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_tensor_that_reads_back_differently_is_noticed(tmp_path, monkeypatch):
    target = make_checkpoint(tmp_path / "target", "qwen2")
    save_head(head_for(Backbone.load(str(target), torch.float32))[0], tmp_path / "head", {})
    save = writer.save_file
    monkeypatch.setattr(writer, "save_file", lambda t, *a, **k: save({n: x + 1 for n, x in t.items()}, *a, **k))
    with pytest.raises(RuntimeError, match="differs from what was written"):
        export_head(tmp_path / "head", str(target), tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_serve_command_asks_for_probabilistic_drafts():
    """vLLM's default drafts greedily, and a head trained for rejection sampling cannot pay there."""
    command = vllm_command("out", 3)
    options = json.loads(command.partition("--speculative-config ")[2].strip("'"))
    assert options == {"method": "mtp", "num_speculative_tokens": 3, "draft_sample_method": "probabilistic"}


def test_a_tokenizer_that_engines_read_otherwise_is_noticed(tmp_path):
    """transformers gives every qwen2 directory Qwen2's pre-tokeniser; the word-level one of the tests is none."""
    for kind in ("qwen2", "llama"):
        make_checkpoint(tmp_path / kind, kind)
        make_tokenizer().save_pretrained(tmp_path / kind)
    assert splits_text_differently(tmp_path / "qwen2")
    assert not splits_text_differently(tmp_path / "llama")


def test_export_of_the_same_head_for_its_own_backbone(tmp_path):
    backbone = make_backbone(tmp_path / "target", "qwen2")
    head, _ = head_for(backbone)
    save_head(head, tmp_path / "head", {})
    assert export_head(tmp_path / "head", str(tmp_path / "target"), tmp_path / "export") == {"family": "mimo"}
