"""An engine over several processes (gloo) against the engine of one: tokens, log-probabilities, memory, failures."""

import numpy as np
import pytest
import torch
from cut_engine import SMALL, briefly_played, lose, play, played, small_model
from spawned import run
from tiny import tiny_config

import glm5
from glm5.engine import Engine
from glm5.errors import InputError
from glm5.parallel import InferencePlan as P


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    glm5.save_model(small_model(), path)
    return str(path)


@pytest.fixture(scope="module")
def alone(directory):
    engine = Engine(directory, **SMALL)
    result = played(engine)
    engine.close()
    assert result["found"] >= 52 and result["stats"]["preemptions"] > 0
    return result


def assert_same(got, wanted):
    """Equal tokens, and log-probabilities up to the order of sums."""
    for part, outputs in wanted["heard"].items():
        for mine, theirs in zip(got["heard"][part], outputs, strict=True):
            for a, b in zip(mine.outputs, theirs.outputs, strict=True):
                assert (a.token_ids, a.versions, a.finish_reason) == (b.token_ids, b.versions, b.finish_reason), part
                torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=2e-5, rtol=0)
                assert (a.experts is None) == (b.experts is None) == (part != "sampled"), part
                if a.experts is not None:
                    np.testing.assert_array_equal(np.sort(a.experts.array), np.sort(b.experts.array))
            if theirs.prompt_logprobs:
                assert len(mine.prompt_logprobs) == len(theirs.prompt_logprobs)
    for name in ("steps", "preemptions", "cached_tokens", "computed_tokens", "sampled_tokens", "version"):
        assert got["stats"][name] == wanted["stats"][name], name


FOUR = pytest.mark.soak


@pytest.mark.parametrize(
    "plan",
    [
        P(tensor=2),
        P(expert=2),
        P(tensor=2, expert=2),
        pytest.param(P(tensor=4, expert=2), marks=FOUR),
        pytest.param(P(tensor=2, expert=4), marks=FOUR),
    ],
    ids=lambda plan: f"tensor{plan.tensor}-expert{plan.expert}",
)
def test_several_processes_give_the_tokens_of_one(plan, directory, alone):
    got, *others = run(plan.processes, play, directory, plan, SMALL)
    assert_same(got, alone)
    assert others == [None] * (plan.processes - 1)
    assert got["bytes"] == expected_bytes(plan)


def expected_bytes(plan):
    """Of the weights that a process holds: every matrix of the feed-forwards and the vocabulary, some of attention."""
    total = 0
    for name, parameter in small_model().named_parameters():
        share = 1
        if ("mlp." in name and "mlp.gate.weight" not in name) or "embed_tokens" in name or "lm_head" in name:
            share = plan.processes
        elif name.endswith(("q_b_proj.weight", "kv_b_proj.weight", "o_proj.weight")):
            share = plan.tensor
        total += parameter.numel() * 4 // share
    return total


@pytest.mark.parametrize("how", ["killed", "stopped", "fails"])
def test_a_lost_process_ends_the_requests_with_a_sentence(how, directory):
    plan = P(tensor=2, timeout_seconds=300 if how != "stopped" else 10)
    killed = () if how == "fails" else (1,)
    (told, seconds), follower = run(2, lose, directory, plan, how, killed=killed)
    assert len(told) == 3 and all("cut over 2 processes" in sentence for sentence in told)
    assert all("start them again" in sentence for sentence in told)
    assert seconds < 200  # no timeout was waited for where the connection broke
    if how == "fails":
        assert "A step failed in process 1" in follower and "no memory left" in follower


def test_drafts_over_processes_change_no_token(directory, alone):
    settings = {**SMALL, "num_speculative_tokens": 2}
    got, _ = run(2, play, directory, P(tensor=2, expert=2), settings, briefly_played)
    assert got["stats"]["drafted_tokens"] > 0
    for mine, theirs in zip(got["heard"]["first"], alone["heard"]["first"], strict=True):
        assert mine.token_ids == theirs.token_ids


def test_bfloat16_over_processes_stays_near_one_process(directory):
    settings = {**SMALL, "dtype": torch.bfloat16, "storage": "fp8"}
    one = briefly_played(Engine(directory, **settings))
    got, _ = run(2, play, directory, P(tensor=2, expert=2), settings, briefly_played)
    for mine, theirs in zip(got["heard"]["first"], one["heard"]["first"], strict=True):
        assert abs(mine.logprobs[0] - theirs.logprobs[0]) < 0.3


@pytest.mark.parametrize(
    ("plan", "changes", "sentence"),
    [
        (P(tensor=3), {}, "4 attention heads do not divide over tensor = 3"),
        (P(expert=3), {}, "8 routed experts do not divide over expert = 3"),
        (P(tensor=2, expert=3), {}, "the smaller must divide the larger; try tensor=3, expert=3"),
        (P(tensor=2), {"vocab_size": 97}, "97 tokens of the vocabulary do not divide over processes = 2"),
        (P(tensor=4), {"intermediate_size": 50}, "50 columns of the dense feed-forward"),
        (P(tensor=0), {}, "tensor is 0"),
        (P(timeout_seconds=0), {}, "timeout_seconds is 0"),
    ],
)
def test_what_cannot_be_cut_is_refused(plan, changes, sentence):
    config = tiny_config(**{"vocab_size": 96, "num_attention_heads": 4, **changes})
    with pytest.raises(InputError, match=sentence):
        plan.check(config)


def test_what_an_engine_over_processes_does_not_do_is_refused(directory):
    with pytest.raises(InputError, match="Strict mode promises the bits of one process"):
        Engine(directory, parallel=P(tensor=2), strict=True)
    with pytest.raises(InputError, match="reads its own part of a directory"):
        Engine(small_model(), parallel=P(tensor=2))
    with pytest.raises(InputError, match=r"2 process\(es\) \(tensor=2, expert=1\), but 1 run; start 2 with `torchrun"):
        Engine(directory, parallel=P(tensor=2))
    with pytest.raises(InputError, match="but 2 run; ask for tensor=2, expert=2, or start one"):
        P().check_world(2)
