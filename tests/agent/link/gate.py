"""A door in front of a real mosquitto that says what mosquitto can't be made to say."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.agent.link.field import until

from lightship.fleet.broker import free_port
from lightship.fleet.ca import CertificateAuthority
from lightship.integrations import mosquitto

#: CONNACK of MQTT 3.1.1: unacceptable protocol version; of MQTT 5: unsupported protocol version; and so on.
NO_SUCH_VERSION_311 = b"\x20\x02\x00\x01"
NO_SUCH_VERSION_5 = b"\x20\x03\x00\x84\x00"
SERVER_BUSY = b"\x20\x03\x00\x89\x00"
TAKEN_OVER = b"\xe0\x02\x8e\x00"
QUOTA_EXCEEDED = b"\xe0\x02\x97\x00"
HANG_UP = b""

#: What is answered to a CONNECT of that protocol level; None: the broker behind the door is asked.
Rule = Callable[[int], bytes | None]


class Gate:
    """TLS in front, a plain mosquitto behind; each connection is a thread."""

    def __init__(self, ca: CertificateAuthority, folder: Path, behind: int) -> None:
        key, chain = ca.issue_server(["127.0.0.1"])
        (folder / "gate.key").write_bytes(key)
        (folder / "gate.pem").write_bytes(chain)
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(folder / "gate.pem", folder / "gate.key")
        self._behind = behind
        self.rule: Rule = lambda _: None
        self.change: Callable[[bytes], bytes] = lambda said: said  # what the broker says to the device
        self.levels: list[int] = []  # of the protocol, of every CONNECT
        self._to_say: list[bytes] = []
        self._closed = False
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def say(self, packet: bytes) -> None:
        """Say that to whoever came last, and hang up, as a broker does that ends a session."""
        self._to_say.append(packet)
        until(lambda: not self._to_say)

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for thread in self._threads:
            thread.join(60)

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), contextlib.closing(connection):
            inside = self._tls.wrap_socket(connection, server_side=True)
            with contextlib.closing(inside):
                hello = inside.recv(4_096)
                level = hello[hello.index(b"MQTT") + 4]
                self.levels.append(level)
                answer = self.rule(level)
                if answer is not None:
                    inside.sendall(answer)
                    return
                with socket.create_connection(("127.0.0.1", self._behind)) as broker:
                    broker.sendall(hello)
                    self._relay(inside, broker)

    def _relay(self, inside: ssl.SSLSocket, broker: socket.socket) -> None:
        """One thread for both ways: two at once in one TLS connection would corrupt it."""
        while not self._closed:
            ready, _, _ = select.select([inside, broker], [], [], 0.02)
            if inside in ready or inside.pending():
                if not (said := inside.recv(65_536)):
                    return
                broker.sendall(said)
            if broker in ready:
                if not (said := broker.recv(65_536)):
                    return
                inside.sendall(self.change(said))
            if self._to_say:
                inside.sendall(self._to_say[0])
                del self._to_say[0]
                return


@contextlib.contextmanager
def plain_mosquitto(folder: Path, acl: str = "") -> Iterator[int]:
    """A mosquitto on loopback without TLS, for whoever comes, or by that ACL; its port."""
    program, port = mosquitto.find(), free_port("127.0.0.1")
    assert program is not None
    lines = ["user root", f"listener {port} 127.0.0.1", "allow_anonymous true"]
    if acl:
        (folder / "gate.acl").write_text(acl)
        lines.append(f"acl_file {folder / 'gate.acl'}")
    (folder / "gate.conf").write_text("\n".join(lines) + "\n")
    command = [program, "-c", str(folder / "gate.conf")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            until(lambda: _listens(port))
            yield port
        finally:
            process.terminate()


def _listens(port: int) -> bool:
    with contextlib.closing(socket.socket()) as s:
        return s.connect_ex(("127.0.0.1", port)) == 0
