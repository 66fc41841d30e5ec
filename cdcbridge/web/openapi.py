"""Describe the API in the form of OpenAPI 3.1, made from the endpoints and their models.

This module is pure.

Source: https://spec.openapis.org/oas/v3.1.0
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

from pydantic.json_schema import models_json_schema

from cdcbridge.web.calls import Endpoint

_TEXT: Final = {"type": ["string", "null"]}
_COUNT: Final = {"type": "integer"}
_SECONDS: Final = {"type": ["number", "null"]}
_LOGGED: Final = {
    "seq": _COUNT,
    "topic": {"type": "string"},
    "key": _TEXT,
    "data": {},
    "commit_lsn": _TEXT,
    "ordinal": {"type": ["integer", "null"]},
    "commit_time": _TEXT,
    "inserted_at": {"type": "string"},
}
_SCHEMAS: Final = {
    "LoggedMessage": _LOGGED,
    "Message": {**_LOGGED, "receipt": _TEXT, "deliver_count": _COUNT, "not_visible_until": _TEXT},
    "StreamMessage": {**_LOGGED, "receipt": _TEXT, "partition": _COUNT},
    "DeadLetter": {"id": _COUNT, "seq": _COUNT, "topic": {"type": "string"}, "key": _TEXT, "data": {},
                   "deliver_count": _COUNT, "reason": {"type": "string"}, "died_at": {"type": "string"}},
    "ConsumerLag": {"name": {"type": "string"}, "mode": {"enum": ["queue", "fifo", "stream"]}, "pending": _COUNT,
                    "in_flight": _COUNT, "dead": _COUNT, "oldest_age_seconds": _SECONDS},
    "Rates": {"per_second_in": _SECONDS, "per_second_out": _SECONDS, "growth": _SECONDS, "seconds": {"type": "number"}},
    "Problem": {"type": {"type": "string"}, "title": {"type": "string"}, "status": _COUNT, "detail": {"type": "string"},
                "code": {"type": "string"}, "hint": {"type": "string"}},
}  # fmt: skip
_STATUSES: Final = {
    "400": "The request cannot be read.",
    "401": "The token is missing or not known.",
    "403": "The token may not do this.",
    "404": "There is no such consumer, or no such dead letter.",
    "409": "A receipt is stale, and `strict` is true.",
    "410": "Retention dropped messages that the group had not read.",
    "413": "The request is larger than `api.max_body`.",
    "422": "A value is not allowed.",
    "429": "Too many logins from this address failed.",
    "503": "The store is away.",
}


def document(endpoints: Iterable[Endpoint], version: str) -> dict[str, Any]:
    """Return the OpenAPI document.

    Args:
        endpoints: All endpoints.
        version: The version of the program.
    """
    endpoints = list(endpoints)
    models = [(one.body, "validation") for one in endpoints if one.body is not None]
    schemas, definitions = models_json_schema(models, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    paths: dict[str, dict[str, Any]] = {}
    for one in endpoints:
        model = None if one.body is None else schemas[one.body, "validation"]
        path = one.path.replace(":path", "")
        paths.setdefault(path, {})[one.method.lower()] = _operation(one, model, definitions.get("$defs", {}))
    described = {name: {"type": "object", "properties": fields} for name, fields in _SCHEMAS.items()}
    return {
        "openapi": "3.1.0",
        "info": {"title": "cdcbridge", "version": version},
        "paths": paths,
        "components": {
            "schemas": {**described, **definitions.get("$defs", {})},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"token": []}, {}],
    }


def _operation(one: Endpoint, model: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"\{(\w+)", one.path)
    ]
    made: dict[str, Any] = {"summary": (one.call.__doc__ or "").partition("\n")[0], "operationId": one.call.__name__}
    if model is not None and one.method == "GET":
        fields = definitions[model["$ref"].rpartition("/")[2]]["properties"]
        parameters += [{"name": name, "in": "query", "schema": schema} for name, schema in fields.items()]
    elif model is not None:
        made["requestBody"] = {"required": True, "content": {"application/json": {"schema": model}}}
    if parameters:
        made["parameters"] = parameters
    is_json = one.media == "application/json"
    answer = {"type": "object", "properties": dict(one.answer)} if is_json else {"type": "string"}
    problem = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    made["responses"] = {
        "200": {"description": "The result.", "content": {one.media: {"schema": answer}}},
        **{status: {"description": text, "content": problem} for status, text in _STATUSES.items()},
    }
    return made
