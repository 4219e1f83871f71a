"""Connections between requests."""

import http.client
import time

import httpx
from chat_client import client_of


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
