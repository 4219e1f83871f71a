"""Strict engine minus trainer is exactly 0.0 with experts routing and the indexer selecting: every way of sampling."""

import copy

import torch
from learning import engine_batch, sampled
from speaker import speaker_model, speaker_tokenizer

from glm5.engine import Engine, SamplingParams
from glm5.engine.strict import packed_strict_logprobs, strict_logprobs
from glm5.rl.learner import Learner, LearnerConfig
from glm5.rl.records import Trajectory
from glm5.rl.strict import strict_differences

PROMPTS = [list(range(5, 30)), list(range(40, 51)), [9] * 40]


def strict_engine(model, version=0):
    return Engine(model, speaker_tokenizer(), strict=True, version=version)


def exact(differences):
    return all(torch.equal(d, torch.zeros_like(d)) for d in differences)


def test_single_turn_in_company():
    engine = strict_engine(speaker_model())
    outputs = engine.generate(PROMPTS, SamplingParams(n=3, max_tokens=12, seed=1, ignore_eos=True))
    trajectories = [sampled(output.prompt_token_ids, c) for output in outputs for c in output.outputs]
    assert max(len(t.token_ids) for t in trajectories) > 4 * speaker_model().config.index_topk
    differences = strict_differences(lambda version: speaker_model(), trajectories)
    assert exact(differences) and sum(map(len, differences)) == 9 * 12


def test_several_turns_and_tokens_that_nobody_sampled_between_them():
    engine = strict_engine(speaker_model())
    ids, flags, logprobs, versions = list(PROMPTS[0]), [False] * 25, [0.0] * 25, [-1] * 25
    for turn in range(3):
        [output] = engine.generate([ids], SamplingParams(max_tokens=7, seed=turn, ignore_eos=True))
        said, tool = output.outputs[0], [60 + turn, 61, 62]
        ids += [*said.token_ids, *tool]
        flags += [True] * 7 + [False] * 3
        logprobs += [*said.logprobs, 0.0, 0.0, 0.0]
        versions += [*said.versions, -1, -1, -1]
    trajectory = Trajectory(tuple(ids), tuple(flags), tuple(logprobs), tuple(versions))
    [difference] = strict_differences(lambda version: speaker_model(), [trajectory])
    assert len(difference) == 21 and exact([difference])


def test_an_answer_interrupted_by_new_weights_is_judged_in_pieces():
    models = {0: speaker_model(0), 1: speaker_model(1)}
    engine = strict_engine(copy.deepcopy(models[0]))
    params = SamplingParams(max_tokens=300, seed=2, ignore_eos=True)
    stream = engine.stream(PROMPTS[0], params)
    first = next(iter(stream))
    engine.update_weights(1, models[1].state_dict())
    deltas = [first, *stream]
    ids = [token for delta in deltas for token in [delta.token_id]]
    trajectory = Trajectory(
        (*PROMPTS[0], *ids), (False,) * 25 + (True,) * len(ids), (0.0,) * 25 + tuple(d.logprob for d in deltas),
        (-1,) * 25 + tuple(d.version for d in deltas),
    )  # fmt: skip
    assert {0, 1} == set(trajectory.versions[25:])
    asked = []
    [difference] = strict_differences(lambda version: asked.append(version) or models[version], [trajectory])
    assert len(difference) == 300 and exact([difference]) and asked == [0, 1]
    [wrong] = strict_differences(lambda version: models[0], [trajectory])
    assert not exact([wrong])  # under one version alone they differ


def test_packed_or_alone_it_is_the_same_to_the_bit():
    model = speaker_model()
    alone = [strict_logprobs(model, ids) for ids in PROMPTS]
    for order in ([0, 1, 2], [2, 0, 1]):
        together = packed_strict_logprobs(model, [PROMPTS[i] for i in order])
        assert all(torch.equal(found, alone[i]) for i, found in zip(order, together, strict=True))
    long = [list(range(2, 300)) * 2, PROMPTS[1]]  # longer than one step
    assert [len(x) for x in packed_strict_logprobs(speaker_model(0, 1024), long)] == [595, 10]


def test_after_training_too():
    learner = Learner(speaker_model(), LearnerConfig())
    learner.step(engine_batch())
    engine = strict_engine(copy.deepcopy(learner.model), version=1)
    outputs = engine.generate(PROMPTS, SamplingParams(max_tokens=9, seed=4))
    trajectories = [sampled(output.prompt_token_ids, output.outputs[0]) for output in outputs]
    assert exact(strict_differences(lambda version: learner.model, trajectories))
