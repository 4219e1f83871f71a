"""`glm5 VERB ...`: finds the verb, turns its dataclass into flags, prints errors as one sentence.

A verb's file is imported when the verb is called, so that help and misspelt verbs answer at once.
"""

from __future__ import annotations

import os

# Before anything loads PyTorch: waiting threads that spin make two busy programs on one machine many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

from glm5 import __version__
from glm5.errors import GLM5Error, did_you_mean

Options = TypeVar("Options")


def quickstart(arguments: Sequence[str]) -> int:
    """Real text to a chatting model in minutes: corpus, pre-training, SFT, RL, evaluation, report"""
    from glm5.cli.quickstart import QuickstartOptions, run

    return run(_parse(QuickstartOptions, "quickstart", arguments))


def plan(arguments: Sequence[str]) -> int:
    """What a model takes, whether it fits, how fast it runs, what a token costs"""
    from glm5.cli.plan import PlanOptions, run

    return run(_parse(PlanOptions, "plan", arguments))


def data(arguments: Sequence[str]) -> int:
    """Build corpora and token shards, look into them, check them"""
    from glm5.cli.data import run

    return run(arguments)


def train(arguments: Sequence[str]) -> int:
    """One stage of training: pretrain, midtrain, dsa1, dsa2 or sft; resume, replay and proof of a run"""
    from glm5.cli.train import run

    return run(arguments)


def rl(arguments: Sequence[str]) -> int:
    """Reinforcement learning, asynchronous or not, from environments, agents or recorded use"""
    from glm5.cli.rl import run

    return run(arguments)


def evaluate(arguments: Sequence[str]) -> int:
    """Score a model on an environment"""
    from glm5.cli.eval import EvalOptions, run

    return run(_parse(EvalOptions, "eval", arguments))


def serve(arguments: Sequence[str]) -> int:
    """Serve a model: OpenAI and Anthropic APIs, a chat page"""
    from glm5.cli.serve import ServeOptions, run

    return run(_parse(ServeOptions, "serve", arguments))


def chat(arguments: Sequence[str]) -> int:
    """Chat with a model in the terminal"""
    from glm5.cli.chat import ChatOptions, run

    return run(_parse(ChatOptions, "chat", arguments))


def convert(arguments: Sequence[str]) -> int:
    """Change dtype and sharding of a model directory"""
    from glm5.cli.convert import ConvertOptions, run

    return run(_parse(ConvertOptions, "convert", arguments))


def report(arguments: Sequence[str]) -> int:
    """Write the report page of a run again"""
    from glm5.cli.report import ReportOptions, run

    return run(_parse(ReportOptions, "report", arguments))


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "quickstart": quickstart,
    "plan": plan,
    "data": data,
    "train": train,
    "rl": rl,
    "eval": evaluate,
    "serve": serve,
    "chat": chat,
    "convert": convert,
    "report": report,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; the exit status is 0 for success, 1 for an error the user can mend, 2 for a wrong command line,
    130 for what the user stopped."""
    verb, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if verb in ("-h", "--help", "help"):
        print(_help())
        return 0
    if verb == "--version":
        print(f"glm5 {__version__}")
        return 0
    if verb not in VERBS:
        print(f"glm5: there is no verb {verb!r}.{did_you_mean(verb, VERBS)}\n\n{_help()}", file=sys.stderr)
        return 2
    try:
        return VERBS[verb](rest)
    except GLM5Error as error:
        print(f"glm5 {verb}: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        exec("")  # CPython ends by the signal when the last text that was executed was interrupted, as in an import
        print(f"\nglm5 {verb}: stopped.", file=sys.stderr)
        return 130


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {call.__doc__}" for name, call in VERBS.items())
    return f"usage: glm5 VERB [options]\n\n{verbs}\n\nglm5 VERB --help lists the options of a verb."


def _parse(options: type[Options], verb: str, arguments: Sequence[str]) -> Options:
    return tyro.cli(options, prog=f"glm5 {verb}", args=arguments)


if __name__ == "__main__":
    sys.exit(main())
