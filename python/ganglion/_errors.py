"""Errors of the package."""

from __future__ import annotations


class Error(Exception):
    """Wrong input, or a run that failed; the text says what, where and how to fix it."""


class ExportError(Error):
    """An objective that cannot be captured: the text has the place in the source and the fix."""
