"""A panic of the grammar's library ends the request whose grammar it is, and no other."""

import llguidance
import pytest
from speaker import VOCABULARY, speaker_model, speaker_tokenizer
from test_speculation import Always, agreeing_model

from glm5.engine import Engine, SamplingParams, StructuredOutputs
from glm5.engine.grammar_state import GrammarState
from glm5.engine.panics import panics_refused
from glm5.errors import InputError

BESIDE = SamplingParams(max_tokens=30, seed=2, ignore_eos=True)
STRUCTURED = SamplingParams(max_tokens=30, seed=3, structured_outputs=StructuredOutputs(regex="[a-z ]{25}"))


class NoTokenizer:
    """Breaks whenever it is asked."""

    bos_token_id, eos_token_id, special_token_ids, tokens = None, 0, [0], [b"<eos>", b"a"]

    def __call__(self, text):
        if text:
            raise RuntimeError("no text")
        return []


def panic():
    """A real one."""
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(NoTokenizer())).tokenize_str("a")


class Panicking:
    """A matcher that panics at its `count`-th call of one method, and whatever it is asked afterwards."""

    def __init__(self, matcher, method, count):
        self.matcher, self.method, self.left = matcher, method, count

    def __getattr__(self, name):
        inner = getattr(self.matcher, name)

        def called(*values):
            self.left -= name == self.method
            return panic() if self.left <= 0 else inner(*values)

        return called


def test_a_panic_is_no_exception_and_becomes_a_refusal():
    with pytest.raises(BaseException) as raised:
        panic()
    assert not isinstance(raised.value, Exception)
    with pytest.raises(InputError, match="It cannot go on: its library failed"), panics_refused("It cannot go on"):
        panic()
    for other in (KeyboardInterrupt, ValueError):
        with pytest.raises(other), panics_refused("It cannot go on"):
            raise other


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("method", ["compute_bitmask", "consume_token", "is_stopped", "rollback"])
def test_a_panic_while_a_grammar_is_advanced_ends_its_own_request(monkeypatch, method, drafts):
    model = agreeing_model(vocab_size=VOCABULARY)
    engine = Engine(model, speaker_tokenizer(), strict=True, num_blocks=40, num_speculative_tokens=drafts)
    if drafts:
        engine._core.speculator.pace = Always()
    (alone,) = engine.generate([[7, 9, 11]], BESIDE)
    init = GrammarState.__init__
    for count in (1, 2, 3, 6):
        with monkeypatch.context() as broken:
            broken.setattr(
                GrammarState, "__init__",
                lambda state, matcher, size, count=count: init(state, Panicking(matcher, method, count), size),
            )  # fmt: skip
            beside = engine.stream([7, 9, 11], BESIDE)
            structured = engine.stream([5, 6], STRUCTURED)
            assert tuple(delta.token_id for delta in beside) == alone.token_ids
            if method == "rollback" and not drafts:  # nothing is ever undone
                assert len(list(structured)) > 3
            else:
                with pytest.raises(InputError, match="structured output cannot go on: its library failed"):
                    list(structured)
    assert engine.generate([[7, 9, 11]], BESIDE)[0].token_ids == alone.token_ids
    stats = engine.stats()
    assert engine.failure is None and stats.running == stats.waiting == stats.blocks_used == 0
    engine.close()


def test_a_panic_while_a_grammar_is_made_is_a_refusal(monkeypatch):
    engine = Engine(speaker_model(), speaker_tokenizer())
    monkeypatch.setattr("glm5.engine.grammar.llguidance.LLMatcher.deep_copy", lambda matcher: panic(), raising=False)
    with pytest.raises(InputError, match="structured_outputs cannot be used: its library failed"):
        engine.stream([5], STRUCTURED)
    engine.close()
