"""pytest's option ``--mhc-impl``, and two rules for the golden cases: a name that can't be loaded ends the run before
its first test, and an implementation of which every case was skipped fails it.

pytest imports this module in every run where the package is installed: nothing but pytest is imported at its top.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest

GOLDEN = "conformance.test_golden"
ITEM = re.compile(r"(^|\btest_golden\.py)::test_golden\[")
PROPERTY = "mhc_impl"
"""The name of the user property of a golden item that holds its implementation's name."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("mhc-conformance").addoption(
        "--mhc-impl",
        action="append",
        metavar="NAME",
        help=f"Implementations that `pytest --pyargs {GOLDEN}` judges: a registered name, module:attribute or "
        "exec:COMMAND; repeatable, or with commas between them.",
    )
    parser.addini(PROPERTY, "Implementations for the golden cases where --mhc-impl names none.", type="linelist")


def pytest_configure(config: pytest.Config) -> None:
    if not _is_worker(config):
        config.pluginmanager.register(Skipped(), "mhc-conformance-skipped")


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks golden items with their implementation, and loads each, so that a wrong name is one error and no more."""
    golden = [
        item for item in items if isinstance(item, pytest.Function) and getattr(item.module, "__name__", "") == GOLDEN
    ]
    for item in golden:
        case: Any = item.callspec.params["item"]
        item.user_properties.append((PROPERTY, item.callspec.id.removeprefix(f"{case.id}-")))
    if not _is_worker(config):
        _load(config, [item.nodeid for item in golden])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: list[str]) -> None:
    """The same in the main process of pytest-xdist, whose workers can't end the run."""
    _load(node.config, [identifier for identifier in ids if ITEM.search(identifier)])


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def _load(config: pytest.Config, identifiers: list[str]) -> None:
    """Loads the implementations of golden items, as far as they are selected, and hashes the golden files.

    Raises:
        pytest.UsageError: one can't be loaded, there is none, or a file isn't as promised.
    """
    if not identifiers:
        return
    from conformance.files.places import CaseError
    from conformance.implementations.asked import asked, loaded
    from conformance.interface import SetupError
    from conformance.judge.integrity import Corpus

    try:
        corpus = Corpus()
    except CaseError as error:
        raise pytest.UsageError(str(error)) from error
    if corpus.problems:
        raise pytest.UsageError(corpus.told())
    names = asked(config)
    if not names:
        raise pytest.UsageError("expected --mhc-impl NAME: neither JAX with Flax nor PyTorch is installed")
    for name in names:
        if any(identifier.endswith(f"-{name}]") for identifier in identifiers):
            try:
                loaded(name)
            except SetupError as error:
                raise pytest.UsageError(f"--mhc-impl {error}") from error


class Skipped:
    """Fails a run in which every golden case of an implementation was skipped."""

    def __init__(self) -> None:
        # In a run with pytest-xdist this is the main process, to which the reports come.
        self.reasons: dict[str, Counter[str]] = {}
        """For each implementation: how many of its cases were skipped, by the reason; those that ran have none."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = dict(report.user_properties).get(PROPERTY)
        if isinstance(name, str) and (report.when == "call" or report.skipped):
            reason = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else ""
            self.reasons.setdefault(name, Counter())[reason.removeprefix("Skipped: ")] += 1

    def lines(self) -> list[str]:
        """One line for each implementation that ran nothing."""
        return [
            f"{name}: all {reasons.total()} golden cases were skipped, so that nothing was judged; "
            f"the commonest reason is: {reasons.most_common(1)[0][0]}"
            for name, reasons in self.reasons.items()
            if not reasons[""]
        ]

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.lines() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for line in self.lines():
            terminalreporter.write_line(f"ERROR: mhc-conformance: {line}", red=True)
