import json

from bebop.data.end_tokens import end_tokens
from tests.rollouts import make_tokenizer
from tests.tiny_models import make_model

EOS, END = 2, 130


def test_end_tokens_are_those_of_engines(tmp_path):
    """All of generation_config.json and the tokenizer's; config.json's where there is no generation config."""
    model = make_model("qwen2", eos_token_id=EOS)
    model.config.save_pretrained(tmp_path)
    tokenizer = make_tokenizer()
    assert end_tokens(tmp_path, tokenizer) == [EOS]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 5], "top_k": 3}))
    assert end_tokens(tmp_path, tokenizer) == [5, 7]
    tokenizer.eos_token = "<end>"
    assert end_tokens(tmp_path, tokenizer) == [5, 7, END]
