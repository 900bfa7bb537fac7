"""A stub that listens half a second after its execution and refuses two requests before it answers.

python -m tests.scripts.slow_server PORT PIECE...
"""

from __future__ import annotations

import json
import sys
import time

from tests.scripts.stub_server import Handler, Stub

refusals = [503, 503]


class SlowHandler(Handler):
    def do_GET(self) -> None:
        body = json.dumps({"marks": {"ready": 0.7}}).encode()
        self.send_response(503 if refusals else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.server.status = refusals.pop() if refusals else 200
        super().do_POST()


if __name__ == "__main__":
    time.sleep(0.5)
    Stub(sys.argv[2:], port=int(sys.argv[1]), handler=SlowHandler).serve_forever()
