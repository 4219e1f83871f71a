"""A reader in front of the page: headless Chromium, and what one does and sees in it."""

import shutil

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="no browser here: apt-get install chromium chromium-driver"
)
QUIET = ("disable-gpu", "disable-quic", "no-first-run", "disable-background-networking", "disable-component-update",
         "disable-sync", "no-sandbox", "headless", "disable-dev-shm-usage")  # fmt: skip


def start_browser(profile):
    """A browser with a profile of its own."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (*QUIET, f"user-data-dir={profile}"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))


class Reader:
    """What someone in front of the page does and sees."""

    def __init__(self, driver, url):
        self.driver = driver
        driver.get(url + "page/icon.svg")  # of the same origin, so with the same storage
        driver.execute_script("localStorage.clear(); sessionStorage.clear()")
        driver.get(url)
        driver.get_log("browser")
        self.size(1200, 800)

    def one(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def until(self, condition):
        """Looks again also where what it looks at is just being drawn anew."""
        wait = WebDriverWait(self.driver, 60, poll_frequency=0.1, ignored_exceptions=[StaleElementReferenceException])
        return wait.until(lambda _: condition())

    def say(self, text):
        self.one("#say").send_keys(text, Keys.ENTER)

    def answered(self, text):
        """Waits until the last answer has come to its end and holds a text."""
        self.until(lambda: not self.one("#stop").is_displayed() and text in self.last())

    def last(self):
        answers = self.all(".answer .text")
        return answers[-1].text if answers else ""

    def press(self, name):
        """Presses the last button of that name that can be seen."""
        shown = lambda: [b for b in self.all(f'button[aria-label="{name}"]') if b.is_displayed()]
        self.until(shown)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'}); arguments[0].click()", shown()[-1])

    def size(self, width, height, mobile=False):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def theme(self, name):
        features = [{"name": "prefers-color-scheme", "value": name}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def complaints(self):
        """What the browser's console says: errors of scripts, and violations of the policy."""
        return [line["message"] for line in self.driver.get_log("browser") if line["level"] == "SEVERE"]
