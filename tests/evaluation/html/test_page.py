"""The page as text: what it shows of good, odd and hostile documents."""

from __future__ import annotations

import re
from typing import Any

import matplotlib
import pytest

from torchaccel.evaluation.html.page import render

from ..schema import check_document
from . import samples
from .reading import Page

HOSTILE = [
    "<script>alert(1)</script>",
    "</title></svg><img src=x onerror=alert(1)>",
    '"><b onmouseover="alert(1)">',
    r"$\frac{1}{$",
    "{{ 7 * 7 }} {% raw %}",
    "]]><!-- --> &amp; &#60;",
    "\x00\x1b[31m\ud800\uffff",
    "url(#x) #0a0b01 id='y'",
]
ALL = [
    *("d1-pareto-perplexity", "d1-pareto-recall", "d1-memory-perplexity", "d1-memory-recall"),
    *("d1-roofline", "d1-speed-ms"),
    *("d2-pareto-perplexity", "d2-pareto-recall", "d2-memory-perplexity", "d2-memory-recall"),
    *("d2-recall-0", "d2-recall-1", "d2-position", "d2-layers-0", "d2-speed-ttft-ms", "d2-speed-tpot-ms"),
]


def test_the_samples_have_the_shape_of_real_documents() -> None:
    check_document(samples.decode_document())
    check_document(samples.evaluate_document())


def test_every_plot_there_is_data_for_and_no_other() -> None:
    page = Page(render([samples.decode_document(), samples.evaluate_document(), samples.null_document()]))
    assert page.figures == ALL
    assert not page.open


def test_equal_documents_give_equal_bytes_whatever_the_user_configured() -> None:
    documents = [samples.decode_document(), samples.evaluate_document()]
    first = render(documents)
    with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": None, "axes.linewidth": 7}):
        assert render(documents) == first
        assert matplotlib.rcParams["font.size"] == 30


def test_nothing_is_loaded_and_ids_are_unique() -> None:
    html = render([samples.decode_document(), samples.decode_document(), samples.evaluate_document()])
    page = Page(html)
    assert "://" not in re.sub(r"xmlns[^ ]*", "", html)
    assert not page.attributes("src")
    assert {tag for tag, _ in page.tags} & {"script", "iframe", "object", "embed"} == set()
    assert len(set(page.ids)) == len(page.ids)
    links = [link.removeprefix("#") for link in page.attributes("href") if link != "data:,"]
    clips = re.findall(r"url\(#([^)]+)\)", html)
    assert links and clips
    assert set(links) | set(clips) <= set(page.ids)


def test_every_plot_has_a_title_and_its_numbers_in_words() -> None:
    page = Page(render([samples.decode_document(), samples.evaluate_document()]))
    for attributes in [attributes for tag, attributes in page.tags if tag == "svg"]:
        assert attributes["role"] == "img"
        assert set((attributes["aria-labelledby"] or "").split()) <= set(page.ids)
    assert "torchaccel:int8 18.5 ms, floor 10.1 ms, predicted 11.6 ms" in page.text


def test_what_did_not_run_is_listed_with_its_reason() -> None:
    text = Page(render([samples.decode_document()])).text
    for line in (
        "flex absent torch has no flex attention for this device",
        "torchaccel:h2o declined needs attention weights, and the model is fused",
        "torchaccel:bad failed RuntimeError: out of memory",
    ):
        assert line in text


def test_a_declined_variant_that_ran_is_marked_in_the_plots() -> None:
    document = samples.decode_document()
    quest = next(result for result in document["results"] if result["variant"] == "torchaccel:quest")
    quest |= {"status": "declined", "reason": "no kernel"}
    assert Page(render([document])).text.count("quest (declined)") == 4


def test_the_table_has_the_columns_that_say_something() -> None:
    page = Page(render([samples.decode_document()]))
    for heading in (
        "ms per token",
        "×\N{NO-BREAK SPACE}eager",
        "of floor",
        "predicted ms",
        "KV MB",
        "graphs / recompiles",
        "KL",
    ):
        assert heading in page.texts
    for absent in ("bits/byte", "similarity", "ms to first token", "key blocks"):
        assert absent not in page.texts
    assert "18.5 [17.2–22.4]" in page.texts
    assert "4.99" in page.texts


