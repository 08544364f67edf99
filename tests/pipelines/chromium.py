"""A headless Chromium that looks for nothing online, driven by Debian's own driver."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.remote.webelement import WebElement

WAIT_S = 20.0
ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",  # the tests may run as root, where Chromium refuses to start with it
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1100,900",
)


class Browser:
    """One window of a browser with a profile of its own."""

    def __init__(self, profile: Path) -> None:
        browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
        if browser is None or driver is None:
            pytest.skip("the search page is tested in chromium: apt-get install chromium chromium-driver")
        options = webdriver.ChromeOptions()
        options.binary_location = browser
        for argument in (*ARGUMENTS, f"--user-data-dir={profile}"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(driver))

    def close(self) -> None:
        self.driver.quit()

    def open(self, address: str) -> None:
        """Load the address anew, also when only its fragment is another, in the state of a new tab."""
        self.driver.get("about:blank")
        self.command(
            "Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=-1, uploadThroughput=-1
        )
        self.command("Emulation.clearDeviceMetricsOverride")
        self.command("Emulation.setEmulatedMedia", features=[])
        self.logged("browser")
        self.logged("performance")
        self.driver.get(address)

    def run(self, script: str, *arguments: Any) -> Any:
        """What the script returns."""
        return self.driver.execute_script(script, *arguments)

    def command(self, name: str, **arguments: Any) -> Any:
        """Answer of a command of the DevTools protocol."""
        return self.driver.execute_cdp_cmd(name, arguments)

    def press(self, *keys: str) -> None:
        """Press keys where the focus is, whatever that is."""
        ActionChains(self.driver).send_keys(*keys).perform()

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        """The text nodes' content below each element that matches, whether it is seen or not."""
        return list(self.run("return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector))

    def focused(self) -> str:
        """`#id` or `.class` of what has the focus, with its place among its kind: `.head 0`."""
        return str(
            self.run(
                """const at = document.activeElement;
                if (at.id) return "#" + at.id;
                const all = [...document.getElementsByClassName(at.className)];
                return at === document.body ? "body" : `.${at.className} ${all.indexOf(at)}`;"""
            )
        )

    def wait(self, what: str, condition: Callable[[], Any]) -> Any:
        """The first true value of the condition. AssertionError, with what the page says, when there is none in time."""
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            if value := condition():
                return value
            time.sleep(0.02)
        raise AssertionError(f"no {what} within {WAIT_S:.0f} s; the page says:\n{self.find('body').text}")

    def wait_for_hits(self) -> list[str]:
        """Texts of the hits, once the search under way has ended with some."""
        self.wait(
            "hits", lambda: self.run("return !document.body.classList.contains('loading')") and self.texts(".hit")
        )
        return self.texts(".hit .text")

    def wait_for_text(self, selector: str, text: str) -> str:
        """Seen text of the element, once it contains this."""
        return str(
            self.wait(f"{text!r} in {selector}", lambda: text in self.find(selector).text and self.find(selector).text)
        )

    def logged(self, kind: str) -> list[dict[str, Any]]:
        """What was logged since the last call: `browser` (the console), `performance` (DevTools events)."""
        return list(self.driver.get_log(kind))

    def requested(self) -> list[str]:
        """Addresses that pages asked for since the last call to this or to `open`."""
        events = [json.loads(entry["message"])["message"] for entry in self.logged("performance")]
        return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
