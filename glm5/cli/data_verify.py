"""`glm5 data verify DIR`: rehashes everything that was built under a directory and says what is broken."""

from __future__ import annotations

import json as json_text
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from glm5.data.verify import verify as verify_directory


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Check every file of a build, corpus or dataset against its manifest. The exit status is 1 when one is broken."""

    directory: Annotated[Path, tyro.conf.Positional]
    """What `glm5 data build` wrote, or any directory above it."""
    json: bool = False
    """Print one JSON object."""


def verify(options: VerifyOptions) -> int:
    """Prints a line per directory, and a sentence per problem."""
    found = verify_directory(options.directory)
    broken = sum(bool(finding.problems) for finding in found)
    if options.json:
        lines = [
            {"directory": str(f.directory), "kind": f.kind, "files": f.files, "problems": list(f.problems)}
            for f in found
        ]
        print(json_text.dumps({"broken": broken, "checked": lines}))
        return int(broken > 0)
    for finding in found:
        print(
            f"{'broken' if finding.problems else 'whole'}  {finding.directory}: {finding.kind}, {finding.files} files"
        )
        for problem in finding.problems:
            print(f"        {problem}")
    return int(broken > 0)
