"""What every endpoint has around it: ids and logs, the key, draining, limits, `/health` and `/metrics`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse

from glm5.serve.access_log import AccessLog
from glm5.serve.auth import RequireKey, check_key
from glm5.serve.cross_origin import install_cross_origin
from glm5.serve.host_check import CheckHost
from glm5.serve.lifecycle import CountRequests, Lifecycle
from glm5.serve.limits import BodyLimit
from glm5.serve.metrics import Metrics
from glm5.serve.service import Service
from glm5.serve.slow_readers import SendAtLeisure


def install_outside(
    app: FastAPI, service: Service, api_key: str | None = None, hosts: Iterable[str] | None = None,
    origins: Iterable[str] = (),
) -> None:  # fmt: skip
    """Adds the layers, the outermost last, and the two endpoints; `app.state.lifecycle` is for whoever runs the app."""
    source, limits, gate = service.source, service.limits, service.gate
    lifecycle = app.state.lifecycle = Lifecycle()

    def gauges() -> dict[str, float]:
        return {"requests_in_flight": lifecycle.in_flight, "requests_running": gate.running,
                "requests_waiting": gate.waiting, "draining": lifecycle.draining}  # fmt: skip

    metrics = Metrics(gauges, getattr(source, "stats", None))
    app.add_middleware(BodyLimit, max_bytes=limits.max_body_bytes, seconds=limits.body_seconds)
    app.add_middleware(SendAtLeisure, limits=limits)
    app.add_middleware(CountRequests, lifecycle=lifecycle)
    if api_key is not None:
        app.add_middleware(RequireKey, key=check_key(api_key))  # the layer itself is made when the app starts
    install_cross_origin(app, origins)  # around the key, which no preflight carries; inside the check of the host
    if hosts is not None:
        app.add_middleware(CheckHost, hosts=hosts)
    app.add_middleware(AccessLog, metrics=metrics)
    metrics.install(app)
    backend_ready = getattr(source, "ready", None)

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> JSONResponse:
        away = backend_ready is not None and not await backend_ready()
        trouble = "engine failed" if getattr(source, "failure", None) else "backend away" if away else None
        body: dict[str, Any] = {
            "status": lifecycle.status if trouble is None or lifecycle.draining else trouble,
            "model": service.model_name, "weight_version": source.version,
            "running": gate.running, "waiting": gate.waiting,
        }  # fmt: skip
        return JSONResponse(body, 503 if lifecycle.draining or trouble else 200)
