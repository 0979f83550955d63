"""Loops that read inside a window or compile too often are told so, once, with the line; others are left in peace."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(1500)


@pytest.fixture
def messages(mode: str, came: Callable[[str, str], Any]) -> dict[str, list[str]]:
    return came(mode, "loops")


@pytest.fixture(params=["none", "fsdp"])
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


def line_of(message: str) -> str:
    path, number = re.search(r"([^ ]+\.py):(\d+)$", message).groups()
    assert Path(path).parent == Path(__file__).parent
    return Path(path).read_text().splitlines()[int(number) - 1]


@pytest.mark.parametrize(
    "loop",
    [
        "steady",
        "steady windows",
        "steady, forbidden to read",
        "evaluating, forbidden to read",
        "saving, forbidden to read",
    ],
)
def test_a_steady_loop_is_not_warned(messages: dict[str, list[str]], loop: str) -> None:
    assert messages[loop] == []


@pytest.mark.parametrize("loop", ["reading", "reading now and then", "masking"])
def test_a_value_read_inside_a_window_is_named(messages: dict[str, list[str]], loop: str) -> None:
    (message,) = messages[loop]
    line, words = re.match(r"(.*?\.py:\d+) (read a value from the device inside a window.*)", message).groups()
    assert "# the line to be named" in line_of(line)
    assert "accumulate" in line_of(words)


def test_a_value_read_inside_a_window_is_an_error_where_that_is_asked(messages: dict[str, list[str]]) -> None:
    (message,) = messages["reading, forbidden"]
    assert message.startswith("raised Unexpected execution happens inside the compiled function")
    if sys.version_info >= (3, 11):  # exceptions have notes
        assert "XLA(full_graph=True) makes reading a value inside a window an error" in message


def test_a_value_printed_inside_a_window_is_told_with_the_window(messages: dict[str, list[str]]) -> None:
    (message,) = messages["printing"]
    next_line, words = re.match(r"something \(print, perhaps\) before (.*:\d+) (read a value.*)", message).groups()
    assert "accelerator.backward(loss)" in line_of(next_line)
    assert "accumulate" in line_of(words)


def test_changing_shapes_are_named_with_counts(messages: dict[str, list[str]]) -> None:
    (message,) = messages["shapes"]
    assert re.search("batches of 3 different shapes", message)
    assert "(6, 32) float32] (1 times)" in message
    assert "accumulate" in line_of(message)


def test_a_changing_number_is_named(messages: dict[str, list[str]]) -> None:
    (message,) = messages["number"]
    assert "a Python number that enters the program has changed (the length of a slice" in message
    assert "accumulate" in line_of(message)
