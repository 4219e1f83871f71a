"""Tools that fetch: what is the infrastructure's failure, and what the model is told."""

import asyncio
import json
import socket
import struct
import threading
import urllib.request

import httpx
import pytest
from episodes import said

from glm5.envs import EnvironmentFailure, Toolbox


def answers(functions, *calls):
    message = said("", *calls)
    return [m["content"] for m in asyncio.run(Toolbox(functions).answer(message["tool_calls"]))]


def read_by_httpx(url):
    return httpx.get(url).text


def read_by_python(url):
    return urllib.request.urlopen(url).read()


def hang_up(listener):
    """Takes one connection, and ends it with a reset."""
    connection, _ = listener.accept()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.recv(1)
    connection.close()


@pytest.mark.parametrize("client", [read_by_httpx, read_by_python])
def test_a_lost_connection_is_the_infrastructures_whatever_its_client_calls_it(client):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"

        def page() -> str:
            server = threading.Thread(target=hang_up, args=(listener,))
            server.start()
            try:
                return client(url)
            finally:
                server.join()

        def handled() -> str:
            try:
                return page()
            except Exception:
                raise ValueError("no such page") from None

        with pytest.raises(EnvironmentFailure, match="the tool page lost its connection") as caught:
            answers([page], ("page", ""))
        assert caught.value.kind == "unreachable"
        assert answers([handled], ("handled", "")) == ['{"error": "no such page"}']


@pytest.mark.parametrize("client", [read_by_httpx, read_by_python])
def test_an_address_where_nobody_listens_is_no_way_out_of_an_episode(client):
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))

        def page(port: int) -> str:
            return client(f"http://127.0.0.1:{port}/")

        (told,) = answers([page], ("page", json.dumps({"port": unheard.getsockname()[1]})))
        assert "refused" in json.loads(told)["error"]
