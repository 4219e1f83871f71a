"""The page of a run's rollouts, from its journal."""

from __future__ import annotations

from pathlib import Path

from glm5.rl.event_log import events_of
from glm5.rl.journal import read_journal
from glm5.rl.seen import TrainerLogprobs, read_seen
from glm5.rl.session import JOURNAL
from glm5.rl.view.history import History
from glm5.rl.view.viewer import MOST_TOKENS, write_viewer
from glm5.text import Tokenizer
from glm5.train import RunDirectory
from glm5.train.run_directory import model_of

ROLLOUTS = "rollouts.html"


def view_run(run_directory: Path, *, trainer: TrainerLogprobs | None = None, most_tokens: int = MOST_TOKENS) -> Path:
    """Writes the page of a run, finished or not, into its directory, and gives its path.

    trainer: `trainer_logprobs` of some weights, to colour tokens by the ratio; by default those of the weights that
    learnt from them, where the run has kept these.
    """
    run = RunDirectory.open(run_directory)
    events = (event for record in read_journal(run.path / JOURNAL) for event in events_of(record))
    tokenizer = Tokenizer.from_pretrained(model_of(Path(run.description["config"]["parent"])))
    path, history = run.path / ROLLOUTS, History(most_tokens).follow(events)
    if run.finished:
        history.ended()
    if trainer is None:
        trainer = read_seen(run.path, [(one.step, one.rollout) for one in history if one.step is not None])
    write_viewer(
        path, list(history), tokenizer, title=run.path.name, trainer=trainer, most_tokens=most_tokens,
        finished=history.finished,
    )  # fmt: skip
    return path
