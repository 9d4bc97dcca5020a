"""What a storage's error means: whether to try again, and what its user can do. Pure: errors in, words out."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass

_TRANSIENT = frozenset(
    {
        errno.EAGAIN,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.EINTR,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.EPIPE,
        errno.ESTALE,
        errno.ETIMEDOUT,
    }
)
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


@dataclass(frozen=True)
class Fault:
    """A kind of trouble: `transient` is worth another try; `what` and `remedy` are for people."""

    what: str
    remedy: str
    transient: bool = False


FULL = Fault("it is full", "make room there, then the same command goes on with the run")
EXPIRED = Fault("its credentials have expired", "renew them, then the same command goes on with the run")
CREDENTIALS = Fault(
    "its credentials are missing or wrong",
    "check them (the address, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws, or Google's application default)",
)
PERMISSION = Fault(
    "permission is denied",
    "have whoever owns it allow reading, writing, listing and deleting, or name another folder",
)
NO_BUCKET = Fault("there is no such bucket", "make the bucket or correct its name")
UNREACHABLE = Fault(
    "it does not answer as it should",
    "check that it runs and can be reached from here, then the same command goes on with the run",
    transient=True,
)
OTHER = Fault(
    "",
    "check that the folder can be written, has room, and that the credentials allow it, or name another folder",
)

# The first that fits counts. The words are pyarrow's (of AWS and Google Cloud), obstore's and HTTP's own.
_SIGNS: tuple[tuple[Fault, str], ...] = (
    (FULL, r"Insufficient ?Storage|No space left|QuotaExceeded|QUOTA_EXCEEDED|storage quota"),
    (EXPIRED, r"[Ee]xpired|REQUEST_EXPIRED|EXPIRED_TOKEN"),
    (NO_BUCKET, r"NO_SUCH_BUCKET|NoSuchBucket|bucket does not exist|no such bucket"),
    (
        CREDENTIALS,
        r"INVALID_ACCESS_KEY_ID|InvalidAccessKeyId|SIGNATURE_DOES_NOT_MATCH|SignatureDoesNotMatch|INVALID_CLIENT_TOKEN"
        r"|UNRECOGNIZED_CLIENT|MISSING_AUTHENTICATION_TOKEN|InvalidToken|INVALID_SIGNATURE|UNAUTHENTICATED"
        r"|Unauthenticated|NOT_AUTHENTICATED|instance metadata|latest/meta-data|latest/api/token",
    ),
    (PERMISSION, r"ACCESS_DENIED|AccessDenied|PERMISSION_DENIED|PermissionDenied|Forbidden"),
    (
        UNREACHABLE,
        r"SLOW_DOWN|SlowDown|INTERNAL_FAILURE|InternalError|SERVICE_UNAVAILABLE|THROTTLING|REQUEST_TIME"
        r"|RequestTimeout|NETWORK_CONNECTION|curlCode|UNAVAILABLE|DEADLINE_EXCEEDED|\bINTERNAL\b|ABORTED"
        r"|RESOURCE_EXHAUSTED|[Cc]onnection (?:refused|reset|aborted|closed)|[Tt]imed? ?out|[Tt]imeout"
        r"|error sending request|HTTP error",
    ),
)
_STATUS = re.compile(r"(?:HTTP status|status code|HTTP response code)[ :=]+(\d{3})")
_BY_STATUS = {401: CREDENTIALS, 403: PERMISSION, 507: FULL, 408: UNREACHABLE, 409: UNREACHABLE, 429: UNREACHABLE}
_NAMES = re.compile(r"'[^']*'|\"[^\"]*\"|https?://(?!169\.254\.169\.254)\S+")
"""What an error quotes is the user's own words, but for the address that gives a machine its credentials."""


def fault_of(error: BaseException) -> Fault:
    """What an error of a filesystem or a client of an object store means."""
    number = getattr(error, "errno", None)
    if number in _FULL:
        return FULL
    if number in _TRANSIENT or isinstance(error, (ConnectionError, TimeoutError)):
        return UNREACHABLE
    if number in (errno.EACCES, errno.EPERM):
        return PERMISSION
    if number is not None:  # the local disk's own word
        return OTHER
    text = _NAMES.sub("''", str(error))
    found = next((fault for fault, signs in _SIGNS if re.search(signs, text)), None)
    status = _STATUS.search(text)
    if found is None and status is not None:
        code = int(status.group(1))
        return _BY_STATUS.get(code, UNREACHABLE if code >= 500 else OTHER)
    return found or OTHER
