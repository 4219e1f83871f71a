"""An engine without its thread: nothing runs until it is stepped, and everybody gets one token at a time."""

import pytest
from speaker import speaker_model, speaker_tokenizer

from glm5.engine import Engine, SamplingParams


def test_each_round_of_steps_gives_every_sequence_exactly_one_token():
    # Prompts are cut into chunks, and two of three sequences find a seat, so a round takes several steps.
    engine = Engine(
        speaker_model(), speaker_tokenizer(), strict=True, num_blocks=16, block_size=4, max_num_seqs=2,
        max_num_batched_tokens=5, threaded=False,
    )  # fmt: skip
    params = [SamplingParams(max_tokens=n, seed=n, ignore_eos=True) for n in (6, 4, 5)]
    prompts = [list(range(40, 40 + length)) for length in (3, 12, 7)]
    threaded = Engine(speaker_model(), speaker_tokenizer(), strict=True, num_blocks=32)
    expected = [output.token_ids for output in threaded.generate(prompts, params)]
    threaded.close()

    streams = [engine.stream(prompt, p, session_id=str(p.seed)) for prompt, p in zip(prompts, params, strict=True)]
    assert [stream.poll() for stream in streams] == [None] * 3
    said: list[list[int]] = [[], [], []]
    for count in range(1, 7):
        while engine.step():
            pass
        for stream, ids in zip(streams, said, strict=True):
            try:
                ids.append(stream.poll().token_id)
            except EOFError:
                continue
        assert [len(ids) for ids in said] == [min(count, p.max_tokens) for p in params]
    assert [tuple(ids) for ids in said] == expected
    assert engine._thread is None
    assert [output.token_ids for output in engine.generate(prompts, params)] == expected
    left = engine.stream([50, 51], SamplingParams())
    engine.close()
    with pytest.raises(EOFError):
        left.poll()
    with pytest.raises(RuntimeError, match="threaded=False"):
        Engine(speaker_model(), num_blocks=4).step()
