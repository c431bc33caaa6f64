"""The command line ``tenancy``."""

from __future__ import annotations

import gc
import sys


def main() -> None:
    """Run the command line; without the extra, say how to install it."""
    gc.disable()
    try:
        from .app import app
    except ModuleNotFoundError as exc:
        if exc.name not in ("typer", "rich", "click"):
            raise
        sys.exit(f"the command line needs {exc.name}: run pip install 'tenancy-orm[cli]'")
    # What is imported by now stays to the end. Python would look at it several times until then: a third of a second.
    gc.freeze()
    gc.enable()
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        # help and errors without frames, for pipes and logs
        app.rich_markup_mode = None
    app()
