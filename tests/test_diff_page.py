"""docs/diff.html, which shows any two scripts side by side: its data is the scripts, and a browser shows it."""

import ast
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "benchmarks" / "diff.py"
PAGE = ROOT / "docs" / "diff.html"
SCRIPTS = """ppo_continuous.py ppo_klpen.py ppo_multidiscrete_joint_loss.py hppo_hybrid.py vmpo.py
    vmpo_lstm.py""".split()
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
QUIET = """headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking
    disable-component-update disable-sync""".split()


@pytest.fixture(scope="module")
def data() -> dict:
    return json.loads(PAGE.read_text().split('id="data">')[1].split("</script>")[0])


def tool(*argv) -> str:
    return subprocess.run([sys.executable, TOOL, *argv], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_the_page_is_that_of_the_present_scripts(tmp_path):
    tool("--html", tmp_path / "diff.html")
    fresh = (tmp_path / "diff.html").read_bytes()
    assert fresh == PAGE.read_bytes(), "out of date: python benchmarks/diff.py --html docs/diff.html"


def test_the_page_is_small_and_loads_nothing_else():
    text = PAGE.read_text()
    assert len(text.encode()) < 500_000
    head, script = text.split("<script type=")[0], text.rsplit("<script>", 1)[1]
    assert "<style>" in head and '"use strict"' in script
    assert not [word for word in ("src=", "<link", "@import", "url(", "fetch(", "import(") if word in head + script]


def test_the_page_has_each_script_to_the_byte(data):
    assert list(data["scripts"]) and set(data["scripts"]) == set(SCRIPTS)
    for name, parts in data["scripts"].items():
        lines = (ROOT / name).read_text().splitlines()
        without_banners = [line for line in lines if not line.startswith("# =====")]
        assert len(lines) == len(without_banners) + len(parts) - 1
        assert [data["lines"][k] for numbers in parts.values() for k in numbers] == without_banners


@pytest.mark.parametrize("a, b", list(itertools.permutations(SCRIPTS, 2)))
def test_a_pair_s_edits_make_the_one_script_of_the_other(data, a, b):
    for part, edits in data["edits"][f"{a},{b}"].items():
        old, new, made, at = data["scripts"][a][part], data["scripts"][b][part], [], 0
        for i1, i2, j1, j2 in edits:
            made += old[at:i1] + new[j1:j2]
            at = i2
        assert made + old[at:] == new


@pytest.mark.parametrize("name", SCRIPTS)
def test_beside_the_loss_stands_the_objective_from_the_docstring(data, name):
    objective = data["objectives"][name]
    assert objective in ast.get_docstring(ast.parse((ROOT / name).read_text()))
    assert "imise" in objective.partition("\n\n")[0]  # maximise or minimise, and then the equation
    assert "\n\n    " in objective and "python" not in objective


@pytest.mark.parametrize("argv", [["--html", "missing/diff.html"], ["--table", "--html", "diff.html"]])
def test_wrong_arguments_are_one_line_and_write_nothing(argv, tmp_path):
    result = subprocess.run([sys.executable, TOOL, *argv], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (BROWSER and DRIVER):
        pytest.skip("needs chromium or google-chrome, and chromedriver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in [*QUIET, f"user-data-dir={tmp_path_factory.mktemp('browser')}"]:
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def visit(browser, fragment="", width=1440, colours="light"):
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 800}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    feature = {"name": "prefers-color-scheme", "value": colours}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get("about:blank")
    browser.get(f"file://{PAGE}{fragment}")


def texts(browser, selector: str) -> list[str]:
    """The text of all such elements, whether folded or not."""
    return browser.execute_script(f"return [...document.querySelectorAll('{selector}')].map(e => e.textContent)")


def visible(browser, selector: str) -> int:
    """How many such elements are shown."""
    return browser.execute_script(
        f"return [...document.querySelectorAll('{selector}')].filter(e => e.checkVisibility()).length"
    )


def chosen(browser) -> list[str]:
    return [browser.execute_script(f"return document.getElementById('{name}').value") for name in "ab"]


@pytest.mark.parametrize("a, b", [("ppo_klpen.py", "vmpo.py"), ("hppo_hybrid.py", "ppo_continuous.py")])
def test_two_scripts_that_are_chosen_show_what_differs_in_their_losses(browser, a, b):
    from selenium.webdriver.support.ui import Select

    visit(browser)
    Select(browser.find_element("id", "a")).select_by_visible_text(a)
    Select(browser.find_element("id", "b")).select_by_visible_text(b)
    expected = tool(a, b).split("# Loss: ")[1].split("\n# ")[0].splitlines()[1:]
    assert texts(browser, "#Loss .old .line") == [line[2:] for line in expected if line.startswith("- ")]
    assert texts(browser, "#Loss .new .line") == [line[2:] for line in expected if line.startswith("+ ")]
    assert visible(browser, "#Loss .old .line") > 0 and texts(browser, "#Loss .objective b") == [a, b]
    assert browser.execute_script("return location.hash") == f"#{a},{b}"
    assert not browser.get_log("browser")


def test_line_numbers_are_the_files(browser):
    visit(browser, "#vmpo.py,vmpo_lstm.py")
    for column, script in enumerate(("vmpo.py", "vmpo_lstm.py"), 1):
        cells = f"main .row:not(.objective) > :nth-child({column}) .line"
        shown = browser.execute_script(
            f"return [...document.querySelectorAll('{cells}')].map(e => [+e.dataset.n, e.textContent])"
        )
        lines = enumerate((ROOT / script).read_text().splitlines(), 1)
        assert shown == [[n, line] for n, line in lines if not line.startswith("# =====")]


def test_the_words_that_differ_are_marked(browser):
    visit(browser, "#ppo_continuous.py,ppo_klpen.py")
    assert "+ agent.kl_beta * kl " in texts(browser, "#Loss .new ins")
    assert not texts(browser, "#Update del") and "ppo_continuous" in texts(browser, "#Header .old del")


def test_equal_sections_are_folded_and_a_link_opens_one(browser):
    visit(browser, "#ppo_continuous.py,ppo_klpen.py")
    assert visible(browser, "#Update .line") == 0 and visible(browser, "#Loss .line") > 20
    visit(browser, "#ppo_continuous.py,ppo_klpen.py,Update")
    assert visible(browser, "#Update .line") > 100


def test_a_script_is_not_changed_against_itself(browser):
    visit(browser, "#vmpo.py,vmpo.py")
    assert texts(browser, "#total") == ["0 lines differ"] and not texts(browser, ".change")


def test_the_keys_go_from_change_to_change_and_to_the_choice(browser):
    from selenium.webdriver.common.keys import Keys

    visit(browser, "#ppo_continuous.py,ppo_klpen.py")
    places, body = [], browser.find_element("tag name", "body")
    for key in ("j", Keys.ARROW_RIGHT, "j", "k", Keys.ARROW_LEFT):
        body.send_keys(key)
        places += [text.split(" / ")[0] for text in texts(browser, "#place")]
    assert places == ["1", "2", "3", "2", "1"]
    body.send_keys("/")
    browser.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    assert chosen(browser) == ["ppo_klpen.py", "ppo_klpen.py"]


def test_every_change_can_be_reached_by_key(browser):
    visit(browser, "#ppo_continuous.py,ppo_klpen.py")
    count = len(texts(browser, ".change"))
    for _ in range(count + 1):
        browser.find_element("tag name", "body").send_keys("j")
    assert texts(browser, "#place") == [f"{count} / {count}"]


def test_a_phone_gets_one_column_that_fits(browser):
    pair = "#ppo_continuous.py,ppo_multidiscrete_joint_loss.py"
    visit(browser, pair)
    both = visible(browser, "#Loss .same .line")
    assert browser.execute_script("return getComputedStyle(document.querySelector('.row')).display") == "grid"
    visit(browser, pair, width=390)
    assert visible(browser, "#Loss .same .line") == both / 2  # equal lines stand once
    assert browser.execute_script("return document.documentElement.scrollWidth") == 390


def test_dark_mode_follows_the_system(browser):
    lightness = []
    for colours in ("light", "dark"):
        visit(browser, colours=colours)
        for name in ("backgroundColor", "color"):
            rgb = browser.execute_script(f"return getComputedStyle(document.body).{name}").strip("rgb()").split(",")
            lightness.append(sum(map(int, rgb)) / 3)
    back, text, dark_back, dark_text = lightness
    assert back > 200 > 60 > text and dark_back < 60 < 200 < dark_text
