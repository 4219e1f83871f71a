"""The page in headless Chromium, driven as a reader would: conversations over prepared answers, one over an engine."""

import json

from fake_chat import CALL, Running
from page_reader import Reader, needs_browser
from selenium.webdriver.common.keys import Keys

from glm5.bundled import bundled_model
from glm5.engine import Engine
from glm5.serve import create_app

pytestmark = needs_browser


def test_type_stream_and_fold_the_thinking(reader, fake):
    fake.answers["Hello"] = ("Let me think about it for a while.", "A **bold** answer.", [])
    fake.hold_after = 3
    reader.say("Hello")
    reader.until(lambda: reader.one(".thinking").get_attribute("open") and "think" in reader.one(".thought").text)
    assert reader.one(".thinking summary").text == "Thinking…"
    assert reader.one("#stop").is_displayed() and not reader.one("#send").is_displayed()
    fake.hold_after = None
    reader.answered("A bold answer.")
    assert reader.one(".thinking").get_attribute("open") is None
    assert reader.one(".thinking summary").text.startswith("Thought for")
    assert reader.one(".text strong").text == "bold"
    figures = reader.one(".figures").text
    assert "12 tokens" in figures and "tokens/s" in figures and "prompt 7 (3 cached)" in figures
    assert reader.one("#title").get_attribute("value") == "Hello"
    assert fake.asked[0]["messages"] == [{"role": "user", "content": "Hello"}]
    assert fake.asked[0]["chat_template_kwargs"] == {"enable_thinking": True}
    reader.say("And now?")
    reader.answered("You said: And now?")
    assert fake.asked[1]["messages"][1] == {
        "role": "assistant", "content": "A **bold** answer.", "reasoning_content": "Let me think about it for a while.",
    }  # fmt: skip
    assert not reader.complaints()


def test_stop_keeps_what_was_said_and_again_asks_afresh(reader, fake):
    fake.answers["Go"] = ("", "word " * 40, [])
    fake.hold_after = 5
    reader.say("Go")
    reader.until(lambda: reader.last().count("word") == 5)
    reader.one("#say").send_keys(Keys.ESCAPE)
    reader.until(lambda: "stopped" in reader.one(".figures").text)
    assert reader.last().split() == ["word"] * 5
    fake.hold_after = None
    fake.answers["Go"] = ("", "All of it.", [])
    reader.press("Answer again")
    reader.answered("All of it.")
    assert len(reader.all(".answer")) == 1
    assert fake.asked[1]["messages"] == fake.asked[0]["messages"] == [{"role": "user", "content": "Go"}]


HOLD_FRAMES = """
const [frame, parse] = [requestAnimationFrame, JSON.parse];
const held = [];
window.seen = 0;
window.requestAnimationFrame = (callback) => held.push(callback);
JSON.parse = (text) => { if (text.includes("choices")) window.seen++; return parse(text); };
window.release = () => {
  [window.requestAnimationFrame, JSON.parse] = [frame, parse];
  held.forEach((callback) => callback(0));
};
"""


def test_two_answers_at_once_are_both_shown_and_kept(reader, fake):
    """What comes for another conversation in the same frame takes nothing from the one on screen."""
    for text, word in (("one", "left "), ("two", "right ")):
        fake.answers[text], fake.holds[text] = ("", word * 40, []), 3
        reader.say(text)
        reader.until(lambda word=word: reader.last().count(word.strip()) >= 2)
        shown = reader.last().count(word.strip())
        if text == "one":
            reader.one("#new").click()
            reader.until(lambda: not reader.all(".answer"))
    reader.driver.execute_script(HOLD_FRAMES)
    for number, text in enumerate(("one", "two"), 1):
        fake.holds[text] = 8
        reader.until(lambda number=number: reader.driver.execute_script("return seen") >= 5 * number)
    reader.driver.execute_script("release()")
    assert reader.last().count("right") > shown
    kept = lambda: reader.driver.execute_script("return Object.values(localStorage).join()")
    reader.until(lambda: kept().count("left") > shown and kept().count("right") > shown)
    fake.holds.clear()
    reader.answered("right " * 39 + "right")
    assert not reader.complaints()


