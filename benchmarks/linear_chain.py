"""Time, memory and accuracy of the end-to-end TV loss from hidden states, side by side with what one would use instead.

python -m benchmarks.linear_chain --output benchmarks/results/linear_chain

All variants in one process, one after another in every round, median over the rounds. Writes OUTPUT.json and OUTPUT.png.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from bebop import CrossEntropyLoss, E2ETVLoss, ForwardKLLoss
from bebop.kernels.lm_head import LmHead
from bebop.kernels.rows import row_passes
from benchmarks.memory import peak_extra_bytes


@dataclass
class Problem:
    """Neighbouring chains of one text, bf16 operands; `noise` sets how good the draft is."""

    draft: Tensor  # [K, N, d]
    target: Tensor  # [N+K, d]
    weight: Tensor  # [V, d]
    rows: Tensor  # [K, N]
    tokens: Tensor  # [K, N]

    @property
    def arguments(self) -> dict[str, Tensor]:
        return {"target_rows": self.rows, "tokens": self.tokens, "valid": torch.ones_like(self.rows, dtype=torch.bool)}


def make_problem(steps: int, chains: int, size: int, vocabulary: int, noise: float, device: str) -> Problem:
    generator = torch.Generator().manual_seed(0)
    # Logits with a standard deviation of 3, as peaked as a language model's at an entropy of a few nats.
    weight = (torch.randn(vocabulary, size, generator=generator) * (3 / size**0.5)).bfloat16()
    target = torch.randn(chains + steps, size, generator=generator).bfloat16()
    rows = torch.arange(chains) + torch.arange(1, steps + 1).unsqueeze(1)
    draft = (target[rows].float() + noise * torch.randn(steps, chains, size, generator=generator)).bfloat16()
    tokens = torch.randint(0, vocabulary, (steps, chains), generator=generator)
    return Problem(*(x.to(device) for x in (draft, target, weight, rows, tokens)))


FLOOR = "2K+1 products (floor)"
SAME_LOSS = ("bebop e2e TV", "naive autograd", "naive, torch.compile", "naive, bf16 logits")

Step = Callable[[], Tensor]  # runs forward and backward, returns the gradient of draft [K, N, d]


def backward(draft: Tensor, loss: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, draft)
    return gradient


def leaf(problem: Problem) -> Tensor:
    """The draft's states; on a CPU as fp32 numbers, which the naive variants need there, so that all gradients are."""
    return (problem.draft.clone() if problem.draft.is_cuda else problem.draft.float()).requires_grad_()


def ours(problem: Problem, loss_fn) -> Step:
    draft = leaf(problem)
    return lambda: backward(draft, loss_fn(draft, problem.target, problem.weight, **problem.arguments).loss)


