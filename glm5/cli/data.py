"""`glm5 data build|inspect|verify|world`: one options class and one function per subverb, each in a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tyro

from glm5.cli.data_build import BuildOptions, build
from glm5.cli.data_inspect import InspectOptions, inspect
from glm5.cli.data_verify import VerifyOptions, verify
from glm5.cli.data_world import WorldOptions, world

Options = BuildOptions | InspectOptions | VerifyOptions | WorldOptions
SUBVERBS: dict[str, Callable[..., Options]] = {
    "build": BuildOptions,
    "inspect": InspectOptions,
    "verify": VerifyOptions,
    "world": WorldOptions,
}


def run(arguments: Sequence[str]) -> int:
    """Parses the subverb's options and runs it."""
    options: Options = tyro.extras.subcommand_cli_from_dict(SUBVERBS, prog="glm5 data", args=arguments)
    match options:
        case BuildOptions():
            return build(options)
        case InspectOptions():
            return inspect(options)
        case VerifyOptions():
            return verify(options)
        case WorldOptions():
            return world(options)
