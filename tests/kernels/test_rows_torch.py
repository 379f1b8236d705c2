import torch

from bebop.kernels import rows_torch


def test_log_sum_exp_of_a_real_vocabulary_is_accurate():
    """Compiled and added up in fp32, the log-sum-exp is off by what flips tokens across q < p."""
    x = 3 * torch.randn(4, 151_936, generator=torch.Generator().manual_seed(0))
    index, scale = torch.arange(4), torch.ones(4)
    exact = x.double().logsumexp(-1)
    ours = (rows_torch.log_sum_exp(x, index, scale) - exact).abs().max()
    in_fp32 = (torch.compile(torch.logsumexp)(x, -1) - exact).abs().max()
    print(f"error of the log-sum-exp: ours {ours:.1e}, compiled in fp32 {in_fp32:.1e}")
    assert ours < 5e-8
