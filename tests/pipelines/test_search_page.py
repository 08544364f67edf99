"""The search page in a headless Chromium, in front of a real service of a small index. What it says of trouble: test_search_page_troubles.py."""

from __future__ import annotations

import re
from urllib.parse import quote

import pytest
from selenium.webdriver.common.keys import Keys

from pipelines.service.page import PAGE, search_page
from tests.pipelines.chromium import Browser
from tests.pipelines.running_service import (
    ARABIC,
    HOSTILE,
    HOSTILE_ID,
    JAPANESE,
    LINES,
    LONG_WORD,
    Served,
)

LEAST_CONTRAST = 4.5  # WCAG 2.2, AA, text of any size
PHONE = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}


def test_the_page_is_one_file_that_names_nothing_outside() -> None:
    page = PAGE.read_text(encoding="utf-8")
    addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.[\w/.-]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}  # the namespace of its icon, which is never fetched
    assert not re.search(
        r"<link(?! rel=\"icon\" href=\"data:)|@import|url\(|\bsrc=|innerHTML|outerHTML|insertAdjacent|\beval\b", page
    )
    assert len(page.encode()) < 40_000


def test_the_policy_of_the_page_lists_all_that_it_may_do() -> None:
    _, headers = search_page()
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy and "http" not in policy and "*" not in policy


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(scheme: str) -> None:
    light, dark = re.findall(r":root \{([^}]*)\}", PAGE.read_text(encoding="utf-8"))
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", light if scheme == "light" else dark))
    pairs = [(text, ground) for text in ("ink", "soft", "accent") for ground in ("ground", "raised", "tint")]
    pairs += [("warn", "warn-tint"), ("ink", "warn-tint")]
    low = {pair: ratio for pair in pairs if (ratio := _contrast(colours[pair[0]], colours[pair[1]])) < LEAST_CONTRAST}
    assert not low
    assert _contrast(colours["field"], colours["raised"]) >= 3  # borders of what can be written in


def _contrast(one: str, other: str) -> float:
    """The ratio of WCAG 2.2 for two #rrggbb."""
    lights = []
    for colour in (one, other):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def test_a_search_needs_the_keyboard_only(browser: Browser, served: Served) -> None:
    browser.open(served.url)
    browser.wait_for_text("#large", "Search 20 documents by meaning")
    assert browser.focused() == "#q"
    browser.press(LINES.split("\n")[0], Keys.ENTER)
    shown = browser.wait_for_hits()
    found = served.search(queries=["first line"])["results"][0]["hits"]
    assert shown == [hit["text"] for hit in found]
    assert browser.focused() == "#q"

    browser.press(Keys.ARROW_DOWN)
    assert browser.focused() == ".head 0"
    browser.press("j")
    assert browser.focused() == ".head 1"
    browser.press(Keys.ARROW_DOWN, "k", "k")
    assert browser.focused() == ".head 0"
    browser.press(Keys.END)
    assert browser.focused() == f".head {len(found) - 1}"
    browser.press(Keys.ARROW_DOWN)  # there is none below
    assert browser.focused() == f".head {len(found) - 1}"
    browser.press(Keys.HOME, Keys.ENTER)
    assert browser.run("return document.activeElement.getAttribute('aria-expanded')") == "true"
    browser.press(Keys.ESCAPE)
    assert browser.focused() == ".head 0"
    assert browser.run("return document.activeElement.getAttribute('aria-expanded')") == "false"
    browser.press(Keys.ESCAPE)
    assert browser.focused() == "#q"
    browser.press(Keys.ARROW_DOWN, "/")
    assert browser.focused() == "#q"
    browser.press("a/b")  # the box is selected, and a slash in it is a slash
    assert browser.find("#q").get_attribute("value") == "a/b"


def test_a_hit_shows_rank_id_chunk_score_and_source(browser: Browser, served: Served) -> None:
    browser.open(f"{served.url}/#q=wing+of+plane&k=3")
    browser.wait_for_hits()
    answer = served.search(queries=["wing of plane"], k=3)
    hits = answer["results"][0]["hits"]
    assert browser.texts(".rank") == ["1", "2", "3"]
    assert browser.texts(".id") == [hit["doc_id"] for hit in hits]
    assert browser.texts(".score") == [f"score {hit['score']:.3f}" for hit in hits]
    assert browser.texts(".source") == [hit["source"] for hit in hits] == ["docs.jsonl"] * 3
    status = browser.find("#status").text
    assert re.fullmatch(
        r"3 hits · nprobe 3 · server [\d.,]+ ms \(.*encode.*\) · round trip [\d.,]+ ms · v\d+", status
    ), status
    assert status.endswith(answer["version"])
    assert (
        browser.find("#about").text
        == f"{answer['version']} · 20 documents · {served.get('/v1/index')['model']['name']}"
    )


