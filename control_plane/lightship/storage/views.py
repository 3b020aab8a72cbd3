"""Storage: read-only views for dashboards and for people with SQL.

Rules:
* a view names what may be seen: no secret, no key, no payload, no row of data is in any;
* one text serves SQLite and PostgreSQL; times are milliseconds since the Unix epoch, as in the tables;
* views are no part of any migration: they are dropped before tables change and made anew afterwards, since neither
  engine changes a table under a view. On PostgreSQL the role `lightship_reader`, where there is one, may read them,
  and nothing else.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from sqlalchemy import Connection, inspect, text

READER: Final = "lightship_reader"


class View(NamedTuple):
    """A view, and what a row of it is."""

    name: str
    help: str
    query: str


VIEWS: Final[tuple[View, ...]] = (
    View(
        "view_devices",
        "A device: what it runs and how it is, by its own reports.",
        """
        SELECT id AS device, tenant, "group" AS device_group, state, last_seen AS last_seen_ms, online,
            running_model AS model, running_version AS version, running_digest AS digest, phase, update_state,
            update_code, drift_level, quarantined, agent, onnxruntime, machine, cert_not_after AS certificate_until_ms,
            cloned_at AS cloned_ms, enrolled_at AS enrolled_ms
        FROM devices
        """,
    ),
    View(
        "view_rollouts",
        "A rollout.",
        """
        SELECT id AS rollout, model, version, status, reason, created_by, created_at AS created_ms,
            updated_at AS updated_ms
        FROM rollouts
        """,
    ),
    View(
        "view_update_steps",
        "A step of a device's update, as it reported it.",
        """
        SELECT s.at AS at_ms, s.device, d."group" AS device_group, s.rollout, s.digest, s.state, s.code, s.detail
        FROM update_steps s LEFT JOIN devices d ON d.id = s.device
        """,
    ),
    View(
        "view_versions",
        "A registered version of a model.",
        """
        SELECT model, version, state, digest, length AS bytes, created_at AS created_ms, released_at AS released_ms
        FROM model_versions
        """,
    ),
    View(
        "view_windows",
        "A closed window of a device's stream; `psi` is the largest debiased one of a feature.",
        """
        SELECT w.device, d."group" AS device_group, w.model, w.version, w.digest, w.w AS number,
            w.opened_at AS opened_ms, w.closed_at AS closed_ms, w.rows AS row_count, w.invalid, w.labelled, w.errors,
            w.judged, w.level, w.shift AS psi
        FROM windows w LEFT JOIN devices d ON d.id = w.device
        """,
    ),
    View(
        "view_alarms",
        "An alarm, open where `closed_ms` is null.",
        """
        SELECT id AS alarm, kind, level, model, device, sentence, opened_at AS opened_ms, closed_at AS closed_ms
        FROM alarms
        """,
    ),
    View(
        "view_alerts",
        "Of what people are told, or would be: a finding that waits, an alert that is open, or one that is over.",
        """
        SELECT id AS alert, kind, status, severity, sentence, count AS findings, began AS began_ms,
            resolved_at AS resolved_ms
        FROM alerts
        """,
    ),
    View(
        "view_experiments",
        "An experiment on a device: rows that both answered, and those of them answered alike.",
        """
        SELECT e.id AS experiment, e.name, e.mode, e.status, e.model, e.version, a.device, a.row_count, a.same,
            a.failures, a.dropped, a.updated_ms
        FROM experiments e LEFT JOIN (
            SELECT experiment, device, SUM(rows) AS row_count, SUM(same) AS same, SUM(failures) AS failures,
                SUM(dropped) AS dropped, MAX(updated_at) AS updated_ms
            FROM agreements GROUP BY experiment, device
        ) a ON a.experiment = e.id
        """,
    ),
    View(
        "view_outboxes",
        "An outbox of a device: how far its reports are stored, and how many it dropped before they were.",
        """
        SELECT p.device, d."group" AS device_group, p.epoch, p.next_seq - 1 AS stored_to, p.lost,
            p.updated_at AS updated_ms
        FROM device_epochs p LEFT JOIN devices d ON d.id = p.device
        """,
    ),
    View(
        "view_dead_letters",
        "A message that could not be understood, without its content.",
        """
        SELECT id AS letter, at AS at_ms, topic, code, detail FROM dead_letters
        """,
    ),
)


def drop_views(connection: Connection) -> None:
    """Drop them, and those of other versions, so that tables can change."""
    for name in sorted(n for n in inspect(connection).get_view_names() if n.startswith("view_")):
        connection.execute(text(f'DROP VIEW "{name}"'))


def make_views(connection: Connection) -> None:
    """Make them, where their tables are; an older schema has none."""
    tables = set(inspect(connection).get_table_names())
    if not {"tallies", "experiments", "alerts"} <= tables:
        return
    for view in VIEWS:
        connection.execute(text(f"CREATE VIEW {view.name} AS {view.query}"))
    if connection.dialect.name == "postgresql" and _has_reader(connection):
        names = ", ".join(view.name for view in VIEWS)
        connection.execute(text(f"GRANT SELECT ON {names} TO {READER}"))


def _has_reader(connection: Connection) -> bool:
    found = connection.scalar(text("SELECT 1 FROM pg_roles WHERE rolname = :name"), {"name": READER})
    return found is not None
