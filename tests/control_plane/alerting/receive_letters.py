"""A mail server, as a program: `receive_letters.py FOLDER starttls|tls|plain [CERTIFICATE KEY]`.

It takes letters of `lightship` with the password `right`, but for nobody@example.org, and puts them into `FOLDER` as
`1.eml`, `2.eml` and so on. Its port is in `FOLDER/port`.
"""

from __future__ import annotations

import asyncio
import ssl
import sys
from pathlib import Path
from typing import Any

from aiosmtpd.smtp import SMTP, AuthResult, LoginPassword

FOLDER, KIND = Path(sys.argv[1]), sys.argv[2]


class Inbox:
    letters = 0

    async def handle_RCPT(self, _server: Any, _session: Any, envelope: Any, address: str, _options: Any) -> str:  # noqa: N802
        if address == "nobody@example.org":
            return "550 5.1.1 Nobody is not here"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, _server: Any, session: Any, envelope: Any) -> str:  # noqa: N802
        self.letters += 1
        safe = f"X-Was: {'tls' if KIND == 'tls' or session.ssl else 'plain'}\r\n".encode()
        (FOLDER / f"{self.letters}.new").write_bytes(safe + envelope.content)
        (FOLDER / f"{self.letters}.new").rename(FOLDER / f"{self.letters}.eml")
        return "250 OK"


def admit(_server: Any, _session: Any, _envelope: Any, _mechanism: str, data: LoginPassword) -> AuthResult:
    return AuthResult(success=(data.login, data.password) == (b"lightship", b"right"), handled=False)


async def main() -> None:
    context = None
    if KIND != "plain":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(sys.argv[3], sys.argv[4])
    starttls = KIND == "starttls"
    inbox = Inbox()

    def serve() -> SMTP:
        return SMTP(
            inbox,
            hostname="mail.test",
            tls_context=context if starttls else None,
            require_starttls=starttls,
            authenticator=admit,
            auth_required=KIND != "plain",
            auth_require_tls=starttls,
        )

    server = await asyncio.get_running_loop().create_server(
        serve, "127.0.0.1", 0, ssl=context if KIND == "tls" else None
    )
    (FOLDER / "port.new").write_text(str(server.sockets[0].getsockname()[1]))
    (FOLDER / "port.new").rename(FOLDER / "port")
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
