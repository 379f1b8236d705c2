"""Train an MTP head: accelerate launch recipes/train_mtp.py --config recipes/configs/demo.yaml [--key value ...]."""

import logging
import sys

from bebop.errors import InputError
from bebop.training.config import parse_config
from bebop.training.trainer import train


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        train(parse_config())
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
