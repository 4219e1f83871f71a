"""The process that compiles a grammar first: cut off, given up, or unable to start."""

import subprocess
import sys

import pytest
from speaker import speaker_config, speaker_tokenizer

from glm5.engine import StructuredOutputs
from glm5.engine.grammar import GrammarCompiler
from glm5.engine.grammar_probe import AbandonedError
from glm5.errors import InputError, UnavailableError

ENDLESS = (99_999_989, 99_999_971)
"""Schemas of multiples of these compile for minutes."""


def test_a_compilation_without_end_is_cut_off(monkeypatch):
    monkeypatch.setattr("glm5.engine.grammar_probe.PROBE_SECONDS", 0.3)
    tokenizer = speaker_tokenizer()
    compiler = GrammarCompiler(tokenizer, speaker_config().vocab_size, tokenizer.eos_ids)
    for divisor in ENDLESS:  # each time the process starts anew, and its start is no time for the grammar
        with pytest.raises(InputError, match=r"did not compile within 0\.3 seconds; simplify it"):
            compiler.compile(StructuredOutputs(json={"type": "integer", "multipleOf": divisor}))
    monkeypatch.undo()
    compiler.compile(StructuredOutputs(regex="a"))
    compiler.close()


def test_a_start_that_nobody_waits_for_is_ended(monkeypatch):
    """Its process never says that it is ready."""
    started, real = [], subprocess.Popen
    command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    monkeypatch.setattr(subprocess, "Popen", lambda args, **k: started.append(real(command, **k)) or started[-1])
    tokenizer = speaker_tokenizer()
    compiler, asked = GrammarCompiler(tokenizer, speaker_config().vocab_size, tokenizer.eos_ids), iter([True])
    with pytest.raises(AbandonedError):
        compiler.compile(StructuredOutputs(regex="a"), lambda: next(asked, False))
    (process,) = started
    assert process.returncode is not None


def test_a_compilation_that_nobody_waits_for_is_ended():
    tokenizer = speaker_tokenizer()
    compiler = GrammarCompiler(tokenizer, speaker_config().vocab_size, tokenizer.eos_ids)
    compiler.compile(StructuredOutputs(regex="a"))
    process, endless = compiler._probe._process, StructuredOutputs(json={"type": "integer", "multipleOf": ENDLESS[0]})
    with pytest.raises(AbandonedError):
        compiler.compile(endless, lambda: False)
    assert process.poll() is None  # not even begun
    asked = iter([True])
    with pytest.raises(AbandonedError):
        compiler.compile(endless, lambda: next(asked, False))
    assert process.returncode is not None and not compiler.has(endless)  # it is no refusal
    assert compiler.compile(StructuredOutputs(regex="b")).allowed().sum() == 1
    compiler.close()


@pytest.mark.parametrize(
    ("command", "seconds", "sentence"),
    [(["-c", "import time; time.sleep(60)"], 0.2, "was not ready within 0.2 seconds"),
     (["-c", ""], 60.0, r"ended while it started|could not be started"), (None, 60.0, "could not be started")],
)  # fmt: skip
def test_a_process_that_does_not_start_is_no_fault_of_the_grammar(monkeypatch, command, seconds, sentence):
    tokenizer, popen = speaker_tokenizer(), subprocess.Popen
    compiler = GrammarCompiler(tokenizer, speaker_config().vocab_size, tokenizer.eos_ids)

    def other(given, **options):
        return popen(["/nonexistent"] if command is None else [given[0], *command], **options)

    with monkeypatch.context() as patched:
        patched.setattr("glm5.engine.grammar_probe.START_SECONDS", seconds)
        patched.setattr("glm5.engine.grammar_probe.subprocess.Popen", other)
        with pytest.raises(UnavailableError, match=sentence):
            compiler.compile(StructuredOutputs(regex="a"))
    assert compiler.compile(StructuredOutputs(regex="a")).allowed().sum() == 1  # nothing of it is remembered
    compiler.close()
