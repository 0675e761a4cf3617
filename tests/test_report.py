"""The report of a prediction: what the file holds, and how it behaves in a real browser where one is installed."""

import base64
import dataclasses
import hashlib
import io
import itertools
import json
import re
import shutil
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from matplotlib.ticker import MaxNLocator
from PIL import Image
from scipy import stats
from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from basics.console import UserError
from lmd import methods
from lmd import report as reports
from lmd.report import BlindSpot, Picture, Report

HOSTILE = [
    "</script><script>document.title='owned'</script>.png",
    "<img src=x onerror=\"document.title='owned'\">.png",
    "<!--<script></script x",
    "a\u202egnp.exe",
    "line\nbreak\udce9.png",
    "{{ 7 * 7 }}&amp;'\".png",
]


def example(images=200, n=199, rate=0.05, **changes):
    """A report of `images` new images, a tenth of them foreign, the first few of hostile names."""
    rng = np.random.default_rng(images + n)
    calibration, score = rng.gamma(6, 1, n).round(2), rng.gamma(6, 1, images).round(2)  # rounded: there are ties
    score[: images // 10] += 10
    p_value = (1 + (calibration >= score[:, None]).sum(1)) / (n + 1)
    names = [f"incoming/img_{i}.png" for i in range(images)]
    names[: len(HOSTILE)] = HOSTILE[:images]
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8)
    heat = np.linspace(0, 1, 64).reshape(8, 8)
    rows = reports.pictured(p_value, score, rate) if "pictures" not in changes else []
    made = Report(
        sentences=["12 of 200 images are flagged", "The folder differs."],
        files=names,
        score=score,
        p_value=p_value,
        calibration=calibration,
        rate=rate,
        parts={"structure <b>": rng.random(images), "file size": rng.random(images)},
        skipped=[("<i>broken</i>.jpg", "not an image, or damaged")],
        pictures=[Picture(int(row), ramp, 255 - ramp, heat, "its <u>structure</u>") for row in rows],
        blind_spots=[BlindSpot("noise", 1.0, 100), BlindSpot("<s>blur</s>", 0.125, 80)],
        facts=[("command", "python predict.py --images '<script>'"), ("torch", "2.15.0")],
        decide_again="python predict.py --output results/",
    )
    return dataclasses.replace(made, **changes)


