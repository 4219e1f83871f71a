"""Random walks through the grammar of calls and answers: what a model without any sense could write."""

import numpy as np
from speaker import speaker_config, speaker_tokenizer

from glm5 import AssistantStream
from glm5.engine.grammar import GrammarCompiler
from glm5.serve.structure import Structure, as_held

MOST = 500
CLOSING = '"}]'
"""Written more often than the rest, for else hardly a walk would end."""


class Walks:
    """Of one tokenizer and one stream of random numbers."""

    def __init__(self):
        self.tokenizer, self.random = speaker_tokenizer(), np.random.default_rng(0)
        self.compiler = GrammarCompiler(self.tokenizer, speaker_config().vocab_size, self.tokenizer.eos_ids)
        tags = map(self.tokenizer.token_to_id, ("</arg_value>", "</tool_call>"))
        self.closing = [*tags, *(token for mark in CLOSING for token in self.tokenizer.encode(mark))]

    def texts(self, outputs, count, likely=()):
        """Whole texts of a structure. likely: more tokens that are written often."""
        found = [self._text(outputs, [*self.closing, *likely]) for _ in range(count)]
        return [text for text in found if text is not None]

    def _text(self, outputs, likely):
        state, ids = self.compiler.compile(outputs), []
        while not state.complete and len(ids) < MOST:
            (allowed,) = np.nonzero(state.allowed())
            weights = np.where(np.isin(allowed, likely), 8.0, 1.0)
            token = int(self.random.choice(allowed, p=weights / weights.sum()))
            if token in self.tokenizer.eos_ids:
                return self.tokenizer.decode(ids, skip_special_tokens=False)
            state.accept(token)
            ids.append(token)
        return self.tokenizer.decode(ids, skip_special_tokens=False) if state.complete else None

    def calls(self, tool, count, likely=()):
        """Arguments, as JSON texts, of forced calls of a tool in OpenAI's envelope."""
        outputs = Structure(tools=[tool], calls="one").outputs(thinking=False, reasoning_tokens=0)
        found = []
        for text in self.texts(outputs, count, likely):
            stream = AssistantStream(as_held([tool], outputs), thinking=False)
            stream.feed(text)
            message = stream.finish()
            assert message["content"] is None and len(message["tool_calls"]) == 1, text
            found.append(message["tool_calls"][0]["function"]["arguments"])
        return found

    def answers(self, schema, count):
        """JSON texts of a format."""
        return self.texts(Structure(answer=schema).outputs(thinking=False, reasoning_tokens=0), count)
