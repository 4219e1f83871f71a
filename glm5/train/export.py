"""The model of a training checkpoint as a Hugging Face directory, at any step that the run still has."""

from __future__ import annotations

from pathlib import Path

from glm5.checkpoint import save_model
from glm5.checkpoint.training_state import read_training_state
from glm5.errors import RunError
from glm5.train.run_directory import RunDirectory, step_of
from glm5.train.stages import config_of, job_of


def export_checkpoint(run_directory: Path, out: Path, *, step: int | None = None) -> int:
    """Writes the weights of the checkpoint of `step` (default: the newest) and the tokenizer to `out`; gives the step.

    The checkpoint may come from any number of processes. Raises RunError when the run has no such checkpoint.
    """
    run = RunDirectory.open(run_directory)
    found = {step_of(path): path for path in run.checkpoints()}
    if not found or (step is not None and step not in found):
        kept = ", ".join(map(str, found)) or "none"
        raise RunError(f"{run.path} has no checkpoint of step {step}; it has these: {kept}.")
    step = max(found) if step is None else step
    job = job_of(config_of(run))
    model = job.make_model()
    tensors = read_training_state(found[step])
    model.load_state_dict({k.removeprefix("model."): x for k, x in tensors.items() if k.startswith("model.")})
    save_model(model.eval(), out, job.tokenizer)
    return step
