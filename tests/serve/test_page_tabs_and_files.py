"""The page in headless Chromium: two tabs with one conversation, odd things in the browser's storage and in files."""

import contextlib
import json

import pytest
from page_reader import needs_browser
from selenium.webdriver.common.keys import Keys

pytestmark = needs_browser


class Tabs:
    """Two tabs of one browser with one conversation; `with tabs.second():` is what happens in the other."""

    def __init__(self, reader, fake):
        self.reader, self.driver = reader, reader.driver
        reader.say("first")
        reader.answered("You said: first")
        self.here = self.driver.current_window_handle
        self.driver.switch_to.new_window("tab")
        self.there = self.driver.current_window_handle
        reader.size(1200, 800)
        self.driver.get(fake.url)
        assert not reader.all(".answer")  # a tab of its own begins with a conversation of its own
        reader.one(".conversation").click()
        assert reader.last() == "You said: first"
        self.driver.switch_to.window(self.here)

    @contextlib.contextmanager
    def second(self):
        self.driver.switch_to.window(self.there)
        yield
        self.driver.switch_to.window(self.here)


@pytest.fixture
def tabs(reader, fake):
    both = Tabs(reader, fake)
    yield both
    both.driver.switch_to.window(both.there)
    both.driver.close()
    both.driver.switch_to.window(both.here)


def kept(reader):
    """What the user says in each conversation that the browser keeps."""
    found = reader.driver.execute_script(
        "return Object.entries(localStorage).filter(([key]) => key.startsWith('glm5/conversation/')).map(([, v]) => v)"
    )
    said = [[m["content"] for m in json.loads(c)["messages"] if m["role"] == "user"] for c in found]
    return sorted(said)


def test_a_tab_follows_what_another_says_in_its_conversation(reader, tabs):
    with tabs.second():
        reader.say("second")
        reader.answered("You said: second")
    reader.until(lambda: reader.last() == "You said: second")
    reader.say("third")
    reader.answered("You said: third")
    with tabs.second():
        reader.until(lambda: reader.last() == "You said: third")
        reader.driver.refresh()
        reader.until(lambda: reader.last() == "You said: third")  # each tab comes back to its own
    assert kept(reader) == [["first", "second", "third"]]


def test_what_another_tab_said_is_answered_to_before_the_browser_tells_of_it(reader, tabs):
    deaf = (
        "const add = addEventListener;"
        "addEventListener = (on, ...more) => ['storage', 'focus'].includes(on) || add(on, ...more)"
    )
    script = reader.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": deaf})
    reader.driver.refresh()
    reader.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)
    reader.until(lambda: reader.last() == "You said: first")
    with tabs.second():
        reader.say("second")
        reader.answered("You said: second")
    assert reader.last() == "You said: first"  # this tab has heard of nothing
    reader.say("third")
    reader.answered("You said: third")
    assert kept(reader) == [["first", "second", "third"]]


def test_two_tabs_that_change_one_conversation_make_two(reader, tabs, fake):
    fake.answers["slow"], fake.holds["slow"] = ("", "word " * 40, []), 3
    reader.say("slow")
    reader.until(lambda: reader.last().count("word") >= 2)
    with tabs.second():
        reader.until(lambda: "slow" in reader.one("#log").text)
        reader.say("quick")
        reader.answered("You said: quick")
    fake.holds.clear()
    reader.answered("word " * 39 + "word")
    reader.until(lambda: "kept as a second conversation" in reader.one(".toast").text)
    reader.until(lambda: kept(reader) == [["first", "slow"], ["first", "slow", "quick"]])
    assert len(reader.all(".conversation")) == 2
    reader.driver.refresh()
    reader.until(lambda: reader.last().count("word") == 40)


def test_what_is_being_written_is_not_taken_away_by_another_tab(reader, tabs):
    reader.press("Edit answer")
    reader.one(".editor textarea").send_keys(" indeed")
    with tabs.second():
        reader.say("second")
        reader.answered("You said: second")
    reader.one(".editor textarea").send_keys(Keys.CONTROL, Keys.ENTER)
    reader.until(lambda: reader.last() == "You said: first indeed")
    assert kept(reader) == [["first"], ["first", "second"]]


