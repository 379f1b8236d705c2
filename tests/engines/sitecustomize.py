"""Mends two defects of vLLM's CPU build in the test environment, in every process of it (it is on PYTHONPATH).

- torchvision from PyPI is a CUDA build: beside a CPU torch its Python part needs two operators to be declared.
- vllm 0.32.0 without triton: the fallback of `expand_batch_to_tokens` loses its result for floating-point inputs, so with
  speculation and a temperature the logits are divided by garbage.
"""

import importlib.abc
import importlib.util
import sys


def declare_torchvision_operators():
    import torch

    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def mend_rejection_sampler(module):
    def expand_batch_to_tokens(x, cu_num_tokens, num_tokens, replace_from=0, replace_to=0):
        import torch

        counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
        expanded = torch.repeat_interleave(x, counts, output_size=num_tokens)
        return expanded.masked_fill(expanded == replace_from, replace_to)

    module.expand_batch_to_tokens = expand_batch_to_tokens


class Mender(importlib.abc.MetaPathFinder):
    before = {"torchvision": declare_torchvision_operators}
    after = {"vllm.v1.sample.rejection_sampler": mend_rejection_sampler}

    def find_spec(self, name, path=None, target=None):
        if name in self.before:
            self.before.pop(name)()
        if name not in self.after:
            return None
        mend = self.after.pop(name)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            mend(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Mender())
