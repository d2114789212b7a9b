"""A web server in a thread that can break connections, ignore ranges and change its file."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FileServer:
    """Serves `content` at any path; every request is noted in `requests` as its Range header.

    `breaks` lists, per coming request, after how many bytes the connection is cut (None: not);
    `statuses` lists statuses to answer first.
    """

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.etag: str | None = '"one"'
        self.ranges = True
        self.obeys_if_range = True
        self.breaks: list[int | None] = []
        self.statuses: list[int] = []
        self.requests: list[str | None] = []
        self.url = ""

    @contextmanager
    def running(self) -> Iterator["FileServer"]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        server.handle_error = lambda *request: None  # a client that hangs up is no error here
        self.url = f"http://127.0.0.1:{server.server_port}/data.zip"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        state = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                asked = self.headers.get("Range")
                state.requests.append(asked)
                if state.statuses:
                    self.send_error(state.statuses.pop(0))
                    return
                start, total = 0, len(state.content)
                unchanged = self.headers.get("If-Range") == state.etag or not state.obeys_if_range
                if asked and state.ranges and unchanged:
                    start = int(asked.removeprefix("bytes=").rstrip("-"))
                    if start >= total:
                        self.send_response(416)
                        self.end_headers()
                        return
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
                else:
                    self.send_response(200)
                if state.etag is not None:
                    self.send_header("ETag", state.etag)
                self.send_header("Content-Length", str(total - start))
                self.end_headers()
                cut = state.breaks.pop(0) if state.breaks else None
                self.wfile.write(
                    state.content[start:] if cut is None else state.content[start:][:cut]
                )
                if cut is not None:
                    self.close_connection = True

        return Handler
