"""Answer the requests of clients of SQS, and pass all others on.

A request belongs to SQS if it carries a signature of AWS, or names an action of SQS in the header X-Amz-Target. It is
logged like a request of the API, with its action. Never logs a body, a signature or a secret.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from time import monotonic
from typing import Any, Final

import structlog
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from cdcbridge.errors import CdcbridgeError
from cdcbridge.web.access import Caller, Failures
from cdcbridge.web.calls import Services
from cdcbridge.web.problems import RequestRefused
from cdcbridge.web.requests import address_of, body_of, has_gone, log_request
from cdcbridge.web.sqs import answers, managing, receiving, sending
from cdcbridge.web.sqs.calls import SqsAnswer, SqsCall
from cdcbridge.web.sqs.directory import Directory
from cdcbridge.web.sqs.errors import (
    NO_ACTION,
    NO_SUCH_KEY,
    UNSUPPORTED,
    SqsError,
    sqs_error,
)
from cdcbridge.web.sqs.requests import Given, from_json, from_query
from cdcbridge.web.sqs.signature import Signature, SignedRequest, is_signed, signature_of, verify

_ACTIONS: Final[Mapping[str, Callable[[SqsCall], Awaitable[SqsAnswer]]]] = {
    "ChangeMessageVisibility": receiving.change_message_visibility,
    "ChangeMessageVisibilityBatch": receiving.change_message_visibility_batch,
    "CreateQueue": managing.create_queue,
    "DeleteMessage": receiving.delete_message,
    "DeleteMessageBatch": receiving.delete_message_batch,
    "GetQueueAttributes": managing.get_queue_attributes,
    "GetQueueUrl": managing.get_queue_url,
    "ListDeadLetterSourceQueues": managing.list_dead_letter_source_queues,
    "ListQueueTags": managing.list_queue_tags,
    "ListQueues": managing.list_queues,
    "PurgeQueue": managing.purge_queue,
    "ReceiveMessage": receiving.receive_message,
    "SendMessage": sending.send_message,
    "SendMessageBatch": sending.send_message_batch,
    "SetQueueAttributes": managing.set_queue_attributes,
    "StartMessageMoveTask": managing.start_message_move_task,
}
_REFUSED: Final = {
    "AddPermission",
    "CancelMessageMoveTask",
    "DeleteQueue",
    "ListMessageMoveTasks",
    "RemovePermission",
    "TagQueue",
    "UntagQueue",
}
_JSON: Final = "application/x-amz-json-1.0"
_XML: Final = "text/xml"
_TARGET: Final = "x-amz-target"
_DECIDING: Final = frozenset((_TARGET.encode(), b"authorization"))
_HEADERS: Final = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
log = structlog.get_logger()


class SqsFront:
    """The outermost application, which answers requests of SQS. It needs no routes, and so skips those of the API.

    Args:
        app: Answers all other requests.
        services: The store, the settings and the other parts that serve all calls.
        failures: The failed logins.
    """

    def __init__(self, app: ASGIApp, services: Services, failures: Failures) -> None:
        self._app = app
        self._services = services
        self._failures = failures
        self._directory = Directory(services.store)
        self._keys = _keys(services)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request of SQS, or pass it on."""
        if self._keys and scope["type"] == "http" and _is_of_sqs(scope):
            await (await self._answer(Request(scope, receive)))(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        began, request_id = monotonic(), str(uuid.uuid4())
        target = request.headers.get(_TARGET)
        is_json = target is not None
        caller: Caller | None = None
        action = ""
        try:
            body, signature, caller = await self._login(request)
            action, values = from_query(_query(request), body) if target is None else from_json(target, body)
            answer = await self._answered(action, values, request, caller, signature)
            content = answers.json_answer(answer) if is_json else answers.xml_answer(action, answer, request_id)
            status, more = 200, dict[str, str]()
        except CdcbridgeError as error:
            status, content, more = _refused(sqs_error(error), request_id, is_json=is_json)
        except ClientDisconnect:
            gone = sqs_error(RequestRefused(408, "the caller has disconnected"))
            status, content, more = _refused(gone, request_id, is_json=is_json)
        except Exception as error:
            log.exception("api.failed", path=request.scope["path"], error=f"{type(error).__name__}: {error}")
            unforeseen = CdcbridgeError("the request failed for a reason that nobody foresaw. See the log of `serve`.")
            status, content, more = _refused(sqs_error(unforeseen), request_id, is_json=is_json)
        seconds = log_request(request, status, began, caller, action=action[:80])
        template = f"/ (SQS {action})" if action in _ACTIONS else "/ (SQS)"  # a stranger must not make new series
        self._services.figures.answered(request.method, template, status, seconds)
        own = {"x-amzn-RequestId": request_id, "Content-Type": _JSON if is_json else _XML}
        return Response(content, status, headers={**_HEADERS, **own, **more})

    async def _login(self, request: Request) -> tuple[bytes, Signature, Caller]:
        """Return the body, the signature and the caller.

        Raises:
            SqsError: The signature is missing or wrong.
            RequestRefused: The address failed too often, or the body is too large.
        """
        address = address_of(request)
        try:
            signed = _signed(request)
            signature = signature_of(signed)
            if (key := self._keys.get(signature.key_id)) is None:
                raise SqsError(NO_SUCH_KEY, "The security token included in the request is invalid.")
            body = await body_of(request, self._services.config.api.max_body)
            verify(signed._replace(body=body), signature, key[0], datetime.now(UTC))
        except SqsError:
            self._failures.refuse(address, monotonic())
            self._failures.note(address, monotonic())
            raise
        return body, signature, key[1]

    async def _answered(
        self, action: str, values: dict[str, Any], request: Request, caller: Caller, signature: Signature
    ) -> SqsAnswer:
        if (call := _ACTIONS.get(action)) is None:
            if action in _REFUSED:
                raise SqsError(UNSUPPORTED, f"{action} is not supported: queues are declared in the configuration file,"
                               " and StartMessageMoveTask has moved everything when it returns.")  # fmt: skip
            raise SqsError(NO_ACTION, f"The action {action[:80]} is not valid for this endpoint.")
        path: str = request.scope["path"]
        if path.count("/") == 2:  # older clients send requests to the URL of the queue
            values.setdefault("QueueUrl", path)
        base = f"{request.scope['scheme']}://{request.headers.get('host', '')}"  # the signature covers the host
        return await call(
            SqsCall(
                services=self._services,
                directory=self._directory,
                caller=caller,
                action=action,
                given=Given(values),
                base=base,
                region=signature.region,
                address=address_of(request),
                gone=partial(has_gone, request),
            )
        )


def _keys(services: Services) -> dict[str, tuple[str, Caller]]:
    """Return the secrets and the callers of all access keys, by their ids."""
    api = services.config.api
    tokens = {token.name: Caller.of(token) for token in api.tokens}
    keys = () if api.sqs is None else api.sqs.access_keys
    return {key.id: (key.secret.get_secret_value(), tokens[key.token]) for key in keys}


def _is_of_sqs(scope: Scope) -> bool:
    found = {name: value.decode("latin-1") for name, value in scope["headers"] if name in _DECIDING}
    target, authorization = found.get(_TARGET.encode(), ""), found.get(b"authorization")
    return target.startswith("AmazonSQS.") or is_signed(scope["query_string"].decode("latin-1"), authorization)


def _signed(request: Request) -> SignedRequest:
    scope = request.scope
    path = scope.get("raw_path") or scope["path"].encode()
    headers = [
        (name.decode("latin-1").lower(), value.decode("utf-8", "surrogateescape")) for name, value in scope["headers"]
    ]
    return SignedRequest(request.method, path.decode("latin-1"), _query(request), headers)


def _query(request: Request) -> str:
    query: bytes = request.scope["query_string"]
    return query.decode("latin-1")


def _refused(error: SqsError, request_id: str, *, is_json: bool) -> tuple[int, bytes, dict[str, str]]:
    content, more = answers.json_error(error) if is_json else (answers.xml_error(error, request_id), {})
    return error.code.status, content, more
