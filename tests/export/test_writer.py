import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import MtpModel

from bebop.backbone import Backbone, fingerprint
from bebop.errors import InputError
from bebop.export import writer
from bebop.export.check import check_export
from bebop.export.engine_config import completed_config
from bebop.export.serving import serve_commands, splits_text_differently
from bebop.export.writer import export_head
from bebop.families import MIMO, QWEN3_5
from bebop.heads.loading import head_for, save_head
from tests.rollouts import make_tokenizer
from tests.tiny_models import CONFIGS, make_backbone, make_checkpoint, make_model, make_wrapper, scramble


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


def test_whoever_may_read_the_config_may_read_the_weights(target, head, tmp_path):
    """An engine often runs as another user; safetensors writes files for their owner alone. Links are the target's."""
    (target / "config.json").chmod(0o644)
    export_head(tmp_path / "head", str(target), tmp_path / "export")
    written = [s for s in (tmp_path / "export").glob("*.safetensors") if s.stat().st_nlink == 1]
    assert {shard.stat().st_mode & 0o777 for shard in written} == {0o644}
    head_files = {p.stat().st_mode for p in (tmp_path / "head").iterdir()}
    assert len(head_files) == 1


def test_what_someone_may_edit_is_copied(target, head, tmp_path):
    """Chat templates in their directory too; no weights in other formats, which do not hold the head."""
    (target / "additional_chat_templates").mkdir()
    (target / "additional_chat_templates" / "tools.jinja").write_text("tools")
    (target / "tokenizer.model").write_bytes(b"pieces")
    (target / "pytorch_model.bin").write_bytes(b"weights")
    output = tmp_path / "export"
    export_head(tmp_path / "head", str(target), output)
    assert (output / "additional_chat_templates" / "tools.jinja").read_text() == "tools"
    assert not (output / "pytorch_model.bin").exists()
    for name in ("tokenizer.model", "tokenizer.json", "generation_config.json"):
        assert (output / name).read_bytes() == (target / name).read_bytes()
        assert not os.path.samefile(output / name, target / name)


def test_another_models_head_is_said_to_be_one(tmp_path, caplog):
    """Of the same shape: it may be a later checkpoint of the policy, so it is no error."""
    for seed, name in enumerate(("first", "second")):
        make_checkpoint(tmp_path / name, "qwen2", seed=seed)
    first = fingerprint(tmp_path / "first")
    facts = {"backbone": "first", "fingerprint": first}
    save_head(head_for(Backbone.load(str(tmp_path / "first"), torch.float32))[0], tmp_path / "head", facts)
    export_head(tmp_path / "head", str(tmp_path / "first"), tmp_path / "own")
    assert not caplog.records
    export_head(tmp_path / "head", str(tmp_path / "second"), tmp_path / "other")
    assert "was trained for first, whose weights are not those of" in caplog.text
    assert fingerprint(tmp_path / "own") == first, "neither shards nor the added head change it"


def test_layers_that_no_engine_takes_are_refused_before_anything_is_written(tmp_path):
    for layer_types in (
        ["linear_attention"] * 4,
        ["full_attention", "linear_attention", "linear_attention", "full_attention"],
    ):
        text = CONFIGS["qwen3_5_text"](layer_types=layer_types)
        with pytest.raises(InputError, match=f"no regular interval .{layer_types[0]}.*correct layer_types"):
            completed_config(text.to_dict(), text, QWEN3_5)


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
    quantised = make_checkpoint(tmp_path / "quantised", "qwen2")
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    (tmp_path / "there").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for arguments, message in (
        ((tmp_path / "head", str(target), tmp_path / "there"), "there exists"),
        ((tmp_path / "nothing", str(target), tmp_path / "out"), "has no head.safetensors"),
        ((tmp_path / "head", str(tmp_path / "nothing"), tmp_path / "out"), "does not exist"),
        ((tmp_path / "head", str(other), tmp_path / "out"), "expected \\(64, 128\\)"),
        ((tmp_path / "head", str(native), tmp_path / "out"), "is a mimo head, the target needs qwen3_5"),
        ((tmp_path / "head", str(quantised), tmp_path / "out"), "is quantised"),
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
    commands = serve_commands(MIMO, "out", 3)
    assert commands.keys() == {"vLLM"}, "SGLang feeds a MiMo head another state than it was trained on"
    command = commands["vLLM"]
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


NATIVE = ["qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"]


@pytest.mark.parametrize("kind", [*NATIVE, "qwen2"])
def test_an_untouched_native_head_comes_out_bit_for_bit(kind, tmp_path):
    """Also where it lay among the target's own tensors, and in bf16."""
    target = make_checkpoint(tmp_path / "fp32", kind, native_head=True)
    one = {k: v.bfloat16() for shard in sorted(target.glob("*.safetensors")) for k, v in load_file(shard).items()}
    for path in (*target.glob("*.safetensors"), target / "model.safetensors.index.json"):
        path.unlink()
    writer.save_file(one, target / "model.safetensors", metadata={"format": "pt"})
    backbone = Backbone.load(str(target), torch.float32)
    head, origin = head_for(backbone)
    assert origin == "checkpoint"
    save_head(head, tmp_path / "head", {"draft_steps": 3, "temperature": 1.0})
    export_head(tmp_path / "head", str(target), tmp_path / "export")
    found = {k: v for shard in (tmp_path / "export").glob("*.safetensors") for k, v in load_file(shard).items()}
    assert found.keys() == one.keys()
    assert all(torch.equal(found[name], one[name]) for name in one)
    assert not check_export(tmp_path / "export").problems


@pytest.mark.parametrize("kind", NATIVE)
def test_config_says_what_each_engine_reads(kind, tmp_path):
    target = make_checkpoint(tmp_path / "target", kind)
    path = target / "config.json"
    config = json.loads(path.read_text())
    for key in ("full_attention_interval", "partial_rotary_factor", "architectures"):
        config.pop(key, None)
    path.write_text(json.dumps(config))
    save_head(head_for(Backbone.load(str(target), torch.float32))[0], tmp_path / "head", {})
    export_head(tmp_path / "head", str(target), tmp_path / "export")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["mtp_num_hidden_layers"] == 1
    assert config.get("num_nextn_predict_layers") == (1 if kind == "qwen3_next" else None)
    assert config["num_mtp_layers"] == 1
    assert config["layer_types"] == ["linear_attention"] * 3 + ["full_attention"]
    assert config["full_attention_interval"] == 4
    assert config["rope_parameters"]["partial_rotary_factor"] == config["partial_rotary_factor"]
    name = {"qwen3_5_text": "Qwen3_5", "qwen3_5_moe_text": "Qwen3_5Moe", "qwen3_next": "Qwen3Next"}[kind]
    assert config["architectures"] == [name + "ForCausalLM"]


@pytest.mark.parametrize("kind", NATIVE)
def test_transformers_reads_the_exported_head(kind, tmp_path):
    """transformers' own MtpModel is strict about names and shapes."""
    target = make_checkpoint(tmp_path / "target", kind)
    head, _ = head_for(Backbone.load(str(target), torch.float32))
    scramble(head, seed=4)
    save_head(head, tmp_path / "head", {})
    export_head(tmp_path / "head", str(target), tmp_path / "export")
    theirs = MtpModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "export")).state_dict()
    renamed = {
        "pre_fc_norm_embedding": "layers.0.enorm",
        "pre_fc_norm_hidden": "layers.0.hnorm",
        "fc": "layers.0.eh_proj",
        "norm": "layers.0.post_norm",
    }
    for name, tensor in head.state_dict().items():
        stem, _, end = name.rpartition(".")
        there = f"{renamed[stem]}.{end}" if stem in renamed else name.replace("layers.0.", "layers.0.mtp_block.", 1)
        assert torch.equal(tensor, theirs[there]), name


