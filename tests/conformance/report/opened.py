"""A page in a browser, for tests: opened, waited for, and closed with what it complained of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

WIDE, PHONE = (1280, 900), (390, 844)
"""Width and height, in pixels."""


class Opened:
    """A page that is open; complains of errors in its scripts when it is closed."""

    def __init__(
        self, browser: Any, path: Path, size: tuple[int, int] = WIDE, scheme: str = "light", fragment: str = ""
    ):
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.tab = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
        self.tab.on("pageerror", lambda error: self.problems.append(str(error)))
        self.tab.on("console", lambda message: self.problems.append(message.text) if message.type == "error" else None)
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.goto(f"{path.as_uri()}#{fragment}")

    def __enter__(self) -> Any:
        return self.tab

    def __exit__(self, *_: object) -> None:
        self.tab.close()
        assert not self.problems

    def open_all(self) -> None:
        """Opens everything that is folded, also what is folded inside of it, and waits for the pictures."""
        for _ in range(200):
            self.tab.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
            self.tab.wait_for_timeout(100)
            filled = "(d) => d.open && d.children.length > 1"
            if self.tab.evaluate(f"[...document.querySelectorAll('details')].every({filled})"):
                break
        else:
            pytest.fail("something that is folded is still empty after 20 s")
        wait(self.tab, "(plot) => plot.querySelector('.main-svg')")


def wait(tab: Any, holds: str) -> None:
    """Until something holds of every picture; the page's own policy forbids the driver's way to wait."""
    for _ in range(200):
        if tab.evaluate(f"[...document.querySelectorAll('.plot')].every({holds})"):
            return
        tab.wait_for_timeout(100)
    pytest.fail(f"a picture isn't as it should be after 20 s: {holds}")


def unfold(tab: Any, details: str, inside: str) -> None:
    """Opens the first of these by its summary, and waits for what is inside: it is made after the click, not in it."""
    tab.locator(f"{details} > summary").first.click()
    tab.locator(f"{details}[open]").first.locator(inside).first.wait_for(timeout=20_000)
