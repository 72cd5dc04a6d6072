"""Exit codes and the error types of the harness."""

from __future__ import annotations

from enum import IntEnum

from medusa_impl.errors import UserError

__all__ = ["ExitCode", "InvalidMeasurement", "UserError"]


class ExitCode(IntEnum):
    """What every command of the project returns to its shell."""

    OK = 0
    GATE_REGRESSION = 1
    INVALID_MEASUREMENT = 2
    USER_ERROR = 3
    DEFECT = 70
    INTERRUPTED = 130
    PIPE_CLOSED = 141


class InvalidMeasurement(Exception):
    """A measurement that a named validity check refuses; never turned into a figure."""
