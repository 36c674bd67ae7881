"""The page in a real browser: everything visible, readable, inside the window, and nothing fetched."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from torchaccel.evaluation.html.page import write_report

from . import samples
from .test_page import ALL, hostile_document

FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
ALONE = [f"d4-{name}" for name in ("recall-0", "recall-1", "position", "layers-0", "speed-ttft-ms", "speed-tpot-ms")]
DESKTOP, PHONE = 1280, 400
# A4 across, less the margins.
PAPER = 1030
MEASURE = """() => {
  const box = (e) => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
  const words = (svg) => [...svg.querySelectorAll("text")].filter((t) => t.textContent.trim()).map((t) => ({
    text: t.textContent,
    box: box(t),
    size: parseFloat(getComputedStyle(t).fontSize) * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width,
  }));
  return {
    width: document.documentElement.scrollWidth,
    figures: [...document.querySelectorAll("figure")].map((f) => {
      const svg = f.querySelector("svg");
      return {id: f.id, box: box(svg), words: words(svg), caption: box(f.querySelector("figcaption"))};
    }),
    outside: [...document.body.querySelectorAll("*")]
      .filter((e) => !e.closest(".scroll") && !e.closest("svg"))
      .filter((e) => e.getBoundingClientRect().right > window.innerWidth + 1)
      .map((e) => e.outerHTML.slice(0, 100)),
    background: getComputedStyle(document.body).backgroundColor,
  };
}"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium on this machine; Debian's package is called chromium")
    driver = pytest.importorskip(
        "playwright.sync_api", reason="playwright drives the browser; it is in torchaccel[dev]"
    )
    # A profile of its own, in a folder that the driver removes at the end.
    with driver.sync_playwright() as started, started.chromium.launch(executable_path=path, args=FLAGS) as browser:
        yield browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("report") / "report.html"
    documents = [samples.decode_document(), samples.evaluate_document(), samples.null_document()]
    write_report([*documents, samples.single_document()], file)
    return file


def visit(chromium: Any, file: Path, width: int, scheme: str = "light", media: str = "screen") -> dict[str, Any]:
    """What the browser makes of ``file``: sizes in CSS pixels, and ``trouble``: requests, messages, dialogs, errors."""
    trouble: list[str] = []
    with chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True) as context:
        tab = context.new_page()
        tab.on("request", lambda request: trouble.append(f"request {request.url}"))
        tab.on("console", lambda message: trouble.append(f"console {message.text}"))
        tab.on("pageerror", lambda error: trouble.append(f"error {error}"))
        tab.on("dialog", lambda dialog: (trouble.append(f"dialog {dialog.message}"), dialog.dismiss()))
        tab.emulate_media(media=media)
        tab.goto(file.as_uri())
        found: dict[str, Any] = tab.evaluate(MEASURE)
    allowed = (f"request {file.as_uri()}", "request data:")
    return found | {"trouble": [line for line in trouble if not line.startswith(allowed)]}


def overlap(one: list[float], other: list[float], slack: float = 1.0) -> bool:
    """Whether two boxes (left, top, right, bottom) share more than ``slack`` pixels both ways."""
    across = min(one[2], other[2]) - max(one[0], other[0])
    down = min(one[3], other[3]) - max(one[1], other[1])
    return across > slack and down > slack


def collisions(figure: dict[str, Any]) -> list[tuple[str, str]]:
    words = figure["words"]
    pairs = ((a, b) for i, a in enumerate(words) for b in words[:i])
    return [(a["text"], b["text"]) for a, b in pairs if overlap(a["box"], b["box"])]


def strays(figure: dict[str, Any], slack: float = 2.0) -> list[str]:
    """Words that reach out of the drawing."""
    left, top, right, bottom = figure["box"]
    frame = [left - slack, top - slack, right + slack, bottom + slack]
    boxes = [(word["text"], word["box"]) for word in figure["words"]]
    return [text for text, (a, b, c, d) in boxes if a < frame[0] or b < frame[1] or c > frame[2] or d > frame[3]]


@pytest.mark.parametrize(("width", "least"), [(DESKTOP, 9.0), (PHONE, 7.0)], ids=["desktop", "phone"])
def test_every_plot_is_there_and_can_be_read(chromium: Any, page: Path, width: int, least: float) -> None:
    found = visit(chromium, page, width)
    assert found["trouble"] == []
    assert [figure["id"] for figure in found["figures"]] == [*ALL, *ALONE]
    for figure in found["figures"]:
        left, top, right, bottom = figure["box"]
        assert left >= 0 and right <= width, figure["id"]
        assert right - left > 250, figure["id"]
        assert bottom - top > 60, figure["id"]
        assert figure["words"], figure["id"]
        assert min(word["size"] for word in figure["words"]) >= least, figure["id"]
        assert collisions(figure) == [], figure["id"]
        assert not overlap(figure["box"], figure["caption"]), figure["id"]
        assert strays(figure) == [], figure["id"]
    assert found["outside"] == []
    assert found["width"] <= width


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_hostile_strings_run_nothing_and_push_nothing_out(chromium: Any, tmp_path: Path, width: int) -> None:
    write_report([hostile_document()], tmp_path / "report.html")
    found = visit(chromium, tmp_path / "report.html", width)
    assert found["trouble"] == []
    assert found["outside"] == []
    assert found["figures"]


def test_the_printed_page_fits_its_paper(chromium: Any, page: Path) -> None:
    found = visit(chromium, page, PAPER, media="print")
    assert found["width"] <= PAPER
    assert found["outside"] == []


def test_the_dark_scheme_is_dark(chromium: Any, page: Path) -> None:
    assert visit(chromium, page, DESKTOP)["background"] == "rgb(255, 255, 255)"
    assert visit(chromium, page, DESKTOP, "dark")["background"] == "rgb(22, 25, 29)"


def test_the_checks_see_what_they_are_for(chromium: Any, tmp_path: Path) -> None:
    """A page with every fault that the tests above look for."""
    file = tmp_path / "bad.html"
    file.write_text(
        '<!doctype html><body style="margin:0"><img src="https://example.invalid/x.png">'
        '<div style="width:3000px">wide</div><script>alert(1); console.error("no")</script>'
        '<figure id="f"><svg viewBox="0 0 100 50" width="100"><text y="20" font-size="5">aaaaaa</text>'
        '<text y="20" x="5" font-size="5">bbb</text></svg><figcaption>c</figcaption></figure>'
    )
    found = visit(chromium, file, PHONE)
    kinds = {line.split()[0] for line in found["trouble"]}
    assert {"request", "dialog", "console"} <= kinds
    assert any("3000px" in element for element in found["outside"])
    assert found["width"] > PHONE
    (figure,) = found["figures"]
    assert collisions(figure) == [("bbb", "aaaaaa")]
    assert strays(figure | {"box": [0, 0, 5, 5]}) == ["aaaaaa", "bbb"]
    assert max(word["size"] for word in figure["words"]) < 9