def logits_at_full_precision(problem: Problem) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A draft leaf, and hidden -> fp32 logits: on a GPU bf16 products with fp32 results, on a CPU fp32 products of bf16
    numbers, under "medium" precision, which uses bf16 units if there are any and is exact for such numbers."""
    if problem.weight.is_cuda:
        head = LmHead(problem.weight)

        class Logits(torch.autograd.Function):
            @staticmethod
            def forward(ctx, hidden):
                out = torch.empty(*hidden.shape[:-1], len(problem.weight), device=hidden.device)
                return head.logits(hidden.flatten(0, -2), out.view(-1, len(problem.weight))).view_as(out)

            @staticmethod
            def backward(ctx, gradient):
                back = head.back(gradient.flatten(0, -2).bfloat16())
                return back.view(*gradient.shape[:-1], -1).bfloat16()

        return leaf(problem), Logits.apply
    weight = problem.weight.float()
    return leaf(problem), lambda hidden: hidden @ weight.T


def tv_of_logits(draft_logits: Tensor, target_logits: Tensor, rows: Tensor) -> Tensor:
    """End-to-end TV as one would write it: no statistic that is not needed, target softmax once for all steps."""
    p = target_logits.softmax(-1)[rows]
    alpha = torch.minimum(draft_logits.softmax(-1), p).sum(-1)
    return 1.0 - alpha.cumprod(0).mean()


def naive(problem: Problem, compiled: bool) -> Step:
    draft, logits = logits_at_full_precision(problem)
    target = problem.target.to(draft.dtype)
    loss = torch.compile(tv_of_logits) if compiled else tv_of_logits

    def step() -> Tensor:
        with torch.no_grad():
            target_logits = logits(target)
        return backward(draft, loss(logits(draft), target_logits, problem.rows))

    return step


def naive_bf16(problem: Problem) -> Step:
    """Logits rounded to bf16, as a bf16 lm_head returns them; softmax in fp32."""
    draft = problem.draft.clone().requires_grad_()

    def step() -> Tensor:
        target_logits = (problem.target @ problem.weight.T).float()
        return backward(draft, tv_of_logits((draft @ problem.weight.T).float(), target_logits, problem.rows))

    return step


def floor(problem: Problem) -> Step:
    """The 2K+1 products alone, step by step, at the same precision: what nothing that computes the loss can beat."""
    draft, logits = logits_at_full_precision(problem)
    target, back_weight = problem.target.to(draft.dtype), problem.weight.to(draft.dtype)
    some_gradient = torch.zeros(draft.shape[1], len(back_weight), dtype=draft.dtype, device=draft.device)

    @torch.no_grad()
    def step() -> Tensor:
        logits(target)
        for hidden in draft:
            logits(hidden)
        return torch.stack([some_gradient @ back_weight for _ in draft])

    return step


def liger_jsd(problem: Problem) -> Step:
    """Liger-Kernel's chunked generalised JSD at beta 0, which is forward KL: pure PyTorch, runs anywhere."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss_fn = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)
    draft = leaf(problem)
    weight = problem.weight.to(draft.dtype)
    target = problem.target.to(draft.dtype)[problem.rows].flatten(0, 1)
    return lambda: backward(draft, loss_fn(draft.flatten(0, 1), weight, target, weight, problem.tokens.flatten()))


def liger_cross_entropy(problem: Problem) -> Step:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    draft = problem.draft.clone().requires_grad_()
    loss_fn = LigerFusedLinearCrossEntropyLoss()
    return lambda: backward(draft, loss_fn(problem.weight, draft.flatten(0, 1), problem.tokens.flatten()))


def cut_cross_entropy(problem: Problem) -> Step:
    from cut_cross_entropy import linear_cross_entropy

    draft = problem.draft.clone().requires_grad_()
    return lambda: backward(draft, linear_cross_entropy(draft.flatten(0, 1), problem.weight, problem.tokens.flatten()))


def variants(device: str, chunk_bytes: int) -> dict[str, Callable[[Problem], Step]]:
    found: dict[str, Callable[[Problem], Step]] = {
        "bebop e2e TV": lambda p: ours(p, E2ETVLoss(chunk_bytes=chunk_bytes)),
        "naive autograd": lambda p: naive(p, compiled=False),
        "naive, torch.compile": lambda p: naive(p, compiled=True),
        FLOOR: floor,
    }
    if device == "cuda" or torch.cpu._is_avx512_bf16_supported():
        found["naive, bf16 logits"] = naive_bf16  # without bf16 units a CPU takes minutes for one such product
    installed = importlib.util.find_spec
    if installed("liger_kernel"):
        found["bebop forward KL"] = lambda p: ours(p, ForwardKLLoss(chunk_bytes=chunk_bytes))
        found["Liger chunked forward KL"] = liger_jsd
    if device == "cuda" and (installed("liger_kernel") or installed("cut_cross_entropy")):
        found["bebop CE"] = lambda p: ours(p, CrossEntropyLoss(chunk_bytes=chunk_bytes, step_decay=1.0))
    if device == "cuda" and installed("liger_kernel"):
        found["Liger fused linear CE"] = liger_cross_entropy
    if device == "cuda" and installed("cut_cross_entropy"):
        found["cut cross-entropy"] = cut_cross_entropy
    return found


