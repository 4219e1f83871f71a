"""The prefix cache in use: conversations, salts, weights that change, and what is counted."""

from dataclasses import replace

from plain import GREEDY, ToyModel, alone, run, submit, tokens_and_logprobs, toy_core
from speaker import speaker_model, speaker_tokenizer

from glm5.engine import Engine, SamplingParams
from glm5.engine.sessions import group_of

SIZE = 16


def test_a_conversation_of_20_turns_computes_its_past_once():
    """Each turn is everything said so far, thoughts included, and a new question."""
    core = toy_core(num_blocks=200, block_size=SIZE, budget=64)
    said, prompt_tokens, again = [1] * 100, 0, 0
    for turn in range(20):
        new = [(turn * 37 + i) % 320 for i in range(8)]
        before = core.scheduler.computed_tokens
        request = submit(core, said + new, replace(GREEDY, max_tokens=11))
        run(core)
        answer = [delta.token_id for delta in request.sequences[0].deltas]
        computed = core.scheduler.computed_tokens - before - (len(answer) - 1)  # the last answered token is not run
        prompt_tokens += len(said) + len(new)
        fresh = len(new) + (len(said) if turn == 0 else 1)
        again += max(computed - fresh - SIZE, 0)
        assert request.cached_tokens == len(said) + len(new) - computed
        said = said + new + answer
    assert again < 0.02 * prompt_tokens, (again, prompt_tokens)
    assert core.scheduler.cached_tokens > 0.9 * prompt_tokens - 20 * (8 + SIZE)


def test_a_cached_prefix_changes_no_answer_and_leaves_the_last_token_to_compute():
    core = toy_core(block_size=4)
    prompt = list(range(16))
    for expected in (0, 12):  # of 16 cached tokens the last block is computed, for its logits
        request = submit(core, prompt)
        run(core)
        assert (request.cached_tokens, tokens_and_logprobs(request)) == (expected, alone(prompt))


def test_sessions_do_not_see_each_others_prefixes():
    core = toy_core(block_size=4)
    cached = []
    for salt in ("a", "b", None, "a", None):
        request = submit(core, list(range(18)), salt=salt)
        run(core)
        cached.append(request.cached_tokens)
    assert cached == [0, 0, 0, 16, 16]


def test_prefixes_of_older_weights_are_not_used():
    core = toy_core(block_size=4)
    prompt = list(range(18))
    request = submit(core, prompt)
    core.step(0), core.step(0)
    assert core.scheduler.running == request.sequences
    core.scheduler.new_weights(1, recompute=False)
    run(core)  # a cache of both versions: never to be found
    again = submit(core, prompt)
    run(core)
    assert again.cached_tokens == 0
    third = submit(core, prompt)
    run(core)
    assert third.cached_tokens == 16


def test_strict_sequences_compute_their_cache_anew_after_new_weights():
    model = ToyModel()
    core = toy_core(block_size=4, model=model)
    request = submit(core, list(range(18)))
    core.step(0), core.step(0), core.step(0)
    before = core.scheduler.computed_tokens
    core.scheduler.new_weights(1, recompute=True)
    core.scheduler.check()
    assert core.scheduler.waiting == request.sequences and core.scheduler.blocks.used == 0
    run(core)
    done = len(request.sequences[0].token_ids) - 1
    assert core.scheduler.computed_tokens - before == done
    assert [d.version for d in request.sequences[0].deltas] == [0] * 2 + [1] * 10
    assert tokens_and_logprobs(request) == alone(list(range(18)))
    again = submit(core, list(range(18)))
    run(core)
    assert again.cached_tokens == 16


def test_a_preempted_sequence_finds_what_is_left_of_its_blocks():
    core = toy_core(num_blocks=14, block_size=4, seqs=4, budget=64)
    prompts = [[1] * 12 + [i] for i in range(4)]
    requests = [submit(core, prompt, replace(GREEDY, max_tokens=16)) for prompt in prompts]
    run(core)
    scheduler = core.scheduler
    assert scheduler.preemptions > 0 and scheduler.cached_tokens > 0
    expected = [alone(prompt, replace(GREEDY, max_tokens=16)) for prompt in prompts]
    assert [tokens_and_logprobs(request) for request in requests] == expected


def test_requests_that_come_together_compute_their_common_prompt_once():
    """In chunks and at once; the others take it block by block when it is there, and somebody else begins meanwhile."""
    prompt = list(range(5, 31))  # six blocks of four and a part
    for budget in (64, 7):
        core = toy_core(block_size=4, seqs=9, budget=budget, num_blocks=120)
        siblings = [submit(core, prompt, replace(GREEDY, max_tokens=3)) for _ in range(8)]
        other = submit(core, [1, 2, 3], replace(GREEDY, max_tokens=3))
        core.step(0)
        running = [core.scheduler.request_of[sequence] for sequence in core.scheduler.running]
        assert running == ([siblings[0], other] if budget == 64 else [siblings[0]])
        run(core)
        sampled = 9 * 2  # the last token of each is never an input
        assert core.scheduler.computed_tokens == 26 + 7 * 2 + 3 + sampled
        assert [r.cached_tokens for r in siblings] == [0] + [24] * 7
        for request in siblings:
            assert tokens_and_logprobs(request) == alone(prompt, replace(GREEDY, max_tokens=3))


def test_nobody_waits_for_a_prompt_that_is_not_going_on():
    """Its reader is slow, its rows are of older weights, or it is gone."""
    prompt = list(range(5, 31))
    core = toy_core(block_size=4, seqs=4, budget=8)
    first, second = (submit(core, prompt, replace(GREEDY, max_tokens=3)) for _ in range(2))
    core.step(0)
    assert [core.scheduler.request_of[s] for s in core.scheduler.running] == [first]
    first.mailbox.full = True
    core.step(0)
    assert second.sequences[0] in core.scheduler.running and second.cached_tokens == 8
    first.mailbox.full = False
    third = submit(core, prompt, replace(GREEDY, max_tokens=3))
    first.aborted = second.aborted = True
    core.step(0)
    core.step(0)
    assert third.sequences[0] in core.scheduler.running
    core.scheduler.new_weights(1, recompute=False)
    fourth = submit(core, prompt, replace(GREEDY, max_tokens=3))
    core.step(0)
    core.step(0)
    assert fourth.sequences[0] in core.scheduler.running and fourth.cached_tokens == 0
    run(core)
    assert all(r.sequences[0].done for r in (third, fourth))


def test_members_of_a_group_share_and_others_do_not():
    engine = Engine(speaker_model(), speaker_tokenizer(), block_size=4, num_blocks=64)
    for session, cached in (
        ("a//0", 0),
        ("a//1", 8),
        ("a", 8),
        ("b//0", 0),
        ("openenv/http://x/3//1", 0),
        ("a//b//0", 0),
    ):
        stream = engine.stream(list(range(40, 51)), SamplingParams(max_tokens=1), session_id=session)
        assert len(list(stream)) == 1 and stream.cached_tokens == cached, session
    engine.close()
    assert group_of("env/http://x/3//1") == "env/http://x/3" and group_of("//1") == "//1"
