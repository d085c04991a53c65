"""What a command prints, without the secrets that addresses and the environment hold."""

from __future__ import annotations

import logging
import sys
import traceback
from types import TracebackType
from typing import Any

from rlhf_lightning.io.secrets import redact_text


def print_traceback(error: BaseException) -> None:
    """Print an error as Python does, without secrets."""
    sys.stderr.write(redact_text("".join(traceback.format_exception(error))))


def keep_secrets() -> None:
    """Let no traceback and no log message of this process hold one. May be called again."""
    sys.excepthook = _hook
    logging.setLogRecordFactory(_record)


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print_traceback(error.with_traceback(trace))


def _record(*args: Any, **kwargs: Any) -> logging.LogRecord:
    record = logging.LogRecord(*args, **kwargs)
    try:
        message = record.getMessage()
    except (TypeError, ValueError):  # a mistake in the call, which logging itself reports
        return record
    found = redact_text(message)
    if found != message:
        record.msg, record.args = found, ()
    return record
