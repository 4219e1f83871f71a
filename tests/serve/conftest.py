"""What the tests of the server share: a browser, a prepared server for the page, and any app on a real port."""

import threading

import pytest
from fake_chat import FakeChat, Running
from page_reader import Reader, start_browser

from glm5.serve import serve


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """One browser for all tests."""
    with start_browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(scope="session")
def fake():
    chat = FakeChat()
    with Running(chat.app) as chat.url:
        yield chat


@pytest.fixture
def reader(browser, fake):
    fake.answers.clear()
    fake.asked.clear()
    fake.holds.clear()
    fake.key, fake.failure, fake.hold_after = None, None, None
    return Reader(browser, fake.url)


@pytest.fixture
def live_server():
    """Serves an app on a free port until the test ends; gives its URL."""
    running = []

    def start(app):
        urls, bound = [], threading.Event()
        ready = lambda url: (urls.append(url), bound.set())
        thread = threading.Thread(target=serve, args=(app,), kwargs={"ready": ready}, daemon=True)
        thread.start()
        bound.wait()
        running.append((app, thread))
        return urls[0]

    yield start
    for app, thread in running:
        app.state.lifecycle.draining = True
        thread.join(timeout=60)
        assert not thread.is_alive()
