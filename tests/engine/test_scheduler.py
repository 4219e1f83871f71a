"""The scheduler, stepped by hand over a toy model: same answers however the work is cut, fair, and nothing lost."""

from dataclasses import replace

import pytest
import torch
from plain import GREEDY, ToyModel, alone, run, submit, tokens_and_logprobs, toy_core

from glm5.engine import SamplingParams
from glm5.engine.scheduler import PRIORITY_SECONDS
from glm5.errors import CheckpointError

PROMPTS = [list(range(5, 5 + n)) for n in (3, 17, 1, 30, 9, 17)]
SAMPLED = SamplingParams(n=3, seed=7, max_tokens=9, temperature=1.2, ignore_eos=True)


@pytest.mark.parametrize(
    "cut",
    [{}, {"budget": 3}, {"seqs": 1}, {"block_size": 1, "num_blocks": 60}, {"num_blocks": 11}, {"seqs": 2, "budget": 1},
     {"num_blocks": 11, "prefix_caching": False, "budget": 5}],
)  # fmt: skip
def test_answers_do_not_depend_on_batch_chunks_blocks_and_preemption(cut):
    core = toy_core(**cut)
    requests = [submit(core, p, params) for p in PROMPTS for params in (GREEDY, SAMPLED)]
    run(core)
    expected = [alone(p, params) for p in PROMPTS for params in (GREEDY, SAMPLED)]
    assert [tokens_and_logprobs(request) for request in requests] == expected
    assert core.scheduler.blocks.used == 0 and not core.requests
    if cut.get("num_blocks") == 11:
        assert core.scheduler.preemptions > 0


def test_a_step_keeps_to_its_budget_and_decoding_comes_first():
    core = toy_core(budget=10, seqs=4)
    first = submit(core, [1, 2, 3])
    core.step(0)
    submit(core, list(range(40)))
    step = core.scheduler.schedule()
    assert [work.sequence for work in step.works[:1]] == first.sequences
    assert [(w.start, len(w.token_ids), w.keep) for w in step.works] == [(3, 1, 1), (0, 9, 0)]


def test_the_latest_arrival_is_preempted_first_and_keeps_its_place():
    core = toy_core(num_blocks=8, seqs=4)
    requests = [submit(core, [i, i + 1, i + 2], replace(GREEDY, max_tokens=20)) for i in (1, 11, 21)]
    order = []
    while core.step(0):
        core.scheduler.check()
        lost = [i for i, r in enumerate(requests) if r.sequences[0] in core.scheduler.waiting]
        order.append(tuple(lost))
    assert (2,) in order and (0,) not in order and (1,) not in order, order
    ended = [r.sequences[0].deltas for r in requests]
    assert [len(deltas) for deltas in ended] == [20] * 3


def test_nobody_overtakes_and_priority_is_worth_seconds_of_waiting():
    core = toy_core(seqs=1)
    submit(core, [1], now=0.0)
    core.step(0)
    late, urgent, patient = (
        submit(core, [2], now=1.0),
        submit(core, [3], now=2.0, priority=-1),
        submit(core, [4], now=-PRIORITY_SECONDS, priority=2),
    )
    places = [core.scheduler.request_of[s] for s in core.scheduler.waiting]
    assert places == [urgent, late, patient]
    big = submit(core, list(range(100, 300)), now=3.0)
    small = submit(core, [5], now=4.0)
    for request in (urgent, late, patient):
        request.aborted = True
    core.scheduler.max_num_seqs = 2
    core.scheduler.blocks.extend(held := [], 4 * 20)  # too little is left for the big one
    core.step(0)
    assert [core.scheduler.request_of[s] for s in core.scheduler.waiting] == [big, small]
    core.scheduler.blocks.release(held)
    run(core)
    assert all(s.done for r in (big, small) for s in r.sequences)


def test_a_request_of_low_priority_does_not_starve_under_a_stream_of_urgent_ones():
    core = toy_core(seqs=1)
    params = replace(GREEDY, max_tokens=2)
    patient = submit(core, [9], params, now=0.0, priority=1)
    served_at = None
    for second in range(100):
        submit(core, [second], params, now=float(second))
        core.step(0), core.step(0)
        if patient.sequences[0].done:
            served_at = second
            break
    assert served_at is not None and served_at <= PRIORITY_SECONDS + 1


def test_samples_of_one_prompt_share_its_blocks_until_they_write():
    core = toy_core(block_size=4, seqs=8)
    request = submit(core, list(range(10)), replace(SAMPLED, n=4))
    core.step(0)
    assert core.scheduler.blocks.used == 3 and core.scheduler.computed_tokens == 10
    core.step(0)
    assert core.scheduler.blocks.used == 2 + 4
    core.scheduler.check()
    run(core)
    assert tokens_and_logprobs(request) == alone(list(range(10)), replace(SAMPLED, n=4))


