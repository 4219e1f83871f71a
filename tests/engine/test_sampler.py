"""The sampler against exact distributions, and the random numbers against their contract."""

import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glm5.engine import SamplingParams
from glm5.engine.sampler import filtered_probabilities, sample_token, token_logprobs, uniform, uniforms
from glm5.errors import InputError


def chi_square_limit(freedom: int, alpha: float = 1e-4) -> float:
    """Upper quantile of chi-square (Wilson and Hilferty's cube-root approximation)."""
    z = NormalDist().inv_cdf(1 - alpha)
    return freedom * (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2},
     {"temperature": 1.5, "min_p": 0.05, "top_k": 8, "top_p": 0.9}],
)  # fmt: skip
def test_sampled_counts_follow_the_filtered_softmax(settings):
    logits_V = torch.randn(16, generator=torch.Generator().manual_seed(1)) * 1.5
    params = SamplingParams(**settings)
    draws = 6000
    counts = torch.zeros(16)
    for random in uniforms(7, 0, 0, draws):
        counts[sample_token(logits_V, params, random)] += 1
    expected_V = reference_distribution(logits_V, params)
    assert counts[expected_V == 0].sum() == 0
    kept = expected_V > 0
    chi_square = float(((counts - draws * expected_V)[kept] ** 2 / (draws * expected_V[kept])).sum())
    assert chi_square < chi_square_limit(max(int(kept.sum()) - 1, 1))


def reference_distribution(logits_V: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The definition, token by token in plain Python."""
    weights = {i: math.exp(x / params.temperature) for i, x in enumerate(logits_V.tolist())}
    likeliest = max(weights.values())
    weights = {i: w for i, w in weights.items() if w >= params.min_p * likeliest}
    ranked = sorted(weights, key=lambda i: (-weights[i], i))
    if params.top_k > 0:
        ranked = ranked[: params.top_k]
    total, kept, mass = sum(weights[i] for i in ranked), [], 0.0
    for i in ranked:
        if mass >= params.top_p * total:
            break
        kept.append(i)
        mass += weights[i]
    result = torch.zeros(len(logits_V))
    for i in kept:
        result[i] = weights[i] / mass
    return result


@settings(max_examples=50, deadline=None)
@given(st.floats(0.1, 5), st.integers(0, 12), st.floats(0.01, 1), st.floats(0, 1), st.integers(0, 1000))
def test_filters_equal_the_definition(temperature, top_k, top_p, min_p, seed):
    logits_V = torch.randn(10, generator=torch.Generator().manual_seed(seed)).double()
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    torch.testing.assert_close(
        filtered_probabilities(logits_V, params).float(), reference_distribution(logits_V, params), atol=1e-6, rtol=1e-5
    )


def test_ties_keep_the_lowest_ids():
    flat_V = torch.zeros(6)
    assert sample_token(flat_V, SamplingParams(temperature=0.0), 0.9) == 0
    probabilities_V = filtered_probabilities(flat_V, SamplingParams(top_k=2))
    assert probabilities_V.tolist() == [0.5, 0.5, 0, 0, 0, 0]


def test_extreme_values_stay_in_range():
    logits_V = torch.tensor([0.0, 1e30, -1e30, float("-inf")])
    for random in (0.0, 0.5, 1 - 2**-53):
        assert sample_token(logits_V, SamplingParams(temperature=1e-6), random) == 1
    assert sample_token(torch.tensor([0.0, float("-inf")]), SamplingParams(), 1 - 2**-53) == 0
    assert sample_token(torch.tensor([float("-inf"), 0.0]), SamplingParams(), 0.0) == 1


def test_random_numbers_depend_on_seed_sample_and_position_only():
    numbers = {(s, i, p): uniform(s, i, p) for s in (0, 1, 2**64 - 1) for i in (0, 1) for p in (0, 1, 200_000)}
    assert len(set(numbers.values())) == len(numbers)
    assert all(0 <= x < 1 for x in numbers.values())
    assert numbers == {key: uniform(*key) for key in reversed(numbers)}
    # A pinned value: a change of generator would silently change every recorded run.
    assert uniform(1234, 5, 678) == 0.12610750000750692


def test_logprobs_are_those_of_the_model_itself():
    logits_V = torch.randn(8, generator=torch.Generator().manual_seed(0))
    logprob, top = token_logprobs(logits_V, 3, 2)
    assert logprob == float(logits_V.log_softmax(-1)[3])
    assert [i for i, _ in top] == logits_V.topk(2).indices.tolist()
    assert token_logprobs(logits_V, 3, None)[1] == ()


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [("n", 0, "n is 0"), ("temperature", -1, "at least 0"), ("temperature", float("nan"), "temperature is nan"),
     ("temperature", float("inf"), "temperature is inf"), ("top_p", 0, "above 0"), ("top_p", 1.5, "at most 1"),
     ("top_k", 1.5, "whole number"), ("top_k", -2, "at least -1"), ("min_p", 2, "at most 1"),
     ("max_tokens", 0, "max_tokens is 0"), ("max_tokens", True, "whole number"), ("seed", -1, "seed is -1"),
     ("seed", 2**64, "seed is"), ("logprobs", 21, "from 0 to 20"), ("stop", [""], "at least one character"),
     ("stop", [3], "stop holds 3"), ("stop_token_ids", [-1], "whole number"), ("min_tokens", 17, "from 0 to 16"),
     ("stop", ["x"] * 65, "at most 64"), ("stop", 5, "stop is 5; give a list"),
     ("stop_token_ids", 5, "stop_token_ids is 5; give a list"), ("stop_token_ids", "5", "is '5'; give a list"),
     ("top_p", float("nan"), "top_p is nan"), ("min_p", float("nan"), "min_p is nan"),
     ("temperature", 10**400, "it must be a number"), ("max_tokens", "5", "max_tokens is '5'")],
)  # fmt: skip
def test_bad_settings_are_refused_with_a_sentence(field, value, sentence):
    with pytest.raises(InputError, match=sentence):
        SamplingParams(**{field: value})


def test_tempered_logprobs_need_a_temperature():
    with pytest.raises(InputError, match="tempered_logprobs has no meaning at temperature 0"):
        SamplingParams(temperature=0, tempered_logprobs=True)
    with pytest.raises(InputError, match=r"at temperature 1e-46; give 0\.01 at least"):  # 0 in fp32
        SamplingParams(temperature=1e-46, tempered_logprobs=True)
