"""An object store on the loopback for tests, and a proxy before it that loses replies, conditions or permissions."""

import contextlib
import http.client
import logging
import os
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}


@contextlib.contextmanager
def serving():
    """The port of a store that lives as long as the block."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield server.get_host_and_port()[1]
    finally:
        server.stop()


def reached_at(port: int) -> dict[str, str]:
    """The environment of who uses the store behind `port`; drivers that are connected elsewhere are forgotten."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    return {**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}


def new_bucket() -> str:
    import s3fs

    name = f"b-{uuid.uuid4().hex[:12]}"
    s3fs.S3FileSystem(use_listings_cache=False).call_s3("create_bucket", Bucket=name)
    return name


class Proxy:
    """Hands requests on to the store behind `port`.

    lose(method, path): whether the reply to this request is lost; refuse(method, path): whether it is answered with
    403; conditions: whether conditions of puts are handed on.  `log` has (method, path, status) of the store's answers.
    """

    def __init__(self, port: int):
        self.target = port
        self.lose = self.refuse = lambda method, path: False
        self.conditions, self.down = True, False
        self.log: list[tuple[str, str, int]] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.down = True  # for connections that are open
        self.server.shutdown()
        self.server.server_close()


def _handler(proxy):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if proxy.down:
                self.close_connection = True
                return
            if proxy.refuse(self.command, self.path):
                self.answer(403, [], b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")
                return
            headers = dict(self.headers.items())
            if not proxy.conditions:
                headers = {k: v for k, v in headers.items() if k.lower() not in ("if-match", "if-none-match")}
            store = http.client.HTTPConnection("127.0.0.1", proxy.target, timeout=30)
            store.request(self.command, self.path, body, headers)
            reply = store.getresponse()
            content = reply.read()
            proxy.log.append((self.command, self.path, reply.status))
            if proxy.lose(self.command, self.path):
                self.close_connection = True
                return
            self.answer(reply.status, reply.getheaders(), content)

        def answer(self, status, headers, content):
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                    self.send_header(name, value)
            length = next((v for k, v in headers if k.lower() == "content-length"), None)
            self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

        def log_message(self, *_):
            pass

    return Handler
