"""Products with the frozen lm_head that keep logits in fp32, whatever its dtype."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Low-precision weights are upcast part by part on a CPU. Parts this large stay in its cache.
_SLAB_BYTES = 8 * 2**20


class LmHead:
    """W [V, d] and the two products with it: operands in its dtype, accumulation and results in fp32 (fp64 for fp64).

    Only CUDA has products with results wider than their operands. Elsewhere slabs of W are upcast on the way; a CPU may
    multiply them in bf16 units with fp32 sums (AMX), which is exact, as the slabs hold bf16 numbers.
    """

    def __init__(self, weight: Tensor):
        self.weight = weight
        self.accumulate = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.in_slabs = weight.device.type != "cuda" and weight.dtype in (torch.bfloat16, torch.float16)
        self._buffer: Tensor | None = None
        # What `back` takes: on a CPU in slabs fp32, so the gradient may overwrite the logits.
        self.gradient_dtype = torch.float32 if self.in_slabs else weight.dtype

    @property
    def slab_rows(self) -> int:
        """Rows of W that are upcast at a time."""
        size, width = self.weight.shape
        return min(size, max(256, _SLAB_BYTES // (width * self.accumulate.itemsize)))

    @property
    def buffer_bytes(self) -> int:
        """What a product takes besides operands and result."""
        return self.slab_rows * self.weight.shape[1] * self.accumulate.itemsize if self.in_slabs else 0

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """hidden [R, d] -> logits [R, V] in out."""
        hidden = hidden.to(self.weight.dtype)
        with self._precision():
            if self.in_slabs:
                hidden = hidden.to(self.accumulate)
                for part, slab in self._slabs():
                    torch.mm(hidden, slab.T, out=out[:, part])
            elif self.weight.dtype == self.accumulate:
                torch.mm(hidden, self.weight.T, out=out)
            else:
                torch.mm(hidden, self.weight.T, out_dtype=self.accumulate, out=out)
        return out

    def back(self, gradient: Tensor) -> Tensor:
        """Gradient of logits [R, V] in `gradient_dtype` -> gradient of hidden [R, d] in fp32 (fp64)."""
        with self._precision():
            if self.in_slabs:
                result = gradient.new_zeros(len(gradient), self.weight.shape[1])
                for part, slab in self._slabs():
                    result.addmm_(gradient[:, part], slab)
                return result
            if self.weight.dtype == self.accumulate:
                return gradient @ self.weight
            return torch.mm(gradient, self.weight, out_dtype=self.accumulate)

    def _slabs(self) -> Iterator[tuple[slice, Tensor]]:
        size, width = self.weight.shape
        if self._buffer is None:  # one for all products: freed and taken anew, it would leave holes between the logits
            self._buffer = self.weight.new_empty(self.slab_rows, width, dtype=self.accumulate)
        for start in range(0, size, self.slab_rows):
            part = slice(start, min(start + self.slab_rows, size))
            yield part, self._buffer[: part.stop - start].copy_(self.weight[part])

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """Whatever precision the caller's own products run at: the logits decide which tokens get gradient."""
        matmul = (torch.backends.cuda if self.weight.is_cuda else torch.backends.mkldnn).matmul
        before = matmul.fp32_precision
        matmul.fp32_precision = "bf16" if self.in_slabs and self.weight.dtype == torch.bfloat16 else "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = before
