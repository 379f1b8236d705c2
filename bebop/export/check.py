"""What an engine would do with an exported directory: python -m bebop.export.check DIRECTORY.

Engines are no check themselves: vLLM says nothing of a missing Linear weight, SGLang only warns, transformers ignores
and drops the head. So names, shapes and dtypes are compared with the family's table, and config.json with what engines read.
"""

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from bebop.backbone import load_model, read_config, read_weight_map, refuse_quantised
from bebop.errors import InputError, errors_as_one_line
from bebop.export.engine_config import DERIVED_KEYS, completed_config
from bebop.export.serving import serve_commands
from bebop.families import Family, family_of
from bebop.heads.head import MTPHead
from bebop.heads.loading import native_name, native_state_dict


@dataclass
class Stored:
    """A tensor in a shard."""

    shard: str
    shape: tuple[int, ...]
    dtype: str


@dataclass
class Report:
    """What stands in the way, one line each, naming the tensor or key.

    Attributes:
        problems: of every engine; empty if they load the directory as it is meant.
        problems_of: those of one program alone, by its name.
    """

    directory: Path
    family: Family | None = None
    head_tensors: int = 0
    problems: list[str] = field(default_factory=list)
    problems_of: dict[str, list[str]] = field(default_factory=dict)

    @property
    def engines(self) -> list[str]:
        """The engines that would serve the directory."""
        if self.problems or self.family is None:
            return []
        return [engine for engine in self.family.engines if engine not in self.problems_of]


def head_table(text_config: Any, family: Family, fused_experts: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a head in this family's layout, experts one by one or fused."""
    with torch.device("meta"):
        head = MTPHead(text_config, family)
    tensors = native_state_dict(head)
    if fused_experts:
        tensors = {native_name(family, name): tensor for name, tensor in head.state_dict().items()}
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_export(directory: Path) -> Report:
    """Compare a directory with what engines expect of its family.

    Raises:
        InputError: there is no readable config.json to compare with.
    """
    report = Report(directory)
    if not (directory / "config.json").is_file():
        raise InputError(f"{directory} has no config.json; expected a directory that recipes/export_mtp.py wrote")
    model_config = read_config(directory)
    text_config = model_config.get_text_config()
    config = json.loads((directory / "config.json").read_text())
    try:
        refuse_quantised(model_config, directory)
        report.family = family_of(text_config)
        wanted = completed_config(config, text_config, report.family)
    except InputError as error:
        report.problems.append(str(error))
        return report
    _check_config(config, wanted, report.family, report)
    stored = _read_shards(directory, report)
    readable = not report.problems
    _check_head(stored, text_config, report.family, report)
    _check_lm_head(stored, text_config, report.family, report)
    if readable:
        _check_target(directory, report)
    return report


def _check_config(config: dict[str, Any], wanted: dict[str, Any], family: Family, report: Report) -> None:
    for part, found, expected in (
        ("config.json", config, wanted),
        ("text_config of config.json", config.get("text_config", {}), wanted.get("text_config", {})),
    ):
        for key, value in expected.items():
            if key == "text_config" or found.get(key) == value:
                continue
            if found.get(key) is None and (
                key in DERIVED_KEYS or (key in family.announced_by[:1] and family.loads_unannounced)
            ):
                continue
            program = family.only_read_by.get(key)
            problems = report.problems_of.setdefault(program, []) if program else report.problems
            problems.append(f"{part} has {key} = {found.get(key)!r}, {program or 'engines'} needs {value!r}")


def _read_shards(directory: Path, report: Report) -> dict[str, Stored]:
    """Every tensor of the checkpoint; what index and shards say differently goes into the report."""
    try:
        weight_map = read_weight_map(directory) or {}
    except InputError as error:
        report.problems.append(str(error))
        weight_map = {}
    shards = sorted(set(weight_map.values()) | {p.name for p in directory.glob("*.safetensors")})
    stored: dict[str, Stored] = {}
    for shard in shards:
        meant = [name for name, at in weight_map.items() if at == shard]
        example = f" ({meant[0]} and {len(meant) - 1} more should be in it)" if meant else ""
        if not (directory / shard).is_file():
            report.problems.append(f"{shard} is missing{example}")
            continue
        try:
            with safe_open(directory / shard, framework="pt") as file:
                for name in file.keys():
                    part = file.get_slice(name)
                    if name in stored:
                        report.problems.append(
                            f"{name} is in {stored[name].shard} and again in {shard}; engines take either"
                        )
                    if weight_map and weight_map.get(name) != shard:
                        report.problems.append(f"{name} is in {shard}, the index says {weight_map.get(name)}")
                    stored[name] = Stored(shard, tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            report.problems.append(f"{shard} is damaged or truncated{example}: {error}")
            continue
        report.problems += [f"{name} is not in {shard}, where the index has it" for name in meant if name not in stored]
    return stored


def _check_head(stored: dict[str, Stored], text_config: Any, family: Family, report: Report) -> None:
    head = {name: tensor for name, tensor in stored.items() if name.startswith(family.prefix)}
    report.head_tensors = len(head)
    table = head_table(text_config, family, any(name.endswith("experts.gate_up_proj") for name in head))
    dtypes = [t.dtype for name, t in stored.items() if name.endswith("embed_tokens.weight")]
    if not head:
        report.problems.append(f"no tensor is named {family.prefix}*: there is no MTP head in this directory")
        return
    for name in sorted(table.keys() - head.keys()):
        report.problems.append(f"{name} is missing; vLLM leaves a missing Linear weight at its random start, without a word")
    for name in sorted(head.keys() - table.keys()):
        report.problems.append(f"{name} does not belong to a {family.name} head; vLLM refuses unknown tensors")
    for name, shape in table.items():
        if name in head and head[name].shape != shape:
            report.problems.append(f"{name} is {head[name].shape}, config.json makes it {shape}")
        if name in head and dtypes and head[name].dtype != dtypes[0]:
            report.problems.append(f"{name} is {head[name].dtype}, the target's embedding is {dtypes[0]}")


def _check_lm_head(stored: dict[str, Stored], text_config: Any, family: Family, report: Report) -> None:
    has_lm_head = any(name.endswith("lm_head.weight") for name in stored)
    if family.stores_lm_head and text_config.tie_word_embeddings and not has_lm_head:
        report.problems.append("lm_head.weight is missing; it is tied, but this family's engines need it stored")


def _check_target(directory: Path, report: Report) -> None:
    """Let transformers match its model with the checkpoint, without memory for either."""
    try:
        _, missing = load_model(directory, device_map="meta")
    except InputError as error:
        report.problems.append(str(error))
        return
    report.problems += [f"{name} of the target is missing" for name in missing]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    with errors_as_one_line():
        report = check_export(directory)
    for problem in report.problems:
        print(f"problem: {problem}")
    for program, problems in report.problems_of.items():
        for problem in problems:
            print(f"problem for {program} alone: {problem}")
    if report.family is None or not report.engines:
        sys.exit(f"{directory}: problems found; engines would not draft with this head as it was trained")
    engines = ", ".join(report.engines)
    print(f"{directory}: a {report.family.name} head of {report.head_tensors} tensors, as expected by {engines}\n")
    for engine, command in serve_commands(report.family, str(directory), draft_steps=3).items():
        if engine in report.engines:
            print(f"{engine}:\n    {command}\n")


if __name__ == "__main__":
    main()