def test_an_open_hit_shows_all_facts_as_text_to_select(browser: Browser, served: Served) -> None:
    browser.open(f"{served.url}/#q=wing+of+plane&k=1")
    browser.wait_for_hits()
    assert not browser.find(".facts").is_displayed()
    browser.press(Keys.ARROW_DOWN, Keys.ENTER)
    assert browser.find(".facts").is_displayed()
    hit = served.search(queries=["wing of plane"], k=1)["results"][0]["hits"][0]
    names = ["doc_id", "chunk_no", "score", "source"]
    assert browser.texts(".facts dt") == names
    shown = browser.texts(".facts dd")
    assert float(shown.pop(2)) == pytest.approx(hit["score"], abs=1e-6)
    assert shown == [str(hit[name]) for name in names if name != "score"]


def test_a_document_that_looks_like_markup_stays_text(browser: Browser, served: Served) -> None:
    browser.open(f"{served.url}/#q={quote(HOSTILE)}")
    shown = browser.wait_for_hits()
    assert HOSTILE in shown and HOSTILE_ID in browser.texts(".id")
    at = shown.index(HOSTILE)
    browser.run("document.querySelectorAll('.head')[arguments[0]].click()", at)
    assert browser.texts(".hit .text")[at] == HOSTILE
    assert browser.run("return document.querySelectorAll('#hits :is(img, script, b, a, iframe)').length") == 0
    assert browser.run("return window.owned") is None


def test_markup_could_not_run_if_a_fault_let_it_in(browser: Browser, served: Served) -> None:
    browser.open(served.url)
    assert browser.run(
        "try { document.body.innerHTML = '<b>x</b>'; return 'written' } catch (error) { return error.name }"
    ) == ("TypeError")
    browser.run(
        """for (const [tag, fields] of [["script", {text: "window.owned = 1"}], ["img", {src: "http://127.0.0.2:9/x.png"}]]) {
             try { document.body.append(Object.assign(document.createElement(tag), fields)); } catch { }
           }"""
    )
    assert browser.run("return window.owned") is None
    said = browser.wait("violation", lambda: [entry["message"] for entry in browser.logged("browser")])
    assert any("Content Security Policy" in message for message in said), said


def test_no_request_leaves_for_another_place(browser: Browser, served: Served) -> None:
    browser.open(f"{served.url}/#q={quote(HOSTILE)}")
    browser.wait_for_hits()
    asked = browser.requested()
    assert f"{served.url}/v1/search" in asked
    assert [address for address in asked if not address.startswith((served.url + "/", "data:", "about:"))] == []
    assert browser.logged("browser") == []  # neither an error nor a violation of the policy
    assert browser.driver.get_cookies() == []


def test_the_address_holds_question_and_settings(browser: Browser, served: Served) -> None:
    browser.open(served.url)
    browser.wait_for_text("#effort", "0.99")
    browser.press("wing of plane", Keys.ENTER)
    assert len(browser.wait_for_hits()) == 10
    browser.run("document.querySelector('#k').value = ''")
    browser.find("#k").send_keys("4", Keys.TAB)
    browser.wait("four hits", lambda: len(browser.texts(".hit")) == 4)
    browser.find("#prefix").send_keys("plain-1", Keys.ENTER)
    browser.wait("ids with the prefix", lambda: all(i.startswith("plain-1") for i in browser.texts(".id")))
    browser.find("#effort").send_keys("0.99")
    address = browser.wait("recall", lambda: "recall" in browser.driver.current_url and browser.driver.current_url)
    assert address == f"{served.url}/#q=wing+of+plane&k=4&recall=0.99&prefix=plain-1"
    browser.wait_for_hits()
    shown = browser.texts(".id")

    browser.open(address)
    browser.wait_for_hits()
    assert browser.texts(".id") == shown
    assert [browser.find(f"#{name}").get_attribute("value") for name in ("q", "k", "effort", "prefix")] == [
        "wing of plane",
        "4",
        "0.99",
        "plain-1",
    ]


def test_back_and_forward_repeat_the_search(browser: Browser, served: Served) -> None:
    browser.open(f"{served.url}/#q=plane&k=2")
    first = browser.wait_for_hits()
    browser.find("#q").clear()
    browser.find("#q").send_keys(JAPANESE[:20], Keys.ENTER)
    browser.wait("other hits", lambda: browser.texts(".hit .text") not in ([], first))
    browser.driver.back()
    browser.wait("the first hits", lambda: browser.texts(".hit .text") == first)
    assert browser.find("#q").get_attribute("value") == "plane"
    browser.driver.forward()
    browser.wait("the other hits", lambda: browser.texts(".hit .text") not in ([], first))


