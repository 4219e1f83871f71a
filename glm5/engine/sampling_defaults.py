"""What a model's makers advise for sampling: the settings in `generation_config.json`, for requests that name none.

The names are those that vLLM takes from there. Not taken: `do_sample` and `max_new_tokens`; and the ids that end a turn
come from `config.json`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from glm5.engine.sampling_params import SamplingParams
from glm5.errors import CheckpointError, InputError

FILE = "generation_config.json"


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """Fields of `SamplingParams`; None leaves a field to its own default there."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    @classmethod
    def from_directory(cls, directory: Path) -> SamplingDefaults:
        """Those of a model directory; none where it has no such file. Raises `CheckpointError` for a wrong one."""
        path = directory / FILE
        if not path.is_file():
            return cls()
        try:
            stated = json.loads(path.read_bytes())
        except ValueError as error:
            raise CheckpointError(f"{path} is no JSON ({error}); write it again, or remove it.") from None
        if not isinstance(stated, dict):
            raise CheckpointError(f"{path} must hold one JSON object; write it again, or remove it.")
        found = cls(**{field.name: stated.get(field.name) for field in fields(cls)})
        try:
            SamplingParams(**found.under())
        except InputError as error:
            raise CheckpointError(f"{path}: {error}") from None
        return found

    def under(self, **given: Any) -> dict[str, Any]:
        """The defaults with everything over them that is given and not None."""
        together = {**asdict(self), **{name: value for name, value in given.items() if value is not None}}
        return {name: value for name, value in together.items() if value is not None}
