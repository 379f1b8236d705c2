"""An exported tiny Qwen3.5 as a GGUF file for llama.cpp: python gguf_model.py DIRECTORY OUTPUT.gguf.

Runs in the engine environment. llama.cpp's own convert_hf_to_gguf.py is in no package; its table of tensor names is, in
`gguf`. This does to the tensors what that script does, as far as the tests need it. The vocabulary is that of bytes.
"""

import json
import sys
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file

# What the converter renames `mtp.*` to: the head becomes one more block behind the model's.
HEAD = {
    "fc": "nextn.eh_proj",
    "pre_fc_norm_embedding": "nextn.enorm",
    "pre_fc_norm_hidden": "nextn.hnorm",
    "norm": "nextn.shared_head_norm",
}


def gguf_name(name: str, names: gguf.TensorNameMap, layers: int) -> str:
    parts = name.split(".")
    if parts[0] == "mtp" and parts[1] in HEAD:
        return f"blk.{layers}.{HEAD[parts[1]]}.weight"
    if parts[0] == "mtp":
        name = name.replace("mtp.layers.0", f"model.layers.{layers}")
    found = names.get_name(name.replace("dt_bias", "dt_proj.bias"), try_suffixes=(".weight", ".bias"))
    assert found, f"{name} has no name in GGUF"
    return found


def gguf_value(name: str, value: torch.Tensor) -> torch.Tensor:
    if name.endswith("A_log"):
        return -value.exp()
    if name.endswith("conv1d.weight"):
        return value.squeeze(1)
    # llama.cpp multiplies by the weight itself, so that zero-centred norms get their 1 here.
    return value + 1 if "norm" in name and "linear_attn" not in name else value


def byte_tokens() -> list[str]:
    """The printable stand-ins that byte-level BPE has for bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def main(directory: Path, output: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    layers, rope = config["num_hidden_layers"], config["rope_parameters"]
    assert config["linear_num_key_heads"] == 1, "with more, the converter reorders value heads"
    writer = gguf.GGUFWriter(output, "qwen35")
    writer.add_block_count(layers + config["mtp_num_hidden_layers"])
    writer.add_nextn_predict_layers(config["mtp_num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(config["head_dim"] * rope["partial_rotary_factor"]))
    writer.add_rope_dimension_sections([*rope.get("mrope_section", [11, 11, 10]), 0])
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(config["linear_key_head_dim"])
    writer.add_ssm_group_count(config["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(config["linear_num_value_heads"])
    writer.add_ssm_inner_size(config["linear_value_head_dim"] * config["linear_num_value_heads"])
    writer.add_full_attention_interval(config["full_attention_interval"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(byte_tokens())
    writer.add_token_types([gguf.TokenType.NORMAL] * 256)
    writer.add_token_merges(["a b"])  # required; its result is no token, so that bytes stay bytes
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN35, layers + 1)
    for shard in sorted(directory.glob("*.safetensors")):
        for name, value in load_file(shard).items():
            writer.add_tensor(gguf_name(name, names, layers), gguf_value(name, value.float()).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
