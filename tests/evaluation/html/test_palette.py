"""Colours that can be seen and told apart, in both schemes."""

from __future__ import annotations

import pytest

from torchaccel.evaluation.html.documents import parse
from torchaccel.evaluation.html.palette import LONGEST, ROLES, Looks, short, stand_in, stand_ins

from . import samples

LEAST = dict.fromkeys(ROLES, 3.0) | {"ink": 7.0, "muted": 4.5}


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("role", sorted(set(ROLES) - {"surface", "grid", "on-series"}))
def test_contrast(role: str, scheme: int) -> None:
    assert contrast(ROLES[role][scheme], ROLES["surface"][scheme]) >= LEAST[role]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_numbers_in_full_cells_can_be_read(scheme: int) -> None:
    assert contrast(ROLES["on-series"][scheme], ROLES["series-1"][scheme]) >= 4.5


def test_a_variant_looks_the_same_in_every_document_and_unlike_the_others() -> None:
    documents = parse([samples.decode_document(), samples.evaluate_document()])
    looks = Looks(documents)
    everywhere = [{row.variant: looks.of(row) for row in document.rows} for document in documents]
    for variant, look in everywhere[1].items():
        assert everywhere[0][variant] == look
    assert len({(look.colour, look.marker) for look in everywhere[1].values()}) == len(everywhere[1])


def test_every_role_has_a_colour_of_its_own_to_stand_for_it() -> None:
    assert stand_ins() == {stand_in(role): f"var(--{role})" for role in ROLES}
    assert len(stand_ins()) == len(ROLES)


def test_names_are_shortened_in_the_middle() -> None:
    name = "torchaccel:" + "first" * 8 + "#2"
    assert len(short(name)) == LONGEST
    assert short(name).startswith("first")
    assert short(name).endswith("#2")
    assert short("torchaccel:int8") == "int8"