def oracle(problem: Problem) -> tuple[Tensor, float]:
    """The e2e TV gradient in float64, a few chains at a time, and mean alpha."""
    weight = problem.weight.double()
    parts, alphas = [], []
    chains = problem.draft.shape[1]
    for here in torch.arange(chains, device=problem.draft.device).split(32):
        draft = problem.draft[:, here].double().requires_grad_()
        q, p = (draft @ weight.T).softmax(-1), (problem.target.double()[problem.rows[:, here]] @ weight.T).softmax(-1)
        alpha = torch.where(q < p, q, p).sum(-1)
        parts.append(backward(draft, -alpha.cumprod(0).sum() / problem.rows.numel()))
        alphas.append(alpha.detach())
    return torch.cat(parts, 1), torch.cat(alphas, 1).mean().item()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(step: Step, device: str) -> float:
    synchronise(device)
    started = time.perf_counter()
    step()
    synchronise(device)
    return time.perf_counter() - started


def compare(problem: Problem, device: str, chunk_bytes: int, rounds: int) -> dict[str, dict]:
    """Seconds, their spread, peak memory and gradient error by variant."""
    makers = variants(device, chunk_bytes)
    steps = {}
    exact, _ = oracle(problem)
    result: dict[str, dict] = {}
    for name, make in tqdm(makers.items(), desc="warm-up, memory, accuracy"):
        steps[name] = make(problem)
        gradient = steps[name]()
        result[name] = {"gradient_error": relative_error(gradient, exact) if name in SAME_LOSS else None}
        del gradient
        result[name]["peak_bytes"] = peak_extra_bytes(steps[name], device)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in tqdm(range(rounds), desc="rounds"):
        for name, step in steps.items():
            seconds[name].append(timed(step, device))
    for name, values in seconds.items():
        # Ratios within a round: neighbours on a shared machine slow all of a round's variants alike.
        ratio = statistics.median(v / f for v, f in zip(values, seconds[FLOOR], strict=True))
        result[name] |= {
            "seconds": statistics.median(values),
            "fastest": min(values),
            "slowest": max(values),
            "x_floor": ratio,
        }
    return result


