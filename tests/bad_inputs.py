"""What users get wrong: a folder in which everything is right, ways to spoil it, and what is then said."""

import contextlib
import gzip
import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

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


def prepare(folder: Path) -> None:
    """Everything that the commands above need, in the current directory."""
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    for name, kind, native in (("model", "qwen2", False), ("native", "qwen3_5_text", True)):
        tokenizer.save_pretrained(make_checkpoint(Path(name), kind, native_head=native))
    save_head(head_for(Backbone.load("model", torch.float32))[0], Path("head"), {"backbone": "model", "draft_steps": 3})
    export_head(Path("head"), "model", Path("exported"), copy=True)
    header = RolloutHeader("model", tokenizer_hash(tokenizer), VOCABULARY, 1.0)
    write_rollouts(Path("rollouts.jsonl"), header, self_generated(40))
    write_rollouts(Path("rollouts.parquet"), header, self_generated(40))
    write_rollouts(Path("held-out.jsonl"), header, self_generated(12, seed=5))
    talk = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4"}]
    Path("chats.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    Path("train.yaml").write_text(CONFIG)
    train(parse_config(["--config", "train.yaml", "--output", "run"]))


Spoil = Callable[[], object]


class BadInput(NamedTuple):
    """A command in the spoilt folder, and what it ends with."""

    name: str
    spoil: Spoil
    command: str
    message: str


def nothing() -> None:
    """The mistake is in the command."""


def removed(name: str) -> Spoil:
    return lambda: Path(name).unlink()


def truncated(name: str) -> Spoil:
    return lambda: os.truncate(name, Path(name).stat().st_size // 2)


def written(name: str, content: str | bytes) -> Spoil:
    return lambda: Path(name).write_bytes(content.encode() if isinstance(content, str) else content)


def directory(name: str) -> Spoil:
    """A directory in place of the file."""
    return lambda: (Path(name).unlink(missing_ok=True), Path(name).mkdir())


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
    """A conversation in turns, user's and assistant's, and the model's chat template."""

    def spoil() -> None:
        talk = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
        Path("chats.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
        if template is not None:
            Path("model/chat_template.jinja").write_text(template)

    return spoil


INDEX = "native/model.safetensors.index.json"
PARQUET = f"{TRAIN} --rollouts rollouts.parquet"
NATIVE = f"{TRAIN} --backbone native"
HEADER = '{"bebop_rollouts": 1'
FIRST_IDS = '"prompt_ids": ['

FILES = [
    BadInput("rollouts missing", removed("rollouts.jsonl"), TRAIN, "X"),
    BadInput("rollouts empty", written("rollouts.jsonl", ""), TRAIN, "X"),
    BadInput("rollouts truncated", truncated("rollouts.jsonl"), TRAIN, "X"),
    BadInput("rollouts binary", written("rollouts.jsonl", b"PAR1\xff\xfe"), TRAIN, "X"),
    BadInput("rollouts nul", written("rollouts.jsonl", b"\0" * 5000), TRAIN, "X"),
    BadInput("rollouts a directory", directory("rollouts.jsonl"), TRAIN, "X"),
    BadInput("rollouts of chats", nothing, f"{TRAIN} --rollouts chats.jsonl", "X"),
    BadInput("rollouts of another format version", replaced("rollouts.jsonl", HEADER, '{"bebop_rollouts": 2'), TRAIN, "X"),
    BadInput("rollouts of another format version", replaced("rollouts.jsonl", HEADER, '{"bebop_rollouts": true'), TRAIN, "X"),
    BadInput("header no vocab", replaced("rollouts.jsonl", '"vocab_size"', '"vocabulary"'), TRAIN, "X"),
    BadInput("header vocab -1", replaced("rollouts.jsonl", '"vocab_size": 131', '"vocab_size": -1'), TRAIN, "X"),
    BadInput("header vocab 0", replaced("rollouts.jsonl", '"vocab_size": 131', '"vocab_size": 0'), TRAIN, "X"),
    BadInput("header vocab huge", replaced("rollouts.jsonl", '"vocab_size": 131', '"vocab_size": 1e30'), TRAIN, "X"),
    BadInput("header vocab huge int", replaced("rollouts.jsonl", '"vocab_size": 131', '"vocab_size": 1' + "0" * 30), TRAIN, "X"),
    BadInput("header temp nan", replaced("rollouts.jsonl", '"temperature": 1.0', '"temperature": NaN'), TRAIN, "X"),
    BadInput("header temp nan evaluate", replaced("rollouts.jsonl", '"temperature": 1.0', '"temperature": NaN'), EVALUATE, "X"),
    BadInput("header temp -1", replaced("rollouts.jsonl", '"temperature": 1.0', '"temperature": -1'), TRAIN, "X"),
    BadInput("header temp true", replaced("rollouts.jsonl", '"temperature": 1.0', '"temperature": true'), TRAIN, "X"),
    BadInput("header model number", replaced("rollouts.jsonl", '"model": "model"', '"model": 3'), TRAIN, "X"),
    BadInput("header sampling list", replaced("rollouts.jsonl", '"sampling": {}', '"sampling": null'), VALIDATE, "X"),
    BadInput("header hash number", replaced("rollouts.jsonl", '"tokenizer_hash": "', '"tokenizer_hash": "0'), TRAIN, "X"),
    BadInput("header vocab other", replaced("rollouts.jsonl", '"vocab_size": 131', '"vocab_size": 150'), TRAIN, "X"),
    BadInput("id out", replaced("rollouts.jsonl", FIRST_IDS, FIRST_IDS + "131, "), TRAIN, "X"),
    BadInput("id bool", replaced("rollouts.jsonl", FIRST_IDS, FIRST_IDS + "true, "), TRAIN, "X"),
    BadInput("id nan", replaced("rollouts.jsonl", FIRST_IDS, FIRST_IDS + "NaN, "), TRAIN, "X"),
    BadInput("id list", replaced("rollouts.jsonl", FIRST_IDS, FIRST_IDS + "[1], "), TRAIN, "X"),
    BadInput("id neg", replaced("rollouts.jsonl", FIRST_IDS, FIRST_IDS + "-1, "), VALIDATE, "X"),
    BadInput("blank line", replaced("rollouts.jsonl", '{"prompt', '\n{"prompt'), TRAIN, "X"),
    BadInput("bom", lambda: Path("rollouts.jsonl").write_bytes(b"\xef\xbb\xbf" + Path("rollouts.jsonl").read_bytes()), TRAIN, "X"),
    BadInput("disagree", lambda: (shutil.copy("rollouts.jsonl", "more.jsonl"), replaced("more.jsonl", '"temperature": 1.0', '"temperature": 0.5')()), f"{TRAIN} --rollouts rollouts.jsonl more.jsonl", "X"),
    BadInput("pattern", nothing, f"{TRAIN} --rollouts 'sampled/*.parquet'", "X"),
    BadInput("parquet truncated", truncated("rollouts.parquet"), PARQUET, "X"),
    BadInput("parquet json", lambda: shutil.copy("rollouts.jsonl", "rollouts.parquet"), PARQUET, "X"),
    BadInput("parquet no header", parquet_with({"prompt_ids": [[1]], "response_ids": [[2]]}, header=False), PARQUET, "X"),
    BadInput("parquet no column", parquet_with({"prompt": ["a"], "response": ["b"]}), PARQUET, "X"),
    BadInput("parquet text", parquet_with({"prompt_ids": ["a"], "response_ids": ["b"]}), PARQUET, "X"),
    BadInput("parquet named jsonl", lambda: shutil.copy("rollouts.parquet", "p.jsonl"), f"{TRAIN} --rollouts p.jsonl", "X"),
    BadInput("gz not", lambda: shutil.copy("rollouts.jsonl", "r.jsonl.gz"), f"{TRAIN} --rollouts r.jsonl.gz", "X"),
    BadInput("gz trunc", lambda: Path("r.jsonl.gz").write_bytes(gzip.compress(Path("rollouts.jsonl").read_bytes())[:300]), f"{TRAIN} --rollouts r.jsonl.gz", "X"),
    BadInput("gz named jsonl", lambda: Path("r.jsonl").write_bytes(gzip.compress(Path("rollouts.jsonl").read_bytes())), f"{TRAIN} --rollouts r.jsonl", "X"),
    BadInput("json array", written("rollouts.jsonl", '[{"prompt_ids": [1]}]\n'), TRAIN, "X"),
    BadInput("header int", written("rollouts.jsonl", '5\n'), TRAIN, "X"),
    BadInput("evaluate empty", written("rollouts.jsonl", ""), EVALUATE, "X"),
    BadInput("evaluate pattern", nothing, EVALUATE.replace("rollouts.jsonl", "'r*.nothing'"), "X"),
    BadInput("compare overlap", nothing, COMPARE.replace("held-out.jsonl", "rollouts.jsonl"), "X"),
    BadInput("compare pattern", nothing, COMPARE.replace("held-out.jsonl", "'h*.jsonl'"), "X"),
    BadInput("validate empty", written("rollouts.jsonl", ""), VALIDATE, "X"),
    BadInput("validate other model", nothing, f"{VALIDATE} --model native --draft-steps 30", "X"),
    BadInput("validate json is dir", nothing, f"{VALIDATE} --json run", "X"),
    BadInput("validate json in file", nothing, f"{VALIDATE} --json train.yaml/x.json", "X"),
    BadInput("deep json", written("rollouts.jsonl", "[" * 100000 + "\n"), TRAIN, "X"),
    BadInput("big int", replaced("rollouts.jsonl", FIRST_IDS, FIRST_IDS + "9" * 5000 + ", "), TRAIN, "X"),
]
CONFIGS = [
    BadInput("unknown key", written("train.yaml", CONFIG + "max_step: 3\n"), TRAIN, "X"),
    BadInput("number key", written("train.yaml", CONFIG + "3: 3\n"), TRAIN, "X"),
    BadInput("null", written("train.yaml", CONFIG + "seed:\n"), TRAIN, "X"),
    BadInput("nan lr", written("train.yaml", CONFIG + "temperature: .nan\n"), TRAIN, "X"),
    BadInput("inf lr", nothing, f"{TRAIN} --learning_rate inf", "X"),
    BadInput("inf temp", nothing, f"{TRAIN} --temperature inf", "X"),
    BadInput("nan wd", nothing, f"{TRAIN} --weight_decay nan", "X"),
    BadInput("nan share", nothing, f"{TRAIN} --held_out_share nan", "X"),
    BadInput("bool lr", written("train.yaml", CONFIG + "temperature: true\n"), TRAIN, "X"),
    BadInput("bool cli", nothing, f"{TRAIN} --cache_states perhaps", "X"),
    BadInput("yaml list", written("train.yaml", "- a\n- b"), TRAIN, "X"),
    BadInput("yaml empty", written("train.yaml", ""), TRAIN, "X"),
    BadInput("yaml broken", written("train.yaml", "a: [\nb: }"), TRAIN, "X"),
    BadInput("yaml binary", written("train.yaml", b"\xff\xfe\0a"), TRAIN, "X"),
    BadInput("yaml python", written("train.yaml", "seed: !!python/object:os.system [ls]"), TRAIN, "X"),
    BadInput("yaml dir", directory("train.yaml"), TRAIN, "X"),
    BadInput("yaml missing", removed("train.yaml"), TRAIN, "X"),
    BadInput("config twice", nothing, "train_mtp --config", "X"),
    BadInput("stray", nothing, f"{TRAIN} stray", "X"),
    BadInput("rollout int", written("train.yaml", CONFIG.replace("rollouts.jsonl", "3")), TRAIN, "X"),
    BadInput("range", nothing, f"{TRAIN} --temperature_low 1 --temperature_high 0.5", "X"),
    BadInput("states dir", nothing, f"{TRAIN} --states_directory states", "X"),
    BadInput("states dir file", nothing, f"{TRAIN} --cache_states true --states_directory train.yaml", "X"),
    BadInput("accumulate", nothing, f"{TRAIN} --accumulate 1000", "X"),
    BadInput("tracker", nothing, f"{TRAIN} --tracker mlflow", "X"),
    BadInput("max_length", nothing, f"{TRAIN} --max_length 20", "X"),
    BadInput("no held out", nothing, f"{TRAIN} --held_out_share 0", "X"),
    BadInput("draft 22", nothing, f"{TRAIN} --draft_steps 22", "X"),
    BadInput("loss", nothing, f"{TRAIN} --loss 'e2e_tv + x ce'", "X"),
    BadInput("loss nan", nothing, f"{TRAIN} --loss 'e2e_tv + nan ce'", "X"),
    BadInput("seed neg", nothing, f"{TRAIN} --seed -1", "X"),
    BadInput("seed huge", nothing, f"{TRAIN} --seed 99999999999999999999999", "X"),
    BadInput("compare objective", nothing, f"{COMPARE} --objectives mse", "X"),
    BadInput("compare baseline", nothing, f"{COMPARE} --objectives tv", "X"),
    BadInput("compare seeds", nothing, f"{COMPARE} --seeds 0", "X"),
    BadInput("compare range", nothing, f"{COMPARE} --range 1 0.5", "X"),
    BadInput("compare range nan", nothing, f"{COMPARE} --range nan nan", "X"),
    BadInput("compare share", nothing, f"{COMPARE} --cold-start-share 2", "X"),
    BadInput("compare same name", nothing, f"{COMPARE} --held-out a/x.jsonl b/x.jsonl", "X"),
    BadInput("compare unknown", nothing, f"{COMPARE} --learning_rat 1", "X"),
    BadInput("compare out", nothing, f"{COMPARE} --output train.yaml", "X"),
    BadInput("evaluate steps", nothing, f"{EVALUATE} --steps 0", "X"),
    BadInput("evaluate steps many", nothing, f"{EVALUATE} --steps 200", "X"),
    BadInput("evaluate temp", nothing, f"{EVALUATE} --temperatures 0", "X"),
    BadInput("evaluate temp", nothing, f"{EVALUATE} --temperatures nan", "X"),
    BadInput("evaluate temp", nothing, f"{EVALUATE} --temperatures inf", "X"),
    BadInput("evaluate cost", nothing, f"{EVALUATE} --cost-ratio -1", "X"),
    BadInput("evaluate cost", nothing, f"{EVALUATE} --cost-ratio nan", "X"),
    BadInput("evaluate cost 0", nothing, f"{EVALUATE} --cost-ratio 0", "X"),
    BadInput("evaluate chk", nothing, f"{EVALUATE} --checkpoints 2", "X"),
    BadInput("evaluate res", nothing, f"{EVALUATE} --resamples 1", "X"),
    BadInput("evaluate backbones", nothing, f"{EVALUATE} --backbone model native", "X"),
    BadInput("evaluate tokens", nothing, f"{EVALUATE} --tokens-per-batch 0", "X"),
    BadInput("evaluate decode", nothing, f"{EVALUATE} --decode -1", "X"),
    BadInput("evaluate seed", nothing, f"{EVALUATE} --seed -1 --decode 1", "X"),
    BadInput("evaluate no backbone", json_with("head/head.json", backbone=None), EVALUATE, "X"),
    BadInput("evaluate auto no backbone", nothing, EVALUATE.replace("--head head", "--head auto"), "X"),
    BadInput("evaluate draft steps str", json_with("head/head.json", draft_steps="three"), EVALUATE, "X"),
    BadInput("generate temperature", nothing, f"{GENERATE} --temperature nan", "X"),
    BadInput("generate temperature", nothing, f"{GENERATE} --temperature inf", "X"),
    BadInput("generate count", nothing, f"{GENERATE} --count 0", "X"),
    BadInput("generate ending", nothing, f"{GENERATE} --output new.parquet", "X"),
    BadInput("generate server", nothing, f"{GENERATE} --server nonsense", "X"),
    BadInput("generate prompts", nothing, f"{GENERATE} --prompts nothing.txt", "X"),
    BadInput("convert temp", nothing, f"{CONVERT} --temperature nan", "X"),
    BadInput("convert temp", nothing, f"{CONVERT} --temperature inf", "X"),
    BadInput("convert ending", nothing, f"{CONVERT} --output new.csv", "X"),
    BadInput("convert count", nothing, f"{CONVERT} --count 0", "X"),
    BadInput("convert column", nothing, f"{CONVERT} --column talk", "X"),
    BadInput("convert dataset", nothing, f"{CONVERT} --dataset nothing.jsonl", "X"),
    BadInput("convert dataset", nothing, f"{CONVERT} --dataset 'nothing*.jsonl'", "X"),
    BadInput("convert damaged", truncated("chats.jsonl"), CONVERT, "X"),
    BadInput("convert damaged", written("chats.jsonl", ""), CONVERT, "X"),
    BadInput("convert damaged nonstream", truncated("chats.jsonl"), CONVERT.replace("--streaming", ""), "X"),
    BadInput("convert split", nothing, f"{CONVERT} --split test", "X"),
    BadInput("convert binary", written("chats.jsonl", b"\xff\xfe\0"), CONVERT, "X"),
    BadInput("validate steps", nothing, f"{VALIDATE} --draft-steps 0", "X"),
    BadInput("validate tokens", nothing, f"{VALIDATE} --tokens-per-micro-batch -1", "X"),
]
MODELS = [
    BadInput(f"{c.split()[0]} {n}", s, c, "X")
    for c in (TRAIN, EVALUATE, EXPORT, GENERATE, CONVERT, VALIDATE)
    for n, s in {
        "no directory": lambda: shutil.rmtree("model"),
        "no config": removed("model/config.json"),
        "damaged config": truncated("model/config.json"),
        "config a list": written("model/config.json", "[]"),
        "config nonsense": written("model/config.json", "{}"),
        "qwen3": json_with("model/config.json", model_type="qwen3"),
        "unknown type": json_with("model/config.json", model_type="nonsense"),
        "quantised": json_with("model/config.json", quantization_config={"quant_method": "fp8"}),
        "no weights": removed("model/model.safetensors"),
        "truncated": truncated("model/model.safetensors"),
        "zero": written("model/model.safetensors", ""),
        "missing tensor": tensors_with("model/model.safetensors", lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        "missing embed": tensors_with("model/model.safetensors", lambda t: t.pop("model.embed_tokens.weight")),
        "shape": json_with("model/config.json", intermediate_size=64),
        "vocab": json_with("model/config.json", vocab_size=140),
        "heads 0": json_with("model/config.json", num_attention_heads=0),
        "layers str": json_with("model/config.json", num_hidden_layers="two"),
        "hidden str": json_with("model/config.json", hidden_size=None),
        "act": json_with("model/config.json", hidden_act="nonsense"),
        "sliding": json_with("model/config.json", use_sliding_window=True, layer_types=["sliding_attention"] * 2),
        "no tokenizer": removed("model/tokenizer.json"),
        "damaged tokenizer": truncated("model/tokenizer.json"),
        "tokenizer dir": directory("model/tokenizer.json"),
        "tokenizer config": written("model/tokenizer_config.json", "["),
        "other tokenizer": replaced("model/tokenizer.json", '"w5"', '"v5"'),
        "generation config": written("model/generation_config.json", "["),
        "index list": written("model/model.safetensors.index.json", "[]"),
        "index gone": written("model/model.safetensors.index.json", '{"weight_map": {"a": "gone.safetensors"}}'),
        "template": written("model/chat_template.jinja", "{% nonsense %}"),
        "announced": json_with("model/config.json", num_nextn_predict_layers=1),
        "announced str": json_with("model/config.json", num_nextn_predict_layers="one"),
        "chat missing": removed("model/chat_template.jinja"),
        "hf id": lambda: Path("model").rename("gone"),
    }.items()
] + [
    BadInput("native shard", removed("native/model-00001-of-00002.safetensors"), NATIVE, "X"),
    BadInput("native index lies", replaced(INDEX, "model-00002-of", "model-00001-of"), NATIVE, "X"),
    BadInput("native index lies 2", replaced(INDEX, '"mtp.fc.weight": "model-00002-of-00002.safetensors"', '"mtp.fc.weight": "model-00001-of-00002.safetensors"'), NATIVE, "X"),
    BadInput("native index num", replaced(INDEX, '"model-00002-of-00002.safetensors"', "3"), NATIVE, "X"),
    BadInput("native two", json_with("native/config.json", mtp_num_hidden_layers=2), NATIVE, "X"),
    BadInput("native none", json_with("native/config.json", mtp_num_hidden_layers=0), NATIVE, "X"),
    BadInput("native gone", lambda: (removed("native/model-00002-of-00002.safetensors")(), removed(INDEX)(), Path("native/model-00001-of-00002.safetensors").rename("native/model.safetensors")), NATIVE, "X"),
    BadInput("native lacks", tensors_with("native/model-00002-of-00002.safetensors", lambda t: t.pop("mtp.fc.weight")), NATIVE, "X"),
    BadInput("native export other", nothing, EXPORT.replace("model", "native"), "X"),
]
HEADS = [
    BadInput(f"{c.split()[0]} {n}", s, c, "X")
    for c in (f"{TRAIN} --head head", EVALUATE, EXPORT)
    for n, s in {
        "no head": lambda: shutil.rmtree("head"),
        "no json": removed("head/head.json"),
        "json damaged": truncated("head/head.json"),
        "json list": written("head/head.json", "[]"),
        "json binary": written("head/head.json", b"\xff\xfe"),
        "family": json_with("head/head.json", family="qwen3_5"),
        "family nonsense": json_with("head/head.json", family=3),
        "no family": written("head/head.json", "{}"),
        "truncated": truncated("head/head.safetensors"),
        "empty": written("head/head.safetensors", ""),
        "stray": tensors_with("head/head.safetensors", lambda t: t.update(stray=torch.zeros(1))),
        "lacks": tensors_with("head/head.safetensors", lambda t: t.popitem()),
        "width": tensors_with("head/head.safetensors", lambda t: t.update({n: torch.zeros(64, 128) for n in t if "input_proj" in n})),
        "dtype": tensors_with("head/head.safetensors", lambda t: t.update({n: x.to(torch.int8) for n, x in t.items()})),
        "nan": tensors_with("head/head.safetensors", lambda t: t.update({n: x * float("nan") for n, x in t.items()})),
        "file": lambda: (shutil.rmtree("head"), Path("head").touch()),
        "draft_steps str": json_with("head/head.json", draft_steps="x"),
        "backbone num": json_with("head/head.json", backbone=3),
    }.items()
]
MASKS = [
    BadInput("empty answer", chat("w1", ""), CONVERT, "X"),
    BadInput("no assistant", chat("w1"), CONVERT, "X"),
    BadInput("assistant first", written("chats.jsonl", '{"messages": [{"role": "assistant", "content": "w1"}]}\n'), CONVERT, "X"),
    BadInput("longer", chat("w1", "w2", "w3", "w4", template="{{ messages | length }} " + CHAT_TEMPLATE), CONVERT, "X"),
    BadInput("no end", chat("w1", "w2", template=CHAT_TEMPLATE.replace(" <end>", "")), CONVERT, "X"),
    BadInput("raise", chat("w1", "w2", template="{{ raise_exception('a\nb') }}"), CONVERT, "X"),
    BadInput("no template", removed("model/chat_template.jinja"), CONVERT, "X"),
    BadInput("content null", written("chats.jsonl", '{"messages": [{"role": "user"}, {"role": "assistant", "content": null}]}\n'), CONVERT, "X"),
    BadInput("roles", written("chats.jsonl", '{"messages": [{"role": "tool", "content": "w"}]}\n'), CONVERT, "X"),
    BadInput("string", written("chats.jsonl", '{"messages": "hello"}\n'), CONVERT, "X"),
    BadInput("too long", chat("w1", "w2 " * 300), CONVERT, "X"),
]
STEP = "run/checkpoints/step-000001"
CHECKPOINTS = [
    BadInput("auto none", lambda: shutil.rmtree("run/checkpoints"), f"{RESUME} auto", "X"),
    BadInput("auto no run", nothing, f"{RESUME} auto --output new", "X"),
    BadInput("auto damaged", truncated(f"{STEP}/optimizer.bin"), f"{RESUME} auto", "X"),
    BadInput("manifest damaged", truncated(f"{STEP}/manifest.json"), f"{RESUME} auto", "X"),
    BadInput("manifest list", written(f"{STEP}/manifest.json", '{"position": [], "accept_length": 1, "files": []}'), f"{RESUME} auto", "X"),
    BadInput("named damaged", truncated(f"{STEP}/model.safetensors"), f"{RESUME} {STEP}", "X"),
    BadInput("named missing", nothing, f"{RESUME} nothing", "X"),
    BadInput("outside", lambda: shutil.copytree(STEP, "other/step-000001"), f"{RESUME} other/step-000001", "X"),
    BadInput("other data", lambda: shutil.copy("held-out.jsonl", "rollouts.jsonl"), f"{RESUME} auto", "X"),
    BadInput("other steps", nothing, f"{RESUME} auto --draft_steps 2", "X"),
    BadInput("other seed", nothing, f"{RESUME} auto --seed 2", "X"),
    BadInput("fewer steps", nothing, f"{RESUME} auto --max_steps 1", "X"),
    BadInput("other model", nothing, f"{RESUME} auto --backbone native", "X"),
    BadInput("step name", lambda: Path(STEP).rename("run/checkpoints/last"), f"{RESUME} run/checkpoints/last", "X"),
]
OUTPUTS = [
    BadInput("train exists", nothing, f"{TRAIN} --output run", "X"),
    BadInput("train file", nothing, f"{TRAIN} --output rollouts.jsonl", "X"),
    BadInput("train in file", nothing, f"{TRAIN} --output rollouts.jsonl/new", "X"),
    BadInput("compare in file", nothing, f"{COMPARE} --output rollouts.jsonl/new", "X"),
    BadInput("evaluate exists", nothing, f"{EVALUATE} --output run", "X"),
    BadInput("evaluate in file", nothing, f"{EVALUATE} --output rollouts.jsonl/new", "X"),
    BadInput("export exists", nothing, f"{EXPORT} --output run", "X"),
    BadInput("export in file", nothing, f"{EXPORT} --output rollouts.jsonl/new", "X"),
    BadInput("convert exists", nothing, f"{CONVERT} --output rollouts.jsonl", "X"),
    BadInput("convert in file", nothing, f"{CONVERT} --output rollouts.jsonl/new.jsonl", "X"),
    BadInput("generate exists", nothing, f"{GENERATE} --output rollouts.jsonl", "X"),
    BadInput("generate in file", nothing, f"{GENERATE} --output rollouts.jsonl/new.jsonl", "X"),
    BadInput("check missing", nothing, "check nothing", "X"),
    BadInput("check file", nothing, "check train.yaml", "X"),
    BadInput("check config", truncated("exported/config.json"), CHECK, "X"),
    BadInput("check config list", written("exported/config.json", "[]"), CHECK, "X"),
    BadInput("check binary", written("exported/model-00002-of-00002.safetensors", "x"), CHECK, "X"),
    BadInput("check fine", nothing, CHECK, "X"),
]
BAD_INPUTS = [*FILES, *CONFIGS, *MODELS, *HEADS, *MASKS, *CHECKPOINTS, *OUTPUTS]
