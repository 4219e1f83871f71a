"""A tool-using agent, unchanged, is served by the gateway and learnt from: its reward before and after.

    python -m benchmarks.rl_gateway                       # the bundled nano, agent over the openai package
    python -m benchmarks.rl_gateway --agent anthropic --steps 30 --out runs/gateway

The agent is a plain program: base URL, tool loop, answer. Its tasks are fresh requests for the tools of
`glm5.data.tools` (calculator, weather, alarm, letters), `--group-size` attempts at each, those of a round side by side
over HTTP. An attempt is worth 0.2 for the right tool, 0.4 for its arguments, 0.4 for an answer that says its result.
Before and after, the same agent does the same `--judged` held-out requests against a plain server, at temperature 1;
the gain is the mean over the requests, with its standard error. A finished run in `--out` is judged again, not done
again: more requests tell a small gain from chance.
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import anthropic
import httpx
import openai
import tyro

from benchmarks.measure import machine
from glm5.bundled import bundled_model
from glm5.data.tool_chats import ToolRequest, ToolRequests
from glm5.data.tools import run_tool
from glm5.engine import Engine
from glm5.optim import OptimizerConfig, Schedule
from glm5.rl.admission import SchedulerConfig
from glm5.rl.config import RLRunConfig
from glm5.rl.gateway import Address, train_from_gateway
from glm5.rl.gateway.learning import served
from glm5.rl.learner import LearnerConfig
from glm5.serve import create_app
from glm5.train import RunDirectory

TOWNS = ("Paris", "Rome", "Oslo", "Lima", "Kyoto", "Quito")
TURNS = 3
OPENAI = openai.OpenAI(base_url="http://127.0.0.1", api_key="none", max_retries=2, timeout=600.0)
ANTHROPIC = anthropic.Anthropic(base_url="http://127.0.0.1", api_key="none", max_retries=2, timeout=600.0)


@dataclass
class Options:
    """Options of the benchmark."""

    model: Path | None = None
    """A run or model directory; the bundled one when left out."""
    agent: Literal["openai", "anthropic"] = "openai"
    steps: int = 60
    groups_per_batch: int = 4
    group_size: int = 8
    max_staleness: int = 4
    lr: float = 1e-4
    """Rises over four batches and falls to a twentieth."""
    judged: int = 384
    seed: int = 0
    out: Path | None = None
    """The run directory; a temporary one when left out."""


@dataclass(frozen=True)
class Attempt:
    """What an agent did: the calls that it ran, and its last words."""

    calls: list[tuple[str, dict[str, Any]]]
    said: str

    def reward(self, request: ToolRequest) -> float:
        """Of the first call: 0.2 for the right tool, up to 0.4 for its arguments; 0.4 more for saying its result."""
        if not self.calls or self.calls[0][0] != request.name:
            return 0.0
        given, wanted = self.calls[0][1], request.arguments
        right = sum(given.get(name) == value for name, value in wanted.items()) / len(wanted)
        result = str(json.loads(run_tool(request.name, wanted))["result"])
        return 0.2 + 0.4 * right + 0.4 * (given == wanted and result in self.said)


def openai_agent(base_url: str, request: ToolRequest) -> Attempt:
    """Asks, runs what is called, asks again."""
    client = OPENAI.with_options(base_url=f"{base_url}/v1")
    messages: list[Any] = [{"role": "user", "content": request.question}]
    tools: Any = list(request.tools)
    calls, said = [], ""
    for _ in range(TURNS):
        reply = client.chat.completions.create(
            model="glm5", messages=messages, tools=tools, max_tokens=64, reasoning_effort="none"
        )
        message = reply.choices[0].message
        messages.append(message)
        said = message.content or ""
        for call in message.tool_calls or []:
            assert call.type == "function"
            arguments = json.loads(call.function.arguments)
            calls.append((call.function.name, arguments))
            result = run_tool(call.function.name, arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        if not message.tool_calls:
            break
    return Attempt(calls, said)


def anthropic_agent(base_url: str, request: ToolRequest) -> Attempt:
    """The same with the other package."""
    client = ANTHROPIC.with_options(base_url=base_url)
    functions = [tool["function"] for tool in request.tools]
    tools: Any = [{"input_schema": f["parameters"], "name": f["name"], "description": f["description"]}
                  for f in functions]  # fmt: skip
    messages: list[Any] = [{"role": "user", "content": request.question}]
    calls, said = [], ""
    for _ in range(TURNS):
        reply = client.messages.create(model="glm5", messages=messages, tools=tools, max_tokens=64)
        said = "".join(block.text for block in reply.content if block.type == "text")
        results = []
        for block in reply.content:
            if block.type == "tool_use":
                calls.append((block.name, block.input))
                text = run_tool(block.name, block.input)
                results.append({"type": "tool_result", "tool_use_id": block.id, "content": text})
        if not results:
            break
        messages += [{"role": "assistant", "content": reply.content}, {"role": "user", "content": results}]
    return Attempt(calls, said)


AGENTS = {"openai": openai_agent, "anthropic": anthropic_agent}


class Use:
    """Sends the agent on one request after the other, and rewards what it did."""

    def __init__(self, options: Options) -> None:
        self.options, self.http = options, httpx.Client(timeout=600, limits=httpx.Limits(max_connections=None))
        self.requests = ToolRequests(options.seed, TOWNS)
        self.over = threading.Event()

    def begin(self, url: str) -> None:
        """When the gateway is there."""
        self.thread = threading.Thread(target=self._run, args=(url,))
        self.thread.start()

    def _run(self, url: str) -> None:
        options = self.options
        with ThreadPoolExecutor(options.groups_per_batch * options.group_size) as pool:
            for number in range(10**9):
                groups = [(f"{number}-{i}", self.requests.request()) for i in range(options.groups_per_batch)]
                attempts = [(url, name, request) for name, request in groups for _ in range(options.group_size)]
                list(pool.map(self._attempt, attempts))
                if self.over.is_set():
                    return

    def _attempt(self, place: tuple[str, str, ToolRequest]) -> None:
        url, group, request = place
        try:
            opened = self.http.post(f"{url}/rl/sessions", json={"group": group, "task": request.name})
            session = f"{url}/rl/sessions/{opened.raise_for_status().json()['session']}"
            try:
                base_url = url + opened.json()["anthropic_base_url"]
                reward = AGENTS[self.options.agent](base_url, request).reward(request)
            except (openai.APIStatusError, anthropic.APIStatusError) as error:  # the agent's own mistake
                self.http.post(f"{session}/abandon", json={"reason": str(error)[:200]})
            else:
                self.http.post(f"{session}/reward", json={"value": reward})
        except (httpx.HTTPError, openai.APIError, anthropic.APIError) as error:
            if not self.over.is_set():
                print(f"The agents stop: {error!r}", flush=True)  # the run is over and its gateway closed, or it is not
            self.over.set()


@contextmanager
def plain_server(model: Path) -> Iterator[str]:
    """A server without a recorder."""
    engine, urls = Engine(model), list[str]()
    with served(create_app(engine), Address(port=0), urls.append):
        yield urls[0]
    engine.close()


def judged(model: Path, options: Options) -> list[float]:
    """The agent's rewards on the held-out requests."""
    requests = ToolRequests(options.seed, TOWNS, "heldout")
    fresh = [requests.request() for _ in range(options.judged)]
    with plain_server(model) as url, ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda request: AGENTS[options.agent](url, request).reward(request), fresh))