def scaling(settings: dict, device: str, chunk_bytes: int, rounds: int) -> list[dict]:
    """Seconds and memory of our op at half and double the chains, and at a third and two thirds of the vocabulary."""
    chains, vocabulary = settings["chains"], settings["vocabulary"]
    sizes = [(chains // 2, vocabulary), (chains, vocabulary), (2 * chains, vocabulary)]
    sizes += [(chains, vocabulary // 3), (chains, 2 * vocabulary // 3)]
    steps = []
    for n, v in sizes:
        problem = make_problem(**(settings | {"chains": n, "vocabulary": v}), device=device)
        steps.append(ours(problem, E2ETVLoss(chunk_bytes=chunk_bytes)))
    seconds: list[list[float]] = [[] for _ in steps]
    for number in tqdm(range(rounds + 1), desc="scaling"):
        for i, step in enumerate(steps):
            spent = timed(step, device)
            if number:  # the first compiles
                seconds[i].append(spent)
    peaks = [peak_extra_bytes(step, device) for step in steps]
    return [
        {"chains": n, "vocabulary": v, "seconds": statistics.median(s), "peak_bytes": peak}
        for (n, v), s, peak in zip(sizes, seconds, peaks, strict=True)
    ]


def where_time_goes(step: Step, device: str) -> dict[str, float]:
    """Share of a step of our op spent in products with the lm_head, in row passes, and elsewhere."""
    spent = {"products": 0.0, "row passes": 0.0}

    def clocked(function, part: str):
        def call(*arguments):
            synchronise(device)
            started = time.perf_counter()
            result = function(*arguments)
            synchronise(device)
            spent[part] += time.perf_counter() - started
            return result

        return call

    passes = row_passes(torch.device(device), torch.float32)
    with ExitStack() as stack:
        for owner, names, part in (
            (LmHead, ("logits", "back"), "products"),
            (passes, ("log_sum_exp", "statistics", "gradient"), "row passes"),
        ):
            for name in names:
                stack.enter_context(mock.patch.object(owner, name, clocked(getattr(owner, name), part)))
        total = timed(step, device)
    return {part: seconds / total for part, seconds in spent.items()} | {"rest": 1 - sum(spent.values()) / total}


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = [x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    flags = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in Path("/proc/cpuinfo").read_text().split()]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads, {' '.join(flags)}"


def draw(result: dict[str, dict], title: str, path: Path) -> None:
    names = list(result)
    figure, axes = plt.subplots(1, 3, figsize=(12, 0.45 * len(names) + 1.4), sharey=True)
    columns = (
        ("seconds", "time per step, s", 1),
        ("peak_bytes", "peak extra memory, GiB", 2**30),
        ("gradient_error", None, 1),
    )
    for axis, (key, label, unit) in zip(axes, columns, strict=True):
        values = [(result[name][key] or 0) / unit for name in names]
        bars = axis.barh(names, values, color="0.75", edgecolor="black")
        text = [f"{v:.1e}" if key == "gradient_error" and v else f"{v:.2f}" if v else "another loss" for v in values]
        axis.bar_label(bars, text, padding=3, fontsize=8)
        axis.set_xlabel(label or "gradient error against float64, relative")
        axis.margins(x=0.3)
    axes[2].set_xscale("log")
    axes[2].set_xlim(1e-4, 10)
    axes[0].invert_yaxis()
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=3, help="K")
    parser.add_argument("--chains", type=int, default=512, help="N")
    parser.add_argument("--size", type=int, default=1024, help="d")
    parser.add_argument("--vocabulary", type=int, default=151_936, help="V")
    parser.add_argument("--noise", type=float, default=0.008, help="of the drafts' states, relative; 0.008 is alpha 0.99")
    parser.add_argument("--chunk-mib", type=int, default=512, help="budget for logits")
    parser.add_argument("--rounds", type=int, default=5, help="the median is taken over these")
    parser.add_argument("--output", type=Path, required=True, help="path without suffix for the .json and the .png")
    arguments = parser.parse_args()
    settings = {key: getattr(arguments, key) for key in ("steps", "chains", "size", "vocabulary", "noise")}
    chunk_bytes = arguments.chunk_mib * 2**20
    problem = make_problem(**settings, device=arguments.device)
    torch.set_float32_matmul_precision("medium")  # for the CPU's fp32 variants, see `logits_at_full_precision`
    with torch.no_grad():
        stats = E2ETVLoss()(problem.draft, problem.target, problem.weight, **problem.arguments).stats
    alpha = stats.alpha.mean().item()
    result = compare(problem, arguments.device, chunk_bytes, arguments.rounds)
    parts = where_time_goes(ours(problem, E2ETVLoss(chunk_bytes=chunk_bytes)), arguments.device)
    sizes = scaling(settings, arguments.device, chunk_bytes, arguments.rounds)

    name = device_name(arguments.device)
    installed = [package for package in ("torch", "triton", "liger_kernel") if importlib.util.find_spec(package)]
    versions = {package: importlib.metadata.version(package) for package in installed}
    title = (
        "K = {steps}, N = {chains}, d = {size}, V = {vocabulary:,}".format(**settings)
        + f"; {name}; torch {versions['torch']}"
    )
    table = Table("variant", "s", "x floor", "fastest .. slowest", "peak MiB", "gradient error", title=title)
    for variant, r in result.items():
        error = "" if r["gradient_error"] is None else f"{r['gradient_error']:.1e}"
        spread = f"{r['fastest']:.2f} .. {r['slowest']:.2f}"
        table.add_row(variant, f"{r['seconds']:.2f}", f"{r['x_floor']:.2f}", spread, f"{r['peak_bytes'] / 2**20:.0f}", error)
    lines = Table("N", "V", "s", "us per chain and V = 1000", "peak MiB", title="bebop e2e TV at other sizes")
    for s in sizes:
        rate = 1e9 * s["seconds"] / s["chains"] / s["vocabulary"]
        peak = f"{s['peak_bytes'] / 2**20:.0f}"
        lines.add_row(str(s["chains"]), str(s["vocabulary"]), f"{s['seconds']:.2f}", f"{rate:.1f}", peak)
    console = Console(width=120)
    console.print(table, lines)
    console.print("bebop e2e TV: " + ", ".join(f"{part} {share:.0%}" for part, share in parts.items()))
    console.print(f"mean alpha {alpha:.4f}, chunk budget {arguments.chunk_mib} MiB")

    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "device": name, "versions": versions, **settings, "chunk_mib": arguments.chunk_mib, "rounds": arguments.rounds,
        "alpha": alpha, "variants": result, "parts": parts, "sizes": sizes,
    }  # fmt: skip
    arguments.output.with_suffix(".json").write_text(json.dumps(report, indent=1))
    draw(result, title, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
