"""Shared by all tests: one set of compile caches, and no state carried from one test's compilations to the next."""

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """Forget compiled graphs after each test: they count towards one limit per model class."""
    yield
    torch._dynamo.reset()
