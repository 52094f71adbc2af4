"""The page at ``/``: three files of our own, which ask this server alone."""

from pathlib import Path

from fastapi import APIRouter, HTTPException, Response
from fastapi.responses import FileResponse

FOLDER = Path(__file__).parent

TYPES = {"page.css": "text/css; charset=utf-8", "page.js": "text/javascript; charset=utf-8"}
"""By name: what the page is made of."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)

HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def router() -> APIRouter:
    """``/`` and ``/static/…``, which need no key: the page asks for it."""
    routes = APIRouter(include_in_schema=False)

    @routes.get("/")
    async def page() -> Response:
        return FileResponse(FOLDER / "index.html", media_type="text/html; charset=utf-8", headers=HEADERS)

    @routes.get("/static/{name}")
    async def part(name: str) -> Response:
        if name not in TYPES:
            raise HTTPException(404, "There is no such file.")
        return FileResponse(FOLDER / name, media_type=TYPES[name], headers=HEADERS)

    return routes
