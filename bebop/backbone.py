"""The frozen language model: hidden states at the tap a head family needs, the embedding, and the lm_head."""

import hashlib
import json
import logging
import re
import textwrap
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from bebop.errors import InputError
from bebop.families import Family, family_of
from bebop.llama_as_qwen2 import qwen2_config
from bebop.sharding import load_sharded

logger = logging.getLogger(__name__)

INDEX_FILE = "model.safetensors.index.json"
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]  # weights, configs, tokenizers, templates
_FINGERPRINTED = re.compile(r"(?:model\.|model\.language_model\.|language_model\.model\.)(norm|embed_tokens)\.weight")


def resolve_checkpoint(name: str, weights: bool = True) -> Path:
    """Directory of a model given as a directory or hub id, with its config and safetensors checked for completeness.

    Without `weights` those are neither fetched nor checked.

    Raises:
        InputError: no such directory or hub model, no config.json, no safetensors, or a damaged or truncated file.
    """
    directory = Path(name).expanduser()
    if not directory.is_dir():
        if directory.is_absolute() or name.startswith(".") or name.count("/") != 1:
            raise InputError(f"model directory {name!r} does not exist (nor is it a hub id of the form owner/name)")
        try:
            files = _FILES if weights else [pattern for pattern in _FILES if pattern != "*.safetensors"]
            directory = Path(snapshot_download(name, allow_patterns=files))
        except Exception as error:
            raise InputError(
                f"model {name!r} is neither a local directory nor could it be fetched from the hub: {_one_line(error)}"
            ) from error
    if not (directory / "config.json").is_file():
        raise InputError(f"{directory} has no config.json; give the directory of a Hugging Face checkpoint")
    for shard in checkpoint_shards(directory) if weights else []:
        try:
            with safe_open(shard, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise InputError(f"{shard} is damaged or truncated ({_one_line(error)}); fetch it again") from error
    return directory


def read_config(directory: Path) -> Any:
    """The checkpoint's transformers config.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return AutoConfig.from_pretrained(directory)
    except Exception as error:
        raise InputError(f"{directory}/config.json cannot be read ({_one_line(error)}); fetch it again") from error


def refuse_quantised(config: Any, directory: Path) -> None:
    """Neither training nor export takes a quantised checkpoint.

    The head is trained against the target's own distribution and embedding; and engines would read its bf16 tensors with
    the quantisation that config.json announces.

    Raises:
        InputError: config.json, or its text_config, has a quantization_config.
    """
    for part in (config, config.get_text_config()):
        if getattr(part, "quantization_config", None) is not None:
            raise InputError(f"{directory} is quantised; give the bf16 checkpoint it was made from")


def read_weight_map(directory: Path) -> dict[str, str] | None:
    """Which shard the checkpoint's index names for every tensor; None if there is no index.

    Raises:
        InputError: the index cannot be read, or is not one.
    """
    index = directory / INDEX_FILE
    if not index.exists():
        return None
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        if weight_map and all(isinstance(shard, str) for shard in weight_map.values()):
            return weight_map
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise InputError(f"{index} is damaged; fetch it again")


def checkpoint_shards(directory: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint: those of its index, or the only one.

    Raises:
        InputError: there is none, the index names a file that is not there, or it is damaged.
    """
    if weight_map := read_weight_map(directory):
        shards = [directory / name for name in sorted(set(weight_map.values()))]
        if missing := [path.name for path in shards if not path.is_file()]:
            raise InputError(f"{directory} has no {missing[0]}, which its index names; fetch it again")
        return shards
    shards = sorted(directory.glob("*.safetensors"))
    if (directory / "model.safetensors") in shards:
        return [directory / "model.safetensors"]
    if not shards:
        raise InputError(f"{directory} has no *.safetensors file; convert the checkpoint with save_pretrained first")
    return shards


def fingerprint(directory: Path) -> str:
    """Sixteen hex digits that tell one checkpoint's weights from another's: a hash of final norm and embedding, in bf16.

    Of the embedding the first 1024 rows are enough, and are read in no time.

    Raises:
        InputError: the checkpoint lacks one of the two.
    """
    found = {}
    for shard in checkpoint_shards(directory):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():
                if match := _FINGERPRINTED.fullmatch(name):
                    found[match[1]] = file.get_slice(name)[:1024].to(torch.bfloat16).view(torch.uint8)
    if len(found) < 2:
        raise InputError(f"{directory} has no norm.weight and embed_tokens.weight; is it a language model's checkpoint?")
    return hashlib.sha256(b"".join(found[name].numpy().tobytes() for name in sorted(found))).hexdigest()[:16]


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint directory, exactly as its tokenizer.json says.

    Not AutoTokenizer: for model_type qwen2 that builds Qwen2's own pre-tokeniser, whatever tokenizer.json holds, and splits
    the text of a Llama model that is stored as Qwen2 in places where the model never saw a split.

    Raises:
        InputError: no tokenizer.json, or a damaged one.
    """
    if not (directory / "tokenizer.json").is_file():
        raise InputError(f"{directory} has no tokenizer.json; save the model's tokenizer there with save_pretrained")
    try:
        return PreTrainedTokenizerFast.from_pretrained(directory)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise InputError(
            f"{directory}/tokenizer.json or tokenizer_config.json is damaged ({_one_line(error)}); fetch them again"
        ) from error


def _one_line(error: Exception) -> str:
    return textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__


def load_model(directory: Path, **options: Any) -> tuple[Any, list[str]]:
    """transformers' causal language model of a checkpoint, and the names of its tensors that the checkpoint lacks.

    Args:
        directory: of the checkpoint. A head in it is left alone, and transformers' report of that kept quiet.
        options: of `from_pretrained`; device_map="meta" matches names and shapes without reading weights.

    Raises:
        InputError: tensors of another shape than config.json says, or a config.json that makes no model.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except Exception as error:  # a config.json that says nonsense fails somewhere in the model's own code
        raise InputError(
            f"{directory} cannot be loaded as its config.json says ({type(error).__name__}: {_one_line(error)})"
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    model, report = loaded
    if mismatched := sorted(report["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        raise InputError(
            f"{directory} does not match its config.json: {name} is {tuple(stored)}, config.json makes it "
            f"{tuple(expected)}; fetch both again"
        )
    return model, sorted(report["missing_keys"])


class Backbone:
    """A frozen causal language model of Qwen2, Llama, Qwen3.5 or Qwen3-Next type.

    Attributes:
        directory: where the checkpoint lies.
        model: the transformers model, frozen, in evaluation mode.
        config: its text config.
        head_config: the text config in the form the head's family uses (Qwen2 for a Llama backbone).
        family: the head layout that engines expect beside it.
        packs_documents: whether several documents may share a row. Recurrent (linear-attention) layers carry state
            across documents, so models that have them take one document a row.
    """

    def __init__(self, model: Any, directory: Path):
        self.directory = directory
        self.model = model.requires_grad_(False).eval()
        self.config = model.config.get_text_config()
        self.family: Family = family_of(self.config)
        self.head_config = qwen2_config(self.config) if self.config.model_type == "llama" else self.config
        self.decoder = model.get_decoder()
        layer_types = getattr(self.config, "layer_types", None) or ["full_attention"]
        if "sliding_attention" in layer_types:
            raise InputError(f"{directory} uses sliding-window attention, which no MTP head family here supports")
        self.packs_documents = set(layer_types) == {"full_attention"}

    @classmethod
    def load(
        cls,
        name: str,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        sharded: bool = False,
    ) -> "Backbone":
        """Load from a directory or hub id, in bf16 or fp32.

        Args:
            name: directory or hub id.
            dtype: of all weights.
            device: of this process.
            sharded: split the decoder layers over the processes of torch.distributed; every process must call. From then on
                a forward pass is a collective: all processes must make the same number of them.

        Raises:
            InputError: the model cannot be found or read, or is of a type that has no head family.
        """
        directory = resolve_checkpoint(name)
        config = read_config(directory)
        family_of(config.get_text_config())  # refuse before gigabytes are read
        refuse_quantised(config, directory)

        def load() -> Any:
            model, missing = load_model(directory, dtype=dtype)
            if missing:
                raise InputError(
                    f"{directory} lacks {len(missing)} tensors of the model, {missing[0]} among them; fetch it again"
                )
            return model

        if not sharded:
            return cls(load().to(device), directory)
        return cls(
            load_sharded(load, lambda: load_model(directory, dtype=dtype, device_map="meta")[0], torch.device(device)),
            directory,
        )

    @property
    def lm_head_weight(self) -> Tensor:
        """[V, d], the frozen output projection."""
        return self.model.get_output_embeddings().weight

    @property
    def device(self) -> torch.device:
        return self.lm_head_weight.device

    @property
    def max_length(self) -> int:
        """Longest sequence the model takes, in tokens."""
        return self.config.max_position_embeddings

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """Token embeddings: [...] int64 -> [..., d]."""
        return self.model.get_input_embeddings()(tokens)

    @torch.no_grad()
    def hidden_states(self, tokens: Tensor, documents: Tensor, positions: Tensor) -> Tensor:
        """States at the family's tap (before or after the final norm): [B, T] -> [B, T, d].

        Args:
            tokens: [B, T] int64.
            documents: [B, T] int64, equal within a document, -1 for padding.
            positions: [B, T] int64, position within the document, 0 for padding.

        Raises:
            InputError: rows of several documents for a model that cannot keep them apart.
        """
        real = documents >= 0
        if not self.packs_documents and bool((real[:, 1:] & (documents[:, 1:] != documents[:, :-1])).any()):
            raise InputError(f"a {self.config.model_type} backbone needs one document a row: its state runs on across them")
        # Positions that start anew tell transformers where packed documents begin. Padding lies behind the document, so
        # a recurrent model need not be told of it: it must not be, or it would take the padding for packed documents.
        pre_norm, post_norm = self._forward(tokens, positions if self.packs_documents else None)
        return pre_norm if self.family.tap == "pre_norm" else post_norm

    @torch.no_grad()
    def residual_scale(self) -> float:
        """Root mean square of the residual stream where it leaves the last layer: the median over some tokens."""
        tokens = torch.linspace(0, self.config.vocab_size - 1, 64, device=self.device).long().unsqueeze(0)
        pre_norm, _ = self._forward(tokens, None)
        return pre_norm.float().pow(2).mean(-1).sqrt().median().item()

    @torch.no_grad()
    def decode(self, tokens: Tensor, positions: Tensor, real: Tensor, cache: Any) -> Tensor:
        """States at the tap of tokens that go on from a cache: [B, T] -> [B, T, d].

        Args:
            tokens, positions: [B, T] int64.
            real: [B, cached + T] bool, False for padding, which stands on the left.
            cache: a transformers cache, updated.
        """
        pre_norm, post_norm = self._forward(
            tokens, positions, attention_mask=real.long(), past_key_values=cache, use_cache=True
        )
        return pre_norm if self.family.tap == "pre_norm" else post_norm

    def _forward(self, tokens: Tensor, positions: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
        """States before and after the final norm, each [B, T, d]."""
        tapped: dict[str, Tensor] = {}
        handle = self.decoder.norm.register_forward_pre_hook(lambda _, inputs: tapped.update(pre_norm=inputs[0]))
        try:
            options = {"use_cache": False} | options
            post_norm = self.decoder(input_ids=tokens, position_ids=positions, **options).last_hidden_state
        finally:
            handle.remove()
        return tapped["pre_norm"], post_norm

    @torch.no_grad()
    def target_hidden(self, tapped: Tensor) -> Tensor:
        """States as the lm_head takes them, from states at the tap: [..., d] -> [..., d]."""
        return self.decoder.norm(tapped) if self.family.tap == "pre_norm" else tapped