def test_nprobe_can_be_given_in_place_of_a_recall(browser: Browser, served: Served) -> None:
    browser.open(f"{served.url}/#q=plane&nprobe=1")
    browser.wait_for_hits()
    assert browser.find("#nprobe").get_attribute("value") == "1"
    browser.find("#nprobe").send_keys(Keys.BACKSPACE, "77", Keys.ENTER)
    assert "nprobe must be" in browser.wait_for_text("#trouble", "77")


def test_a_long_text_is_clamped_and_opens_whole_with_its_lines(browser: Browser, served: Served) -> None:
    browser.open(f"{served.url}/#q={quote(LINES)}&k=20")
    at = browser.wait_for_hits().index(LINES)
    height = "return document.querySelectorAll('.text')[arguments[0]].getBoundingClientRect().height"
    line = browser.run("return parseFloat(getComputedStyle(document.querySelector('.text')).lineHeight)")
    assert browser.run(height, at) <= 3.1 * line
    browser.run("document.querySelectorAll('.head')[arguments[0]].click()", at)
    assert browser.run(height, at) >= 4.9 * line  # its own four lines, and the last of them wraps


def test_each_script_is_laid_out_in_its_own_direction(browser: Browser, served: Served) -> None:
    browser.open(f"{served.url}/#q={quote(ARABIC)}&k=20")
    shown = browser.wait_for_hits()
    directions = browser.run("return [...document.querySelectorAll('.text')].map((e) => getComputedStyle(e).direction)")
    assert directions[shown.index(ARABIC)] == "rtl"
    assert directions[shown.index(JAPANESE)] == "ltr"
    assert browser.run("return getComputedStyle(document.querySelector('#q')).direction") == "rtl"


def test_a_phone_needs_no_sideways_scrolling(browser: Browser, served: Served) -> None:
    browser.open(f"{served.url}/#q={LONG_WORD}&k=20")
    browser.wait_for_hits()
    browser.command("Emulation.setDeviceMetricsOverride", **PHONE)
    browser.run("for (const head of document.querySelectorAll('.head')) head.click()")
    assert browser.run("return innerWidth") == PHONE["width"]
    assert browser.run("return document.documentElement.scrollWidth") == PHONE["width"]
    wide = browser.run(
        "return [...document.querySelectorAll('main *')].filter((e) => e.getBoundingClientRect().right > innerWidth).map((e) => e.outerHTML)"
    )
    assert wide == []


def test_dark_and_light_follow_the_system(browser: Browser, served: Served) -> None:
    lights = {}
    for scheme in ("light", "dark"):
        browser.open(f"{served.url}/#q=wing")
        browser.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        browser.wait_for_hits()
        colours = browser.run(
            "return [['body', 'backgroundColor'], ['.text', 'color'], ['#q', 'color']].map(([selector, name]) =>"
            " getComputedStyle(document.querySelector(selector))[name])"
        )
        lights[scheme] = [sum(map(int, re.findall(r"\d+", colour)[:3])) / 3 for colour in colours]
    assert lights["light"][0] > 240 and max(lights["light"][1:]) < 60
    assert lights["dark"][0] < 40 and min(lights["dark"][1:]) > 200


def test_nothing_moves_for_those_who_want_less_motion(browser: Browser, served: Served) -> None:
    browser.open(served.url)
    moving = "document.body.classList.add('loading'); return getComputedStyle(document.querySelector('.box'), '::after').animationName"
    assert browser.run(moving) == "sweep"
    browser.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": "reduce"}])
    assert browser.run(moving) == "none"


def test_everything_that_takes_the_focus_has_a_name(browser: Browser, served: Served) -> None:
    browser.open(f"{served.url}/#q=wing&k=2&nprobe=2")
    browser.wait_for_hits()
    nodes = browser.command("Accessibility.getFullAXTree")["nodes"]
    named: dict[str, list[str]] = {}
    for node in nodes:
        properties = {entry["name"]: entry["value"].get("value") for entry in node.get("properties", [])}
        if properties.get("focusable") and node["role"]["value"] not in ("RootWebArea", "MenuListPopup", "option"):
            named.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value"))
    assert all(name for names in named.values() for name in names), named
    assert named["searchbox"] == ["What to search for"]
    assert named["spinbutton"] == ["hits", "lists probed"]
    assert named["combobox"] == ["recall"] and named["textbox"] == ["ids beginning with"]
    assert len(named["button"]) == 3 and named["button"][0] == "Search"
    assert re.fullmatch(r"1 plain-\d+ score 0\.\d+", named["button"][1]), named["button"]
    roles = [node["role"]["value"] for node in nodes if not node["ignored"]]
    assert {"main", "search", "status", "list", "heading"} <= set(roles)
