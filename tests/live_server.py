"""An app behind real sockets for the time of a `with` block."""

import socket
import threading
import time
from contextlib import contextmanager

import uvicorn

from glm5.serve.http import bind


@contextmanager
def live(app):
    """The base URL of the app on a free loopback port."""
    with bind("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(60)


@contextmanager
def kept_port():
    """A port that nobody else is given meanwhile; a server can listen there, also one after the other."""
    with socket.socket() as keeper:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind(("127.0.0.1", 0))
        yield keeper.getsockname()[1]
