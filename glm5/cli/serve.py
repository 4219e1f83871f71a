"""`glm5 serve`: one model over HTTP."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from fastapi import FastAPI

from glm5.bundled import bundled_model
from glm5.cli.engine_options import EngineOptions
from glm5.engine import Engine, SamplingDefaults, follow
from glm5.engine.admission import MOST_SECONDS
from glm5.engine.sampling_params import MAX_SAMPLES
from glm5.errors import InputError, ParallelError
from glm5.parallel import InferencePlan
from glm5.parallel.mesh import processes, world_rank, world_size
from glm5.serve import Limits, create_app, is_loopback, log_json_lines, serve
from glm5.serve.generation import Source
from glm5.serve.host_check import OWN_NAMES
from glm5.serve.http import DRAIN_SECONDS
from glm5.train.run_directory import model_of

KEY_VARIABLE = "GLM5_API_KEY"
BACKEND_KEY_VARIABLE = "GLM5_BACKEND_API_KEY"


@dataclass(frozen=True, kw_only=True)
class ServeOptions(EngineOptions):
    """Serve a model over HTTP: the OpenAI and Anthropic APIs, a chat page at /, /health and /metrics."""

    model: Annotated[Path | None, tyro.conf.Positional] = None
    """A run directory or a Hugging Face model directory; the small model of this package when left out."""
    host: str = "127.0.0.1"
    """Address to listen on. The default is reachable from this machine only."""
    allow_host: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A name more that clients may use, given again for each; on a loopback address without a key only the machine's
    own are answered."""
    allow_origin: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A site whose pages may use the API from a browser, e.g. https://chat.example, given again for each; * is all.
    When left out, only the server's own page may."""
    port: int = 8000
    """Port to listen on; 0 takes a free one, which is printed."""
    name: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """The model's name in the API, glm5 when left out. May be given again: clients that ask for a second, smaller model
    get this one too."""
    record: Path | None = None
    """Record requests that name a session (header X-Session-ID, or a base URL /s/SESSION/v1) into this directory, with
    the rewards that are posted to /rl/sessions/SESSION/reward; glm5 rl --from-records learns from it."""
    api_key: str | None = None
    """Key that clients must send; better given by the variable GLM5_API_KEY, which other users cannot see."""
    backend: str | None = None
    """Let another server make the tokens, e.g. http://127.0.0.1:8001; MODEL then gives the tokenizer and the limits."""
    backend_api: Literal["generate", "completions", "sglang"] = "generate"
    """generate: vLLM's and glm5's /inference/v1/generate; completions: vLLM's /v1/completions; sglang: /generate."""
    backend_model: str | None = None
    """What the backend calls its model; completions needs it. Its key, if it has one: GLM5_BACKEND_API_KEY."""
    weights_from: Path | None = None
    """Take newer weights from this directory of versions as they appear there (`glm5.rl.weights`)."""
    max_num_seqs: int = 64
    """Sequences that are computed at once."""
    tensor_parallel: int = 1
    """Processes that share the attention heads, started by `torchrun --nproc-per-node N -m glm5 serve ...`."""
    expert_parallel: int = 1
    """Processes that share the routed experts; the same processes, as many as the larger of the two numbers."""
    step_timeout: float = InferencePlan.timeout_seconds
    """Seconds after which a process that does not answer inside a step is given up."""
    generation_config: bool = True
    """Where a request names no temperature, top_p, top_k, min_p or repetition_penalty, that of the model's
    generation_config.json holds; with --no-generation-config the API's own default."""
    max_concurrent: int = Limits.max_concurrent
    """Requests at once."""
    max_waiting: int = Limits.max_waiting
    """Requests that wait for a place; one more is answered with 429."""
    max_body_bytes: int = Limits.max_body_bytes
    """Largest request body; a larger one is answered with 413."""
    max_messages: int = Limits.max_messages
    """Longest conversation, in messages."""
    max_n: int = Limits.max_n
    """Most samples of one prompt, up to 256."""
    max_unsent_bytes: int = Limits.max_unsent_bytes
    """What is kept for one client that reads slowly."""
    deadline: float | None = None
    """Seconds that a request may run, its wait in the engine included; no limit when left out."""
    stall: float = Limits.stall_seconds
    """Seconds after which a client that takes nothing of its answer is cut off."""
    drain: float = DRAIN_SECONDS
    """Seconds that running requests have to end after Ctrl-C or SIGTERM; then they are answered with what is there. A
    second Ctrl-C ends at once."""
    log_requests: bool = True
    """One JSON line per request on the error output, without what was said."""

    def limits(self) -> Limits:
        """What the server accepts. Raises `InputError`."""
        seconds = {"deadline": self.deadline, "stall": self.stall, "drain": self.drain}
        counts = {"max-concurrent": self.max_concurrent, "max-body-bytes": self.max_body_bytes,
                  "max-messages": self.max_messages, "max-n": self.max_n,
                  "max-unsent-bytes": self.max_unsent_bytes}  # fmt: skip
        for name, value in {**seconds, **counts}.items():
            if value is not None and not value > 0:
                raise InputError(f"--{name} is {value}; it must be more than 0.")
        if self.deadline is not None and self.deadline > MOST_SECONDS:
            raise InputError(f"--deadline is {self.deadline:g}; give at most {MOST_SECONDS:g} seconds, or none.")
        if self.max_waiting < 0:
            raise InputError(f"--max-waiting is {self.max_waiting}; it must be at least 0.")
        if self.max_n > MAX_SAMPLES:
            raise InputError(f"--max-n is {self.max_n}; it must be at most {MAX_SAMPLES}.")
        if not all(self.names):
            raise InputError("--name is empty; give a name, or leave it out.")
        return Limits(
            max_concurrent=self.max_concurrent, max_waiting=self.max_waiting, max_body_bytes=self.max_body_bytes,
            deadline_seconds=self.deadline, stall_seconds=self.stall, max_messages=self.max_messages, max_n=self.max_n,
            max_unsent_bytes=self.max_unsent_bytes,
        )  # fmt: skip

    @property
    def names(self) -> tuple[str, ...]:
        """In the API; replies say the first."""
        return self.name or ("glm5",)

    def directory(self) -> Path:
        """Of the model."""
        return bundled_model() if self.model is None else model_of(self.model)

    def plan(self) -> InferencePlan:
        """Over how many processes the engine is cut."""
        return InferencePlan(
            tensor=self.tensor_parallel, expert=self.expert_parallel, timeout_seconds=self.step_timeout
        )


