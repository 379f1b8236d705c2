"""One normaliser for the whole step, and the guards of a step."""

import dataclasses
from pathlib import Path

import pytest
import torch

from bebop.data.rollouts import Rollout, read_rollouts, write_rollouts
from bebop.heads.loading import head_for
from bebop.losses import E2ETVLoss
from bebop.machine import Clock
from bebop.training.distribution import make_accelerator
from bebop.training.material import Material
from bebop.training.step import OptimiserStep
from tests.training.test_trainer import make_config

EIGHT = [[[i] for i in range(8)]]  # micro-batches of rows of documents
SPLITS = {"1 x 8": EIGHT, "2 x 4": [EIGHT[0][:4], EIGHT[0][4:]], "8 x 1": [[row] for row in EIGHT[0]]}


def first_step(config, micro_batches, learning_rate: float = 1e-3):
    """Record and gradients of a single step."""
    config = dataclasses.replace(config, accumulate=len(micro_batches))
    accelerator = make_accelerator(config)
    material = Material.read(config, accelerator)
    material.load_backbone(accelerator)
    head, _ = head_for(material.backbone)
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate)
    model, optimizer, scheduler = accelerator.prepare(
        head, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    )
    step = OptimiserStep(config, accelerator, material, model, optimizer, scheduler)
    gradients: dict[str, torch.Tensor] = {}
    clip = accelerator.clip_grad_norm_

    def look(parameters, norm):
        gradients.update({name: p.grad.clone() for name, p in head.named_parameters()})
        return clip(parameters, norm)

    accelerator.clip_grad_norm_ = look
    record, _ = step(0, step.prepare(micro_batches), E2ETVLoss(), False, Clock(torch.device("cpu")))
    return record, gradients


def test_micro_batches_of_any_number_give_the_same_gradient(tmp_path):
    """Documents are of unequal length, so that a mean of the micro-batches' means would be another number."""
    config = make_config(tmp_path, "qwen2", max_grad_norm=1e9)
    found = {name: first_step(config, micro_batches) for name, micro_batches in SPLITS.items()}
    record, gradients = found["1 x 8"]
    for other, others in found.values():
        assert other["chains"] == record["chains"]
        assert other["loss"] == pytest.approx(record["loss"], rel=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, atol=1e-7, rtol=1e-5, msg=name)


def test_padding_is_counted(tmp_path):
    record, _ = first_step(make_config(tmp_path, "qwen2"), EIGHT)
    assert 0.05 < record["padding"] < 0.9
    alone, _ = first_step(make_config(tmp_path, "qwen2"), SPLITS["8 x 1"])
    assert alone["padding"] == 0.0


def test_a_head_that_a_step_leaves_as_it_was_ends_the_run(tmp_path, monkeypatch):
    """An optimiser that holds other parameters than the head's, as after a wrapper has copied them."""
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    with pytest.raises(RuntimeError, match="step 1 has left the head as it was"):
        first_step(make_config(tmp_path, "qwen2"), EIGHT)


def test_a_head_without_gradient_ends_the_run(tmp_path, monkeypatch):
    forward = E2ETVLoss.forward

    def flat(*arguments, **options):
        loss, stats = forward(*arguments, **options)
        return loss * 0.0, stats

    monkeypatch.setattr(E2ETVLoss, "forward", flat)
    with pytest.raises(RuntimeError, match="no gradient at all"):
        first_step(make_config(tmp_path, "qwen2"), EIGHT)


def test_a_first_step_without_a_valid_pair_is_no_reason_to_end(tmp_path):
    """All its documents are too short; the next step's may not be."""
    config = make_config(tmp_path, "qwen2")
    header, rollouts = read_rollouts(config.rollouts)
    write_rollouts(Path(config.rollouts[0]), header, [*rollouts, *(Rollout([7, 8], [i]) for i in range(9, 30))])
    train = Material.read(config, make_accelerator(config)).train
    short = [[i] for i, rollout in enumerate(train) if len(rollout.response_ids) == 1]
    record, gradients = first_step(config, [short])
    assert (record["chains"], record["loss"], record["grad_norm"]) == (0, 0.0, 0.0)
    assert not any(gradient.any() for gradient in gradients.values())


def test_no_learning_rate_yet_is_no_reason_to_end(tmp_path):
    """The first step of a warm-up has learning rate 0."""
    record, _ = first_step(make_config(tmp_path, "qwen2"), EIGHT, learning_rate=0.0)
    assert record["grad_norm"] > 0


def test_a_micro_batch_without_a_valid_pair_takes_part(tmp_path):
    """It adds nothing to loss and gradient, and no NaN."""
    config = make_config(tmp_path, "qwen2", max_grad_norm=1e9)
    record, gradients = first_step(config, EIGHT)
    header, rollouts = read_rollouts(config.rollouts)
    write_rollouts(Path(config.rollouts[0]), header, [*rollouts, *(Rollout([7, 8], [i]) for i in range(9, 30))])
    short = next(i for i, r in enumerate(Material.read(config, make_accelerator(config)).train) if len(r.response_ids) == 1)
    with_short, others = first_step(config, [*EIGHT, [[short]]])
    assert with_short["chains"] == record["chains"]
    assert with_short["loss"] == pytest.approx(record["loss"], rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, atol=1e-7, rtol=1e-5, msg=name)
