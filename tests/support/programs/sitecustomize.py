"""Imported by each Python process of a test run as it starts: this directory is in their PYTHONPATH. They end sooner.

At its end Python collects garbage several times, and each time looks at everything that a program has imported: a
quarter of a second for this package. Here garbage is collected once, and what is alive is left to end with the process.
"""

import atexit
import gc


def _collect_once() -> None:
    gc.collect()
    gc.freeze()


# the first to be registered, and so the last to run
atexit.register(_collect_once)
