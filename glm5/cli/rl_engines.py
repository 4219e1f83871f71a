"""Where the engines of `glm5 rl` are: here, in processes, on a Ray cluster, or servers that somebody else runs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import tyro

from glm5.errors import InputError
from glm5.rl.config import RLRunConfig
from glm5.rl.executors import MakeFleet, engine_actors, engine_processes, engine_servers, one_engine
from glm5.rl.weights.mirror import check_unused

SERVER_KEY = "GLM5_BACKEND_API_KEY"


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Who samples."""

    executor: Literal["local", "processes", "ray", "servers"] = "local"
    """local: one engine in this process. processes: engines in processes of their own, replaced when they die. ray: the
    same as actors on a cluster. servers: those of --server."""
    engines: int = 1
    """How many, with --executor processes or ray."""
    ray: str | None = None
    """Address of the Ray cluster (auto: the one that this machine belongs to); one is started here when left out."""
    server: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """URL of a server with the parent's model, for --executor servers; several times for several. Their key, if they
    have one: GLM5_BACKEND_API_KEY."""
    server_api: Literal["glm5", "sglang"] = "glm5"
    """glm5: started as `glm5 serve PARENT --weights-from DIR`. sglang: told to read each new model from DIR."""
    publish_to: Path | None = None
    """A directory that gets every new version of the weights: for other servers to follow (`glm5 serve MODEL
    --weights-from DIR`) and, with --executor servers, the DIR of those that sample."""

    def check(self, *, resume: bool) -> None:
        """Raises `InputError` for options that do not go together, `WeightsError` for a directory of another run."""
        if self.executor not in ("processes", "ray") and self.engines != 1:
            raise InputError(f"--engines {self.engines} needs --executor processes.")
        if self.ray is not None and self.executor != "ray":
            raise InputError(f"--ray {self.ray} needs --executor ray.")
        if bool(self.server) != (self.executor == "servers"):
            raise InputError("Servers that sample are named by --executor servers and --server URL together.")
        for url in self.server:
            if urlsplit(url).username is not None or urlsplit(url).password is not None:
                raise InputError(
                    "A --server has a user or password in its address, which the run's record would show; leave it out "
                    f"and give the servers' key by the environment variable {SERVER_KEY}."
                )
        if self.executor == "servers" and self.publish_to is None:
            raise InputError("Say with --publish-to DIR where the servers find new weights.")
        if self.publish_to is not None and not resume:
            check_unused(self.publish_to)

    @property
    def mirror(self) -> Path | None:
        """Where the run writes its versions; servers that sample get them from their fleet."""
        return None if self.executor == "servers" else self.publish_to

    def fleet(self, config: RLRunConfig, run_directory: Path, **engine: Any) -> MakeFleet:
        """The engines of that run. engine: settings of `Engine`, where they are ours."""
        if self.executor == "local":
            return one_engine(config, **engine)
        if self.executor == "processes":
            return engine_processes(config, self.engines, **engine)
        if self.executor == "servers":
            assert self.publish_to is not None
            key = os.environ.get(SERVER_KEY)
            return engine_servers(
                config, self.server, self.publish_to, run_directory, api=self.server_api, api_key=key
            )  # fmt: skip
        make = engine_actors(config, self.engines, **engine)  # refuses when ray is missing
        import ray

        ray.init(self.ray, log_to_driver=False)
        return make
