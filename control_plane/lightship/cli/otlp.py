"""CLI: the fleet's aggregates to an OpenTelemetry collector."""

from __future__ import annotations

import logging
import signal
import threading
import time

import click

from lightship.settings import Settings
from lightship_agent.contract.codes import LightshipError
from lightship_agent.logs import configure

from .console import emit, json_option, opened, say

log = logging.getLogger(__name__)


@click.command()
@click.option("--endpoint", required=True, help="Where it takes metrics over HTTP: http://collector:4318/v1/metrics.")
@click.option("--every", type=click.FloatRange(1, 86_400), default=60.0, show_default=True, help="Seconds between.")
@click.option("--once", is_flag=True, help="Send once, and say whether it was taken.")
@json_option
@click.pass_obj
def otlp(settings: Settings, endpoint: str, every: float, once: bool, as_json: bool) -> None:
    """Send the fleet's aggregates, those of /metrics, to an OpenTelemetry collector, until it is told to stop.

    Needs the extra: pip install 'lightship[otlp]'. Headers and certificates come from OTEL_EXPORTER_OTLP_… variables.
    """
    from lightship.api.metrics import gather
    from lightship.integrations.otlp import OtlpExport

    configure("lightship", settings.log_level, settings.log_format)
    stop = threading.Event()
    for number in () if once else (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    sent = 0
    with opened(settings) as home:
        export = OtlpExport(endpoint, settings.environment)
        try:
            while not stop.is_set():
                try:
                    sent = export.send(gather(home), time.time_ns())
                except LightshipError as e:
                    if once:
                        raise
                    log.warning("otlp: %s: %s", e.code, e)
                if once:
                    break
                stop.wait(every)
        finally:
            export.close()
    if as_json:
        emit({"metrics": sent, "endpoint": endpoint})
    else:
        say(f"{sent} metrics went to {endpoint}.")
