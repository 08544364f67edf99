"""What the search page says when a search fails, waits or is of another version, in a headless Chromium."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest
from selenium.webdriver.common.keys import Keys

from pipelines.service.settings import ServiceSettings
from tests.pipelines.chromium import Browser
from tests.pipelines.nightly_site import Site
from tests.pipelines.plain_corpus import write_object
from tests.pipelines.running_service import Served, serving

TOKEN = "a-token-of-some-length"


def test_the_services_own_words_explain_an_error(browser: Browser, served: Served) -> None:
    browser.open(f"{served.url}/#q=wing&k=100000")
    said = browser.wait_for_text("#trouble", "cannot be searched")
    error = served.search(queries=["wing"], k=100000)["error"]
    assert error["message"] in said and "100000" in said
    assert not browser.find("#again").is_displayed()  # the same question would get the same answer
    assert browser.texts(".hit") == []


def test_nothing_found_says_where_it_looked(browser: Browser, served: Served) -> None:
    browser.open(f"{served.url}/#q=wing&prefix=nowhere")
    browser.wait_for_text("#large", "Nothing found")
    assert "“nowhere”" in browser.find("#small").text
    assert browser.find("#status").text.startswith("No hits · ")


def test_without_a_connection_the_page_says_so_and_searches_once_it_is_back(browser: Browser, served: Served) -> None:
    browser.open(served.url)
    browser.wait_for_text("#large", "documents")
    browser.command(
        "Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1
    )
    browser.press("wing", Keys.ENTER)
    browser.wait_for_text("#trouble", "You are offline.")
    browser.command(
        "Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=-1, uploadThroughput=-1
    )
    assert browser.wait_for_hits()
    assert not browser.find("#trouble").is_displayed()


def test_a_service_that_is_gone_is_named_and_can_be_tried_again(browser: Browser, served_site: Site) -> None:
    with serving(ServiceSettings(served_site.root)) as gone:
        browser.open(gone.url)
        browser.wait_for_text("#large", "documents")
    browser.press("wing", Keys.ENTER)
    browser.wait_for_text("#trouble", "The service does not answer.")
    assert browser.find("#again").is_displayed()


def test_an_overloaded_service_is_asked_again_when_it_said(browser: Browser, served_site: Site) -> None:
    with serving(ServiceSettings(served_site.root, max_queue=64, max_batch=64)) as busy:
        browser.open(busy.url)
        browser.wait_for_text("#large", "documents")
        stop = threading.Event()

        def load() -> None:
            while not stop.is_set():
                busy.search(queries=["wing and flow " * 30] * 60)

        clients = [threading.Thread(target=load) for _ in range(3)]
        for client in clients:
            client.start()
        try:
            # Five queries do not fit beside sixty; one at a time might.
            browser.run(
                """const ask = fetch;
                window.fetch = (path, given) => ask(path, given?.body
                    ? {...given, body: JSON.stringify({...JSON.parse(given.body), queries: Array(5).fill("wing")})} : given);"""
            )
            browser.press("wing", Keys.ENTER)
            said = browser.wait_for_text("#trouble", "The service is busy.")
            assert re.search(r"Trying again in \d+ s", said)
        finally:
            stop.set()
            for client in clients:
                client.join()
        assert browser.wait_for_hits()
        assert not browser.find("#trouble").is_displayed()


def test_a_token_is_asked_for_and_kept_for_the_tab_only(
    browser: Browser, served_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGE_TEST_TOKEN", TOKEN)
    with serving(ServiceSettings(served_site.root, token_env="PAGE_TEST_TOKEN")) as closed:
        browser.open(f"{closed.url}/#q=wing")
        browser.wait("field for the token", lambda: browser.find("#token").is_displayed())
        assert browser.focused() == "#token"
        browser.press("not-the-token", Keys.ENTER)
        browser.wait_for_text("#trouble", "The token was refused.")
        browser.wait("focus", lambda: browser.focused() == "#token")
        browser.press(TOKEN, Keys.ENTER)
        browser.wait_for_hits()
        browser.wait_for_text("#about", "20 documents")
        assert not browser.find("#token-form").is_displayed()
        assert browser.run("return [localStorage.length, Object.values(sessionStorage), document.cookie]") == [
            0,
            [TOKEN],
            "",
        ]
        assert TOKEN not in browser.driver.current_url
    browser.open("about:blank")


def test_a_page_of_an_open_service_shows_no_field_for_a_token(browser: Browser, served: Served) -> None:
    browser.open(f"{served.url}/#q=wing")
    browser.wait_for_hits()
    assert not browser.find("#token-form").is_displayed()


def test_a_search_under_way_says_so_and_escape_stops_it(browser: Browser, served: Served) -> None:
    browser.open(served.url)
    browser.wait_for_text("#large", "documents")
    browser.command(
        "Network.emulateNetworkConditions", offline=False, latency=3000, downloadThroughput=-1, uploadThroughput=-1
    )
    browser.press("wing", Keys.ENTER)
    browser.wait_for_text("#status", "Searching")
    assert browser.find("#hits").get_attribute("aria-busy") == "true"
    browser.press(Keys.ESCAPE)
    browser.wait_for_text("#status", "Stopped.")
    assert browser.find("#hits").get_attribute("aria-busy") == "false"


def test_a_new_version_between_two_searches_is_said(browser: Browser, served_site: Site, tmp_path: Path) -> None:
    site = served_site.copied(tmp_path / "root")
    with serving(ServiceSettings(site.root, poll_s=0.1)) as changing:
        browser.open(f"{changing.url}/#q=wing")
        browser.wait_for_hits()
        assert browser.find("#status").text.endswith("v000001")
        write_object(tmp_path, "new.jsonl", [("new-1", "a new text of a wing")], 1)
        site.update(str(tmp_path / "new.jsonl"), append=True)
        browser.wait("swap", lambda: changing.get("/v1/index")["version"] == "v000002")
        browser.press("/", Keys.ENTER)
        browser.wait_for_text("#changed", "The index changed from v000001 to v000002 since the last answer.")
        assert browser.find("#status").text.endswith("v000002")
        browser.wait_for_text("#about", "v000002 · 21 documents")
        browser.press("/", Keys.ENTER)
        browser.wait("note to go", lambda: not browser.find("#changed").is_displayed())