@pytest.mark.parametrize("busy", [True, False])
def test_a_busy_machine_is_announced_before_the_results(busy: bool) -> None:
    document = samples.decode_document()
    document["machine"]["busy"] = busy
    text = Page(render([document])).text
    assert ("The machine was busy." in text) == busy
    assert not busy or text.index("The machine was busy.") < text.index("ms per token")


def test_fidelity_comes_from_another_document_about_the_same_model_and_says_so() -> None:
    decode, evaluate = samples.decode_document(), samples.evaluate_document()
    del evaluate["results"][5]
    together = Page(render([decode, evaluate]))
    assert "Fidelity as document 2 measured it." in together.text
    assert "Not shown, for want of a measurement: torchaccel:int8." in together.text
    evaluate["model"]["dtype"] = "float32"
    apart = Page(render([decode, evaluate]))
    assert "Fidelity as document" not in apart.text
    assert "d1-pareto-kl" in apart.figures


def hostile_document() -> dict[str, Any]:
    """Hostile strings wherever a document has a string."""
    document = samples.evaluate_document()
    for result, text in zip(document["results"], HOSTILE, strict=False):
        result["variant"] = f"torchaccel:{text}"
        result["options"] = {text: text}
    everything = " ".join(HOSTILE)
    document["results"].append(samples.result("x" + everything, status="failed", reason=everything))
    document["command"] = ["torchaccel", "evaluate", *HOSTILE]
    document["model"]["name"] = everything
    document["machine"] |= {"device": everything, "gemm_gflops": {everything: 1.0}}
    document["versions"] = {"torch": everything}
    document["case"]["kind"] = everything
    document["date"] = everything
    grid = document["results"][0]["details"]["recall"]["needle"]
    for result in document["results"][:3]:
        result["fidelity"]["recall"] = {everything: 1.0, **{text: 0.5 for text in HOSTILE}}
        result["details"]["recall"] = {text: grid for text in HOSTILE}
        result["details"]["sensitivity"] = {"metric": HOSTILE[0], "layers": [{"layer": 0, HOSTILE[0]: 1.0}]}
        result["speedup"] = {f"torchaccel:{text}": 2.0 for text in HOSTILE}
    return document


def test_hostile_strings_stay_text() -> None:
    html = render([hostile_document()])
    html.encode("utf-8")
    page = Page(html)
    assert not page.open
    tags = {tag for tag, _ in page.tags}
    assert tags & {"script", "img", "b"} == set()
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in page.texts
    assert r"$\frac{1}{$" in page.text
    assert "{{ 7 * 7 }}" in page.text
    drawn = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert any("&lt;script&gt;alert(1)" in svg for svg in drawn)


ODD: dict[str, Any] = {
    "text": "seven",
    "nan": float("nan"),
    "infinite": float("inf"),
    "huge": 10**400,
    "negative": -3.5,
    "zero": 0,
    "true": True,
    "list": [1],
    "object": {"median": {}},
    "null": None,
}


@pytest.mark.parametrize("value", ODD.values(), ids=ODD)
def test_values_of_any_type_give_a_page(value: Any) -> None:
    def replaced(record: Any, depth: int) -> Any:
        if depth == 0 or not isinstance(record, dict):
            return value
        return {key: replaced(item, depth - 1) for key, item in record.items()}

    whole = samples.evaluate_document()
    keep = {"variant": "torchaccel:exact", "status": "ok"}
    for depth in range(5):
        results = [replaced(result, depth) | keep if depth else keep for result in whole["results"][:2]]
        parts = {key: replaced(part, depth) for key, part in whole.items() if key != "results"}
        page = Page(render([{**parts, "results": results}]))
        assert not page.open
        assert "nan" not in page.text.split()


def test_a_document_of_nulls_one_variant_and_an_unknown_kind() -> None:
    page = Page(render([samples.null_document()]))
    assert page.figures == []
    assert "1. séance" in page.text
    assert "torchaccel:exact" in page.texts


def test_without_baselines_speed_is_compared_with_the_first_variant() -> None:
    document = samples.decode_document()
    document["results"] = [r for r in document["results"] if r["variant"].startswith("torchaccel:")]
    page = Page(render([document]))
    assert "times faster than exact" in page.text
    assert "×\N{NO-BREAK SPACE}torchaccel:exact" in page.texts


def test_no_documents_give_an_empty_page() -> None:
    assert Page(render([])).figures == []
