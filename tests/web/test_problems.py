"""The statuses of errors that no test causes over HTTP."""

from __future__ import annotations

import pytest

from cdcbridge.errors import BehindPooler, CdcbridgeError, OperatorNeeded, SourceUnavailable, StaleReceipt
from cdcbridge.web.problems import RequestRefused, problem_of


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (BehindPooler("a pooler"), 503),
        (OperatorNeeded("a lost slot"), 503),
        (SourceUnavailable("no connection"), 503),
        (StaleReceipt("stale"), 409),
        (RequestRefused(413, "large"), 413),
        (CdcbridgeError("other"), 500),
    ],
)
def test_the_status_says_whose_fault_it_is(error: CdcbridgeError, status: int) -> None:
    found, problem, headers = problem_of(error)
    assert found == status == problem["status"] and problem["detail"] == str(error)
    assert ("Retry-After" in headers) == isinstance(error, SourceUnavailable)
