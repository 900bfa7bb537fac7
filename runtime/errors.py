"""The one root of every error that is meant for a person to read."""


class FirstlightError(Exception):
    """What was wrong, where, and what to do about it, in one message a user can act on."""


class RequestError(FirstlightError):
    """A request that cannot be served as it is written. `param` names the field at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param
