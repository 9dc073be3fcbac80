"""Places in the user's source, for messages."""

from __future__ import annotations

import linecache
import os
import sys

import torch

SKIPPED = tuple(os.path.dirname(os.path.abspath(file)) + os.sep for file in (torch.__file__, __file__))


def place() -> str:
    """Source line of the user's that runs now, `file.py:12: text`; empty inside a backward pass."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        inside = name.startswith(SKIPPED) or name.startswith(("<frozen", "<eval_with_key"))
        if not inside and not name.endswith(("contextlib.py", "functools.py")):
            text = linecache.getline(name, frame.f_lineno).strip()
            return f"{short(name)}:{frame.f_lineno}: " + (f"`{text}`: " if text else "")
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def short(name: str) -> str:
    """Path of a source file as people see it."""
    relative = os.path.relpath(name) if os.path.isabs(name) else name
    return name if relative.startswith("..") else relative
