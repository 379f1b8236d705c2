"""What users get wrong: every command ends with one line that says it, and leaves all files as they were."""

import hashlib
import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from bebop.backbone import Backbone
from bebop.errors import InputError
from bebop.heads.loading import head_for, save_head
from bebop.training.checkpoint import check_intact
from tests.bad_inputs import (
    CHECK,
    COMPARE,
    CONFIG,
    CONVERT,
    EVALUATE,
    EXPORT,
    GENERATE,
    RESUME,
    TRAIN,
    VALIDATE,
    chat,
    json_with,
    made_a_directory,
    nothing,
    parquet_with,
    prepare,
    removed,
    renamed,
    replaced,
    tensors_with,
    truncated,
    written,
)  # fmt: skip
from tests.full_disk import full_disk
from tests.rollouts import CHAT_TEMPLATE

PARQUET = f"{TRAIN} --rollouts rollouts.parquet"
GZIPPED = f"{TRAIN} --rollouts rollouts.jsonl.gz"
NATIVE = f"{TRAIN} --backbone native"
FROM_HEAD = f"{TRAIN} --head head"
TEMPERATURE = '"temperature": 1.0'
IDS = '"prompt_ids": ['
UP_PROJ = "model.layers.1.mlp.up_proj.weight"
MTP_SHARD = "native/model-00002-of-00002.safetensors"
STEP = "run/checkpoints/step-000001"

