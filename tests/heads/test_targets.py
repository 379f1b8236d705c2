import torch

from bebop.heads.targets import chain_targets


def test_anchors_run_from_the_last_prompt_position_and_chains_are_cut_short_at_the_end():
    """One row: a document of 3 prompt and 4 response tokens, one of 1 and 3, and padding."""
    tokens = torch.arange(100, 113).unsqueeze(0)
    documents = torch.tensor([[0] * 7 + [1] * 4 + [-1] * 2])
    supervised = torch.tensor([[False] * 3 + [True] * 4 + [False] + [True] * 3 + [False] * 2])
    target_rows, next_tokens, valid = chain_targets(tokens, documents, supervised, steps=3)
    # The last prompt positions are 2 and 7. Their first draft is judged at t+1 and predicts x_{t+2}.
    lengths = valid.sum(0).tolist()
    assert lengths == [0, 0, 3, 2, 1, 0, 0, 2, 1, 0, 0, 0, 0]
    assert target_rows[:, 2].tolist() == [3, 4, 5]
    assert next_tokens[:, 2].tolist() == [104, 105, 106]
    assert target_rows[:2, 7].tolist() == [8, 9]
    assert next_tokens[:2, 7].tolist() == [109, 110]


def test_rows_count_through_the_batch():
    documents = torch.zeros(2, 5, dtype=torch.long)
    tokens = torch.arange(10).reshape(2, 5)
    target_rows, next_tokens, valid = chain_targets(tokens, documents, torch.ones(2, 5, dtype=torch.bool), steps=2)
    assert target_rows[:, 5].tolist() == [6, 7]
    assert next_tokens[:, 5].tolist() == [7, 8]
    assert valid.sum(0).tolist() == [2, 2, 1, 0, 0] * 2


def test_a_user_turn_in_between_ends_chains():
    """Multi-turn text: a chain does not go on over unsupervised tokens, and no chain starts among them but the last."""
    supervised = torch.tensor([[True, True, True, False, False, True, True, True]])
    documents, tokens = torch.zeros(1, 8, dtype=torch.long), torch.arange(8).unsqueeze(0)
    valid = chain_targets(tokens, documents, supervised, steps=3).valid
    assert valid.sum(0).tolist() == [1, 0, 0, 0, 2, 1, 0, 0]
