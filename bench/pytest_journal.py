"""A plugin of pytest that tells ``gpu_check.py`` of every test as it begins and ends.

    python -m pytest -p pytest_journal --journal /dev/fd/5 --share 0/8 tests/test_loss.py

If the process ends in a test, the next one is given that test's name among those to leave out.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import harness  # first of all: it sets what torch reads when it is loaded

# isort: split
import pytest
import records
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--journal", type=Path, required=True, help="the pipe")
    parser.addoption("--skip", type=Path, help="file with a JSON list of names to leave out")
    parser.addoption("--share", default="0/1", help="which of how many equal parts to run")
    parser.addoption("--shuffle", action="store_true", help="so that a part is of everything")
    parser.addoption("--budget", type=float, default=1e9, help="seconds for all of it")


def pytest_configure(config: pytest.Config) -> None:
    skip = config.getoption("--skip")
    names = json.loads(skip.read_text()) if skip else ()
    journal = records.Journal(config.getoption("--journal"), names)
    config.pluginmanager.register(_Plugin(journal, time.monotonic() + config.getoption("--budget")))


class _Plugin:
    def __init__(self, journal: records.Journal, end: float) -> None:
        self.journal, self.end = journal, end
        self.outcome = "passed"

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        number, count = map(int, config.getoption("--share").split("/"))
        # Dealt out like cards: every process has its part of what comes first.
        mine = items[number::count]
        if config.getoption("--shuffle"):
            random.Random(0).shuffle(mine)
        self.journal.plan(item.nodeid for item in mine)
        items[:] = [item for item in mine if item.nodeid not in self.journal.skip]

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
            session.exitstatus = pytest.ExitCode.OK  # the share of a process may be none

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.journal.row(case=report.nodeid, failed=report.longreprtext[-2000:])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[object]:
        self.journal.begin(item.nodeid)
        self.outcome = "passed"
        result = yield
        self.journal.tally(self.outcome)
        if self.outcome == "failed" and torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                os._exit(harness.CONTEXT_LOST)
        self.journal.end(item.nodeid)
        return result

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        if time.monotonic() > self.end:
            pytest.skip("no time was left")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.outcome = "failed"
            self.journal.row(case=report.nodeid, failed=report.longreprtext[-2000:])
        elif report.skipped:
            where = report.longrepr
            self.outcome = f"skipped: {where[2] if isinstance(where, tuple) else where}"
