import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bebop.backbone import Backbone
from bebop.export.check import check_export, main
from bebop.export.writer import export_head
from bebop.heads.loading import head_for, save_head
from tests.tiny_models import make_checkpoint

LAST = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
Q_PROJ = "mtp.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def exported(tmp_path) -> Path:
    target = make_checkpoint(tmp_path / "target", "qwen3_5_text")
    save_head(head_for(Backbone.load(str(target), torch.float32))[0], tmp_path / "head", {"draft_steps": 3})
    export_head(tmp_path / "head", str(target), tmp_path / "export", copy=True)
    return tmp_path / "export"


def edit(directory: Path, change) -> None:
    path = directory / LAST
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def index(change):
    return lambda d: edit_json(d / INDEX, lambda i: change(i["weight_map"]))


def tensors(change):
    return lambda d: edit(d, change)


def config(change):
    return lambda d: edit_json(d / "config.json", change)


def remove_from_target(directory: Path, name: str) -> None:
    """From shard and index."""
    path = directory / "model-00001-of-00002.safetensors"
    tensors = load_file(path)
    del tensors[name]
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})
    index(lambda m: m.pop(name))(directory)


DAMAGE = [
    (tensors(lambda t: t.pop(Q_PROJ)), f"{Q_PROJ} is missing"),
    (tensors(lambda t: t.update({"mtp.stray.weight": t["mtp.norm.weight"].clone()})), "mtp.stray.weight does not belong"),
    (tensors(lambda t: t.update({Q_PROJ: t[Q_PROJ].half()})), f"{Q_PROJ} is F16, the target's embedding is F32"),
    (tensors(lambda t: t.update({Q_PROJ: t[Q_PROJ][1:]})), f"{Q_PROJ} is (127, 32), config.json makes it (128, 32)"),
    (index(lambda m: m.pop("mtp.fc.weight")), f"mtp.fc.weight is in {LAST}, the index says None"),
    (index(lambda m: m.update(gone=LAST)), f"gone is not in {LAST}, where the index has it"),
    (index(lambda m: m.update(gone="more.safetensors")), "more.safetensors is missing (gone and 0 more"),
    (lambda d: os.truncate(d / LAST, 3000), f"{LAST} is damaged or truncated (mtp."),
    (lambda d: (d / "model-00001-of-00002.safetensors").unlink(), "model-00001-of-00002.safetensors is missing (lm_head"),
    (config(lambda c: c.update(mtp_num_hidden_layers=2)), "mtp_num_hidden_layers = 2"),
    (config(lambda c: c.update(architectures=[])), "architectures = []"),
    (config(lambda c: c.update(quantization_config={"quant_method": "fp8"})), "is quantised"),
    (lambda d: (d / INDEX).write_text("[]"), "model.safetensors.index.json is damaged"),
    (lambda d: (d / INDEX).write_text('{"weight_map": []}'), "model.safetensors.index.json is damaged"),
    (
        lambda d: remove_from_target(d, "model.layers.2.mlp.up_proj.weight"),
        "model.layers.2.mlp.up_proj.weight of the target is missing",
    ),
    (lambda d: remove_from_target(d, "lm_head.weight"), "lm_head.weight of the target is missing"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_what_engines_would_not_say_is_found(exported, damage, message, capsys, monkeypatch):
    damage(exported)
    problems = check_export(exported).problems
    assert any(message in problem for problem in problems), problems
    monkeypatch.setattr("sys.argv", ["check", str(exported)])
    with pytest.raises(SystemExit, match="engines would not draft"):
        main()
    assert message in capsys.readouterr().out


@pytest.mark.parametrize("key", ["full_attention_interval", "partial_rotary_factor", "num_mtp_layers"])
def test_what_one_program_lacks_does_not_stop_the_others(exported, key, capsys, monkeypatch):
    config(lambda c: c.pop(key))(exported)
    report = check_export(exported)
    program = "transformers" if key == "num_mtp_layers" else "SGLang"
    assert report.problems == []
    assert report.problems_of.keys() == {program}
    monkeypatch.setattr("sys.argv", ["check", str(exported)])
    main()
    said = capsys.readouterr().out
    assert f"problem for {program} alone: config.json has {key} = None" in said
    assert "vllm serve" in said
    assert ("sglang.launch_server" in said) == (program != "SGLang")


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ["qwen3_5_moe_text", "qwen3_next"])
def test_experts_may_be_stored_fused_or_one_by_one(kind, fused, tmp_path):
    make_checkpoint(tmp_path, kind, native_head=True, fused_experts=fused)
    config(lambda c: c.update(mtp_use_dedicated_embeddings=False, attn_output_gate=True))(tmp_path)  # as published
    assert check_export(tmp_path).problems == []


def test_a_published_qwen3_next_checkpoint_needs_no_announcement(tmp_path):
    """Its config.json has none of the keys that announce a head."""
    make_checkpoint(tmp_path, "qwen3_next", native_head=True, announced=False)
    report = check_export(tmp_path)
    assert report.problems == []
    assert report.engines == ["vLLM"]
    config(lambda c: c.update(num_nextn_predict_layers=0))(tmp_path)
    assert any("num_nextn_predict_layers = 0" in problem for problem in check_export(tmp_path).problems)


def test_what_is_no_export_is_said_so(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["check", "runs/nothing"])
    with pytest.raises(SystemExit, match=r"has no config\.json"):
        main()
    make_checkpoint(tmp_path, "qwen3_5_text")
    assert any("there is no MTP head" in problem for problem in check_export(tmp_path).problems)


def test_a_good_directory_is_explained(exported, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["check", str(exported)])
    main()
    said = capsys.readouterr().out
    assert "a qwen3_5 head of 15 tensors" in said
    for engine in ("vllm serve", "sglang.launch_server", "--spec-draft-sampling probabilistic"):
        assert engine in said
