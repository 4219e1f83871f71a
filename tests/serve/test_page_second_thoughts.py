"""The page in headless Chromium: a reader who asks an earlier question again, with the keyboard, and wants it back."""

from fake_chat import CALL
from page_reader import needs_browser
from selenium.webdriver.common.keys import Keys

pytestmark = needs_browser


def test_what_an_earlier_answer_again_removes_can_be_had_back(reader, fake):
    for text in ("one", "two"):
        reader.say(text)
        reader.answered(f"You said: {text}")
    assert not reader.one("#toasts").text
    fake.answers["one"], fake.hold_after = ("", "word " * 40, []), 3
    again = reader.all('button[aria-label="Answer again"]')[0]
    reader.driver.execute_script("arguments[0].focus()", again)
    again.send_keys(Keys.ENTER)
    reader.until(lambda: len(reader.all(".answer")) == 1 and "word" in reader.last())
    assert (
        reader.driver.switch_to.active_element.get_attribute("id") == "say"
    )  # the button is gone; the keyboard is not
    reader.one(".toast button").click()  # while the new answer still comes
    reader.answered("You said: two")
    fake.hold_after = None
    assert [e.text for e in reader.all(".answer .text")] == ["You said: one", "You said: two"]
    reader.driver.refresh()
    reader.until(lambda: reader.last() == "You said: two")
    reader.say("three")
    reader.answered("You said: three")
    assert [m["content"] for m in fake.asked[-1]["messages"][::2]] == ["one", "two", "three"]


def test_an_edited_question_is_put_back_too_and_an_empty_one_is_not_sent(reader, fake):
    for text in ("one", "two"):
        reader.say(text)
        reader.answered(f"You said: {text}")
    for new in ("", "other"):
        edit = reader.all('button[aria-label="Edit message"]')[0]
        reader.driver.execute_script("arguments[0].click()", edit)
        reader.one(".editor textarea").send_keys(Keys.CONTROL, "a")
        reader.one(".editor textarea").send_keys(Keys.DELETE, new, Keys.CONTROL, Keys.ENTER)
        reader.until(lambda: not reader.all(".editor"))
    reader.answered("You said: other")
    assert len(fake.asked) == 3
    reader.one(".toast button").click()
    reader.answered("You said: two")
    assert [e.text for e in reader.all(".user .bubble")] == ["one", "two"]


def test_a_call_that_is_stopped_halfway_is_not_sent_back(reader, fake):
    half = {**CALL, "function": {"name": "get_weather", "arguments": '{"town": '}}
    fake.answers["Weather?"], fake.holds["Weather?"] = ("", "", [half, CALL]), 1
    reader.say("Weather?")
    reader.until(lambda: reader.all(".call"))
    reader.one("#say").send_keys(Keys.ESCAPE)
    reader.until(lambda: "stopped" in reader.one(".figures").text and not reader.all(".call"))
    reader.say("more")
    reader.answered("You said: more")
    assert all("tool_calls" not in message for message in fake.asked[-1]["messages"])
    assert not reader.complaints()
