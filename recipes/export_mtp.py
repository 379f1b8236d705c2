"""Write an engine-ready directory: python recipes/export_mtp.py --head RUN/head --target MODEL --output DIRECTORY."""

import argparse
import logging
from pathlib import Path

from bebop.errors import errors_as_one_line
from bebop.export.serving import serve_commands, splits_text_differently
from bebop.export.writer import export_head
from bebop.families import family_by_name


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--head", required=True, type=Path, help="head directory of a training run")
    parser.add_argument("--target", required=True, help="directory or hub id of the model the head was trained for")
    parser.add_argument("--output", required=True, type=Path, help="directory to write; must not exist")
    parser.add_argument("--copy", action="store_true", help="copy the target's weights too; else hard links where possible")
    arguments = parser.parse_args()
    with errors_as_one_line():
        facts = export_head(arguments.head, arguments.target, arguments.output, arguments.copy)
        has_tokenizer = (arguments.output / "tokenizer.json").is_file()
        differs = has_tokenizer and splits_text_differently(arguments.output)
    print(f"wrote {arguments.output}, a {facts['family']} head beside its target; serve it with\n")
    family, draft_steps = family_by_name(facts["family"]), facts.get("draft_steps", 3)
    for engine, command in serve_commands(family, str(arguments.output), draft_steps).items():
        print(f"{engine}:\n    {command}\n")
    if "temperature" in facts:
        print(f"and sample at temperature {facts['temperature']}, which the head was trained for")
    if "draft_steps" not in facts:
        print("the head does not say how many drafts it was trained for; the commands have 3")
    if differs:
        print(
            "note: transformers reads this tokenizer with Qwen2's rules and splits some text otherwise than the model was "
            "trained on; send token ids, or give the engine the original model's tokenizer (--tokenizer)"
        )


if __name__ == "__main__":
    main()