def run(options: ServeOptions) -> int:
    """Serves until Ctrl-C or SIGTERM. Of the processes that torchrun started the first one serves."""
    limits, plan = options.limits(), options.plan()
    directory = options.directory()
    if options.weights_from is not None and options.backend is not None:
        raise InputError("--weights-from is for this server's own engine; give it to the server behind --backend.")
    defaults = SamplingDefaults.from_directory(directory) if options.generation_config else SamplingDefaults()
    with processes(), contextlib.ExitStack() as opened:
        plan.check_world(world_size())
        if options.backend is not None:
            if plan.processes > 1:
                raise InputError("With --backend another server computes; start one process, without torchrun.")
            return _serve(options, limits, _backend(options, directory), defaults)
        if world_rank() > 0:
            for number in (signal.SIGINT, signal.SIGTERM):  # the first process ends when it is told to, and says so
                signal.signal(number, signal.SIG_IGN)
            follow(directory, plan, device=options.device)
            return 0
        engine = options.engine(directory, max_num_seqs=options.max_num_seqs, parallel=plan)
        opened.enter_context(contextlib.closing(engine))
        if options.weights_from is not None:
            from glm5.rl.weights.follow import Follower  # heavy

            opened.enter_context(contextlib.closing(Follower(engine, options.weights_from)))
        return _serve(options, limits, engine, defaults)


def _serve(options: ServeOptions, limits: Limits, source: Source, defaults: SamplingDefaults) -> int:
    """Prints the address once requests can be sent."""
    key = options.api_key if options.api_key is not None else os.environ.get(KEY_VARIABLE) or None
    closed = key is None and is_loopback(options.host)
    hosts = (*OWN_NAMES, options.host, *options.allow_host) if closed else None
    app = _app(options, source, limits, defaults, key, hosts)
    lost: list[str] = []
    if isinstance(source, Engine) and source.leader is not None:

        def give_up(sentence: str) -> None:
            lost.append(sentence)
            app.state.lifecycle.draining = True  # the server ends when its last request has its error

        source.leader.on_lost = give_up
    log_json_lines(requests=options.log_requests)
    if key is None and not is_loopback(options.host):
        print(
            f"Warning: everybody who reaches {options.host} may use this model; set {KEY_VARIABLE} to require a key.",
            file=sys.stderr,
            flush=True,
        )
    # A full collection of what the start has made would hold every request for a tenth of a second and more
    # (`python -m benchmarks.serve_pauses`); none of it is garbage while the server runs.
    gc.collect()
    gc.freeze()
    try:
        serve(
            app,
            options.host,
            options.port,
            ready=lambda url: print(f"Serving {', '.join(options.names)} at {url}/v1", flush=True),
            drain_seconds=options.drain,
        )
    finally:
        gc.unfreeze()  # else libraries find at the exit what they take for leaks, and say so on stderr
    if lost:
        raise ParallelError(lost[0])
    return 0


def _app(
    options: ServeOptions, source: Source, limits: Limits, defaults: SamplingDefaults, key: str | None,
    hosts: tuple[str, ...] | None,
) -> FastAPI:  # fmt: skip
    """The server, or with --record the gateway. Raises `RunError` when another process records to the directory."""
    if options.record is None:
        return create_app(
            source, model_name=options.names[0], aliases=options.names[1:], limits=limits, api_key=key, hosts=hosts,
            origins=options.allow_origin, defaults=defaults,
        )  # fmt: skip
    from glm5.rl.gateway import Sessions, create_gateway
    from glm5.train.run_directory import directory_sha256

    print("Reading the weights, by which recorded sessions are known", file=sys.stderr, flush=True)
    began = directory_sha256(options.directory())  # versions count from it, unless they are another run's
    sessions = Sessions(options.record, weights=began if options.weights_from is None else f"versions after {began}")
    print(f"Recording sessions, with all that is said in them, to {options.record}", file=sys.stderr, flush=True)
    return create_gateway(
        source, sessions, model_name=options.names[0], aliases=options.names[1:], limits=limits, api_key=key,
        hosts=hosts, origins=options.allow_origin, defaults=defaults,
    )  # fmt: skip


def _backend(options: ServeOptions, directory: Path) -> Source:
    """The other server as a source of tokens. Raises `InputError` when httpx is not installed."""
    assert options.backend is not None
    try:
        from glm5.serve.backend import Backend
    except ImportError:
        raise InputError("A backend needs the package httpx; install glm5[backend].") from None
    from glm5.serve.backend_api import backend_api

    api = backend_api(options.backend_api, options.backend_model)
    key = os.environ.get(BACKEND_KEY_VARIABLE) or None
    return Backend(options.backend, directory, api, max_model_len=options.max_model_len, api_key=key)
