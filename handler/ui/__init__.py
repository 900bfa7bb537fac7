"""The chat page: static files without a build step, which load nothing from anywhere else."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

_FOLDER = Path(__file__).parent
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
# What a model writes must never become code or a request: nothing but the page's own files runs or loads.
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_FILES = {
    "/": _FOLDER / "index.html",
    **{f"/ui/{file.name}": file for file in sorted(_FOLDER.iterdir()) if file.suffix in (".css", ".js")},
}
# Anyone may load the page; the calls that it makes need a key where keys are asked for.
PATHS = frozenset(_FILES)


async def _serve(request: Request) -> Response:
    file = _FILES[request.scope["path"]]
    return FileResponse(file, media_type=_TYPES[file.suffix], headers=_HEADERS)


ROUTES = [Route(path, _serve) for path in _FILES]