def test_an_edited_message_goes_on_from_there(reader, fake):
    for text in ("one", "two"):
        reader.say(text)
        reader.answered(f"You said: {text}")
    reader.driver.execute_script("document.querySelector('.user [aria-label=\"Edit message\"]').click()")
    editor = reader.one(".editor textarea")
    editor.send_keys(Keys.CONTROL, "a")
    editor.send_keys("three", Keys.CONTROL, Keys.ENTER)
    reader.answered("You said: three")
    assert len(reader.all(".message")) == 2
    assert fake.asked[-1]["messages"] == [{"role": "user", "content": "three"}]
    reader.press("Edit answer")
    reader.one(".editor textarea").send_keys(" indeed", Keys.CONTROL, Keys.ENTER)
    reader.until(lambda: reader.last() == "You said: three indeed")
    reader.say("four")
    reader.answered("You said: four")
    assert fake.asked[-1]["messages"][1]["content"] == "You said: three indeed"


def test_a_reload_keeps_conversations_and_they_can_be_deleted_and_put_back(reader, fake):
    reader.say("first")
    reader.answered("You said: first")
    reader.one("#new").click()
    reader.say("second")
    reader.answered("You said: second")
    reader.driver.refresh()
    reader.until(lambda: reader.last() == "You said: second")
    assert [c.text.split("\n")[0] for c in reader.all(".conversation")] == ["second", "first"]
    reader.all(".conversation")[1].click()
    assert reader.last() == "You said: first"
    reader.press("Delete conversation")
    assert [c.text.split("\n")[0] for c in reader.all(".conversation")] == ["second"]
    reader.one(".toast button").click()
    assert reader.last() == "You said: first" and len(reader.all(".conversation")) == 2
    reader.press("Delete conversation")
    reader.driver.refresh()
    reader.until(lambda: reader.last() == "You said: second")
    assert len(reader.all(".conversation")) == 1


def test_a_reload_in_the_middle_keeps_what_came(reader, fake):
    fake.answers["Go"] = ("", "word " * 40, [])
    fake.hold_after = 5
    reader.say("Go")
    reader.until(lambda: reader.last().count("word") == 5)
    reader.driver.refresh()
    reader.until(lambda: reader.last().count("word") == 5)
    assert not reader.one("#stop").is_displayed()
    assert "stopped" in reader.one(".figures").text and not reader.one(".answer .error").is_displayed()


def test_settings_are_changed_while_an_answer_comes(reader, fake):
    """Escape closes the sheet and not the answer; what was changed holds for the next question."""
    fake.answers["Go"] = ("", "word " * 40, [])
    fake.hold_after = 5
    reader.say("Go")
    reader.until(lambda: reader.last().count("word") == 5)
    reader.one("#open-settings").click()
    reader.one("#temperature").send_keys("0.3", Keys.ESCAPE)
    reader.until(lambda: not reader.one("#temperature").is_displayed())
    assert reader.one("#stop").is_displayed()
    fake.hold_after = None
    reader.answered("word")
    assert reader.last().count("word") == 40 and "temperature" not in fake.asked[0]
    reader.say("more")
    reader.answered("You said: more")
    assert fake.asked[1]["temperature"] == 0.3 and len(fake.asked[1]["messages"]) == 3


def test_tool_calls_are_shown_and_their_results_sent(reader, fake):
    fake.answers["Weather?"] = ("", "I look it up.", [CALL, {**CALL, "id": "call_2"}])
    fake.answers["sunny"] = ("", "It is sunny.", [])
    reader.one("#open-settings").click()
    reader.one("#example-tools").click()
    reader.one("#tools").send_keys(Keys.ESCAPE)
    reader.say("Weather?")
    reader.answered("I look it up.")
    assert fake.asked[0]["tools"][0]["function"]["name"] == "get_weather"
    assert reader.one(".call pre").text == '{\n  "town": "Arlo"\n}'
    first, second = reader.all(".result-box textarea")
    first.send_keys('{"result": "rainy"}')
    assert not reader.one(".calls .primary").is_enabled()
    second.send_keys("sunny", Keys.CONTROL, Keys.ENTER)
    reader.answered("It is sunny.")
    called, *results = fake.asked[1]["messages"][1:]
    assert [call["id"] for call in called["tool_calls"]] == ["call_1", "call_2"]
    assert called["tool_calls"][0]["function"] == CALL["function"]
    assert results == [
        {"role": "tool", "tool_call_id": "call_1", "content": '{"result": "rainy"}'},
        {"role": "tool", "tool_call_id": "call_2", "content": "sunny"},
    ]
    assert not reader.all(".result-box") and len(reader.all(".result")) == 2


