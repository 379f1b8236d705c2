import itertools

import pytest
import torch

from bebop.data.batches import make_batch, plan_micro_batches
from bebop.data.rollouts import Rollout
from bebop.data.schedule import schedule
from bebop.errors import InputError

LENGTHS = torch.randint(20, 300, (600,), generator=torch.Generator().manual_seed(0)).tolist()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_document_once_within_the_budget_and_with_little_padding(pack, shuffle):
    plan = plan_micro_batches(LENGTHS, 4096, pack, generator() if shuffle else None)
    assert sorted(i for rows in plan for row in rows for i in row) == list(range(600))
    padded = 0
    for rows in plan:
        width = max(sum(LENGTHS[i] for i in row) for row in rows)
        assert len(rows) * width <= 4096
        padded += len(rows) * width
    # Rows of one document waste more: few documents have nearly the same length.
    assert sum(LENGTHS) / padded > (0.95 if pack else 0.9)
    if not pack:
        assert all(len(row) == 1 for rows in plan for row in rows)


@pytest.mark.parametrize("tokens", [1024, 2048, 4096, 8192])
def test_little_padding_where_most_documents_are_nearly_as_long_as_the_longest(tokens):
    """Answers cut at a length: rows as long as the longest document would hold one each."""
    lengths = [length if i % 4 == 0 else 225 + length // 10 for i, length in enumerate(LENGTHS)]
    plan = plan_micro_batches(lengths, tokens, True, generator())
    widths = [max(sum(lengths[i] for i in row) for row in rows) for rows in plan]
    padded = sum(len(rows) * width for rows, width in zip(plan, widths, strict=True))
    assert sum(lengths) / padded > 0.95
    assert sum(lengths) / (len(plan) * tokens) > 0.9
    assert max(widths) <= 4 * max(lengths)


def test_order_is_a_function_of_the_seed():
    assert plan_micro_batches(LENGTHS, 4096, True, generator(1)) == plan_micro_batches(LENGTHS, 4096, True, generator(1))
    assert plan_micro_batches(LENGTHS, 4096, True, generator(1)) != plan_micro_batches(LENGTHS, 4096, True, generator(2))


@pytest.mark.parametrize("pack", [True, False])
def test_a_document_longer_than_the_budget_has_a_batch_of_its_own(pack):
    """And does not make the others' batches any larger."""
    lengths = [10, 500, *[10] * 50]
    plan = plan_micro_batches(lengths, 100, pack, generator())
    assert [[1]] in plan
    assert all(sum(lengths[i] for i in row) <= 100 for rows in plan for row in rows if row != [1])


def test_documents_all_longer_than_the_budget():
    assert sorted(plan_micro_batches([500, 700], 100, True, generator())) == [[[0]], [[1]]]


def test_batch_tensors():
    rollouts = [Rollout([1, 2], [3, 4, 5]), Rollout([6], [7]), Rollout([8], [9, 10, 11, 12, 13])]
    batch = make_batch([[0, 1], [2]], rollouts)
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 0]]
    assert batch.documents.tolist() == [[0, 0, 0, 0, 0, 1, 1], [2, 2, 2, 2, 2, 2, -1]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1], [0, 1, 2, 3, 4, 5, 0]]
    assert batch.supervised.int().tolist() == [[0, 0, 1, 1, 1, 0, 1], [0, 1, 1, 1, 1, 1, 0]]


def test_schedule_shares_steps_out_to_processes_without_overlap():
    options = {"tokens_per_micro_batch": 4096, "pack": True, "seed": 3}
    one = schedule(LENGTHS, accumulate=4, processes=1, process=0, **options)
    two = [schedule(LENGTHS, accumulate=2, processes=2, process=p, **options) for p in range(2)]
    for whole, first, second in itertools.islice(zip(one, *two, strict=True), 12):
        assert whole == first + second


def test_epochs_differ_and_repeat_nothing_within():
    steps = schedule(LENGTHS, tokens_per_micro_batch=4096, pack=True, accumulate=1, processes=1, process=0, seed=0)
    plan = plan_micro_batches(LENGTHS, 4096, True, generator(0))
    first = [next(steps)[0] for _ in plan]
    documents = [i for rows in first for row in rows for i in row]
    assert sorted(documents) == list(range(600))
    assert [next(steps)[0] for _ in range(3)] != first[:3]


def test_a_plan_that_varies_from_epoch_to_epoch_never_runs_dry():
    """The number of micro-batches of an epoch depends on the shuffle; a step's remainder goes into the next epoch."""
    lengths = LENGTHS[:60]
    first = plan_micro_batches(lengths, 1000, False, generator(0))
    steps = schedule(lengths, tokens_per_micro_batch=1000, pack=False, accumulate=len(first), processes=1, process=0, seed=0)
    assert all(len(step) == len(first) for step in itertools.islice(steps, 30))


def test_too_few_documents_for_a_step_are_refused():
    with pytest.raises(InputError, match="fill 1 micro-batches of 4096 tokens, but a step takes 8"):
        next(schedule([10, 10], tokens_per_micro_batch=4096, pack=True, accumulate=4, processes=2, process=0, seed=0))
