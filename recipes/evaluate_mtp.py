"""What an engine would accept of a head's drafts, and why.

    python recipes/evaluate_mtp.py --head runs/first/head --rollouts held-out.jsonl --output evaluation

Give several rollout files to compare domains, temperatures, or checkpoints of a policy (--checkpoints), and --decode to
count acceptance with the reference decoder as well. Writes report.html, evaluation.json and the figures.
"""

import argparse
import logging
from pathlib import Path

from bebop.errors import errors_as_one_line
from bebop.evaluation.study import Study, run_study


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--head", required=True, help="head directory of a run, or 'auto' for the backbone's native head")
    parser.add_argument("--rollouts", nargs="+", type=Path, required=True, help="files that the backbone sampled")
    parser.add_argument("--output", type=Path, required=True, help="directory to write; must not exist")
    parser.add_argument(
        "--backbone",
        nargs="+",
        default=[],
        help="directory or hub id; one for all files, or one each (default: the head's own)",
    )
    parser.add_argument("--steps", type=int, help="K, draft steps (default: those the head was trained with)")
    parser.add_argument(
        "--temperatures",
        nargs="+",
        type=float,
        default=[],
        help="to score every file at (default: the one it was sampled at)",
    )
    parser.add_argument(
        "--cost-ratio",
        type=float,
        help="cost of a draft step over a target pass (default: bytes of weights that each reads)",
    )
    parser.add_argument(
        "--checkpoints", type=int, default=0, metavar="EARLY",
        help="the files are of a policy's checkpoints in order: split the change of acceptance into its entropy-driven and "
        "mismatch-driven part (Eq. 16), with the slope of the first EARLY files",
    )  # fmt: skip
    parser.add_argument(
        "--decode", type=int, default=0, metavar="PROMPTS", help="prompts of each file to decode with drafts, at each K"
    )
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap over documents")
    parser.add_argument("--seed", type=int, default=0, help="of bootstrap and decoder")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bf16", "fp32"), help="of backbone and head")
    parser.add_argument(
        "--tokens-per-batch", type=int, default=4096, help="most tokens, padding included, of a forward pass"
    )
    study = Study(**vars(parser.parse_args()))
    with errors_as_one_line():
        run_study(study)


if __name__ == "__main__":
    main()
