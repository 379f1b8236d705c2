from dataclasses import asdict

import pytest
import yaml

from bebop.errors import InputError
from bebop.training.config import TrainConfig, parse_config

NEEDED = ["--backbone", "b", "--rollouts", "r", "--output", "o"]


def test_yaml_then_command_line(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("backbone: b\nrollouts: r\noutput: o\nlearning_rate: 1e-3\nmax_steps: 7\ncache_states: true\n")
    config = parse_config(["--config", str(path), "--max_steps", "9", "--loss", "ce"])
    assert config == TrainConfig("b", ["r"], "o", learning_rate=1e-3, max_steps=9, cache_states=True, loss="ce")


def test_resolved_configuration_reads_back(tmp_path):
    config = parse_config([*NEEDED, "--temperature", "0.6"])
    path = tmp_path / "config.yaml"
    path.write_text(config.as_yaml())
    assert parse_config([f"--config={path}"]) == config
    assert yaml.safe_load(path.read_text()) == asdict(config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*NEEDED, "--learning_rat", "1"], "unknown option '--learning_rat'; did you mean 'learning_rate'"),
        ([*NEEDED, "--max_steps", "many"], "max_steps"),
        ([*NEEDED, "--draft_steps", "0"], "draft_steps is 0, expected 1 or more"),
        ([*NEEDED, "--temperature", "0"], "temperature is 0.0, expected a number above 0"),
        ([*NEEDED, "--loss", "e2etv"], "loss: 'e2etv' is no objective; expected one of e2e_tv, realised_e2e_tv"),
        ([*NEEDED, "--held_out_share", "1"], "held_out_share is 1.0"),
        ([*NEEDED, "--temperature_low", "0.5"], "temperature_low and temperature_high are 0.5 and 0.0"),
        ([*NEEDED, "--temperature_low", "1", "--temperature_high", "0.5"], "expected 0 < low <= high"),
        ([*NEEDED, "--cold_start_steps", "5", "--max_steps", "4"], "cold_start_steps is 5, more than max_steps"),
        (["--backbone", "b"], "rollouts is not set"),
        (["--config", "nothing.yaml"], "nothing.yaml does not exist"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        parse_config(arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_step: 3", "unknown key 'max_step'; did you mean 'max_steps'"),
        ("max_steps: 3.5", "max_steps is 3.5, expected int"),
        ("max_steps: many", "max_steps is 'many', expected int"),
        ("cache_states: 1", "cache_states is 1, expected bool"),
        ("- a\n- b", "expected 'key: value' lines, found list"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_yaml_that_does_not_fit_is_refused(text, message, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        parse_config(["--config", str(path)])


def test_every_key_documents_itself():
    assert all(f.metadata["help"] for f in TrainConfig.__dataclass_fields__.values())
