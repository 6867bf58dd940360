"""A pytest plugin that writes one JSON line for each test as it ends: a run that is stopped leaves what it has seen.

``python -m pytest -p gpu_test_log``, with the file's name in ``GPU_TEST_LOG``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

VARIABLE = "GPU_TEST_LOG"
_LONGEST_TEXT = 4000


#: With pytest-xdist only the controller reports. Not its variable tells: a run within a worker's test has that too.
_is_worker = False


def pytest_configure(config: pytest.Config) -> None:
    """Finds out where it runs."""
    global _is_worker
    _is_worker = hasattr(config, "workerinput")


def _write(record: dict[str, Any]) -> None:
    if not _is_worker:
        with Path(os.environ[VARIABLE]).open("a") as log:
            log.write(json.dumps(record) + "\n")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Files that can't be imported."""
    if report.failed:
        _write({"test": report.nodeid, "outcome": "failed", "text": str(report.longrepr)[-_LONGEST_TEXT:]})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A test's outcome, and of those that did not pass the reason."""
    if report.when != "call" and report.outcome == "passed":
        return
    text = ""
    if report.failed:
        text = report.longreprtext[-_LONGEST_TEXT:]
    elif report.skipped and isinstance(report.longrepr, (tuple, list)):  # xdist sends lists
        text = report.longrepr[2]
    _write({"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration, "text": text})
