"""The prefix cache in use: conversations, salts, weights that change, and what is counted."""

from dataclasses import replace

from plain import GREEDY, ToyModel, alone, run, submit, tokens_and_logprobs, toy_core

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
