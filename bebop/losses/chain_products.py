"""Products along a chain of drafts."""

import torch
from torch import Tensor


def cumulative_product(x: Tensor) -> Tensor:
    """prod_{i<=k} x_i of [K, N], over steps.

    torch.cumprod's backward divides by x, and asks the host on the way whether any is 0; this does neither.
    """
    products = [x[0]]
    for step in x[1:]:
        products.append(products[-1] * step)
    return torch.stack(products)
