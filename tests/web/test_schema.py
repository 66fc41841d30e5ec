"""The API keeps what its OpenAPI document promises, for inputs that are generated from the document."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from tests.web.conftest import problem
from tests.web.test_rest import publish

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
EXAMPLES = 8  # for each operation, of valid and of invalid input
LONGEST = 60.0  # seconds for all of them
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "HEAD")
# Names that exist: a random name only finds out that there is no such consumer.
NAMES = {"/api/streams/": "audit", "/api/consumers/": "billing", "/api/topics/": "t"}


def operations(url: str) -> Iterator[Any]:
    schema = schemathesis.openapi.from_url(f"{url}/api/openapi.json")
    for found in schema.get_all_operations():
        operation: Any = found.ok()  # type: ignore[union-attr]
        if not operation.path.endswith("/events"):  # an answer without an end
            yield operation


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_generated_requests_get_answers_as_described(http: httpx.Client, url: str, mode: GenerationMode) -> None:
    publish(http, *({"key": f"k{n}", "data": {"n": n}} for n in range(50)))
    began = time.monotonic()
    for operation in operations(url):
        if mode == GenerationMode.NEGATIVE and not (list(operation.body) or list(operation.query)):
            continue  # nothing about it can be wrong

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        def check(case: Any) -> None:
            for prefix, name in NAMES.items():
                if case.path.startswith(prefix) and case.path_parameters:
                    case.path_parameters = dict.fromkeys(case.path_parameters, name)
            if isinstance(case.body, dict) and isinstance(case.body.get("wait"), int | float | str):
                case.body["wait"] = 0  # no example waits for messages
            case.call_and_validate(checks=CHECKS, base_url=url, timeout=20)

        check()
        assert time.monotonic() - began < LONGEST


def test_methods_that_are_not_described_are_refused(http: httpx.Client, url: str) -> None:
    for path, methods in http.get("/api/openapi.json").json()["paths"].items():
        allowed = {method.upper() for method in methods}
        allowed |= {"HEAD"} if "GET" in allowed else set()
        for method in METHODS:
            if method not in allowed:
                answer = http.request(method, path.replace("{name}", "billing").replace("{topic}", "t"))
                assert answer.status_code == 405, (method, path)
                assert set(answer.headers["allow"].split(", ")) == allowed
                if method != "HEAD":
                    problem(answer, 405)
