"""`glm5 rl --from-gateway` in processes that are killed, and agents that keep asking until they are answered."""

import multiprocessing
import os
import random
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import torch

from glm5.cli.main import main

GROUP = 3
STEPS = 5
OFF = {"chat_template_kwargs": {"enable_thinking": False}}


def learn(parent, path, port, resume):
    """The verb, in this process."""
    torch.set_num_threads(1)
    os.environ.pop("GLM5_API_KEY", None)  # of another test, during which the process began that forks this one
    status = main([
        "rl", "--from-gateway", "--parent", f"{parent}", "--out", f"{path}", "--port", f"{port}",
        "--steps", f"{STEPS}", "--scheduler.groups-per-batch", "1", "--scheduler.group-size", f"{GROUP}",
        "--scheduler.max-staleness", "8", "--learner.optimizer.lr", "1e-3", "--checkpoint-every", "2",
        "--threads", "1", "--json", *(["--resume"] if resume else []),
    ])  # fmt: skip
    if status:
        raise SystemExit(status)


def killed(parent, path, port, kills, seed):
    """Kills the verb that often, each time at a random moment after its gateway came up or before, then lets it end.

    Gives the number of kills that met a living process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed_gateway"])
    chance, died = random.Random(seed), 0
    while True:
        process = context.Process(target=learn, args=(parent, path, port, (path / "run.json").exists()))
        process.start()
        if died < kills:
            if chance.random() < 0.8:  # the others may die while they come back
                wait_for(port, process)
            process.join(chance.uniform(0.0, 0.6))
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                died += 1
        process.join()
        if process.exitcode == 0:
            return died
        assert process.exitcode == -signal.SIGKILL


def wait_for(port, process):
    """Until somebody listens."""
    while process.is_alive():
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)


class Agents:
    """Groups of attempts of two turns, one group after the other, until `stop`; what they were told is remembered."""

    def __init__(self, port):
        self.url = f"http://127.0.0.1:{port}"
        self.stopped = threading.Event()
        self.rewarded = {}
        """Of the sessions whose final reward was acknowledged."""
        self.heard = {}
        """The answers that an agent got, by session."""
        self.refused = []
        self.retries = 0
        self._http = httpx.Client(timeout=120)

    def run(self):
        """In a thread of its own."""
        with ThreadPoolExecutor(GROUP) as pool:
            group = 0
            while not self.stopped.is_set():
                list(pool.map(lambda sample, group=group: self._attempt(group, sample), range(GROUP)))
                group += 1

    def _attempt(self, group, sample):
        name = f"{group}-{sample}"
        self._asked("/rl/sessions", {"session": name, "group": f"{group}"})
        messages = []
        for question in ("What is 12 + 30?", "Again?"):
            messages.append({"role": "user", "content": question})
            body = {"model": "glm5", "messages": messages, "max_tokens": 5, **OFF}
            reply = self._asked(f"/s/{name}/v1/chat/completions", body)
            if reply is None or reply["choices"][0]["finish_reason"] == "abort":  # the run has come to its end
                return
            answer = reply["choices"][0]["message"]
            messages.append({"role": "assistant", "content": answer["content"]})
            self.heard.setdefault(name, []).append(answer["content"])
        value = float(sample % 2)
        if self._asked(f"/rl/sessions/{name}/reward", {"value": value}) is not None:
            self.rewarded[name] = value

    def _asked(self, path, body):
        """The reply to a request, which is sent again until there is one; None when the run is over."""
        while not self.stopped.is_set():
            try:
                reply = self._http.post(self.url + path, json=body)
            except httpx.TransportError:
                reply = None
            if reply is not None and reply.status_code == 200:
                return reply.json()
            if reply is not None and reply.status_code < 500:
                self.refused.append((path, reply.status_code, reply.text))
                return None
            self.retries += 1
            time.sleep(0.05)
        return None
