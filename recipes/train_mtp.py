"""Train an MTP head: accelerate launch recipes/train_mtp.py --config recipes/configs/demo.yaml [--key value ...]."""

import logging

from bebop.errors import errors_as_one_line
from bebop.training.config import parse_config
from bebop.training.trainer import train


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    with errors_as_one_line():
        train(parse_config())


if __name__ == "__main__":
    main()
