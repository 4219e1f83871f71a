"""The dispatcher: help, misspelt verbs and options, errors as sentences, exit statuses."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from glm5.cli.main import VERBS, main
from glm5.train import RunInterrupted


def test_help_lists_every_verb(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    for verb in VERBS:
        assert f"\n  {verb} " in text


def test_a_misspelt_verb_is_refused_with_the_nearest(capsys):
    assert main(["quikstart"]) == 2
    assert "there is no verb 'quikstart'. Did you mean 'quickstart'?" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    assert f"usage: glm5 {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [(["plan", "--contxt", "10"], "--context"), (["quickstart", "--pretrian-steps", "1"], "--pretrain-steps")],
)
def test_a_misspelt_option_is_refused_with_the_nearest(arguments, nearest, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert nearest in captured.err + captured.out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["plan", "glm-6"], "glm-5"),
        (["eval", "{}"], "neither a run nor a model directory"),
        (["chat", "{}"], "neither a run nor a model directory"),
        (["serve", "{}"], "neither a run nor a model directory"),
        (["report", "{}"], "has no run.json"),
        (["convert", "{}", "{}/out"], "has no weights to load"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_user_errors_are_one_sentence_and_status_1(arguments, sentence, tmp_path, capsys):
    assert main([part.format(tmp_path) for part in arguments]) == 1
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.err.lstrip().startswith(f"glm5 {arguments[0]}: ")
    assert "Traceback" not in captured.err


def test_ctrl_c_ends_with_a_sentence(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(VERBS, "plan", interrupted)
    assert main(["plan"]) == 130
    assert "stopped" in capsys.readouterr().err


def test_a_run_that_was_stopped_ends_with_the_status_of_ctrl_c(monkeypatch, capsys):
    def interrupted(arguments):
        raise RunInterrupted("Stopped after step 2.")

    monkeypatch.setitem(VERBS, "train", interrupted)
    assert main(["train"]) == 130
    assert "glm5 train: Stopped after step 2. Run the same command with --resume" in capsys.readouterr().err


def test_ctrl_c_while_a_module_is_imported_ends_with_the_same_status(tmp_path):
    """Dataclasses and named tuples execute text, whose interruption CPython answers with the signal."""
    (tmp_path / "interrupted.py").write_text(
        "import signal\nimport sys\nfrom glm5.cli import main\n\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it\n"
        "def plan(arguments):\n    exec('import signal; signal.raise_signal(signal.SIGINT)')\n\n"
        "main.VERBS['plan'] = plan\nsys.exit(main.main(['plan']))\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    ended = subprocess.run(
        [sys.executable, "-m", "interrupted"], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert ended.stderr.strip() == "glm5 plan: stopped." and ended.returncode == 130


def test_help_does_not_load_pytorch():
    script = "import sys; from glm5.cli.main import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0
