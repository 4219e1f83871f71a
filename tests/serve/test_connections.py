"""Connections: between requests, without a whole request, too many of them, half closed."""

import contextlib
import http.client
import socket
import time

import httpx
import pytest
from chat_client import client_of
from held_source import HeldSource

from glm5.serve import Limits, create_app

HALF = b"POST /v1/completions HTTP/1.1\r\nHost: x"
BODY = b'{"model": "tiny", "prompt": "x"}'
REQUEST = HALF + b"\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


def connected(url):
    address = httpx.URL(url)
    return socket.create_connection((address.host, address.port), timeout=60)


def healthy(connection):
    """Asks for `/health` and reads the whole reply."""
    connection.sendall(HEALTH)
    with contextlib.closing(http.client.HTTPResponse(connection)) as reply:
        reply.begin()
        return reply.status == 200 and b"ready" in reply.read()


def admitted(url):
    """Whether a new connection is served."""
    time.sleep(0.05)
    try:
        with connected(url) as connection:
            return healthy(connection)
    except (ConnectionError, http.client.HTTPException):
        return False


def refused(connection):
    """Sends one byte a little later; whether the server has closed the connection."""
    time.sleep(0.05)
    try:
        connection.sendall(b"x")
    except ConnectionError:
        return True
    return False


def closed(connection):
    """Waits until the server closes it."""
    try:
        return connection.recv(100) == b""
    except ConnectionResetError:  # it had not read all
        return True


def test_an_idle_connection_outlives_the_clients_own_patience(live_server):
    """httpx, and so the openai and anthropic packages, use a connection again within 5 s."""
    address = httpx.URL(live_server(client_of("</think>ok").app))
    connection = http.client.HTTPConnection(address.host, address.port)
    connection.connect()
    connection.auto_open = 0  # a closed one is not opened again behind the test's back
    for idle in (0, httpx.Limits().keepalive_expiry + 0.5):
        time.sleep(idle)
        connection.request("GET", "/health")
        assert connection.getresponse().read()


@pytest.mark.parametrize("sent", [b"", HALF])
def test_a_connection_that_does_not_end_the_head_of_its_request_is_closed(live_server, monkeypatch, sent):
    monkeypatch.setattr("glm5.serve.connection.HEAD_SECONDS", 0.2)
    url = live_server(client_of().app)
    with connected(url) as connection:
        connection.sendall(sent)
        assert closed(connection)


def test_bytes_that_trickle_in_do_not_keep_a_connection_even_behind_a_request(live_server, monkeypatch):
    url = live_server(client_of().app)
    with connected(url) as connection:
        assert healthy(connection)
        monkeypatch.setattr("glm5.serve.connection.HEAD_SECONDS", 0.2)
        connection.sendall(HALF)
        assert any(refused(connection) for _ in range(600))


def test_an_answer_may_take_longer_than_a_head_and_half_a_head_that_came_meanwhile_is_not_kept(
    live_server, monkeypatch
):
    source = HeldSource()
    with connected(live_server(create_app(source, model_name="tiny"))) as connection:
        connection.sendall(REQUEST)
        while not source.streams:
            time.sleep(0.01)
        monkeypatch.setattr("glm5.serve.connection.HEAD_SECONDS", 0.1)
        connection.sendall(HALF)
        time.sleep(0.3)
        source.go_on.set()
        with contextlib.closing(http.client.HTTPResponse(connection)) as reply:
            reply.begin()
            assert reply.status == 200 and b'"text":"x"' in reply.read()
        assert closed(connection)


def test_one_connection_too_many_is_closed_at_once(live_server):
    url = live_server(client_of(limits=Limits(max_concurrent=1, max_waiting=1, spare_connections=1)).app)
    open_ones = [connected(url) for _ in range(3)]
    assert all(healthy(connection) for connection in open_ones)
    with connected(url) as fourth:
        assert closed(fourth)
    assert all(healthy(connection) for connection in open_ones)
    open_ones.pop().close()
    assert any(admitted(url) for _ in range(600))  # the server sees the close in its own time
    for connection in open_ones:
        connection.close()


def test_a_client_that_closes_its_half_of_the_connection_has_left(live_server):
    """As documented: a client that is gone looks the same, and its work is to stop at once."""
    source = HeldSource()
    app = create_app(source, model_name="tiny")
    with connected(live_server(app)) as connection:
        connection.sendall(REQUEST)
        while not source.streams:
            time.sleep(0.01)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(100) == b""
    for _ in range(1000):
        if source.streams[0].closed:
            return
        time.sleep(0.01)
    raise AssertionError("the work went on")
