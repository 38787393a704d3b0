"""What is wrong with a request, in the shape of OpenAI's errors."""

from __future__ import annotations

from typing import Any

STATUS_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error", 504: "server_error"}


class ApiError(Exception):
    """Ends a request with an HTTP status and a sentence for the client.

    param: the field at fault, such as "messages.0.content". code: a word for programs. retry_after: whole seconds after
    which it makes sense to come again.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """{"error": {"message", "type", "param", "code"}}."""
        kind = STATUS_TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Retry-After, where coming again makes sense."""
        return {"retry-after": str(self.retry_after)} if self.retry_after else {}


class Gone(Exception):  # noqa: N818 - no error of ours
    """The client went away."""


class TimedOut(Exception):  # noqa: N818 - names what happened
    """The request was not answered within the limit."""


class ShuttingDown(Exception):  # noqa: N818 - names what happened
    """The server ends before the answer does."""
