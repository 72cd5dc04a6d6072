"""A run's page in a real browser: it opens without an error, sorts, unfolds and plays, on a phone and a desk.

Chromium comes from the system (Debian: chromium and chromium-driver); without it the tests say so and skip.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.files import write_json
from harness.records.run import TOKENS_FILE, RunRecord, TokenTexts
from harness.report.pages.run import chosen_generations, render_page
from harness.tests.fake_judgement import VERDICTS, judge
from harness.tests.fake_record import write_fake_record

selenium = pytest.importorskip("selenium.webdriver", reason="the group browser is not installed")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None or DRIVER is None, reason="no chromium with its chromedriver"),
]


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    folder = tmp_path_factory.mktemp("page") / "record"
    made = write_fake_record(folder, rounds=1, num_prompts=6)
    ids = {token for one in made.generations for token in one.token_ids}
    write_json(folder / TOKENS_FILE, TokenTexts(texts={token: f" {token}" for token in ids}))
    return RunRecord(folder)


@pytest.fixture(scope="module")
def page(record: RunRecord) -> Path:
    judgement = judge(record).model_copy(update={"verdicts": VERDICTS, "checks": ()})
    path = record.folder / "report.html"
    path.write_text(render_page(record, judgement), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = selenium.ChromeOptions()
    options.binary_location = BROWSER
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(executable_path=DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(params=[(390, 800), (1280, 900)], ids=["phone", "desk"])
def opened(request: pytest.FixtureRequest, browser: Any, page: Path) -> Any:
    browser.set_window_size(*request.param)
    began = time.monotonic()
    browser.get(page.as_uri())
    assert time.monotonic() - began < 10
    yield browser
    assert browser.get_log("browser") == [], "errors in the console"


def texts(browser: Any, selector: str) -> list[str]:
    return [one.text for one in browser.find_elements("css selector", selector)]


def test_it_opens_within_the_window(opened: Any) -> None:
    assert texts(opened, "h1") == ["Medusa claims tested: suite fake"]
    wide = opened.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    assert wide <= 0, "nothing but tables scrolls sideways, and these within themselves"
    assert "times as fast as vanilla" in texts(opened, ".answer")[0]


def test_tables_sort_both_ways(opened: Any) -> None:
    table = opened.find_element("css selector", "table")
    button = next(one for one in table.find_elements("css selector", "th button") if one.text == "nodes")

    def column() -> list[float]:
        rows = table.find_elements("css selector", "tbody tr")
        return [float(row.find_elements("tag name", "td")[2].text) for row in rows]

    opened.execute_script("arguments[0].scrollIntoView()", button)
    button.click()
    assert column() == sorted(column())
    button.click()
    assert column() == sorted(column(), reverse=True)
    assert button.find_element("xpath", "..").get_attribute("aria-sort") == "descending"


def test_verdicts_unfold_by_key(opened: Any) -> None:
    summary = opened.find_element("css selector", "details summary")
    opened.execute_script("arguments[0].scrollIntoView(); arguments[0].focus()", summary)
    summary.send_keys(selenium.Keys.ENTER)
    details = summary.find_element("xpath", "..")
    assert details.get_attribute("open") is not None
    assert "Form of the test" in details.text


def test_the_player_steps_plays_and_lights_the_path(opened: Any, record: RunRecord) -> None:
    first, _ = chosen_generations(record)[0]
    player = opened.find_element("id", "player")
    opened.execute_script("arguments[0].scrollIntoView(); arguments[0].focus()", player)

    def shown() -> list[int]:
        return [int(word) for word in opened.find_element("id", "ours").text.split()]

    assert shown() == [first.token_ids[0]]
    known = 1
    for kept in first.step_tokens[:3]:
        player.send_keys(selenium.Keys.ARROW_RIGHT)
        known += kept
        assert shown() == list(first.token_ids[:known])
        lit = opened.find_elements("css selector", "#tree circle.lit")
        assert len(lit) == kept, "the root and the accepted drafts"
    player.send_keys(selenium.Keys.ARROW_LEFT)
    assert shown() == list(first.token_ids[: known - first.step_tokens[2]])
    opened.find_element("id", "play").click()
    deadline = time.monotonic() + 10
    while len(shown()) < first.num_tokens and time.monotonic() < deadline:
        opened.execute_script("document.getElementById('pace').value = '1'")
        time.sleep(0.1)
    assert shown() == list(first.token_ids)
    vanilla = opened.find_element("id", "vanilla").text.split()
    assert 0 < len(vanilla) <= first.num_tokens


def test_another_text_can_be_chosen(opened: Any, record: RunRecord) -> None:
    options = opened.find_elements("css selector", "#choice option")
    assert len(options) == len(chosen_generations(record))
    opened.execute_script(
        "const choice = document.getElementById('choice'); choice.value = arguments[0];"
        "choice.dispatchEvent(new Event('change'))",
        str(len(options) - 1),
    )
    last, _ = chosen_generations(record)[-1]
    assert opened.find_element("id", "ours").text.split() == [str(last.token_ids[0])]
