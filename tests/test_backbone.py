import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from bebop.backbone import Backbone
from bebop.data.batches import make_batch, plan_micro_batches
from bebop.data.rollouts import Rollout
from bebop.errors import InputError
from bebop.heads.draft import draft
from bebop.heads.loading import head_for
from bebop.kernels import linear_chain_statistics
from bebop.llama_as_qwen2 import as_qwen2
from tests.tiny_models import CONFIGS, make_backbone, make_checkpoint, make_model, make_wrapper


def rollouts(seed=0, lengths=(9, 5, 7, 12)):
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 131, (n,), generator=generator).tolist() for n in lengths]
    return [Rollout(i[:2], i[2:]) for i in ids]


def states_of(backbone, documents) -> list[torch.Tensor]:
    """Each document's states, from one batch of all of them in whatever rows this backbone takes."""
    (rows,) = plan_micro_batches([len(d) for d in documents], 10**6, backbone.packs_documents)
    batch = make_batch(rows, documents)
    hidden = backbone.hidden_states(batch.tokens, batch.documents, batch.positions)
    assert backbone.packs_documents == (len(rows) < len(documents))
    return [hidden[batch.documents == i] for i in range(len(documents))]


@pytest.mark.parametrize("kind", CONFIGS)
def test_documents_of_a_batch_do_not_see_each_other(kind, tmp_path):
    """Changing one leaves its neighbours bitwise equal, and each equals what it is alone, recurrent layers included."""
    backbone = make_backbone(tmp_path, kind)
    backbone.model.set_experts_implementation("eager")  # the grouped one takes no float64
    backbone.model.double()  # so that what is compared is not rounding, which grows from layer to layer
    documents = rollouts()
    together = states_of(backbone, documents)
    for i, document in enumerate(documents):
        ids = torch.tensor([document.prompt_ids + document.response_ids])
        alone = backbone.hidden_states(ids, torch.zeros_like(ids), torch.arange(ids.shape[1]).unsqueeze(0))[0]
        torch.testing.assert_close(together[i], alone, atol=1e-5, rtol=1e-5)
    changed = [*documents[:3], rollouts(seed=1)[3]]
    assert len(changed[3]) == len(documents[3])
    after = states_of(backbone, changed)
    assert all(torch.equal(a, b) for a, b in zip(together[:3], after[:3], strict=True))
    assert not torch.allclose(together[3], after[3])


def test_recurrent_backbone_refuses_packed_rows(tmp_path):
    backbone = make_backbone(tmp_path, "qwen3_5_text")
    documents = torch.tensor([[0, 0, 0, 1, 1, -1]])
    with pytest.raises(InputError, match="needs one document a row"):
        backbone.hidden_states(documents.clamp(min=0), documents, torch.tensor([[0, 1, 2, 0, 1, 0]]))


def test_text_part_of_a_multimodal_checkpoint(tmp_path):
    """Published Qwen3.5 checkpoints wrap the language model; its states must be those of the text model alone."""
    text = make_model("qwen3_5_text")
    backbone = Backbone.load(str(make_wrapper(tmp_path, text)), torch.float32)
    assert backbone.family.name == "qwen3_5"
    ids = torch.arange(3, 12).unsqueeze(0)
    hidden = backbone.hidden_states(ids, torch.zeros_like(ids), torch.arange(9).unsqueeze(0))
    torch.testing.assert_close(hidden, text.model(ids).last_hidden_state)
    torch.testing.assert_close(backbone.lm_head_weight, text.lm_head.weight)


@pytest.mark.parametrize("tied", [True, False])
def test_llama_as_qwen2_has_the_same_logits_to_the_last_bit(tied, tmp_path):
    llama = make_model("llama", tie_word_embeddings=tied)
    qwen2 = as_qwen2(llama)
    ids = torch.arange(3, 20).unsqueeze(0)
    assert torch.equal(llama(ids).logits, qwen2(ids).logits)
    qwen2.save_pretrained(tmp_path)
    assert torch.equal(Backbone.load(str(tmp_path), torch.float32).model(ids).logits, llama(ids).logits)


def test_bf16(tmp_path):
    make_checkpoint(tmp_path, "qwen2")
    backbone = Backbone.load(str(tmp_path), torch.bfloat16)
    ids = torch.arange(3, 12).unsqueeze(0)
    assert backbone.hidden_states(ids, torch.zeros_like(ids), torch.arange(9).unsqueeze(0)).dtype == torch.bfloat16


def _config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: _config(p, model_type="qwen3"), "model_type 'qwen3' has no MTP head family"),
        (lambda p: _config(p, model_type="gpt2"), "model_type 'gpt2' has no MTP head family"),
        (lambda p: _config(p, quantization_config={"quant_method": "fp8"}), "is quantised"),
        (lambda p: _config(p, use_sliding_window=True, layer_types=["sliding_attention"] * 2), "sliding-window"),
        (lambda p: (p / "config.json").unlink(), "has no config.json"),
        (lambda p: (p / "model.safetensors").unlink(), "has no \\*.safetensors"),
        (lambda p: _truncate(p / "model.safetensors"), "model.safetensors is damaged or truncated"),
        (lambda p: _truncate(p / "config.json"), "config.json cannot be read"),
        (lambda p: _config(p, intermediate_size=64), "does not match its config.json"),
    ],
)
def test_models_that_do_not_fit_are_refused(damage, message, tmp_path):
    make_checkpoint(tmp_path, "qwen2")
    damage(tmp_path)
    with pytest.raises(InputError, match=message):
        Backbone.load(str(tmp_path), torch.float32)


def test_a_checkpoint_without_one_of_its_tensors_is_refused(tmp_path):
    """transformers fills in random weights and goes on."""
    make_checkpoint(tmp_path, "qwen2")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 tensors of the model, model.layers.1.mlp.up_proj.weight"):
        Backbone.load(str(tmp_path), torch.float32)


def test_a_missing_shard_is_named(tmp_path):
    make_checkpoint(tmp_path, "qwen2", native_head=True)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no model-00001-of-00002\.safetensors, which its index names"):
        Backbone.load(str(tmp_path), torch.float32)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qwen2", "qwen3_5_text"])
def test_what_is_measured_of_a_document_does_not_depend_on_its_neighbours(kind, tmp_path):
    """The whole way from tokens to chain statistics: change one document, and the others' numbers are bitwise the same."""
    backbone = make_backbone(tmp_path, kind)
    head, _ = head_for(backbone)

    def alphas(documents):
        (rows,) = plan_micro_batches([len(d) for d in documents], 10**6, backbone.packs_documents)
        batch = make_batch(rows, documents)
        hidden, target, targets = draft(
            head,
            backbone,
            backbone.hidden_states(batch.tokens, batch.documents, batch.positions),
            **vars(batch),
            steps=3,
            compute_dtype=torch.float32,
        )
        stats = linear_chain_statistics(hidden, target, backbone.lm_head_weight, **targets._asdict())
        return [stats.alpha[:, (batch.documents == i).flatten()] for i in range(len(documents))]

    before = alphas(rollouts())
    after = alphas([*rollouts()[:3], rollouts(seed=1)[3]])
    assert all(torch.equal(a, b) for a, b in zip(before[:3], after[:3], strict=True))
    assert not torch.equal(before[3], after[3])


def _truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def test_missing_directory_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        Backbone.load(str(tmp_path / "nothing"))
