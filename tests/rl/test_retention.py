"""What is measured during a run, when, and how forgetting is read off its metrics."""

import pytest
import torch
from speaker import speaker_model, speaker_tokenizer

from glm5.data import Source, build_corpus, tokenize_corpus
from glm5.data.world import build_world
from glm5.errors import ConfigError
from glm5.evals.skills import SkillsConfig
from glm5.rl.retention import Retention, bits_per_byte, forgetting, skills
from glm5.train.evaluate import evaluate_bits_per_byte


@pytest.fixture(scope="module")
def heldout(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    texts = [(str(i), f"The answer to {i} is {i * 7 % 13}, said the fox.") for i in range(40)]
    corpus = build_corpus(
        root / "corpus", [Source("toy", "python", "CC0-1.0", lambda: iter(texts))], heldout_per_thousand=200
    )
    return tokenize_corpus(corpus, "heldout", speaker_tokenizer(), root / "heldout")


def test_values_join_the_metrics_and_the_model_stays_as_it_was(heldout):
    asked = SkillsConfig(facts=2, sums=2, tools=2, unknown=2, max_tokens=2)
    retention = Retention((bits_per_byte(heldout, "toy"), skills(speaker_tokenizer(), build_world(), asked)), every=5)
    assert [version for version in range(12) if retention.due(version)] == [0, 5, 10]
    model = speaker_model(positions=2048).train()
    values = retention.measure(model)
    expected = evaluate_bits_per_byte(speaker_model(positions=2048), heldout, attention="sparse").bits_per_byte
    assert values["retention/toy/bits_per_byte"] == pytest.approx(expected)
    assert values["retention/sums, unseen numbers"] == 0 and "retention/stops by itself" in values
    assert model.training and torch.is_grad_enabled()


def test_forgetting_is_how_much_worse_the_end_is():
    lines = [
        {"retention/toy/bits_per_byte": 1.5, "retention/sums": 0.75, "reward": 0.1},
        {"reward": 0.2},
        {"retention/toy/bits_per_byte": 1.75, "retention/sums": 0.875},
    ]
    assert forgetting(lines) == {"toy/bits_per_byte": 0.25, "sums": -0.125}
    assert forgetting([{"reward": 1.0}]) == {}


def test_nothing_to_measure_is_refused():
    with pytest.raises(ConfigError, match="something to measure"):
        Retention(())