def test_settings_reach_the_server_and_wrong_ones_do_not(reader, fake):
    reader.one("#open-settings").click()
    for field, value in {"system": "Be brief.", "temperature": "0.3", "top-p": "0.9", "max-tokens": "50", "seed": "7",
                         "tools": "[{"}.items():  # fmt: skip
        reader.one(f"#{field}").send_keys(value)
    reader.one("#thinking").click()
    assert "not valid JSON" in reader.one("#tools-problem").text
    reader.press("Close settings")
    reader.say("Hi")
    reader.until(lambda: "not valid JSON" in reader.one(".toast").text)
    assert not fake.asked
    reader.one("#open-settings").click()
    reader.one("#tools").clear()
    reader.one("#tools").send_keys(" ")
    reader.press("Close settings")
    reader.say("Hi")
    reader.answered("You said: Hi")
    body = fake.asked[0]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert [body[name] for name in ("temperature", "top_p", "max_tokens", "seed")] == [0.3, 0.9, 50, 7]
    assert body["chat_template_kwargs"] == {"enable_thinking": False} and "tools" not in body


def test_a_key_is_asked_for_when_the_server_wants_one(reader, fake):
    fake.key = "secret"
    reader.driver.refresh()
    reader.until(lambda: reader.one("#settings").is_displayed())
    assert "wants an API key" in reader.one("#key-problem").text
    reader.one("#api-key").send_keys("secret")
    reader.press("Close settings")
    reader.say("Hi")
    reader.answered("You said: Hi")
    assert "secret" not in json.dumps(reader.driver.execute_script("return {...localStorage}"))


def test_failures_have_their_sentence(reader, fake):
    fake.failure = (429, "The server is busy; try again.")
    reader.say("Hi")
    reader.until(lambda: "The server is busy; try again." in reader.one(".error").text)
    fake.failure = None
    reader.press("Answer again")
    reader.answered("You said: Hi")
    assert not reader.one(".error").is_displayed()


def test_export_and_import_are_one_format(reader, fake, tmp_path):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": "Yes.", "reasoning_content": "hm", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "3"},
    ]
    file = tmp_path / "conversation.json"
    file.write_text(json.dumps({"messages": messages, "title": "Sums"}))
    reader.one("#import").send_keys(str(file))
    reader.until(lambda: reader.last() == "Yes.")
    assert reader.one("#title").get_attribute("value") == "Sums" and reader.one(".result").text == "3"
    reader.driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    reader.press("Export conversation")
    saved = tmp_path / "Sums.json"
    reader.until(saved.exists)
    assert json.loads(saved.read_text())["messages"] == messages
    file.write_text("{}")
    reader.one("#import").send_keys(str(file))
    reader.until(lambda: "no list of messages" in reader.one(".toast").text)


def test_the_real_server_answers_the_page(browser):
    engine = Engine(bundled_model())
    with Running(create_app(engine, model_name="nano")) as url:
        reader = Reader(browser, url)
        reader.driver.execute_script("document.getElementById('open-settings').click()")
        reader.one("#temperature").send_keys("0")
        reader.press("Close settings")
        reader.until(lambda: "nano" in reader.one("#served").text)
        reader.say("What is 64 + 28?")
        reader.answered("92")
        assert "tokens" in reader.one(".figures").text and not reader.complaints()
        reader.driver.execute_script("document.querySelector('.thinking summary').click()")
        assert reader.one(".thought").text.startswith("ones 4+8+0=12")
        reader.press("Answer again")
        reader.answered("92")
    engine.close()
