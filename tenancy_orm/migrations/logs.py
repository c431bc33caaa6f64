"""Labels Alembic's log lines with the tenant."""

from __future__ import annotations

import logging
import logging.config
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from contextlib import contextmanager
from contextvars import ContextVar
from logging.config import fileConfig

from alembic.config import Config

from .substitution import Substitution

logger = logging.getLogger("tenancy_orm.migrations")

TENANT_FAILED = "tenant %s: %s"
"""The message for a tenant that a run failed for; its arguments are the slug and the reason."""

_label: ContextVar[str | None] = ContextVar("tenancy_orm.migrations.label", default=None)
# the warnings of the running fleet run, which its tasks share
_warned: ContextVar[set[str] | None] = ContextVar("tenancy_orm.migrations.warned", default=None)
_quiet: ContextVar[bool] = ContextVar("tenancy_orm.migrations.quiet", default=False)


class _Labels(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if _quiet.get() and record.levelno <= logging.INFO:
            return False
        label = _label.get()
        if label is not None:
            record.msg = f"[{label.replace('%', '%%')}] {record.msg}"
        return True


# adding the same filter twice does nothing
_labels = _Labels()


@contextmanager
def labelled(label: str) -> Iterator[None]:
    """Prefix Alembic's log lines from the body with ``[label]``."""
    for emitter in (logger, logging.getLogger("alembic.runtime.migration")):
        emitter.addFilter(_labels)
    token = _label.set(label)
    try:
        yield
    finally:
        _label.reset(token)


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out the lines that Alembic logs for each connection ("Context impl PostgresqlImpl.")."""
    token = _quiet.set(True)
    try:
        yield
    finally:
        _quiet.reset(token)


@contextmanager
def warning_once() -> Iterator[None]:
    """Have each warning of ``warn_once`` logged once in the body, and not for each database."""
    token = _warned.set(set())
    try:
        yield
    finally:
        _warned.reset(token)


def warn_once(text: str) -> None:
    """Log a warning about a revision, once in a run."""
    warned = _warned.get()
    if warned is None or text not in warned:
        logger.warning("%s", text)
    if warned is not None:
        warned.add(text)


@contextmanager
def unchanged() -> Iterator[None]:
    """Leave logging as it is: ``fileConfig`` and ``dictConfig`` do nothing in the body.

    An env.py calls them for Alembic's command line. It is also read inside a running application, where they would
    replace the application's handlers and silence its loggers.
    """
    with _file_config.active(), _dict_config.active():
        yield


def _nothing(*_: object, **__: object) -> None:
    pass


_file_config = Substitution(logging.config, "fileConfig", _nothing)
_dict_config = Substitution(logging.config, "dictConfig", _nothing)


def configure(config: Config) -> None:
    """Configure logging by the ini file, if Alembic's command line is running.

    Existing loggers stay enabled: they are those of the application, which is already imported. If env.py has called
    ``fileConfig`` itself, as that of plain Alembic does, this package's loggers are enabled again.
    """
    for name, found in list(logging.root.manager.loggerDict.items()):
        if isinstance(found, logging.Logger) and name.partition(".")[0] == "tenancy_orm":
            found.disabled = False
    path = config.config_file_name
    if getattr(config.cmd_opts, "cmd", None) is None or path is None:
        return
    parser: ConfigParser = config.file_config
    if parser.has_section("loggers"):
        # printed lines must come before the lines logged from now on
        sys.stdout.flush()
        fileConfig(path, disable_existing_loggers=False)
