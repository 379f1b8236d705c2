"""What the fused op is given, and every way in which it may not fit."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bebop.kernels.vocabulary import Vocabulary


@dataclass
class ChainInputs:
    """The tensors of one call; shapes, dtypes and devices are checked as it is made."""

    draft: Tensor  # [K, N, d]
    target: Tensor  # [M, d]
    weight: Tensor  # [V, d]
    target_rows: Tensor  # [K, N]
    tokens: Tensor  # [K, N]
    valid: Tensor  # [K, N]
    temperature: float | Tensor

    def __post_init__(self):
        self.target = self.target.detach()
        draft, target, weight = self.draft, self.target, self.weight
        if (draft.ndim, target.ndim, weight.ndim) != (3, 2, 2) or not draft.shape[2] == target.shape[1] == weight.shape[1]:
            raise ValueError(
                f"draft_hidden {tuple(draft.shape)}, target_hidden {tuple(target.shape)} and weight {tuple(weight.shape)} "
                "do not fit; expected [K, N, d], [M, d] and [V, d]"
            )
        for name, kind in (("target_rows", "int64"), ("tokens", "int64"), ("valid", "bool")):
            x = getattr(self, name)
            if x.shape != draft.shape[:2] or x.dtype != getattr(torch, kind):
                raise ValueError(f"{name} is {x.dtype} {tuple(x.shape)}, expected {kind} {tuple(draft.shape[:2])} ([K, N])")
        devices = {x.device for x in vars(self).values() if isinstance(x, Tensor)}
        if len(devices) > 1:
            raise ValueError(f"all tensors must be on one device, found {sorted(map(str, devices))}")
        if weight.requires_grad:
            raise ValueError("weight (the lm_head) requires grad, but the op has no gradient for it; call weight.detach()")
        if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            raise ValueError(f"weight is {weight.dtype}; expected bf16, fp16, fp32 or fp64 (dequantise the lm_head first)")
        check_temperature(self.temperature, draft.shape[1], self.valid.any(0))

    def check_values(self, vocabulary: Vocabulary) -> tuple[Tensor, Tensor, Tensor]:
        """target_rows, tokens and valid on the host, after a look at what they hold and at what they point to."""
        target_rows, tokens, valid = (x.cpu() for x in (self.target_rows, self.tokens, self.valid))
        if bool((valid[1:] & ~valid[:-1]).any()):
            raise ValueError(
                "valid has a chain whose valid steps are not a prefix; a chain may be cut short, not interrupted"
            )
        for name, x, bound in (("target_rows", target_rows, len(self.target)), ("tokens", tokens, vocabulary.total)):
            if bool((valid & ((x < 0) | (x >= bound))).any()):
                found = x[valid]
                raise ValueError(
                    f"{name} of valid pairs range from {found.min()} to {found.max()}, expected 0 to {bound - 1}"
                )
        names = ("draft_hidden of valid pairs", "target_hidden in rows of valid pairs", "weight")
        bad = torch.stack(
            [
                ~_finite_rows(self.draft)[self.valid].all(),
                ~_finite_rows(self.target)[self.target_rows[self.valid]].all(),
                ~torch.stack(self.weight.aminmax()).isfinite().all(),
            ]
        ).long()
        for name, found in zip(names, vocabulary.sum(bad).tolist(), strict=True):
            if found:  # in any part of a split vocabulary, so that all processes stop
                raise ValueError(f"{name} holds NaN or inf; expected finite numbers")
        return target_rows, tokens, valid


def check_temperature(temperature: float | Tensor, chains: int, used: Tensor | None = None) -> None:
    """Refuse what is not a number above 0, or [N] of them; `used` [N] says which of those count."""
    values = temperature
    if isinstance(values, Tensor):
        if values.shape not in ((), (chains,)):
            raise ValueError(f"temperature is {tuple(values.shape)}, expected a number or [N] = ({chains},)")
        values = values[used] if used is not None and values.ndim else values
    elif isinstance(values, int | float):
        values = torch.tensor(float(values))
    else:
        raise ValueError(f"temperature is {temperature!r}, expected a number or a tensor [N]")
    if not bool(((values > 0) & values.isfinite()).all()):
        raise ValueError(f"temperature is {temperature}, expected above 0 (greedy serving has no TV loss)")


def _finite_rows(x: Tensor) -> Tensor:
    """Whether rows of x [..., d] hold finite numbers only, without a copy of x."""
    lowest, highest = x.detach().aminmax(dim=-1)
    return lowest.isfinite() & highest.isfinite()
