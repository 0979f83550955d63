"""Every Python snippet of the pages runs, and prints what the comment behind its `print` says."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PROMISE = re.compile(r"^ *print\(.*\)  # (.+)$", re.MULTILINE)


def pages_with_promises() -> list[Path]:
    return [page for page in PAGES if PROMISE.search(page.read_text())]


@pytest.mark.parametrize("page", pages_with_promises(), ids=lambda page: str(page.relative_to(ROOT)))
def test_snippets_print_what_they_say(page: Path) -> None:
    namespace: dict[str, object] = {"__name__": "snippet"}
    for snippet in SNIPPET.findall(page.read_text()):
        # The snippets of a page follow each other, and one without a promise may print what the text says.
        output = io.StringIO()
        with redirect_stdout(output):
            exec(compile(snippet, str(page), "exec"), namespace)
        promised = PROMISE.findall(snippet)
        if promised:
            assert output.getvalue().splitlines() == promised