def test_what_another_tab_deletes_is_gone_here_too(reader, tabs, fake):
    fake.answers["slow"], fake.holds["slow"] = ("", "word " * 40, []), 3
    reader.say("slow")
    reader.until(lambda: reader.last().count("word") >= 2)
    with tabs.second():
        reader.press("Delete conversation")
    reader.until(lambda: "deleted in another tab" in reader.one(".toast").text)
    assert not reader.all(".answer") and not reader.one("#stop").is_displayed()
    fake.holds.clear()
    reader.say("new")
    reader.answered("You said: new")
    assert kept(reader) == [["new"]]


SAID = [{"role": "user", "content": "Hi"}, {"role": "assistant", "reasoning": "", "content": "Yes.", "calls": []}]
CUT = {
    **SAID[1],
    "calls": [None, {"id": "a", "name": "f", "arguments": '{"a'}, {"id": "b", "name": "g", "arguments": "{}"}],
}


@pytest.mark.parametrize(
    "odd",
    [
        {"title": "t", "messages": SAID},
        {"title": "t", "messages": SAID, "system": None, "settings": {"tools": 5, "thinking": "no", "topP": None}},
        {"title": "t", "messages": [SAID[0], CUT], "updated": "then", "system": "", "settings": []},
    ],
)
def test_a_kept_conversation_that_lacks_something_still_opens(reader, fake, odd):
    keep = "localStorage.setItem('glm5/conversation/q', arguments[0]); sessionStorage.setItem('glm5/current', 'q')"
    reader.driver.execute_script(keep, json.dumps(odd))
    reader.driver.refresh()
    reader.until(lambda: reader.last() == "Yes.")
    reader.say("more")
    reader.answered("You said: more")
    assert not reader.complaints() and len(reader.all(".conversation")) == 1
    assert fake.asked[0]["chat_template_kwargs"] == {"enable_thinking": True} and "tools" not in fake.asked[0]
    called = fake.asked[0]["messages"][1].get("tool_calls", [])
    assert [call["id"] for call in called] == (["b"] if CUT in odd["messages"] else [])


def test_a_full_storage_is_said_and_takes_nothing_from_the_screen(reader):
    reader.driver.execute_script("Storage.prototype.setItem = () => { throw new DOMException('full'); }")
    for text in ("one", "two"):
        reader.say(text)
        reader.answered(f"You said: {text}")
        reader.until(lambda: "storage is full" in reader.one(".toast").text)


def load(reader, file, content):
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    reader.one("#import").send_keys(str(file))


def test_an_import_keeps_everything_that_is_text(reader, fake, tmp_path):
    parts = [{"type": "text", "text": "Add "}, {"type": "text", "text": "2."}]
    function = {"name": "add", "arguments": {"a": 2}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "c", "content": parts},
        {"role": "assistant", "content": parts},
    ]
    load(reader, tmp_path / "parts.json", {"messages": messages})
    reader.until(lambda: reader.last() == "Add 2.")
    assert reader.one("#title").get_attribute("value") == "Add 2."
    reader.say("more")
    reader.answered("You said: more")
    sent = fake.asked[0]["messages"]
    assert [m["content"] for m in sent] == ["Be brief.\n\nBe kind.", "Add 2.", "", "Add 2.", "Add 2.", "more"]
    assert sent[2]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a":2}'}


def test_a_file_that_cannot_be_shown_whole_is_refused_with_a_sentence(reader, tmp_path):
    image = [{"type": "text", "text": "See"}, {"type": "image_url", "image_url": {"url": "data:"}}]
    called = lambda calls: {"messages": [{"role": "assistant", "content": "", "tool_calls": calls}]}
    for content, sentence in (
        ("{", "The file is not JSON."),
        ("null", "The file holds no list of messages."),
        ({"messages": [{"role": "user", "content": image}]}, "Message 1 holds more than text (image_url)"),
        ({"messages": [{"role": "user", "content": 5}]}, "Message 1 has a content that is no text."),
        ({"messages": [None]}, "Message 1 has no role that is known."),
        (called({}), "The tool calls of message 1 are no list."),
        (called([{"function": {"name": "f", "arguments": "{"}}]), "Message 1 has a tool call without a name"),
    ):
        load(reader, tmp_path / "odd.json", content)
        reader.until(lambda sentence=sentence: sentence in reader.one("#toasts").text)
    assert not kept(reader) and not reader.complaints()
