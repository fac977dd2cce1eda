"""What an extra brings is imported when it is needed, and asked for by name where it is missing."""

from __future__ import annotations

import importlib
from typing import Any


def need(*names: str) -> Any:
    """Import packages of the extra ``study`` and return the first.

    Raises
    ------
    ImportError
        One of them is not installed: the message has the pip line.

    Examples
    --------
    >>> from refattn._need import need
    >>> need("nowhere")
    Traceback (most recent call last):
    ImportError: refattn needs nowhere, which is not installed; install it with: pip install 'refattn[study]'
    """
    found: list[Any] = []
    for name in names:
        try:
            found.append(importlib.import_module(name))
        except ImportError:
            raise ImportError(
                f"refattn needs {name}, which is not installed; install it with: pip install 'refattn[study]'"
            ) from None
    return found[0]
