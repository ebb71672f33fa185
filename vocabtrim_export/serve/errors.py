"""`ApiError`: a refusal in the form in which OpenAI's clients read errors."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from engines.errors import ContextExceededError, VocabtrimError

CONTEXT_EXCEEDED = "context_length_exceeded"


class ApiError(Exception):
    """A request that cannot be answered.

    Attributes:
        status: The HTTP status.
        headers: Headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self._param, self._code = param, code

    def to_dict(self) -> dict[str, Any]:
        """Returns the body of the answer."""
        kinds = {401: "authentication_error", 404: "not_found_error", 408: "timeout_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": str(self), "type": kind, "param": self._param, "code": self._code}
        return {"error": error}


def refusal(error: BaseException) -> Response:
    """Returns the answer that reports an error to a client."""
    told = as_api_error(error)
    return Response(to_json(told.to_dict()), told.status, told.headers, "application/json")


def to_json(data: Mapping[str, Any]) -> bytes:
    """Returns JSON in ASCII: a client's own words may hold half of a surrogate pair, which UTF-8 cannot."""
    return json.dumps(data).encode()


def as_api_error(error: BaseException) -> ApiError:
    """Returns `error` in the form that clients get: with its message where they can correct the request, else without.

    The details of the server's own failures are written to its log.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, VocabtrimError):
        code = CONTEXT_EXCEEDED if isinstance(error, ContextExceededError) else None
        return ApiError(400, str(error), code=code)
    if isinstance(error, TimeoutError):
        return ApiError(504, "the request took longer than this server allows: ask for fewer tokens, or try later")
    logging.getLogger("vocabtrim.serve").error("a request failed", exc_info=error)
    return ApiError(500, "the server failed on this request; its log has the details")
