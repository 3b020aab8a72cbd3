"""Contract: the MQTT topic tree, one function per topic.

    lightship/v1/<tenant>/<device>/state       up    retained birth, and the last will
    lightship/v1/<tenant>/<device>/tele        up    batches of reports
    lightship/v1/<tenant>/<device>/event       up    urgent reports: update steps
    lightship/v1/<tenant>/<device>/cmd/<verb>  down  check | resend | rebirth | loglevel | snapshot
    lightship/v1/<tenant>/<device>/rsp/<verb>  up    what became of one of the last three
    lightship/v1/<tenant>/<device>/home        up    what Home Assistant reads, JSON; only where it is switched on
    lightship/v1/<tenant>/_all/notify          down  "something changed; poll soon" (a hint, never trusted)

On a broker of the device's own, where bindings name no others (docs/serving.md):

    lightship/v1/_local/<model>/predict        in    records to predict
    lightship/v1/_local/<model>/prediction     out   what was predicted, or why not; and below it

Rules: topics carry no secrets and no trust; the tenant of a device is looked up, never believed.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from .codes import SettingsError

ROOT: Final = "lightship/v1"
#: The MQTT 5 content type of a question to a model that is a frame's body, and not a record.
FRAME_TYPE: Final = "application/vnd.lightship.frame"
_PREFIX: Final = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*", re.ASCII)
UP_KINDS: Final = ("state", "tele", "event", "rsp/+")


_KINDS: Final = frozenset(kind.partition("/")[0] for kind in UP_KINDS)


class Address(NamedTuple):
    """Who sent a message, and of which kind, according to its topic."""

    tenant: str
    device: str
    kind: str


def state(tenant: str, device: str) -> str:
    """Retained birth and last will of a device."""
    return f"{ROOT}/{tenant}/{device}/state"


def telemetry(tenant: str, device: str) -> str:
    """Batches of reports."""
    return f"{ROOT}/{tenant}/{device}/tele"


def event(tenant: str, device: str) -> str:
    """Urgent reports."""
    return f"{ROOT}/{tenant}/{device}/event"


def command(tenant: str, device: str, verb: str) -> str:
    """A command to one device; `verb` may be `+` in a subscription."""
    return f"{ROOT}/{tenant}/{device}/cmd/{verb}"


def response(tenant: str, device: str, verb: str) -> str:
    """The reply to a command."""
    return f"{ROOT}/{tenant}/{device}/rsp/{verb}"


def notify(tenant: str) -> str:
    """A hint to all devices of a tenant."""
    return f"{ROOT}/{tenant}/_all/notify"


def home(tenant: str, device: str) -> str:
    """What Home Assistant shows of a device, as JSON; only where it is switched on."""
    return f"{ROOT}/{tenant}/{device}/home"


def discovery(prefix: str, device: str) -> str:
    """Where Home Assistant finds what describes a device, retained; only where it is switched on."""
    return f"{prefix}/device/{device}/config"


def check_discovery_prefix(value: str) -> None:
    """Refuse what can be no prefix of Home Assistant's discovery; "" is none.

    Raises:
        SettingsError: settings.invalid.
    """
    if value and (not _PREFIX.fullmatch(value) or value.startswith(ROOT.partition("/")[0])):
        message = f"home_assistant: expected letters, digits, '_', '-' and '/', found {value!r}."
        raise SettingsError("settings.invalid", message, remedy="It is homeassistant, unless yours differs.")


def local_request(model: str) -> str:
    """Where programs on a device ask a model, on its own broker."""
    return f"{ROOT}/_local/{model}/predict"


def local_answer(model: str) -> str:
    """Where they are answered, unless they name a topic below it."""
    return f"{ROOT}/_local/{model}/prediction"


def ingest_filters(worker_group: str = "lightship-ingest", *, shared: bool = True) -> tuple[str, ...]:
    """What an ingest worker subscribes to, shared among the workers, or each for itself.

    Each kind has a share group of its own: brokers differ in whether one group may hold several filters, and one that
    keeps a single filter per group would silently deliver the last one only.
    """
    groups = {kind: f"$share/{worker_group}-{kind.partition('/')[0]}/" if shared else "" for kind in UP_KINDS}
    return tuple(f"{group}{ROOT}/+/+/{kind}" for kind, group in groups.items())


def parse(topic: str) -> Address | None:
    """The address in an upward topic, or None for anything else."""
    parts = topic.split("/")
    if len(parts) == 6 and parts[4] == "rsp":
        parts.pop()
    elif parts[4:] == ["rsp"]:
        return None
    if len(parts) != 5 or "/".join(parts[:2]) != ROOT or parts[4] not in _KINDS:
        return None
    return Address(parts[2], parts[3], parts[4])
