"""Alerting: e-mail, what is due at once in one letter.

Rules:
* over TLS, from the start or by STARTTLS, which is asked for and not hoped for; without TLS only on this machine;
* the server's certificate is checked; the password goes nowhere before;
* a letter that one recipient may have is taken, and who was refused is logged; one that nobody may have is not;
* a letter's Message-ID follows from what is in it: one that is sent twice is one letter to a mail program.
"""

from __future__ import annotations

import hashlib
import logging
import smtplib
from collections.abc import Sequence
from datetime import UTC, datetime
from email.errors import HeaderParseError
from email.headerregistry import Address
from email.message import EmailMessage
from email.utils import format_datetime

from lightship.settings import Settings
from lightship_agent.contract.codes import AlertError, SettingsError

from .channels import required, secret
from .payload import Message, Told, plain, subject
from .post import Deadline, explained, is_near, trust

log = logging.getLogger(__name__)


class Mail:
    """Somebody's inbox."""

    name = "mail"
    batch = 50
    refresh_seconds = 0.0

    def __init__(self, settings: Settings) -> None:
        """Check the settings and the password.

        Raises:
            SettingsError: settings.invalid.
            AlertError: alert.secret.
        """
        required(settings, "alert_mail_from", "alert_mail_to")
        if settings.alert_mail_user:
            required(settings, "alert_mail_password")
        host, colon, port = settings.alert_mail_server.rpartition(":")
        if not (colon and host and port.isascii() and port.isdigit()):
            raise SettingsError("settings.invalid", "alert_mail_server: expected HOST:PORT.")
        self._host, self._port = host.strip("[]"), int(port)
        self._tls = settings.alert_mail_tls
        if self._tls == "none" and not is_near(self._host):
            message = "alert_mail_tls: expected starttls or tls, as the mail server is another machine."
            raise SettingsError("settings.invalid", message)
        self._sender = _address("alert_mail_from", settings.alert_mail_from)
        listed = [part for part in settings.alert_mail_to.split(",") if part.strip()]
        self._recipients = tuple(_address("alert_mail_to", part) for part in listed)
        self._user, self._password = settings.alert_mail_user, settings.alert_mail_password
        self._trust = trust(settings.alert_ca)
        self._timeout = settings.alert_timeout_seconds
        if self._user:
            secret("alert_mail_password", self._password)

    def send(self, messages: Sequence[Message]) -> None:
        """Send one letter.

        Raises:
            AlertError: alert.secret, alert.unreachable, alert.slow, alert.certificate, alert.protocol, alert.login,
                alert.refused, alert.status.
        """
        said = letter(messages, self._sender, self._recipients)
        password = secret("alert_mail_password", self._password).decode() if self._user else ""
        with explained(f"{self._host}:{self._port}", self._timeout) as deadline:
            self._deliver(said, password, deadline)

    def refresh(self, alerts: Sequence[Told], now: int) -> None:
        """Letters stay."""

    def _deliver(self, said: EmailMessage, password: str, deadline: Deadline) -> None:
        where = f"{self._host}:{self._port}"
        try:
            with self._connect() as server:
                deadline.guard(lambda: server.sock)
                if self._tls == "starttls":
                    server.starttls(context=self._trust)
                if self._user:
                    server.login(self._user, password)
                refused = server.send_message(said)
        except smtplib.SMTPAuthenticationError as e:
            message = f"{where} refused the user {self._user} or the password, with {e.smtp_code}."
            raise AlertError("alert.login", message, remedy="Look at the file of alert_mail_password.") from e
        except (smtplib.SMTPSenderRefused, smtplib.SMTPRecipientsRefused, smtplib.SMTPDataError) as e:
            raise AlertError("alert.refused", f"{where} refused the letter: {_codes(e)}.") from e
        except smtplib.SMTPServerDisconnected as e:
            # The library says so of a reply that did not come, too; and the socket's clock may strike before ours.
            late = deadline.over or isinstance(e.__context__, TimeoutError)
            code = "alert.slow" if late else "alert.unreachable"
            raise AlertError(code, f"{where} ended the connection, or did not answer in time.") from e
        except smtplib.SMTPException as e:
            remedy = "Set alert_mail_tls to what it speaks."
            raise AlertError(
                "alert.protocol", f"{where} does not speak SMTP as expected: {_codes(e)}.", remedy=remedy
            ) from e
        if refused:
            # Some have it: to send it again for the others would be to send it to those for three days.
            log.warning("alert.refused: %s refused %d of %d recipients", where, len(refused), len(self._recipients))

    def _connect(self) -> smtplib.SMTP:
        if self._tls == "tls":
            return smtplib.SMTP_SSL(self._host, self._port, timeout=self._timeout, context=self._trust)
        return smtplib.SMTP(self._host, self._port, timeout=self._timeout)


def letter(messages: Sequence[Message], sender: Address, recipients: Sequence[Address]) -> EmailMessage:
    """One letter about all of them. Pure."""
    said = EmailMessage()
    first = messages[0]
    more = f" and {len(messages) - 1} more" if len(messages) > 1 else ""
    said["Subject"] = f"{subject(first)[:150]}{more}"
    said["From"], said["To"] = sender, tuple(recipients)
    said["Date"] = format_datetime(datetime.fromtimestamp(max(m.at for m in messages) / 1_000, UTC))
    digest = hashlib.sha256("\n".join(m.id for m in messages).encode()).hexdigest()[:24]
    domain = sender.domain or "localhost"
    said["Message-ID"] = f"<{digest}@{domain}>"
    if len(messages) == 1 and first.event != "test":
        # Mail programs show the letters of one alert as one conversation.
        said["References"] = f"<{first.alert.id}@{domain}>"
    said["Auto-Submitted"] = "auto-generated"
    said.set_content("\n\n".join(_paragraph(m) for m in messages) + "\n")
    return said


def _paragraph(message: Message) -> str:
    alert = message.alert
    lines = [subject(message), f"Since {_moment(alert.opened_at)}."]
    if message.event == "resolve":
        lines.append(f"Over since {_moment(alert.resolved_at)}.")
    if alert.count > 1:
        rest = f" and {alert.count - len(alert.devices)} more" if alert.count > len(alert.devices) else ""
        lines.append(f"Of: {plain(', '.join(alert.devices))}{rest}.")
    if message.event != "test":
        lines.append(f"lightship alert show {alert.id}")
    return "\n".join(lines)


def _moment(ms: int) -> str:
    return f"{datetime.fromtimestamp(ms / 1_000, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _address(setting: str, text: str) -> Address:
    try:
        found = Address(addr_spec=text.strip())
    except (HeaderParseError, ValueError, IndexError) as e:
        raise SettingsError("settings.invalid", f"{setting}: expected an address, found {text.strip()!r}.") from e
    return found


def _codes(e: smtplib.SMTPException) -> str:
    if isinstance(e, smtplib.SMTPRecipientsRefused):
        return ", ".join(sorted({str(code) for code, _ in e.recipients.values()}))
    if isinstance(e, smtplib.SMTPResponseException):
        return str(e.smtp_code)
    return type(e).__name__
