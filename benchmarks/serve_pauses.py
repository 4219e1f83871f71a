"""Pauses of a server by Python's garbage collector: the longest, and a full collection, with and without `gc.freeze`.

`glm5 serve` freezes what its start has made (modules, model, tokenizer, app), which no later collection then looks at.

    python -m benchmarks.serve_pauses [--requests 30]
"""

from __future__ import annotations

import argparse
import gc
import time

from fastapi.testclient import TestClient

from glm5.bundled import bundled_model
from glm5.engine import Engine
from glm5.serve import create_app


def pauses(client: TestClient, requests: int) -> list[float]:
    """Seconds of each collection while so many answers are made."""
    found, began = [], [0.0]

    def watch(phase: str, info: dict[str, int]) -> None:
        now = time.perf_counter()
        if phase == "start":
            began[0] = now
        else:
            found.append(now - began[0])

    gc.callbacks.append(watch)
    for number in range(requests):
        question = [{"role": "user", "content": f"What is {number} + 30?"}]
        client.post("/v1/chat/completions", json={"model": "x", "max_tokens": 60, "messages": question})
    gc.callbacks.remove(watch)
    return found


def main() -> None:
    """Prints one line for each setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=30)
    requests = parser.parse_args().requests
    engine = Engine(bundled_model())
    client = TestClient(create_app(engine, model_name="x"))
    for frozen in (False, True):
        gc.collect()
        if frozen:
            gc.freeze()
        found = pauses(client, requests)
        began = time.process_time()
        gc.collect()
        full = time.process_time() - began
        print(
            f"{'frozen' if frozen else 'plain '}: {len(found)} collections in {requests} requests, the longest "
            f"{max(found, default=0.0) * 1e3:.1f} ms; a full one {full * 1e3:.1f} ms of CPU"
        )
    engine.close()


if __name__ == "__main__":
    main()
