"""The viewer's page in headless Chromium, opened from disk: filters, groups, tokens, hostile text, light and dark."""

from dataclasses import replace

import pytest
from page_reader import needs_browser, start_browser
from rollouts_made import rollout
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait
from speaker import speaker_tokenizer

from glm5.rl.records import Branch
from glm5.rl.view import Told, told, write_viewer

pytestmark = needs_browser
HOSTILE = "<img src=x onerror='window.pwned=1'><script>window.pwned=1</script>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with start_browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


class Viewer:
    """Someone in front of the page."""

    def __init__(self, driver, path, rollouts, **options):
        write_viewer(path, rollouts, speaker_tokenizer(), title="a run", **options)
        self.driver, self.path = driver, path
        self.open()

    def open(self, fragment=""):
        self.driver.get("about:blank")
        self.driver.get_log("browser")
        self.driver.get(self.path.as_uri() + fragment)
        self.until(lambda: self.all("article") or "No episode" in self.text("#group-head"))

    def one(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def until(self, condition):
        """Looks again also where what it looks at is just being drawn anew."""
        wait = WebDriverWait(self.driver, 60, poll_frequency=0.05, ignored_exceptions=[StaleElementReferenceException])
        return wait.until(lambda _: condition())

    def groups(self):
        return self.script("return [...document.querySelectorAll('#groups button')].map((b) => b.dataset.group)")

    def classes(self, selector):
        """The first class of each element."""
        found = "return [...document.querySelectorAll(arguments[0])].map((e) => e.className.split(' ')[0])"
        return self.script(found, selector)

    def text(self, selector):
        """Of the first such element, at once: it may be drawn anew."""
        return self.script("return document.querySelector(arguments[0])?.innerText ?? ''", selector)

    def script(self, text, *values):
        return self.driver.execute_script(text, *values)

    def choose(self, group):
        self.one(f'#groups button[data-group="{group}"]').click()
        self.until(lambda: self.one("#columns").get_attribute("data-group") == group)

    def fill(self, field, text):
        self.one(f"#{field}").clear()
        self.one(f"#{field}").send_keys(text)

    def select(self, field, value):
        Select(self.one(f"#{field}")).select_by_value(value)

    def tokens(self):
        self.one('input[value="tokens"]').click()
        self.until(lambda: self.all(".path"))

    def complaints(self):
        return [line["message"] for line in self.driver.get_log("browser") if line["level"] == "SEVERE"]


def run():
    """Three groups: one learnt from, one dropped and one that failed, of another environment."""
    calls = [("add", '{"a": 12, "b": 30}', '{"result": 42}')]
    trained = [Told(rollout(i, reward=float(i % 2), calls=calls), "trained", step=4, weight=1 + i) for i in range(3)]
    dropped = [Told(rollout(i, index=1, question="Sum of 2 and 2?", said="Perhaps 5."), "dropped", "all right")
               for i in range(2)]  # fmt: skip
    failed = [Told(rollout(0, index=2, reward=None, failure="the zebra server is away", environment="web"),
                   "requeued", "environment failure")]  # fmt: skip
    return trained + dropped + failed


@pytest.fixture
def viewer(browser, tmp_path):
    return Viewer(browser, tmp_path / "rollouts.html", run())


def test_groups_stand_side_by_side_with_turns_calls_and_fates(viewer):
    assert viewer.groups() == ["sums/0/0", "sums/1/0", "web/2/0"]
    assert viewer.text("#found") == "6 of 6 episodes in 3 groups"
    assert len(viewer.all("article")) == 3
    first = viewer.text("article:nth-child(2)")
    for part in ("sample 1: 1", "trained in step 4 ×2", "the expected number", "in 2 turns, 1 path", "0 to 1",
                 'add({"a": 12, "b": 30})', '{"result": 42}', "The answer is 42.", "hm"):  # fmt: skip
        assert part in first, part
    viewer.choose("web/2/0")
    text = viewer.text("article")
    assert "no reward" in text and "env_failure" in text and "requeued: environment failure" in text and "zebra" in text
    assert not viewer.complaints()


def test_filters_by_reward_outcome_fate_step_and_environment(viewer):
    for field, value, groups in [
        ("outcome", "env_failure", ["web/2/0"]),
        ("fate", "trained", ["sums/0/0"]),
        ("fate", "dropped: all right", ["sums/1/0"]),
        ("environment", "sums", ["sums/0/0", "sums/1/0"]),
    ]:
        viewer.select(field, value)
        viewer.until(lambda: viewer.groups() == groups)  # noqa: B023
        viewer.select(field, "")
    viewer.fill("step", "4")
    viewer.until(lambda: viewer.groups() == ["sums/0/0"])
    viewer.fill("least", "0.5")
    viewer.until(lambda: viewer.text("#found") == "1 of 6 episodes in 1 group")
    viewer.until(lambda: len(viewer.all("article.off")) == 2)  # the whole group stays in sight
    viewer.one("#clear").click()
    viewer.until(lambda: len(viewer.groups()) == 3)
    viewer.fill("most", "0")
    viewer.until(lambda: viewer.groups() == ["sums/0/0"])
    viewer.fill("most", "-1")
    viewer.until(lambda: "No episode" in viewer.text("#group-head"))


def test_dots_are_explained_and_measured_by_their_own_environment(browser, tmp_path):
    made = [rollout(0, reward=0.5), rollout(1, reward=0.2), rollout(2, reward=-1.0)]
    made += [rollout(i, index=1, reward=reward, environment="web") for i, reward in enumerate((10.0, 0.5, None))]
    viewer = Viewer(browser, tmp_path / "dots.html", told(made))
    dots = "return [...document.querySelectorAll(arguments[0])].map((dot) => dot.classList[1])"
    assert viewer.script(dots, "#groups .pip") == ["r2", "r1", "r0", "r2", "r1", "none"]
    assert viewer.script(dots, "#key .pip") == ["r2", "r1", "r0", "none"] and "no reward" in viewer.text("#key")


def test_search_finds_questions_answers_tools_and_failures(viewer):
    for words, groups in [
        ("sum of 2", ["sums/1/0"]),
        ("PERHAPS", ["sums/1/0"]),
        ('"result": 42', ["sums/0/0"]),
        ("zebra", ["web/2/0"]),
        ("nowhere", []),
    ]:
        viewer.fill("search", words)
        viewer.until(lambda: viewer.groups() == groups)  # noqa: B023
    viewer.one("#clear").click()
    viewer.until(lambda: len(viewer.groups()) == 3)


def test_every_branch_of_an_episode_is_shown_with_the_figures_of_its_own_turns(browser, tmp_path):
    made = rollout(calls=[("add", "{}", "42")], fork=True)
    user = {"role": "user", "content": "Ask."}
    few, first, second = ({"role": "assistant", "content": text} for text in ("An example.", "Left.", "Zebra."))
    branches = (Branch((user, few, first), (None, None, 0)), Branch((user, few, second), (None, None, 1)))
    viewer = Viewer(browser, tmp_path / "branches.html", told([replace(made, branches=branches)]))
    boxes = [box.text for box in viewer.all("article .branch, article .message")]
    figures = [f"turn {number + 1}: {len(turn.output_ids)} tokens" for number, turn in enumerate(made.turns)]
    assert boxes[0] == "branch 1" and boxes[4] == "branch 2: its first 2 messages are those of branch 1"
    assert "turn" not in boxes[2] and "An example." in boxes[2]
    assert figures[0] in boxes[3] and "Left." in boxes[3] and figures[1] in boxes[5] and "Zebra." in boxes[5]
    viewer.fill("search", "left")
    viewer.until(lambda: viewer.text("#found") == "1 of 1 episodes in 1 group")
    viewer.fill("search", "elephant")
    viewer.until(lambda: viewer.text("#found") == "0 of 1 episodes in 0 groups")
    assert not viewer.complaints()


def test_tokens_are_coloured_by_log_probability_version_and_mask(viewer):
    viewer.tokens()
    made = run()[0].rollout
    box = viewer.one("article .path")
    assert f"path 1: {made.num_sampled} sampled tokens" in box.text
    spans = viewer.all("article:first-child .path i")
    assert len(spans) == made.num_sampled and "What is 12 + 30?" in viewer.text(".context")
    logprobs = [x for one in made.turns for x in one.logprobs]
    level = lambda x: sum(-x > bound for bound in (0.1, 0.7, 2.3, 4.6))
    assert [span.get_attribute("class").split()[0] for span in spans] == [f"low{level(x)}" for x in logprobs]
    viewer.select("colour", "version")
    viewer.until(lambda: viewer.all("i.version1"))
    classes = viewer.classes("article:first-child .path i")
    assert classes == [f"version{v}" for one in made.turns for v in one.versions]
    viewer.select("colour", "mask")
    viewer.until(lambda: len(viewer.all("article:first-child i.mask1")) == made.num_sampled)
    span = viewer.all("article:first-child .path i")[0]
    viewer.script("arguments[0].click()", span)
    assert f"log-probability {logprobs[0]:.4g}" in viewer.text("#token") and "version 0" in viewer.text("#token")
    assert not viewer.all('#colour option[value="ratio"]') and not viewer.complaints()


def test_the_ratio_of_trainer_and_sampler(browser, tmp_path):
    made = rollout()
    sampler = [x for one in made.turns for x in one.logprobs]
    shifts = [0.0, 0.01, -0.1, 0.5, -1.0]
    trainer = {made.id: [[x + shifts[i % 5] for i, x in enumerate(sampler)]]}
    viewer = Viewer(browser, tmp_path / "ratio.html", told([made]), trainer=trainer)
    viewer.tokens()
    classes = viewer.classes(".path i")
    assert classes == [["down0", "up1", "down2", "up3", "down4"][i % 5] for i in range(len(sampler))]
    unequal = sum(i % 5 != 0 for i in range(len(sampler)))
    assert f"largest |trainer − sampler| 1.00, {unequal} differ" in viewer.text(".path")
    viewer.script("arguments[0].click()", viewer.all(".path i")[4])
    assert "ratio 0.36788" in viewer.text("#token")


def test_hostile_text_is_text(browser, tmp_path):
    made = rollout(question=HOSTILE, said=HOSTILE, reason=HOSTILE, calls=[(HOSTILE, HOSTILE, HOSTILE)], failure=HOSTILE,
                   environment=HOSTILE)  # fmt: skip
    viewer = Viewer(browser, tmp_path / "hostile.html", [Told(made, "dropped", HOSTILE)])
    text = viewer.text("article")
    assert text.count(HOSTILE) >= 6 and not viewer.all("img, body script:not([id]):not(:last-of-type)")
    viewer.tokens()
    assert HOSTILE in viewer.text(".path").replace("·", "")
    assert viewer.script("return window.pwned") is None and not viewer.complaints()
    refusal = viewer.script("try { document.body.innerHTML = '<b>x</b>' } catch (error) { return error.name }")
    assert refusal == "TypeError"


def test_an_address_and_keys_lead_to_a_group(viewer):
    viewer.open("#sums%2F1%2F0")
    assert viewer.one("#columns").get_attribute("data-group") == "sums/1/0"
    viewer.one("body").send_keys("j")
    viewer.until(lambda: viewer.one("#columns").get_attribute("data-group") == "web/2/0")
    viewer.one("body").send_keys("k")
    viewer.until(lambda: viewer.one("#columns").get_attribute("data-group") == "sums/1/0")
    assert viewer.driver.current_url.endswith("#sums%2F1%2F0")


def test_long_paths_are_shown_in_parts(browser, tmp_path):
    long = rollout(said="What is 12 + 30? The answer is 42. " * 500)
    assert long.num_sampled > 4000
    viewer = Viewer(browser, tmp_path / "long.html", told([long]))
    viewer.tokens()
    assert len(viewer.all(".path i")) == 4000
    more = viewer.one("button.more")
    assert more.text == f"{long.num_sampled - 4000} more tokens"
    viewer.script("arguments[0].click()", more)
    assert len(viewer.all(".path i")) == long.num_sampled


def test_light_dark_and_a_phone(viewer, tmp_path):
    colour = "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]"
    for theme, bright in (("light", True), ("dark", False)):
        features = [{"name": "prefers-color-scheme", "value": theme}]
        viewer.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        assert (viewer.script(colour) > 128) is bright
    viewer.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    phone = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    viewer.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        assert viewer.script("return document.documentElement.scrollWidth <= innerWidth + 1")
    finally:
        viewer.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_large_run_opens(browser, tmp_path):
    many = told(rollout(i % 8, index=i // 8, said=f"It is {i}.") for i in range(2000))
    viewer = Viewer(browser, tmp_path / "large.html", many)
    assert viewer.text("#found") == "2000 of 2000 episodes in 250 groups"
    viewer.fill("search", "it is 1999.")
    viewer.until(lambda: viewer.groups() == ["sums/249/0"])
