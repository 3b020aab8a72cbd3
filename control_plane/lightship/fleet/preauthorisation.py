"""Fleet: devices that the operator lists before they come.

Rules:
* an entry names a device by its id, its serial, its key, or several of these; all that it names must fit;
* each entry lets in one device, once; the same device may ask again while answers get lost;
* an entry with a key needs no token, because the request proves that the device has that key; any other needs a token
  that was made for listed devices: an id or a serial is a claim, and no secret.
"""

from __future__ import annotations

import csv
import io
import re
import secrets
from typing import Any, Final

import msgspec
from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from lightship.storage import audit
from lightship.storage.models import Preauthorisation
from lightship_agent.contract.codes import FleetError
from lightship_agent.contract.names import check_name

MAX_ENTRIES: Final = 100_000
MAX_SERIAL: Final = 128
_KEY: Final = re.compile(r"[0-9a-f]{64}")
_COLUMNS: Final = ("device", "serial", "key", "group")


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One device to come. Empty: anything fits; `group` empty: that of the token, or "default"."""

    device: str = ""
    serial: str = ""
    key: str = ""
    group: str = ""


def read_entries(text: str) -> list[Entry]:
    """The entries of a CSV file with a header of some of device, serial, key, group.

    Raises:
        FleetError: fleet.preauthorisation, naming the line.
        InvalidNameError: name.invalid.
    """
    reader = csv.DictReader(io.StringIO(text), strict=True)
    unknown = set(reader.fieldnames or ["nothing"]) - set(_COLUMNS)
    if unknown:
        message = f"Expected a header of {', '.join(_COLUMNS)}; found {', '.join(sorted(map(repr, unknown)))}."
        raise FleetError("fleet.preauthorisation", message)
    entries: list[Entry] = []
    try:
        for row in reader:
            if None in row or len(entries) == MAX_ENTRIES:
                message = f"Line {reader.line_num}: more columns than the header has, or more than {MAX_ENTRIES} lines."
                raise FleetError("fleet.preauthorisation", message)
            entries.append(check_entry(Entry(**{k: (v or "").strip() for k, v in row.items()}), reader.line_num))
    except csv.Error as e:
        raise FleetError("fleet.preauthorisation", f"Line {reader.line_num}: {e}.") from e
    return entries


def check_entry(entry: Entry, line: int = 0) -> Entry:
    """The entry, if it names a device at all, and rightly.

    Raises:
        FleetError: fleet.preauthorisation.
        InvalidNameError: name.invalid.
    """
    where = f"Line {line}: " if line else ""
    if entry.device:
        check_name("device id", entry.device)
    if entry.group:
        check_name("group", entry.group)
    if len(entry.serial) > MAX_SERIAL or not entry.serial.isprintable():
        raise FleetError("fleet.preauthorisation", f"{where}A serial is at most {MAX_SERIAL} printable characters.")
    if entry.key and not _KEY.fullmatch(entry.key):
        remedy = "`lightship-agent key` prints it."
        message = f"{where}Expected a key as 64 hexadecimal digits (sha256), found {entry.key[:80]!r}."
        raise FleetError("fleet.preauthorisation", message, remedy=remedy)
    if not (entry.device or entry.serial or entry.key):
        message = f"{where}An entry needs a device id, a serial or a key: one of nothing would let in everybody."
        raise FleetError("fleet.preauthorisation", message)
    return entry


def add(session: Session, entries: list[Entry], *, labels: dict[str, Any], actor: str) -> list[Preauthorisation]:
    """Let these devices in when they come.

    Raises:
        FleetError: fleet.preauthorisation for one that is already expected.
    """
    now, rows = audit.now_ms(), []
    for entry in entries:
        if _waiting(session, entry):
            message = f"{entry.device or entry.serial or entry.key[:16]} is already expected."
            raise FleetError("fleet.preauthorisation", message, remedy="See `lightship device preauthorised`.")
        row = Preauthorisation(
            id=secrets.token_hex(6),
            device=entry.device or None,
            serial=entry.serial or None,
            spki=entry.key or None,
            group=entry.group,
            labels=labels,
            created_at=now,
            created_by=actor,
        )
        session.add(row)
        session.flush()
        rows.append(row)
        detail = {"device": entry.device, "serial": entry.serial, "key": entry.key[:16], "group": entry.group}
        audit.append(session, actor=actor, verb="device.preauthorise", subject=row.id, detail=detail)
    return rows


def withdraw(session: Session, entry_id: str, *, actor: str) -> None:
    """Don't let in who has not come yet.

    Raises:
        FleetError: fleet.preauthorisation for an entry that is unknown or was used.
    """
    row = session.get(Preauthorisation, entry_id)
    if row is None or row.used_at:
        found = f"was used by {row.used_by}" if row else "is unknown"
        remedy = "Revoke the device instead." if row else "See `lightship device preauthorised`."
        raise FleetError("fleet.preauthorisation", f"Entry {entry_id!r} {found}.", remedy=remedy)
    session.delete(row)
    audit.append(session, actor=actor, verb="device.withdraw", subject=entry_id)


def find(session: Session, *, device: str, serial: str, spki: str, by_key: bool) -> Preauthorisation | None:
    """The entry that lets this device in, the one that names most about it first.

    Args:
        session: a session.
        device: the id it asks for.
        serial: the serial it claims.
        spki: the digest of the key it proved to have.
        by_key: only an entry that names the key will do.
    """
    named = or_(
        Preauthorisation.device == device, Preauthorisation.serial == (serial or None), Preauthorisation.spki == spki
    )
    fitting = [
        row
        for row in session.scalars(select(Preauthorisation).where(named).order_by(Preauthorisation.id))
        if row.used_by in ("", device)
        and row.device in (None, device)
        and row.serial in (None, serial)
        and row.spki in (None, spki)
        and (row.spki is not None or not by_key)
    ]
    unused = [row for row in fitting if not row.used_at]
    best = sorted(unused or fitting, key=lambda r: (r.spki is None, r.device is None, r.serial is None, r.id))
    return best[0] if best else None


def _waiting(session: Session, entry: Entry) -> bool:
    same = select(Preauthorisation.id).where(
        Preauthorisation.used_at == 0,
        Preauthorisation.device.is_(entry.device or None),
        Preauthorisation.serial.is_(entry.serial or None),
        Preauthorisation.spki.is_(entry.key or None),
    )
    return session.scalar(same.limit(1)) is not None