class Page(HTMLParser):
    """The elements of a page, and the text of its scripts."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.lasttag == "script" and self.cdata_elem:
            self.scripts[-1] += data
        else:
            self.text += data

    @property
    def data(self):
        return json.loads(self.scripts[0])


def page_of(report):
    return Page(reports.render(report))


def decoded(text):
    return np.array(Image.open(io.BytesIO(base64.b64decode(text))))


# ------------------------------------------------------------------------------------------------------ the file


def test_hostile_text_stays_text():
    page = page_of(example(title="<script>x</script>", sentences=["<script>y</script>", "z<b>"]))
    assert len(page.scripts) == 2
    assert not set(page.scripts[0]) & set("<>&")
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"img", "u", "s", "iframe", "object", "embed"}
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert page.data["files"][:6] == [*HOSTILE[:3], r"a\u202egnp.exe", r"line\nbreak\xe9.png", HOSTILE[5]]
    for text in ("<script>x</script>", "<script>y</script>", "z<b>", "<i>broken</i>.jpg", "<s>blur</s>", "'<script>'"):
        assert text in page.text


def test_nothing_is_loaded_and_one_script_may_run():
    page = page_of(example())
    assert {tag for tag, _ in page.elements} >= {"title", "main", "h1", "caption", "label"}
    links = [value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href")]
    assert set(links) == {"#decision", "data:,"}
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; script-src 'sha256-{digest}';")


def test_pictures_are_what_was_given():
    rng = np.random.default_rng(0)
    grey, colour = rng.integers(0, 256, (9, 7, 1), np.uint8), rng.integers(0, 256, (9, 7, 3), np.uint8)
    heat = np.zeros((9, 7))
    heat[0, 0] = 1
    pictures = [Picture(1, colour, None, heat), Picture(0, grey, colour)]
    entries = page_of(example(1000, p_value=np.full(1000, 0.5), pictures=pictures, score=np.arange(1000.0))).data[
        "gallery"
    ]
    assert [entry["row"] for entry in entries] == [1, 0], "of one p-value, the larger score first"
    assert "reconstruction" not in entries[0]
    assert "map" not in entries[1]
    np.testing.assert_array_equal(decoded(entries[0]["original"]), colour)
    np.testing.assert_array_equal(decoded(entries[1]["original"]), grey[..., 0])
    np.testing.assert_array_equal(decoded(entries[1]["reconstruction"]), colour)
    drawn = decoded(entries[0]["map"])
    unchanged = colour.mean(2).round()  # where the map is 0 the original shows, in grey
    assert abs(drawn.astype(int) - unchanged[..., None])[heat == 0].max() <= 0
    yellow = 0.85 * 255 * np.array([0.988362, 0.998364, 0.644924])  # the colour map's last
    np.testing.assert_allclose(drawn[0, 0], yellow + 0.15 * colour[0, 0].mean(), atol=1)


def test_colours_and_ticks_are_matplotlibs():
    """The colours within 7 of 255."""
    heat = np.linspace(0, 1, 256).reshape(16, 16)
    drawn = reports._overlay(np.zeros((16, 16, 3), np.uint8), heat)
    expected = 0.85 * heat[..., None] * 255 * matplotlib.colormaps["inferno"](heat)[..., :3]
    np.testing.assert_allclose(drawn, expected, atol=7)
    rng = np.random.default_rng(0)
    lows, widths = rng.normal(size=200) * 10 ** rng.uniform(-3, 3, 200), 10 ** rng.uniform(-2, 4, 200)
    for low, width in zip(lows, widths, strict=True):
        ticks = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, low + width)
        expected = ticks[(ticks >= low) & (ticks <= low + width)]
        np.testing.assert_allclose(reports._round_numbers(low, low + width), expected, atol=1e-9 * width)


def test_parts_are_explained():
    report = example(meanings={"file size": "size: its <b>file</b> is large"})
    assert "p of file sizesize: its <b>file</b> is large" in " ".join(page_of(report).text.split())
    assert "The score combines these parts" not in page_of(example()).text


def test_large_pictures_are_shrunk_and_too_many_left_out(monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    entry = page_of(example(pictures=[Picture(0, noise)])).data["gallery"][0]
    assert decoded(entry["original"]).shape == (85, 128, 3)
    monkeypatch.setattr(reports, "_MOST_BYTES", 3 * len(entry["original"]))
    page = page_of(example(pictures=[Picture(row, noise) for row in range(5)]))
    assert len(page.data["gallery"]) == 3
    assert "2 more pictures were left out" in page.text


@pytest.mark.parametrize("n", [1, 10, 99, 200, 1000, 5000])
@pytest.mark.parametrize("rate", [0, 0.004321, 0.01, 0.05, 0.7])
def test_stops_decide_as_the_p_values(n, rate):
    report = example(300, n, rate, pictures=[])
    data = page_of(report).data
    stops, ranks = data["stops"], np.array(data["rank"])
    for stop in stops:
        flagged = report.p_value <= stop["rate"]
        np.testing.assert_array_equal(ranks <= stop["rank"], flagged)
        assert float(stop["exact"]) == stop["rate"]
        if stop["rank"] and n < 1000:  # four digits hold the scores of this example
            np.testing.assert_array_equal(report.score > float(stop["threshold"]), flagged)
    assert stops[data["start"]]["rate"] == rate
    decisions = [stop["rank"] for stop in stops]
    assert decisions == sorted(set(decisions)), "each stop decides otherwise than the one before"
    assert {1, (n + 1) // 2} <= set(decisions), "from the smallest possible rate to a half"


@pytest.mark.parametrize(
    ("n", "rate", "band"),
    [
        (200, 0.05, "2.4 % to 8.4 %"),  # as published for split conformal p-values
        (1000, 0.05, "3.7 % to 6.4 %"),
        (1000, 0.01, "0.48 % to 1.7 %"),
        (5000, 0.01, "0.74 % to 1.3 %"),
        (19, 0.05, "0.13 % to 18 %"),  # Beta(1, 19): 1 - .975^(1/19) and 1 - .025^(1/19)
        (1, 0.5, "2.5 % to 98 %"),  # Beta(1, 1) is uniform
        (1, 0, "0 %"),
    ],
)
def test_band_of_the_realised_rate(n, rate, band):
    data = page_of(example(n=n, rate=rate)).data
    assert data["stops"][data["start"]]["band"].replace("\xa0", " ") == band


def test_histogram_counts_every_image():
    """Heights are square roots of shares; the bars of far scores are the outermost."""
    calibration = np.arange(100.0)
    score = np.array([0.0, 50, 1e9, -1e9])
    p_value = (1 + (calibration >= score[:, None]).sum(1)) / 101
    histogram = reports._histogram(score, calibration)
    assert (histogram["low"], histogram["high"], histogram["beyond"]) == (-99, 247.5, 1)
    bars = re.findall(r"M([\d.]+) 100v(-?[\d.]+)h", histogram["new"])
    assert [float(x) for x, _ in bars] == [0, 283.3, 416.7, 983.3]
    shares = np.array([float(height) for _, height in bars]) ** 2
    np.testing.assert_allclose(shares / shares.sum(), 0.25)
    assert "1 new image of still larger scores" in page_of(
        example(4, score=score, p_value=p_value, calibration=calibration, pictures=[])
    ).text.replace("\n", " ")


@pytest.mark.parametrize("images", [0, 1])
@pytest.mark.parametrize("calibration", [np.full(9, 3.0), np.zeros(1), np.linspace(-5, -4, 40)])
def test_few_images_and_equal_scores(images, calibration):
    score = np.full(images, 3.0)
    p_value = (1 + (calibration >= score[:, None]).sum(1)) / (len(calibration) + 1)
    report = example(images, score=score, p_value=p_value, calibration=calibration, rate=0.5)
    page = page_of(dataclasses.replace(report, pictures=report.pictures[:images]))
    assert len(page.data["rank"]) == images
    assert "nan" not in reports.render(report).lower().split("<svg viewbox")[1].split("</svg>")[0]
    assert ("rows" in {a.get("id") for _, a in page.elements}) == bool(images)


def test_false_discovery_rate_is_told():
    text = " ".join(page_of(example(rate=0.035, false_discovery_rate=0.1)).text.split())
    assert "A false discovery rate of 10 % has decided, which is a false-alarm rate of 3.5 % here" in text


NAN = np.full(200, 0.5)
NAN[7] = np.nan


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"score": NAN}, "score holds NaN"),
        ({"p_value": NAN}, "p_value holds NaN"),
        ({"parts": {"size": NAN}}, "parts.size. holds NaN"),
        ({"parts": {"size": np.full(200, 1.5)}}, "parts.size. holds p-values outside"),
        ({"calibration": np.append(np.ones(198), np.inf)}, "calibration holds NaN"),
        ({"calibration": np.ones(0)}, "calibration holds no scores"),
        ({"score": np.ones(199)}, r"score has shape \(199,\), the report 200 files"),
        ({"p_value": np.full(200, 0.0123)}, "does not come from these 199"),
        ({"p_value": np.zeros(200)}, "does not come from these 199"),
        ({"rate": 1.0}, "rate is 1.0"),
        ({"rate": float("nan")}, "rate is nan"),
        ({"pictures": [Picture(0, np.zeros((8, 8)))]}, "float64"),
        ({"pictures": [Picture(0, np.zeros((8, 8, 4), np.uint8))]}, r"\(8, 8, 4\)"),
        ({"pictures": [Picture(0, np.zeros((8, 8), np.uint8), heat=np.full((8, 8), np.nan))]}, "a map has"),
        ({"pictures": [Picture(0, np.zeros((8, 8), np.uint8), heat=np.zeros((4, 4)))]}, "a map has"),
    ],
)
def test_wrong_arrays_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        reports.render(example(**changes))


def test_rows_worth_a_picture():
    p_value, score = np.repeat([0.5, 0.04, 0.01], 100), np.arange(300.0)
    np.testing.assert_array_equal(reports.pictured(p_value, score, 0.01, most=150)[:101], [*range(299, 199, -1), 199])
    assert [len(reports.pictured(p_value, score, 0.01, most)) for most in (300, 150, 10)] == [200, 150, 10]
    assert len(reports.pictured(p_value, score, 0)) == 24
    assert len(reports.pictured(p_value[:5], score[:5], 0)) == 5


def test_written_whole_or_not_at_all(tmp_path):
    reports.write(tmp_path / "new" / "report.html", example())
    assert (tmp_path / "new" / "report.html").read_text() == reports.render(example())
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        reports.write(tmp_path / "taken", example())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "taken"]


def test_colours_contrast():
    """WCAG 2.2 AA: 4.5 between text and its ground, 3 for controls, in both schemes."""
    style = reports.render(example()).split("<style>")[1].split("</style>")[0]
    schemes = [dict(re.findall(r"--(\w+): #(\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)]
    assert len(schemes) == 2

    def luminance(colour):
        channels = np.array([int(colour[i : i + 2], 16) for i in (0, 2, 4)]) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    texts = itertools.product(("text", "muted"), ("ground", "surface", "soft", "tint"))
    reds = itertools.product(["red"], ("surface", "soft", "tint"))
    shapes = itertools.product(("control", "blue"), ["surface"])
    least = dict.fromkeys(shapes, 3) | dict.fromkeys((*texts, *reds), 4.5)
    for scheme, (pair, wanted) in itertools.product(schemes, least.items()):
        dark, light = sorted(luminance(scheme[name]) for name in pair)
        assert (light + 0.05) / (dark + 0.05) >= wanted, pair


# --------------------------------------------------------------------------------------------------- the browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1200,900",
]  # fmt: skip


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A headless Chromium with an empty profile."""
    if not (CHROMIUM and DRIVER):
        pytest.skip("no Chromium with its chromedriver is installed (Debian: apt-get install chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium, tmp_path):
    """Opens reports from the disk; afterwards the page must have complained of nothing and loaded nothing."""

    def opened(report):
        reports.write(tmp_path / "report.html", report)
        chromium.get((tmp_path / "report.html").as_uri())
        return chromium

    chromium.get_log("browser")
    yield opened
    assert chromium.get_log("browser") == []
    loaded = chromium.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []
    chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def text(page, name):
    return page.find_element(By.ID, name).text.replace("\xa0", " ")


def rows(page):
    """The table's rows: a list of the texts of their cells."""
    script = (
        "return [...document.querySelectorAll('#rows tr')].map((row) => [...row.cells].map((cell) => cell.textContent))"
    )
    return page.execute_script(script)


def column(page, name):
    return next(button for button in page.find_elements(By.CSS_SELECTOR, "thead button") if button.text == name)


def test_slider_decides_as_python(browser):
    report = example(1000, 999)
    page, data = browser(report), page_of(report).data
    slider = page.find_element(By.ID, "rate")
    assert text(page, "flagged") == f"{(report.p_value <= 0.05).sum()}"
    assert text(page, "rate-shown") == "5 %"
    assert text(page, "chance") == "50"
    for keys in (Keys.HOME, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.PAGE_UP, Keys.END, Keys.ARROW_LEFT):
        slider.send_keys(keys)
        stop = data["stops"][int(slider.get_attribute("value"))]
        flagged, rank = report.p_value <= stop["rate"], round(stop["rate"] * 1000)
        number = f"{flagged.sum():,}"
        assert text(page, "flagged") == number
        assert slider.get_attribute("aria-valuetext") == f"{stop['label']}, {number} of 1,000 images flagged"
        low, high = stats.beta(rank, 1000 - rank).ppf([0.025, 0.975])
        shown = [float(value) / 100 for value in re.findall(r"[\d.]+", text(page, "band"))]
        np.testing.assert_allclose(shown, [low, high], rtol=0.06)
        assert text(page, "again").endswith(f"--false_alarm_rate {stop['rate']!r}")
        for place, name, decision, *_ in rows(page):
            assert (decision == "flagged") == flagged[int(place.replace(",", "")) - 1], name
        cards = page.find_elements(By.CSS_SELECTOR, "#gallery .card")
        marked = ["flagged" in card.get_attribute("class").split() for card in cards]
        assert marked == [bool(flagged[entry["row"]]) for entry in data["gallery"][: len(cards)]]
    assert page.execute_script("return document.getElementById('line').style.left") == f"{100 * stop['line']:.5g}%"
    sentence = f"{number} of 1,000 images are flagged at a false-alarm rate of {stop['label']} "
    WebDriverWait(page, 10).until(lambda _: text(page, "status").startswith(sentence.replace("\xa0", " ")))
    next(button for button in page.find_elements(By.CSS_SELECTOR, "[data-stop]") if button.text == "1 %").click()
    assert text(page, "flagged") == f"{(report.p_value <= 0.01).sum()}"


def test_table_of_ten_thousand_filters_and_sorts(browser):
    report = example(10_000, 999)
    page = browser(report)
    elements = "return document.querySelectorAll('*').length"
    assert page.execute_script(elements) < 1000
    assert len(rows(page)) == 25
    assert text(page, "row-count") == "Rows 1 to 25 of 10,000"
    assert page.title == report.title, "a file's name ran as a script"
    assert page.execute_script("return document.querySelectorAll('table u, table b, table img').length") == 0

    column(page, "Score").click()
    order = np.argsort(-report.score, kind="stable")
    np.testing.assert_allclose([float(row[4]) for row in rows(page)], report.score[order[:25]], rtol=1e-3)
    column(page, "Score").click()
    np.testing.assert_allclose([float(row[4]) for row in rows(page)], np.sort(report.score)[:25], rtol=1e-3)
    sorted_by = page.find_elements(By.CSS_SELECTOR, "th[aria-sort]")
    assert [(head.text, head.get_attribute("aria-sort")) for head in sorted_by] == [("Score", "ascending")]
    column(page, "No.").click()
    page.find_element(By.ID, "next").click()
    assert [row[0] for row in rows(page)] == [str(number) for number in range(26, 51)]

    page.find_element(By.ID, "only").click()
    flagged = np.flatnonzero(report.p_value <= report.rate)
    assert text(page, "row-count") == f"Rows 1 to 25 of {len(flagged):,}"
    assert [row[0] for row in rows(page)] == [f"{row + 1:,}" for row in flagged[:25]]
    page.find_element(By.ID, "search").send_keys("IMG_77")
    wanted = [f"{row + 1:,}" for row in flagged if "img_77" in report.files[row]]
    assert [row[0] for row in rows(page)] == wanted[:25]
    page.find_element(By.ID, "search").clear()
    page.find_element(By.ID, "search").send_keys("</script>")
    assert [row[1] for row in rows(page)] == [HOSTILE[0]]
    page.find_element(By.ID, "search").send_keys("nowhere")
    assert text(page, "row-count") == "No image fits the filter"
    assert page.execute_script(elements) < 1000


def test_gallery_shows_all_pictures_step_by_step(browser):
    report = example(1000, 999)
    page, data = browser(report), page_of(report).data
    entries, names = data["gallery"], [data["files"][entry["row"]] for entry in data["gallery"]]
    cards = lambda: page.find_elements(By.CSS_SELECTOR, "#gallery .card")
    assert len(cards()) == 12
    assert [card.find_element(By.TAG_NAME, "h3").text for card in cards()] == names[:12]
    pictures = cards()[0].find_elements(By.TAG_NAME, "img")
    assert [picture.get_property("naturalWidth") for picture in pictures] == [8, 8, 8]
    assert [picture.get_attribute("alt").split(" of ")[0] for picture in pictures] == [
        "Original", "Reconstruction", "Map",
    ]  # fmt: skip
    assert "its <u>structure</u>" in cards()[0].text
    page.find_element(By.ID, "more").click()
    assert len(cards()) == 24
    assert page.switch_to.active_element == cards()[12], "the keyboard goes on at the new ones"
    flagged = {entry["row"] for entry in entries} & set(np.flatnonzero(report.p_value <= report.rate))
    for choice, number in (("flagged", len(flagged)), ("borderline", len(entries) - len(flagged))):
        Select(page.find_element(By.ID, "which")).select_by_visible_text(choice)
        assert f"of {number} shown." in text(page, "gallery-count")


def test_keyboard_and_screen_reader(browser):
    """Every control is reached by the tab key in the order of the page, has a name, and shows that it has the focus."""
    page = browser(example())
    wanted = page.find_elements(By.CSS_SELECTOR, "a, button:enabled, input, select, summary, [tabindex='0']")
    wanted = [control for control in wanted if control.is_displayed() or control.tag_name == "a"]
    for control in wanted:
        ActionChains(page).send_keys(Keys.TAB).perform()
        focused = page.switch_to.active_element
        assert focused == control
        assert focused.accessible_name or focused.tag_name == "summary", focused.get_attribute("outerHTML")
        assert focused.value_of_css_property("outline-style") == "solid"
    column(page, "File").send_keys(Keys.ENTER)
    names = [row[1] for row in rows(page)]
    assert names == page.execute_script(
        "return arguments[0].sort(new Intl.Collator('en', {numeric: true}).compare)", names
    )
    page.find_element(By.ID, "only").send_keys(Keys.SPACE)
    assert page.find_element(By.ID, "only").is_selected()
    live = page.find_elements(By.CSS_SELECTOR, "[role=status]")
    assert {element.get_attribute("id") for element in live} == {"status", "row-count", "gallery-count"}
    tables = page.find_elements(By.TAG_NAME, "table")
    assert all(table.find_elements(By.TAG_NAME, "caption") for table in tables)


def test_phone_and_dark_mode(browser):
    page = browser(example())
    light = page.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    assert page.execute_script("return document.documentElement.scrollWidth") <= 360
    assert page.find_element(By.TAG_NAME, "body").value_of_css_property("background-color") != light


def test_the_widest_table_fits_a_small_window(browser):
    """All parts of the combined method at 1100 pixels."""
    names = methods.create("combined").parts
    page = browser(example(parts={name: np.full(200, 0.01234) for name in names}))
    window = {"width": 1100, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", window)
    script = "const box = document.querySelector('#table').parentElement; return box.scrollWidth - box.clientWidth"
    assert page.execute_script(script) <= 0


@pytest.mark.parametrize("images", [0, 1])
def test_pages_of_no_and_of_one_image(browser, images):
    page = browser(example(images, sentences=[f"{images} images"]))
    assert text(page, "flagged") == "0"
    page.find_element(By.ID, "rate").send_keys(Keys.END)
    assert int(text(page, "flagged")) <= images
    assert f"of {images} image{'' if images else 's'} flagged" in page.page_source
    assert len(rows(page)) == images


def test_foreign_scripts_do_not_run(chromium, tmp_path):
    """What the page's own script is not, the browser refuses: by its policy, whatever might get into the page."""
    reports.write(tmp_path / "report.html", example())
    chromium.get((tmp_path / "report.html").as_uri())
    chromium.execute_script("""
        const script = document.createElement("script");
        script.textContent = "document.title = 'owned'";
        document.body.append(script);
        document.body.insertAdjacentHTML("beforeend", "<p onclick=\\"document.title = 'owned'\\">");
        document.body.lastChild.click();
    """)
    assert chromium.title == example().title
    assert [line["level"] for line in chromium.get_log("browser")] == ["SEVERE", "SEVERE"]