ROLLOUTS = {
    "missing": (removed("rollouts.jsonl"), TRAIN, "rollout file rollouts.jsonl does not exist"),
    "unfinished": (renamed("rollouts.jsonl", "rollouts.jsonl.partial"), TRAIN, "rollouts.jsonl is not complete yet"),
    "a vocabulary of gigabytes": (
        replaced("rollouts.jsonl", '"vocab_size": 131', '"vocab_size": 999999999'),
        TRAIN,
        "vocab_size is 999999999, expected a number from 1 to 16777216",
    ),
    "missing, to evaluate": (removed("rollouts.jsonl"), EVALUATE, "rollout file rollouts.jsonl does not exist"),
    "a pattern without a match": (nothing, f"{TRAIN} --rollouts 'sampled/*.jsonl'", "rollout file sampled/.* does not"),
    "a directory": (made_a_directory("rollouts.jsonl"), TRAIN, r"is a directory; give the rollout files in it, as"),
    "empty": (written("rollouts.jsonl", ""), TRAIN, 'rollouts.jsonl:1 is empty; expected a header with "bebop_rollouts"'),
    "empty, to validate": (written("rollouts.jsonl", ""), VALIDATE, "rollouts.jsonl:1 is empty; expected a header"),
    "truncated": (truncated("rollouts.jsonl"), TRAIN, r"rollouts.jsonl:\d+: .*the file is truncated"),
    "binary": (written("rollouts.jsonl", b"PAR1\xff\xfe"), TRAIN, "is not a text file; expected JSON lines"),
    "nested deeply": (written("rollouts.jsonl", "[" * 100_000 + "\n"), TRAIN, ":1: not JSON"),
    "of chats": (nothing, f"{TRAIN} --rollouts chats.jsonl", 'chats.jsonl:1: expected a header with "bebop_rollouts"'),
    "another version": (replaced("rollouts.jsonl", '": 1,', '": 2,'), TRAIN, r'"bebop_rollouts": 1, found 2'),
    "a version that is no number": (replaced("rollouts.jsonl", '": 1,', '": true,'), TRAIN, "found True"),
    "another key": (replaced("rollouts.jsonl", '"vocab_size"', '"vocab"'), TRAIN, "it has model, .*vocab, .*; expected"),
    "no vocabulary": (replaced("rollouts.jsonl", ": 131", ": -1"), TRAIN, "vocab_size is -1, expected a number from 1"),
    "temperature NaN": (replaced("rollouts.jsonl", TEMPERATURE, '"temperature": NaN'), TRAIN, "temperature is nan,"),
    "temperature -1": (replaced("rollouts.jsonl", TEMPERATURE, '"temperature": -1'), EVALUATE, "temperature is -1,"),
    "temperature true": (replaced("rollouts.jsonl", TEMPERATURE, '"temperature": true'), VALIDATE, "temperature is True,"),
    "no sampling": (replaced("rollouts.jsonl", '"sampling": {}', '"sampling": null'), VALIDATE, "sampling is None,"),
    "an id out of range": (replaced("rollouts.jsonl", IDS, f"{IDS}131, "), TRAIN, "jsonl:2: prompt_ids has an id that is"),
    "an id NaN": (replaced("rollouts.jsonl", IDS, f"{IDS}NaN, "), VALIDATE, "jsonl:2: prompt_ids has an id that is no"),
    "an id of many digits": (replaced("rollouts.jsonl", IDS, IDS + "9" * 5000 + ", "), TRAIN, "rollouts.jsonl:2: not JSON"),
    "another vocabulary": (replaced("rollouts.jsonl", ": 131", ": 150"), TRAIN, "a vocabulary of 150, the backbone has 131"),
    "another tokenizer": (replaced("rollouts.jsonl", '_hash": "', '_hash": "0'), EVALUATE, "written with another tokenizer"),
    "two that disagree": (
        replaced("held-out.jsonl", TEMPERATURE, '"temperature": 0.5'),
        f"{TRAIN} --rollouts rollouts.jsonl held-out.jsonl",
        "rollouts.jsonl has temperature 1.0 where held-out.jsonl has 0.5; read files together only if",
    ),
    "too long": (nothing, f"{TRAIN} --max_length 20", r"rollouts.jsonl:\d+: \d+ tokens, longer than the 20 of"),
    "too short": (nothing, f"{TRAIN} --draft_steps 22", "has 21 tokens, too few for 22 draft steps"),
    "too short, to validate": (nothing, f"{VALIDATE} --draft-steps 10", "held-out response has 5 tokens, too few for 10"),
    "too short, to evaluate": (nothing, f"{EVALUATE} --steps 200", "has 21 tokens, too few for 200 draft steps"),
    "too few": (nothing, f"{TRAIN} --accumulate 1000", r"fill \d+ micro-batches of 200 tokens, but a step takes 1000"),
    "none held out": (nothing, f"{TRAIN} --held_out_share 0", "of 40 rollouts none is held-out"),
    "trained on": (nothing, f"{COMPARE} --held-out rollouts.jsonl", "are in rollouts.jsonl, which is trained on"),
    "parquet truncated": (truncated("rollouts.parquet"), PARQUET, "rollouts.parquet is damaged or not parquet"),
    "parquet without header": (parquet_with({"prompt_ids": [[1]]}, header=False), PARQUET, 'no "bebop_rollouts" in its'),
    "parquet without ids": (parquet_with({"text": ["a"]}), PARQUET, "no column prompt_ids; its columns are text"),
    "parquet under another name": (renamed("rollouts.parquet", "p.jsonl"), f"{TRAIN} --rollouts p.jsonl", "name that ends"),
    "not gzip": (renamed("rollouts.jsonl", "rollouts.jsonl.gz"), GZIPPED, "rollouts.jsonl.gz is damaged or truncated"),
    "gzip truncated": (truncated("rollouts.jsonl.gz"), GZIPPED, "rollouts.jsonl.gz is damaged or truncated"),
    "gzip under another name": (
        renamed("rollouts.jsonl.gz", "r.jsonl"),
        f"{TRAIN} --rollouts r.jsonl",
        "is not a text file",
    ),
}
OPTIONS = {
    "unknown key": (written("train.yaml", CONFIG + "max_step: 3\n"), TRAIN, "unknown key 'max_step'; did you mean"),
    "unknown option": (nothing, f"{COMPARE} --learning_rat 1", "unknown option '--learning_rat'; did you mean"),
    "no value": (written("train.yaml", CONFIG + "seed:\n"), TRAIN, "train.yaml: seed is None, expected int"),
    "a number true": (written("train.yaml", CONFIG + "temperature: true\n"), TRAIN, "temperature is True, expected float"),
    "a number NaN": (written("train.yaml", CONFIG + "temperature: .nan\n"), TRAIN, "temperature is nan, expected a number"),
    "neither true nor false": (nothing, f"{TRAIN} --cache_states perhaps", "cache_states.* got perhaps"),
    "a list": (written("train.yaml", "- a\n- b\n"), TRAIN, "train.yaml: expected 'key: value' lines, found list"),
    "empty": (written("train.yaml", ""), TRAIN, "train.yaml: expected 'key: value' lines, found NoneType"),
    "not YAML": (written("train.yaml", "a: [\nb: }"), TRAIN, "train.yaml is not valid YAML: .* line 2"),
    "missing": (removed("train.yaml"), COMPARE, "configuration file train.yaml does not exist"),
    "states_directory alone": (nothing, f"{TRAIN} --states_directory states", "set cache_states: true as well"),
    "train: learning rate": (nothing, f"{TRAIN} --learning_rate inf", "learning_rate is inf, expected a number above 0"),
    "train: weight decay": (nothing, f"{TRAIN} --weight_decay nan", "weight_decay is nan, expected 0 or more"),
    "train: seed": (nothing, f"{TRAIN} --seed -1", "seed is -1, expected a number from 0 to 4294967295"),
    "train: share": (nothing, f"{TRAIN} --held_out_share nan", "held_out_share is nan, expected a share from 0 to below 1"),
    "train: a sum of losses": (nothing, f"{TRAIN} --loss 'e2e_tv + nan ce'", "loss: 'nan ce' is no objective; expected one"),
    "compare: objective": (nothing, f"{COMPARE} --objectives mse", r"--objectives has \['mse'\]; expected some of"),
    "compare: baseline": (nothing, f"{COMPARE} --objectives tv", "--baseline 'ce' is not among the objectives: tv"),
    "compare: seeds": (nothing, f"{COMPARE} --seeds 0", "--seeds is 0, expected 1 or more"),
    "compare: range": (nothing, f"{COMPARE} --range 1 0.5", "--range is 1.0 0.5, expected two temperatures above 0"),
    "compare: share": (nothing, f"{COMPARE} --cold-start-share 2", "--cold-start-share is 2.0, expected a share from 0 to"),
    "compare: same names": (nothing, f"{COMPARE} --held-out a/x.jsonl b/x.jsonl", "files of the same name"),
    "evaluate: steps": (nothing, f"{EVALUATE} --steps 0", "--steps is 0, expected 1 or more"),
    "evaluate: temperature": (nothing, f"{EVALUATE} --temperatures 1 inf", "--temperatures is .*inf.*, expected numbers"),
    "evaluate: cost": (nothing, f"{EVALUATE} --cost-ratio 0", r"--cost-ratio is \[0.0\], expected numbers above 0"),
    "evaluate: resamples": (nothing, f"{EVALUATE} --resamples 1", "--resamples is 1, expected 100 or more"),
    "evaluate: tokens": (nothing, f"{EVALUATE} --tokens-per-batch 0", "--tokens-per-batch is 0, expected 1 or more"),
    "evaluate: backbones": (nothing, f"{EVALUATE} --backbone model native", "2 for 1 rollout files; expected one, or one"),
    "evaluate: no backbone": (nothing, f"{EVALUATE} --head auto", "--backbone is not set, and the head does not say"),
    "evaluate: checkpoints": (nothing, f"{EVALUATE} --checkpoints 2", "--checkpoints 2 with 1 rollout files; expected 2 or"),
    "generate: count": (nothing, f"{GENERATE} --count 0", "--count is 0, expected a number above 0"),
    "generate: temperature": (nothing, f"{GENERATE} --temperature nan", "--temperature is nan, expected a number above 0"),
    "convert: count": (nothing, f"{CONVERT} --count 0", "--count is 0, expected 1 or more"),
    "convert: temperature": (nothing, f"{CONVERT} --temperature inf", "--temperature is inf, expected a number above 0"),
    "validate: share": (nothing, f"{VALIDATE} --held-out-share 1", "--held-out-share is 1.0, expected a share from 0 to"),
    "generate: options": (
        nothing,
        f"{GENERATE} --concurrency 4",
        "--concurrency has no meaning without --server; give that",
    ),
    "validate: tokens": (nothing, f"{VALIDATE} --tokens-per-micro-batch 0", "--tokens-per-micro-batch is 0, expected 1 or"),
}
MODELS = {
    "missing": (renamed("model", "other"), EXPORT, "model directory 'model' does not exist"),
    "no config.json": (removed("model/config.json"), TRAIN, "model has no config.json; give the directory of a Hugging"),
    "config.json truncated": (truncated("model/config.json"), EVALUATE, "model/config.json cannot be read"),
    "config.json a list": (written("model/config.json", "[]"), VALIDATE, "model/config.json cannot be read"),
    "a word for a number": (json_with("model/config.json", num_hidden_layers="two"), TRAIN, "cannot be read .*two"),
    "unknown type": (json_with("model/config.json", model_type="none"), CONVERT, "cannot be read .*`none`"),
    "unknown activation": (json_with("model/config.json", hidden_act="none"), TRAIN, "cannot be loaded .*'none'"),
    "qwen3": (json_with("model/config.json", model_type="qwen3"), GENERATE, "model_type 'qwen3' has no MTP head family"),
    "quantised": (
        json_with("model/config.json", quantization_config={"quant_method": "fp8"}),
        EXPORT,
        "give the bf16 checkpoint",
    ),
    "sliding window": (json_with("model/config.json", layer_types=["sliding_attention"] * 2), TRAIN, "sliding-window"),
    "no weights": (removed("model/model.safetensors"), EVALUATE, r"model has no \*.safetensors file; convert the"),
    "weights truncated": (truncated("model/model.safetensors"), TRAIN, "model.safetensors is damaged or truncated .*fetch"),
    "a tensor missing": (tensors_with("model/model.safetensors", lambda t: t.pop(UP_PROJ)), TRAIN, f"lacks .*{UP_PROJ}"),
    "other widths": (json_with("model/config.json", intermediate_size=64), EVALUATE, r"is \(.*48.*\), config.json makes it"),
    "other vocabulary": (json_with("model/config.json", vocab_size=140), EXPORT, r"is \(131, 32\), config.json makes it"),
    "a shard missing": (removed("native/model-00001-of-00002.safetensors"), NATIVE, "no model-00001-of.*, which its index"),
    "an index that is none": (written("model/model.safetensors.index.json", "[]"), TRAIN, "index.json is damaged; fetch it"),
    "an index that lies": (
        written("model/model.safetensors.index.json", '{"weight_map": {"a": "gone.safetensors"}}'),
        TRAIN,
        "model has no gone.safetensors, which its index names",
    ),
    "generation_config.json truncated": (
        truncated("model/generation_config.json"),
        GENERATE,
        "generation_config.json cannot",
    ),
    "words for end tokens": (
        written("model/generation_config.json", '{"eos_token_id": "</s>"}'),
        GENERATE,
        "eos_token_id is '</s>', expected a token id or a list",
    ),
    "a list for it": (written("model/generation_config.json", "[]"), CONVERT, "model/generation_config.json cannot be read"),
    "no tokenizer.json": (removed("model/tokenizer.json"), VALIDATE, "model has no tokenizer.json; save the model's"),
    "tokenizer.json truncated": (truncated("model/tokenizer.json"), TRAIN, "tokenizer.json or tokenizer_config.json is"),
    "tokenizer_config.json truncated": (truncated("model/tokenizer_config.json"), EXPORT, "tokenizer_config.json is"),
    "another tokenizer": (replaced("model/tokenizer.json", '"w5"', '"v5"'), TRAIN, "rollouts.jsonl was written with"),
    "no chat template": (removed("model/chat_template.jinja"), CONVERT, "model has no chat template to render messages"),
    "a chat template that is none": (
        written("model/chat_template.jinja", "{% for m in %}"),
        GENERATE,
        "the chat template does not take a user's message",
    ),
    "no chat template, to generate": (removed("model/chat_template.jinja"), GENERATE, "has no chat template"),
    "a head announced": (json_with("model/config.json", num_nextn_predict_layers=1), TRAIN, "= 1, but the checkpoint has 0"),
    "a head announced by a word": (
        json_with("model/config.json", num_nextn_predict_layers="one"),
        TRAIN,
        "is 'one', expected",
    ),
    "a head not announced": (json_with("native/config.json", mtp_num_hidden_layers=0), NATIVE, "= 0, but the checkpoint"),
    "two MTP layers": (json_with("native/config.json", mtp_num_hidden_layers=2), NATIVE, "announces 2 MTP layers; only 1"),
    "part of a head": (tensors_with(MTP_SHARD, lambda t: t.pop("mtp.fc.weight")), NATIVE, "mtp.fc.weight is missing"),
}
HEADS = {
    "missing": (nothing, f"{TRAIN} --head none", "none has no head.safetensors; expected a head directory that a training"),
    "no head.json": (removed("head/head.json"), EVALUATE, "head has no head.json; expected a head directory"),
    "head.json truncated": (truncated("head/head.json"), EXPORT, "head/head.json is not JSON"),
    "head.json binary": (written("head/head.json", b"\xff\xfe"), FROM_HEAD, "head/head.json is not JSON"),
    "head.json a list": (written("head/head.json", "[]"), EVALUATE, r"head/head.json holds \[\]; expected an object"),
    "no family": (written("head/head.json", "{}"), EXPORT, "head/head.json: family is None, expected str"),
    "steps in words": (json_with("head/head.json", draft_steps="three"), EVALUATE, "draft_steps is 'three', expected int"),
    "another family": (nothing, f"{EVALUATE} --backbone native", "head is a mimo head, the backbone needs qwen3_5"),
    "another family, to export": (nothing, f"{EXPORT} --target native", "head is a mimo head, the target needs qwen3_5"),
    "truncated": (truncated("head/head.safetensors"), FROM_HEAD, "head/head.safetensors is damaged or truncated"),
    "a stray tensor": (
        tensors_with("head/head.safetensors", lambda t: t.update(x=torch.ones(1))),
        EXPORT,
        "x is unexpected",
    ),
    "a tensor missing": (tensors_with("head/head.safetensors", lambda t: t.popitem()), FROM_HEAD, "backbone: .* is missing"),
    "NaN": (
        tensors_with("head/head.safetensors", lambda t: next(iter(t.values())).fill_(torch.nan)),
        EXPORT,
        "holds NaN or inf",
    ),
    "another width": (
        tensors_with("head/head.safetensors", lambda t: t.update({n: torch.ones(64, 128) for n in t if "input_proj" in n})),
        EVALUATE,
        r"input_proj.weight is \(64, 128\), expected \(32, 64\)",
    ),
}
CHATS = {
    "missing": (removed("chats.jsonl"), CONVERT, "data set file chats.jsonl does not exist"),
    "empty": (written("chats.jsonl", ""), CONVERT, r"data set chats.jsonl cannot be read \(\w+"),
    "truncated": (truncated("chats.jsonl"), CONVERT, "chats.jsonl cannot be read .*JSON"),
    "another column": (nothing, f"{CONVERT} --column talk", "row 0 has no column 'talk', only messages"),
    "another split": (nothing, f"{CONVERT} --split test", "chats.jsonl cannot be read .*test"),
    "an empty answer": (chat("w1", ""), CONVERT, "row 0: message 1, the assistant's, is empty; leave the conversation out"),
    "no answer": (chat("w1"), CONVERT, "row 0 has no assistant's message; leave it out"),
    "no end of answers": (chat("w1", "w2", template=CHAT_TEMPLATE.replace(" <end>", "")), CONVERT, "has no special token"),
    "a template that starts anew": (
        chat("w1", "w2", template="{{ messages | length }} " + CHAT_TEMPLATE),
        CONVERT,
        "row 0: with message 1 the chat template does not go on from the prompt",
    ),
}
CHECKPOINTS = {
    "only a damaged one": (
        truncated(f"{STEP}/optimizer.bin"),
        f"{RESUME} auto",
        "no checkpoint in .* is intact; remove",
    ),
    "named, damaged": (truncated(f"{STEP}/model.safetensors"), f"{RESUME} {STEP}", "model.safetensors is not what was"),
    "named, missing": (nothing, f"{RESUME} none", "none is not a complete checkpoint .*--resume auto takes the newest"),
    "of another run": (lambda: shutil.copytree(STEP, "step-000001"), f"{RESUME} step-000001", "does not lie in"),
    "of other data": (lambda: shutil.copy("held-out.jsonl", "rollouts.jsonl"), f"{RESUME} auto", "rollouts = .*; set it"),
    "of another backbone": (nothing, f"{RESUME} auto --backbone native", "with backbone = .*; set it back"),
    "of other draft steps": (nothing, f"{RESUME} auto --draft_steps 2", "with draft_steps = 3, this run has 2; set it back"),
}
OUTPUTS = {
    "train: exists": (nothing, f"{TRAIN} --output run", "output run exists and is not empty; choose another"),
    "train: a file": (nothing, f"{TRAIN} --output train.yaml", "output train.yaml is a file; expected a directory"),
    "compare: in a file": (nothing, f"{COMPARE} --output train.yaml", "train.yaml is a file; choose another place"),
    "evaluate: exists": (nothing, f"{EVALUATE} --output run", "output run exists; choose another name or remove it"),
    "evaluate: in a file": (nothing, f"{EVALUATE} --output train.yaml/new", "train.yaml is a file; choose another place"),
    "export: exists": (nothing, f"{EXPORT} --output run", "output run exists; choose another name or remove it"),
    "export: in a file": (nothing, f"{EXPORT} --output train.yaml/new", "train.yaml is a file; choose another place"),
    "convert: exists": (nothing, f"{CONVERT} --output held-out.jsonl", "output held-out.jsonl exists; choose another name"),
    "convert: in a file": (nothing, f"{CONVERT} --output train.yaml/new.jsonl", "train.yaml is a file; choose another"),
    "convert: another ending": (nothing, f"{CONVERT} --output new.csv", "new.csv ends in neither .jsonl"),
    "generate: exists": (nothing, f"{GENERATE} --output held-out.jsonl", "output held-out.jsonl exists; choose another"),
    "generate: under a file": (nothing, f"{GENERATE} --output train.yaml/new.jsonl", "train.yaml is a file; choose"),
    "train: under a file": (nothing, f"{TRAIN} --output train.yaml/new", "train.yaml is a file; choose another place"),
    "train: states under a file": (
        nothing,
        f"{TRAIN} --cache_states true --states_directory train.yaml/states",
        "train.yaml/states.* cannot be written",
    ),
    "generate: another ending": (nothing, f"{GENERATE} --output new.parquet", r"ends in '.parquet'; expected .jsonl"),
    "validate: a directory": (nothing, f"{VALIDATE} --json run", r"run cannot be written \(Is a directory\)"),
    "check: missing": (nothing, "check none", "none has no config.json; expected a directory that recipes/export_mtp.py"),
    "check: config.json truncated": (truncated("exported/config.json"), CHECK, "exported/config.json cannot be read"),
}
TABLES = {
    "rollouts": ROLLOUTS, "options": OPTIONS, "model": MODELS, "head": HEADS, "chats": CHATS, "checkpoint": CHECKPOINTS,
    "output": OUTPUTS,
}  # fmt: skip
CASES = [pytest.param(*case, id=f"{table}: {name}") for table, cases in TABLES.items() for name, case in cases.items()]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        prepare()
    return folder