def learnt(parent: Path, options: Options, directory: Path) -> RunDirectory:
    """The finished run: found, or made."""
    if (directory / "run.json").exists() and (run := RunDirectory.open(directory)).finished:
        return run
    optimizer = OptimizerConfig(name="adamw", lr=options.lr, betas=(0.9, 0.98), weight_decay=0.0)
    scheduler = SchedulerConfig(
        groups_per_batch=options.groups_per_batch, group_size=options.group_size, max_staleness=options.max_staleness
    )
    schedule = Schedule(shape="linear", warmup_steps=4, final_fraction=0.05)
    learner = LearnerConfig(optimizer=optimizer, schedule=schedule)
    config = RLRunConfig(parent=parent, steps=options.steps, scheduler=scheduler, learner=learner)
    use, began = Use(options), time.perf_counter()
    run = train_from_gateway(config, directory, Address(port=0), ready=use.begin)
    print(f"{options.steps} steps in {time.perf_counter() - began:.0f} s")
    use.over.set()
    use.thread.join()
    return run


def main() -> None:
    """Prints one table."""
    options = tyro.cli(Options, description=__doc__)
    random.seed(options.seed)
    parent = options.model or bundled_model()
    scratch = Path(tempfile.mkdtemp())
    run = learnt(parent, options, options.out or scratch / "run")
    before, after = judged(parent, options), judged(run.model_directory, options)
    gains = [late - early for early, late in zip(before, after, strict=True)]
    gain, error = statistics.fmean(gains), statistics.stdev(gains) / len(gains) ** 0.5
    metrics = run.read("metrics")
    fifth = max(1, len(metrics) // 5)
    first, last = (statistics.fmean(m["trained_reward"] for m in part) for part in (metrics[:fifth], metrics[-fifth:]))
    print(f"{machine()}; seed {options.seed}, {len(metrics)} steps, {len(gains)} held-out requests")
    print("| agent | held-out reward before | after | gain | trained reward, first fifth | last fifth | oldest token |")
    print("|---" * 7 + "|")
    age = max(m["max_staleness"] for m in metrics)
    held_out = f"{statistics.fmean(before):.3f} | {statistics.fmean(after):.3f} | {gain:+.3f} ± {error:.3f}"
    print(f"| {options.agent} | {held_out} | {first:.3f} | {last:.3f} | {age} versions |")
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
