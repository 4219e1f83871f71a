"""`GrammarProbe`: a process that compiles each new grammar before the engine does, because it may be lost.

llguidance bounds its own work by fuel, but two ways out were found: a few terms compile for minutes (a large
`multipleOf`, which none of `LLParserLimits` shortens), and a chain of thousands of rules overflows the stack, which
ends the process. A compilation runs outside Python and cannot be interrupted. So it is tried here, with a limit on
time and on half of the usual stack; what passes is safe to repeat in the engine. A trial that nobody waits for any
more ends with the process, and the next grammar starts another.

The process runs this very file, which imports nothing of the package: it starts in a third of a second, and reads the
vocabulary of the published models in a second more. That is less than what a useless trial would take from the others.

Where a grammar leaves one text only, llguidance has it tokenized and allows the first of these tokens alone. Tokenizers
find added tokens in any text, and a `<|user|>` in quotes would so force the token of that name, which the text does not
allow. `Vocabulary` therefore hands its own tokenizer over, in whose texts no added token is found.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import llguidance
import tokenizers

PROBE_SECONDS = 5.0
"""For one grammar: a hundred tools take 0.2 s, and a busy machine many times that."""
POLL_SECONDS = 0.1
"""How often it is asked whether somebody still waits."""
START_SECONDS = 60.0
"""For the process and its tokenizer, before the first grammar."""
FIRST_STEPS = 4
STACK_BYTES = 4 * 1024 * 1024
LIMITS = llguidance.LLParserLimits(max_lexer_states=25_000, verbose_errors=False)
"""llguidance's own limits (20 ms to build a lexer, about 20 ms a step) with less memory: some 50 MB at most."""


class NotStartedError(Exception):
    """The process did not get as far as its first grammar."""


class AbandonedError(Exception):
    """Nobody waits for the grammar any more."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as llguidance needs to know it."""

    tokenizer_json: str
    """Its `tokenizer.json`, in which every added token is marked as special."""
    tokens: list[str]
    """The bytes of every token of the model, each byte as the character of its number."""
    special_ids: list[int]
    """Of the added tokens, and of those that the tokenizer does not have: no text matches them."""
    eos_ids: list[int]

    def tokenizer(self) -> llguidance.LLTokenizer:
        """llguidance's own form of it."""
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_PlainText(self)), eos_token=self.eos_ids)


class _PlainText:
    """What llguidance asks of a tokenizer; as a function, it tokenizes text without added tokens."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eos_token_id = vocabulary.eos_ids[0]
        self.special_token_ids = vocabulary.special_ids
        self.tokens = [token.encode("latin-1") for token in vocabulary.tokens]
        self._backend = tokenizers.Tokenizer.from_str(vocabulary.tokenizer_json)
        self._backend.encode_special_tokens = True  # that is, as other text
        self._backend.no_padding()
        self._backend.no_truncation()

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids


class GrammarProbe:
    """Tries grammars with one tokenizer. Used by one thread at a time."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()

    def error(self, grammar: str, wanted: Callable[[], bool]) -> str:
        """Why a grammar (llguidance's own form) cannot be used; empty when it can. Raises `NotStartedError`, and
        `AbandonedError` when it is not `wanted` any more, which is asked all the time."""
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._start(wanted)
        try:
            assert self._process is not None and self._process.stdin is not None
            self._process.stdin.write(json.dumps(grammar) + "\n")
            self._process.stdin.flush()
            answer = self._answer(wanted, PROBE_SECONDS)
        except queue.Empty:
            self.close()
            return f"it did not compile within {PROBE_SECONDS:g} seconds; simplify it"
        except BrokenPipeError:
            answer = ""
        if not answer:  # the process is gone
            self.close()
            return "it is nested too deeply to compile; simplify it"
        message: str = json.loads(answer)
        return message

    def _answer(self, wanted: Callable[[], bool], seconds: float) -> str:
        """What the process says in time. Raises `queue.Empty` or `AbandonedError`."""
        until = time.monotonic() + seconds
        while True:
            try:
                return self._answers.get(timeout=max(0.0, min(POLL_SECONDS, until - time.monotonic())))
            except queue.Empty:
                if not wanted():
                    self.close()
                    raise AbandonedError from None
                if time.monotonic() >= until:
                    raise

    def close(self) -> None:
        """Ends the process; the next grammar starts another."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def _start(self, wanted: Callable[[], bool]) -> None:
        """Raises `NotStartedError` for a process that cannot be made, ends, or is not ready in time, and
        `AbandonedError`."""
        try:
            self._begin()
            ready = self._answer(wanted, START_SECONDS)
        except queue.Empty:
            self.close()
            raise NotStartedError(f"was not ready within {START_SECONDS:g} seconds") from None
        except OSError as error:
            self.close()
            raise NotStartedError(f"could not be started ({error})") from None
        if not ready:
            self.close()
            raise NotStartedError("ended while it started")

    def _begin(self) -> None:
        """Starts the process, and the queue of what it says, which ends with an empty text."""
        self._process = process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).resolve())],  # without this folder's modules
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        assert process.stdin is not None and process.stdout is not None
        answers: queue.Queue[str] = queue.Queue()
        self._answers = answers
        lines = process.stdout

        def read() -> None:
            for line in lines:
                answers.put(line)
            answers.put("")

        threading.Thread(target=read, name="glm5-grammar-probe", daemon=True).start()
        process.stdin.write(json.dumps(asdict(self._vocabulary)) + "\n")
        process.stdin.flush()


def main() -> None:
    """Says that it is ready, then answers each grammar on the standard input with its error, one JSON text a line."""
    tokenizer = Vocabulary(**json.loads(sys.stdin.readline())).tokenizer()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        matcher = llguidance.LLMatcher(tokenizer, json.loads(line), log_level=0, limits=LIMITS)
        error = matcher.get_error() or _error_of_first_steps(matcher)
        print(json.dumps(error), flush=True)


def _error_of_first_steps(matcher: llguidance.LLMatcher) -> str:
    """Some limits are met by the first steps only, and some grammars allow nothing."""
    for step in range(FIRST_STEPS):
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        if matcher.is_error() or (matcher.is_stopped() and step > 0):
            break
        if not mask:
            return "nothing matches it"
        matcher.consume_token((mask & -mask).bit_length() - 1)  # the first that is allowed
    return matcher.get_error()


if __name__ == "__main__":
    threading.stack_size(STACK_BYTES)
    worker = threading.Thread(target=main)
    worker.start()
    worker.join()