@pytest.mark.parametrize(
    ("kind", "fused"), [("qwen3_5_text", False), ("qwen3_5_moe_text", False), ("qwen3_5_moe_text", True)]
)
def test_a_multimodal_wrapper_keeps_its_shape(kind, fused, tmp_path):
    """Published Qwen3.5 checkpoints: the text config is nested, and so is what the head adds to it; experts may be fused."""
    target = make_wrapper(tmp_path / "target", make_model(kind), native_head=True, fused_experts=fused)
    head, origin = head_for(Backbone.load(str(target), torch.float32))
    assert origin == "checkpoint"
    save_head(head, tmp_path / "head", {})
    export_head(tmp_path / "head", str(target), tmp_path / "export")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["architectures"] == json.loads((target / "config.json").read_text())["architectures"]
    assert config["architectures"][0].endswith("ForConditionalGeneration")
    assert config["text_config"]["mtp_num_hidden_layers"] == 1
    assert "mtp_num_hidden_layers" not in config
    assert not check_export(tmp_path / "export").problems
    again, _ = head_for(Backbone.load(str(tmp_path / "export"), torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), again.parameters(), strict=True))
    found = {k: v for shard in (tmp_path / "export").glob("*.safetensors") for k, v in load_file(shard).items()}
    for name, tensor in load_file(target / "model-00001-of-00002.safetensors").items():
        assert torch.equal(found[name], tensor), name


def test_a_sharded_target_named_by_its_hub_id(tmp_path, monkeypatch):
    """As the hub client's cache holds it: a snapshot of links, weights in several shards, one with the native head."""
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / "abc"
    stored = make_checkpoint(tmp_path / "stored", "qwen3_5_moe_text", native_head=True)
    first = stored / "model-00001-of-00002.safetensors"
    tensors = load_file(first)
    names = sorted(tensors)
    index = json.loads((stored / "model.safetensors.index.json").read_text())
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        writer.save_file({name: tensors[name] for name in part}, stored / f"part{number}.safetensors")
        index["weight_map"] |= dict.fromkeys(part, f"part{number}.safetensors")
    first.unlink()
    (stored / "model.safetensors.index.json").write_text(json.dumps(index))
    snapshot.mkdir(parents=True)
    for path in stored.iterdir():
        (snapshot / path.name).symlink_to(path)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    backbone = Backbone.load("owner/name", torch.float32)
    head, origin = head_for(backbone)
    assert origin == "checkpoint"
    scramble(head, seed=5)
    save_head(head, tmp_path / "head", {})
    export_head(tmp_path / "head", "owner/name", tmp_path / "export")
    assert not check_export(tmp_path / "export").problems
    exported = Backbone.load(str(tmp_path / "export"), torch.float32)
    again, _ = head_for(exported)
    assert all(torch.equal(a, b) for a, b in zip(head.state_dict().values(), again.state_dict().values(), strict=True))
    for name, tensor in backbone.model.state_dict().items():
        assert torch.equal(tensor, exported.model.state_dict()[name]), name
    assert (
        load_file(stored / "model-00002-of-00002.safetensors").keys()
        == load_file(tmp_path / "export" / "model-00003-of-00003.safetensors").keys()
    ), "the target's own head is untouched"
