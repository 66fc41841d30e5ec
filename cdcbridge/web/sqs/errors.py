"""The errors of SQS: their names in both protocols, and the errors of the store in their words.

This module is pure.

Source: the service model of Amazon SQS, version 2012-11-05, and the pages "Common errors" of its API reference.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from cdcbridge.errors import CdcbridgeError
from cdcbridge.web.problems import problem_of

_OLD: Final = "AWS.SimpleQueueService."


class SqsCode(NamedTuple):
    """An error code.

    Attributes:
        kind: The name of the exception in the JSON protocol.
        old: The code in the query protocol. Clients show this one in both protocols.
        status: The HTTP status.
    """

    kind: str
    old: str
    status: int = 400


NO_SUCH_QUEUE: Final = SqsCode("QueueDoesNotExist", f"{_OLD}NonExistentQueue")
OTHER_ATTRIBUTES: Final = SqsCode("QueueNameExists", "QueueAlreadyExists")
BAD_RECEIPT: Final = SqsCode("ReceiptHandleIsInvalid", "ReceiptHandleIsInvalid")
NOT_IN_FLIGHT: Final = SqsCode("MessageNotInflight", f"{_OLD}MessageNotInflight")
BAD_CONTENTS: Final = SqsCode("InvalidMessageContents", "InvalidMessageContents")
BAD_ATTRIBUTE_NAME: Final = SqsCode("InvalidAttributeName", "InvalidAttributeName")
BAD_ATTRIBUTE_VALUE: Final = SqsCode("InvalidAttributeValue", "InvalidAttributeValue")
BAD_VALUE: Final = SqsCode("InvalidParameterValueException", "InvalidParameterValue")
MISSING: Final = SqsCode("MissingRequiredParameterException", "MissingParameter")
NO_BATCH: Final = SqsCode("EmptyBatchRequest", f"{_OLD}EmptyBatchRequest")
MANY_ENTRIES: Final = SqsCode("TooManyEntriesInBatchRequest", f"{_OLD}TooManyEntriesInBatchRequest")
SAME_IDS: Final = SqsCode("BatchEntryIdsNotDistinct", f"{_OLD}BatchEntryIdsNotDistinct")
BAD_ENTRY_ID: Final = SqsCode("InvalidBatchEntryId", f"{_OLD}InvalidBatchEntryId")
LONG_BATCH: Final = SqsCode("BatchRequestTooLong", f"{_OLD}BatchRequestTooLong")
UNSUPPORTED: Final = SqsCode("UnsupportedOperation", f"{_OLD}UnsupportedOperation")
IN_PROGRESS: Final = SqsCode("PurgeQueueInProgress", f"{_OLD}PurgeQueueInProgress", 403)
BUSY: Final = SqsCode("ServiceUnavailable", "ServiceUnavailable", 503)
NO_RESOURCE: Final = SqsCode("ResourceNotFoundException", "ResourceNotFoundException", 404)
NO_ACTION: Final = SqsCode("UnknownOperationException", "InvalidAction")
UNREADABLE: Final = SqsCode("SerializationException", "MalformedInput")
NO_SIGNATURE: Final = SqsCode("MissingAuthenticationTokenException", "MissingAuthenticationToken", 403)
INCOMPLETE: Final = SqsCode("IncompleteSignatureException", "IncompleteSignature")
NO_SUCH_KEY: Final = SqsCode("UnrecognizedClientException", "InvalidClientTokenId", 403)
OTHER_SIGNATURE: Final = SqsCode("InvalidSignatureException", "SignatureDoesNotMatch", 403)

_BY_STATUS: Final = {
    403: SqsCode("AccessDeniedException", "AccessDenied", 403),
    404: NO_SUCH_QUEUE,
    408: SqsCode("RequestTimeout", "RequestTimeout", 408),
    413: SqsCode("RequestEntityTooLarge", "RequestEntityTooLarge", 413),
    422: BAD_VALUE,
    429: SqsCode("RequestThrottled", "RequestThrottled", 429),
    503: BUSY,
}
_BY_STATE: Final = {"CB002": NO_SUCH_QUEUE, "CB003": BAD_RECEIPT}
_INTERNAL: Final = SqsCode("InternalFailure", "InternalFailure", 500)


class SqsError(CdcbridgeError):
    """A request that SQS would refuse.

    Attributes:
        code: The code of the error.
    """

    def __init__(self, code: SqsCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def sqs_error(error: CdcbridgeError) -> SqsError:
    """Return the error of SQS for an error of the API or of the store.

    For example, an unknown consumer (CB001) is a queue that does not exist.
    """
    if isinstance(error, SqsError):
        return error
    status, problem, _ = problem_of(error)
    code = _BY_STATE.get(problem.get("code", "")) or _BY_STATUS.get(status, _INTERNAL)
    return SqsError(code, f"{error} {error.hint}" if error.hint else str(error))
