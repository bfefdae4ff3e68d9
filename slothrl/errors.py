"""Errors that are the user's to mend: shown as plain lines and an exit code, never as a traceback."""


class UserError(Exception):
    """Something the user asked for cannot be done; the message says what and which knob mends it."""

    exit_code = 2


class ConfigError(UserError):
    """All problems found in a configuration, reported together.

    Args:
        problems: one line each, in the order in which they were found.
    """

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems


class PolicyMismatchError(UserError):
    """The engine samples from another policy than the one being trained."""


class NotShareableError(UserError):
    """vLLM holds a base model in a form that transformers cannot be laid over; the message says which part and why."""


class FaultError(UserError):
    """Something went wrong while training: memory, disk, numbers or the engine. What was saved is whole."""

    exit_code = 1
