"""The page in headless Chromium: hostile output, light and dark, a phone, names for everything, the keyboard."""

import json

from fake_chat import CALL
from page_reader import needs_browser
from selenium.webdriver.common.keys import Keys

pytestmark = needs_browser

HOSTILE = """<script>window.pwned = 1</script><img src=x onerror="window.pwned = 1">

[press](javascript:window.pwned=1) [me](JaVaScRiPt:window.pwned=1) [data](data:text/html,<script>1</script>)
![picture](https://example.org/spy.png) [fine](https://example.org/) <https://example.org/a>

<a href="javascript:window.pwned=1">x</a> `<b>code</b>`

```html
<script>window.pwned = 1</script>
```

| <img src=x onerror=window.pwned=1> | b |
|--|--|
| [x](vbscript:1) | <svg onload=window.pwned=1> |

"""


def test_hostile_output_is_text(reader, fake):
    name = "<img src=x onerror=window.pwned=1>"
    call = {**CALL, "function": {"name": name, "arguments": json.dumps({"a": name})}}
    fake.answers["attack"] = (HOSTILE, HOSTILE + ">" * 500 + " deep\n" + "*a **b _c " * 2000, [call])
    reader.say("attack")
    reader.answered("<script>window.pwned = 1</script>")
    links = [link.get_attribute("href") for link in reader.all("#log a")]
    assert links and all(link.startswith("https://example.org/") for link in links)
    assert all(link.get_attribute("rel") == "noopener noreferrer nofollow" for link in reader.all("#log a"))
    assert not reader.all("#log img, #log script, #log iframe, #log b, #log svg:not(.icon)")
    assert name in reader.one(".call-head").text and reader.one(".call pre").text.count(name) == 1
    reader.driver.refresh()
    reader.until(lambda: "pwned" in reader.last())
    assert reader.driver.execute_script("return window.pwned") is None
    blocked = "document.getElementById('welcome').innerHTML = '<b>x</b>'"
    refusal = reader.driver.execute_script(f"try {{ {blocked} }} catch (error) {{ return error.name }}")
    assert refusal == "TypeError"  # even the page's own scripts cannot make markup of a string


ODD = """
const texts = ["# " + "#".repeat(50000) + "x", "a|b\\n" + "-|".repeat(20000) + "x", "```" + " ".repeat(90000) + "`",
  "*a **b _c ".repeat(990), "[a](".repeat(2400), ("[a](" + "x".repeat(900)).repeat(11), "` `` ".repeat(1900),
  (">".repeat(5000) + "\\n").repeat(200), Array.from({length: 400}, (_, i) => " ".repeat(i) + "- a").join("\\n")];
import("/page/markdown.js").then(({ MarkdownView }) => arguments[0](texts.map((text) => {
  const place = document.createElement("div");
  new MarkdownView(place).update(text);
  return place.textContent.length;
})));
"""


def test_odd_texts_do_not_hang_the_page(reader):
    """Each would take minutes where two parts of a pattern compete for the same characters."""
    reader.driver.set_script_timeout(100)
    assert all(length > 0 for length in reader.driver.execute_async_script(ODD))


WIDE = "x" * 300 + "\n\n```\n" + "y" * 300 + "\n```\n\n|" + "z" * 90 + "|" + "z" * 90 + "|\n|--|--|\n|a|b|\n"


def test_light_dark_and_a_phone(reader, fake):
    fake.answers["wide"] = (WIDE, WIDE, [CALL])
    reader.say("wide")
    reader.until(lambda: reader.all(".result-box"))
    colour = "const m = getComputedStyle(document.body).backgroundColor.match(/\\d+/g); return m.map(Number)"
    reader.theme("light")
    assert min(reader.driver.execute_script(colour)) > 240
    reader.theme("dark")
    assert max(reader.driver.execute_script(colour)) < 50
    reader.driver.execute_script("document.querySelector('input[name=theme][value=light]').click()")
    reader.driver.refresh()
    assert min(reader.driver.execute_script(colour)) > 240  # the reader's choice wins, also after a reload
    reader.size(360, 740, mobile=True)
    reader.driver.refresh()
    reader.until(lambda: reader.all(".result-box"))
    widths = (
        "return [document.documentElement.scrollWidth, document.getElementById('scroller').scrollWidth, innerWidth]"
    )
    assert reader.driver.execute_script(widths) == [360, 360, 360]
    assert not reader.one("#sidebar").is_displayed()
    reader.one("#show-sidebar").click()
    reader.until(lambda: reader.one(".conversation").is_displayed())
    reader.one("#open-settings")
    reader.theme("light")


def test_everything_has_a_name_and_the_keyboard_is_enough(reader, fake):
    fake.answers["Hello"] = ("hm", "Yes.\n\n```\ncode\n```", [CALL])
    reader.say("Hello")
    reader.answered("Yes.")
    for _ in range(2):  # the page, then the settings over it
        tree = reader.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        roles = {"button", "textbox", "combobox", "checkbox", "radio", "switch", "spinbutton", "link", "dialog"}
        controls = [n for n in tree if n.get("role", {}).get("value") in roles and not n.get("ignored")]
        nameless = [n for n in controls if not n.get("name", {}).get("value")]
        assert len(controls) > 8 and not nameless
        reader.driver.execute_script("document.getElementById('open-settings').click()")
    assert reader.one("#status").get_attribute("textContent").startswith("Yes.")
    reader.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    reader.one("#say").click()
    reader.one("#say").send_keys(Keys.ARROW_UP)
    assert reader.driver.switch_to.active_element.get_attribute("aria-label") == "Edited message"
    reader.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert reader.driver.switch_to.active_element.get_attribute("id") == "say"
    reader.one("#say").send_keys("two", Keys.SHIFT, Keys.ENTER, Keys.SHIFT, "lines", Keys.ENTER)
    reader.answered("You said: two")
    assert fake.asked[-1]["messages"][-1]["content"] == "two\nlines"