@pytest.fixture
def folder(prepared, tmp_path, monkeypatch) -> Path:
    """A copy to spoil, as the current directory."""
    shutil.copytree(prepared, tmp_path / "folder")
    monkeypatch.chdir(tmp_path / "folder")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "folder"


def run(command: str, monkeypatch) -> None:
    name, *arguments = shlex.split(command)
    monkeypatch.setattr("sys.argv", [name, *arguments])
    importlib.import_module("bebop.export.check" if name == "check" else f"recipes.{name}").main()


def said(command: str, monkeypatch) -> str:
    """The one line that a command ends with."""
    with pytest.raises(SystemExit) as end:
        run(command, monkeypatch)
    assert re.fullmatch("error: .*", end.value.code), end.value.code
    return end.value.code


def tree(folder: Path) -> dict[str, str]:
    """Every directory and file, and what is in it."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "directory"
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize(("spoil", "command", "message"), CASES)
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(spoil, command, message, folder, monkeypatch, capfd):
    spoil()
    before = tree(folder)
    assert re.search(message, line := said(command, monkeypatch)), line
    assert tree(folder) == before
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("command", "size", "output"),
    [
        (CONVERT, 20_000, "new.jsonl"),
        (CONVERT.replace("new.jsonl", "new.parquet"), 1_000, "new.parquet"),
        (EXPORT, 20_000, "new"),  # safetensors
        (EVALUATE, 20_000, "new"),  # figures
        (f"{RESUME} auto", 20_000, "run/checkpoints/step-000002"),  # safetensors
        (f"{RESUME} auto", 60_000, "run/checkpoints/step-000002"),  # torch.save
    ],
)
def test_a_full_disk_is_said_in_one_line_and_leaves_nothing_half_written(command, size, output, folder, monkeypatch):
    talk = json.loads(Path("chats.jsonl").read_text())
    Path("chats.jsonl").write_text((json.dumps(talk) + "\n") * 1000)
    before = tree(folder)
    with full_disk(size):
        assert re.match(rf"error: {output}\S* cannot be written \(.+\); make room there", said(command, monkeypatch))
    after = tree(folder)
    assert after.keys() == before.keys()
    of_the_run = {"run/config.yaml", "run/environment.json", "run/metrics.jsonl"}  # as they are behind the last step
    assert {name for name in before if after[name] != before[name]} <= (of_the_run if "run" in output else set())
    check_intact(Path(STEP))
    run(command, monkeypatch)
    assert Path(output).exists()


def test_a_head_that_does_not_fit_on_the_disk_leaves_the_one_before(folder):
    before = tree(folder)
    head, _ = head_for(Backbone.load("model", torch.float32))
    with full_disk(20_000), pytest.raises(InputError, match=r"head cannot be written .*File too large"):
        save_head(head, Path("head"), {})
    assert tree(folder) == before


def test_a_file_that_may_not_be_read_is_one_line(folder, monkeypatch):
    """Permissions do not stop root, so the refusal is made up."""

    def refused(path, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("bebop.data.files.LocalFileSystem.open", lambda self, *a, **k: refused(*a, **k))
    assert said(VALIDATE, monkeypatch) == "error: rollouts.jsonl cannot be read (Permission denied)"
    monkeypatch.setattr("bebop.export.writer.read_head", refused)
    assert said(EXPORT, monkeypatch) == "error: [Errno 13] Permission denied: 'head'"
