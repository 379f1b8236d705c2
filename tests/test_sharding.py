"""A backbone whose layers are split over two processes is the same model."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from safetensors.torch import load_file, save_file

from bebop.backbone import Backbone
from bebop.errors import InputError
from bebop.sharding import checksums, whole
from tests.tiny_models import CONFIGS, make_checkpoint


def _compare(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    tokens = torch.randint(0, 131, (3, 20), generator=torch.Generator().manual_seed(rank))
    documents, positions = torch.zeros_like(tokens), torch.arange(20).expand(3, 20)
    for kind in CONFIGS:
        for tied in (False, True):
            directory = f"{folder}/{kind}-{tied}"
            plain = Backbone.load(directory, torch.float32)
            split = Backbone.load(directory, torch.float32, sharded=True)
            for _ in range(2):  # weights are gathered and dropped again
                expected = plain.hidden_states(tokens, documents, positions)
                torch.testing.assert_close(split.hidden_states(tokens, documents, positions), expected, atol=0, rtol=0)
            assert torch.equal(split.target_hidden(expected), plain.target_hidden(expected))
            assert torch.equal(split.lm_head_weight, plain.lm_head_weight)
            assert torch.equal(split.embed(tokens), plain.embed(tokens))
            assert split.residual_scale() == plain.residual_scale()
            tie = split.model.get_input_embeddings().weight is split.lm_head_weight
            assert tie is tied
            layers = list(split.decoder.layers.parameters())
            for ours, theirs in zip(layers, plain.decoder.layers.parameters(), strict=True):
                assert ours.to_local().numel() < theirs.numel() or theirs.shape[0] == 1
                assert torch.equal(whole(ours), theirs)
            before = checksums(split.model)
            assert before == checksums(split.model)
            with torch.no_grad():
                layers[0].to_local().view(-1)[0] += 1
            assert before != checksums(split.model)
    with pytest.raises(InputError, match="lacks 1 tensors of the model"):  # said by process 0, raised on both
        Backbone.load(f"{folder}/damaged", torch.float32, sharded=True)
    dist.destroy_process_group()


def test_split_over_two_processes_it_is_the_same_model(tmp_path):
    for kind in CONFIGS:
        for tied in (False, True):
            make_checkpoint(tmp_path / f"{kind}-{tied}", kind, tie_word_embeddings=tied)
    damaged = make_checkpoint(tmp_path / "damaged", "qwen2")
    tensors = load_file(damaged / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    multiprocessing.spawn(_compare, (port, str(tmp_path)), nprocs=2)


@pytest.mark.parametrize("change", [lambda w: w.mul_(2), lambda w: w.neg_(), lambda w: w.copy_(w.flip(0))])
def test_a_checksum_tells_any_change(change):
    """Constant norms doubled, signs and rows exchanged: a sum or an exclusive or of the bits would be the same."""
    module = torch.nn.ParameterDict({"norm": torch.ones(8), "weight": torch.tensor([[1.0, -1.0], [-1.0, 1.0]])})
    before = checksums(module)
    assert checksums(module) == before
    with torch.no_grad():
        for weight in module.values():
            change(weight)
    assert checksums(module)["weight"] != before["weight"]


def test_a_checksum_is_of_the_part_that_zero_3_keeps():
    parameter = torch.nn.Parameter(torch.empty(0))
    parameter.ds_tensor = torch.ones(4)
    before = checksums(torch.nn.ParameterList([parameter]))
    parameter.ds_tensor += 1
    assert checksums(torch.nn.ParameterList([parameter])) != before
