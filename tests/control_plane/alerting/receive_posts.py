"""A receiver of webhooks, as a program: `receive_posts.py FOLDER [CERTIFICATE KEY]`.

It notes what it gets in `FOLDER/posts`, a JSON object a line, and answers as `FOLDER/mood` says: a status, `hang`, or
`drip`: a byte now and then and never a whole answer. Its port is in `FOLDER/port`.
"""

from __future__ import annotations

import json
import ssl
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FOLDER = Path(sys.argv[1])


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        with (FOLDER / "posts").open("a") as f:
            f.write(json.dumps({"path": self.path, "headers": headers, "body": body.decode()}) + "\n")
        mood = (FOLDER / "mood").read_text() if (FOLDER / "mood").exists() else "204"
        if mood == "hang":
            time.sleep(60)
        if mood == "drip":
            for byte in b"HTTP/1.1 200 OK\r\n" + b"x-a: " * 1_000:
                self.wfile.write(bytes([byte]))
                time.sleep(0.1)
        self.send_response(int(mood) if mood.isdigit() else 200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    server.daemon_threads = True
    if len(sys.argv) > 2:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(sys.argv[2], sys.argv[3])
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    (FOLDER / "port.new").write_text(str(server.server_address[1]))
    (FOLDER / "port.new").rename(FOLDER / "port")
    server.serve_forever()


if __name__ == "__main__":
    main()
