"""What accelerate may ask for and a head cannot be trained with is refused."""

from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

from bebop.errors import InputError
from bebop.training import distribution
from bebop.training.config import TrainConfig
from bebop.training.distribution import make_accelerator


def accelerator_that(**asks):
    """Stands for accelerate's, which starts most of this on GPUs alone."""
    settings = {"distributed_type": DistributedType.NO, "mixed_precision": "no", "is_fsdp2": False, "num_processes": 2}
    plugin = SimpleNamespace(deepspeed_config=asks.pop("deepspeed", {}))
    device = SimpleNamespace(type="cpu")
    return SimpleNamespace(**(settings | asks), state=SimpleNamespace(deepspeed_plugin=plugin), device=device)


def deepspeed(stage: int, **more):
    config = {"zero_optimization": {"stage": stage}} | more
    return {"distributed_type": DistributedType.DEEPSPEED, "deepspeed": config}


@pytest.mark.parametrize(
    ("asks", "message"),
    [
        ({"distributed_type": DistributedType.FSDP}, "FSDP1; set fsdp_version: 2"),
        ({"distributed_type": DistributedType.MEGATRON_LM}, "asks for .*MEGATRON_LM"),
        ({"mixed_precision": "fp16"}, "mixed_precision 'fp16', and the run computes in float32"),
        ({"mixed_precision": "bf16"}, "mixed_precision 'bf16', and the run computes in float32"),
        (deepspeed(1), "zero_stage 1, expected 2 or 3"),
        (deepspeed(3, bf16={"enabled": True}), "enables bf16"),
    ],
)
def test_it_is_refused(asks, message, monkeypatch):
    monkeypatch.setattr(distribution, "Accelerator", lambda **_: accelerator_that(**asks))
    with pytest.raises(InputError, match=message):
        make_accelerator(TrainConfig(dtype="fp32"))


def test_deepspeed_is_told_what_the_run_says(monkeypatch):
    found = accelerator_that(**deepspeed(2, gradient_clipping=1.0))
    monkeypatch.setattr(distribution, "Accelerator", lambda **_: found)
    make_accelerator(TrainConfig(max_grad_norm=0.3, accumulate=4))
    settings = found.state.deepspeed_plugin.deepspeed_config
    assert settings["gradient_clipping"] == 0.3
    assert settings["gradient_accumulation_steps"] == 4
    assert settings["train_batch_size"] == 8
