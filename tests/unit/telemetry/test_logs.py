"""Logs that name the tenant and the request: the standard library's, and structlog's."""

from __future__ import annotations

import io
import json
import logging
import logging.config
import logging.handlers
import queue
import threading
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest
import structlog

from tenancy_orm import Status, Tenancy, TenancyConfig, Tenant, current_request_id
from tenancy_orm.context import bind
from tenancy_orm.correlation import RequestLabels, attach_labels, reset_labels, set_labels
from tenancy_orm.integrations.structlog import add_tenant
from tenancy_orm.telemetry import TenantLogFilter

ACME = Tenant(id=UUID(int=1), slug="acme", status=Status.ACTIVE, tier="free")
FORMAT = "%(tenant_id)s|%(tenant)s|%(request_id)s|%(message)s"


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """What a configuration of logging writes, that has the filter on its handler; it ends with the test."""
    written = io.StringIO()
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "filters": {"tenant": {"()": "tenancy_orm.telemetry.TenantLogFilter"}},
            "formatters": {"line": {"format": FORMAT}},
            "handlers": {
                "out": {"class": "logging.StreamHandler", "stream": written, "filters": ["tenant"], "formatter": "line"}
            },
            "root": {"handlers": ["out"], "level": "INFO"},
        }
    )
    yield written
    root.handlers[:] = handlers
    root.setLevel(level)


def labels(request_id: str, tenant: Tenant | None = None) -> RequestLabels:
    made = RequestLabels(request_id)
    made.tenant = tenant
    return made


def test_every_record_has_the_fields(stream: io.StringIO) -> None:
    """Of libraries and threads too; empty where there is nothing, so that no format fails."""
    tenancy = Tenancy(TenancyConfig(control_url="embedded"))
    log = logging.getLogger("some.library.deep.inside")
    log.info("nobody")
    token = set_labels(labels("edge-1"))
    log.info("a request without a tenant")
    with bind(ACME):
        log.info("bound %s", "%")
        wrapped = tenancy.wrap(lambda: log.info("thread of %s", current_request_id()))
        threads = [threading.Thread(target=target) for target in (wrapped, lambda: log.info("plain thread"))]
    reset_labels(token)
    for thread in threads:
        thread.start()
        thread.join()
    log.info("nobody again")
    acme = f"{ACME.id}|acme|edge-1"
    assert stream.getvalue().splitlines() == [
        "|||nobody",
        "||edge-1|a request without a tenant",
        f"{acme}|bound %",
        f"{acme}|thread of edge-1",
        "|||plain thread",
        "|||nobody again",
    ]


def test_a_filter_on_a_logger_misses_what_its_children_log() -> None:
    """Why it belongs on handlers: there the format fails, and the record is lost."""
    parent, child = logging.getLogger("tests.parent"), logging.getLogger("tests.parent.child")
    handler = logging.handlers.BufferingHandler(10)
    parent.addHandler(handler)
    parent.addFilter(tenant_filter := TenantLogFilter())
    try:
        child.warning("x")
        with pytest.raises(ValueError, match="tenant_id"):
            logging.Formatter(FORMAT).format(handler.buffer[0])
        parent.removeFilter(tenant_filter)
        handler.addFilter(tenant_filter)
        child.warning("x")
        assert logging.Formatter(FORMAT).format(handler.buffer[1]) == "|||x"
    finally:
        parent.removeHandler(handler)


def test_a_queue_is_labelled_where_the_record_is_made() -> None:
    """A listener's thread adds nothing of its own, and what ``extra`` gives stays."""
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    into, out = logging.handlers.QueueHandler(waiting), logging.handlers.BufferingHandler(10)
    into.addFilter(TenantLogFilter())
    out.addFilter(TenantLogFilter("-"))
    log = logging.getLogger("tests.queue")
    log.addHandler(into)
    listener = logging.handlers.QueueListener(waiting, out)
    listener.start()
    try:
        with bind(ACME):
            log.warning("x")
        log.warning("x", extra={"tenant": "given"})
    finally:
        listener.stop()
        log.removeHandler(into)
    line = logging.Formatter(FORMAT)
    assert [line.format(record) for record in out.buffer] == [f"{ACME.id}|acme||x", "|given||x"]


def test_structlog_has_the_same_fields() -> None:
    """As far as there are any; what an event has already stays; a standard record that it formats has them as well."""
    written = io.StringIO()
    log = structlog.wrap_logger(
        structlog.PrintLogger(written), processors=[add_tenant, structlog.processors.JSONRenderer()]
    )
    log.info("nobody")
    token = set_labels(labels("edge-1", ACME))
    log.info("the request's")
    reset_labels(token)
    with bind(ACME):
        log.info("bound", tenant="given")
        formatter = structlog.stdlib.ProcessorFormatter(
            processor=structlog.processors.JSONRenderer(), foreign_pre_chain=[add_tenant]
        )
        foreign = json.loads(formatter.format(logging.makeLogRecord({"msg": "x"})))
    assert [json.loads(line) for line in written.getvalue().splitlines()] == [
        {"event": "nobody"},
        {"event": "the request's", "tenant_id": str(ACME.id), "tenant": "acme", "request_id": "edge-1"},
        {"event": "bound", "tenant_id": str(ACME.id), "tenant": "given"},
    ]
    assert foreign["tenant"] == "acme"
    error = ZeroDivisionError()
    attach_labels(labels("edge-2", ACME), error)
    record = logging.makeLogRecord({"msg": "x", "exc_info": (type(error), error, None)})
    assert json.loads(formatter.format(record))["request_id"] == "edge-2"
    log.error("x", exc_info=error)
    assert json.loads(written.getvalue().splitlines()[-1])["tenant"] == "acme"


def test_an_exception_of_another_request_does_not_change_a_record(stream: io.StringIO) -> None:
    """One that is raised again ends several requests: the running one, else the last that it ended, is named."""
    globex = Tenant(id=UUID(int=2), slug="globex", status=Status.ACTIVE, tier="free")
    log, error = logging.getLogger("tests.shared"), ZeroDivisionError()
    attach_labels(labels("edge-1", ACME), error)
    token = set_labels(labels("edge-2", globex))
    log.error("unbound", exc_info=error)
    with bind(globex):
        log.error("bound", exc_info=error)
    reset_labels(token)
    with bind(globex):
        log.error("without a request", exc_info=error)
    log.error("of the first", exc_info=error)
    attach_labels(labels("edge-2", globex), error)
    log.error("of the second", exc_info=error)
    assert [line for line in stream.getvalue().splitlines() if "|" in line] == [
        f"{globex.id}|globex|edge-2|unbound",
        f"{globex.id}|globex|edge-2|bound",
        f"{globex.id}|globex||without a request",
        f"{ACME.id}|acme|edge-1|of the first",
        f"{globex.id}|globex|edge-2|of the second",
    ]
