"""The browser and the prepared server that the tests of the page share."""

import pytest
from fake_chat import FakeChat, Running
from page_reader import Reader, start_browser


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
    fake.key, fake.failure, fake.hold_after = None, None, None
    return Reader(browser, fake.url)