def test_a_slow_reader_is_paused_and_gives_way():
    core = toy_core(num_blocks=8, seqs=1)
    slow = submit(core, [1, 2, 3], replace(GREEDY, max_tokens=25), buffered=4)
    run(core)
    assert slow.mailbox.full and len(slow.sequences[0].deltas) == 4
    other = submit(core, list(range(20)))
    run(core)  # takes the seat and the blocks
    assert other.sequences[0].done and core.scheduler.blocks.used == 0
    read = []
    for _ in range(25 + 10):
        if slow.mailbox.finished and len(read) == 25:
            break
        delta = slow.mailbox.take()
        if delta is None:
            run(core)
        else:
            read.append(delta)
    tokens = tuple(delta.token_id for delta in read)
    assert tokens == alone([1, 2, 3], replace(GREEDY, max_tokens=25))[0][0]


def test_deadlines_and_aborts_end_a_request_wherever_it_is():
    core = toy_core(seqs=2, budget=4)
    running, waiting = submit(core, [1], deadline=5.0), submit(core, [2] * 30)
    forks, kept = submit(core, [3] * 9, replace(SAMPLED, n=2)), submit(core, [4])
    for _ in range(3):
        core.step(4.9)
    assert len(running.sequences[0].deltas) == 3
    waiting.aborted = forks.aborted = True
    core.step(5.0)
    core.scheduler.check()
    ended = [r.mailbox.finished for r in (running, waiting, forks, kept)]
    assert ended == [True, True, True, False]
    assert running.sequences[0].output().finish_reason == "abort"
    run(core, now=5.0)
    assert tokens_and_logprobs(kept) == alone([4]) and core.scheduler.blocks.used == 0


class Broken(ToyModel):
    """Gives NaN for one token and fails on another."""

    def forward(self, ids_1T, *, attention):
        if 77 in ids_1T:
            raise RuntimeError("no memory")
        out = super().forward(ids_1T, attention=attention)
        out.logits[ids_1T.eq(66).cumsum(1) > 0] = torch.nan
        return out


def test_a_failure_costs_the_requests_of_its_step_and_nothing_else():
    core = toy_core(model=Broken())
    good, bad = submit(core, [1, 2]), submit(core, [66, 1], replace(SAMPLED, n=2))
    core.step(0)
    assert bad.mailbox.finished and not good.mailbox.finished
    with pytest.raises(CheckpointError, match="NaN or infinite logits"):
        bad.mailbox.take()
    assert not bad.step_failed
    core.scheduler.check()
    submit(core, [77])
    core.step(0)
    with pytest.raises(RuntimeError, match="no memory"):
        good.mailbox.raise_error()
    assert good.step_failed
    core.scheduler.check()
    assert core.scheduler.blocks.used == 0
    again = submit(core, [1, 2])
    run(core)
    assert tokens_and_logprobs(again) == alone([1, 2])


@pytest.mark.parametrize("budget", [3, 64])
def test_drafts_change_no_token_and_rejected_ones_leave_nothing_behind(budget):
    expected = alone([5, 6, 7], replace(GREEDY, max_tokens=30))[0]
    core = toy_core(budget=budget)
    requests = [submit(core, [5, 6, 7], replace(GREEDY, max_tokens=30)) for _ in range(2)]
    right = [True, True, False, True]
    while core.step(0):
        core.scheduler.check()
        for request in requests:
            for sequence in request.sequences:
                done = len(sequence.deltas)
                if done and not sequence.done:
                    guesses = expected[0][done : done + 4]
                    sequence.drafts = [g if ok else (g + 1) % 320 for g, ok in zip(guesses, right, strict=False)]
    assert [tokens_and_logprobs(r)[0] for r in requests] == [expected] * 2
    if budget == 64:
        assert core.accepted_tokens > core.drafted_tokens // 3 and core.steps < 20
    again = submit(core, [5, 6, 7, *expected[0][:20]], replace(GREEDY, max_tokens=10))
    run(core)
    assert again.cached_tokens == 20 and tokens_and_logprobs(again)[0][0] == expected[0][20:]


def test_drafts_beyond_the_end_take_no_blocks_that_admission_has_not_counted():
    params = replace(GREEDY, max_tokens=13)
    core = toy_core(num_blocks=4, block_size=4)  # 4 prompt tokens and 12 sampled ones: the cache is full
    request = submit(core, [5, 6, 7, 8], params)
    while core.step(0):
        core.scheduler.check()
        request.sequences[0].drafts = [1, 2, 3, 4, 5, 6]
    assert request.sequences[0].done and tokens_and_logprobs(request) == alone([5, 6, 7, 8], params)
    assert core.drafted_tokens > 0


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("asked", [{}, {"n": 3}, {"prompt_logprobs": 1}])
@pytest.mark.parametrize("new", [1, 2, 6])
def test_requests_that_fill_the_cache_to_its_last_row_end_wherever_they_are_interrupted(new, asked, prefix_caching):
    params = replace(SAMPLED, **{"n": 1, "max_tokens": new, **asked})
    prompt = list(range(5, 5 + 16 - (new - 1)))  # with all sampled tokens but the last: 16 rows, the whole cache
    for weights_after in range(new + 6):
        core = toy_core(num_blocks=4, block_size=4, budget=7, prefix_caching=prefix_caching)
        requests = [submit(core, prompt, params), submit(core, [1, 2], GREEDY)]
        for _ in range(weights_after):
            core.step(0)
        core.scheduler.new_weights(1, recompute=True)
        run(core)
        assert [tokens_and_logprobs(r) for r in requests] == [alone(prompt, params), alone([1, 2])]
        assert core.scheduler.blocks.used == 0 and not core.requests
