"""What the programs with a page share: where they listen, and whose requests they admit."""

import hmac
import re
import secrets
import socket
from collections.abc import Callable, Collection

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lm.core.errors import UserError

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}


class RequestGuard:
    """Admits the requests of the page itself and of whoever knows the token; adds security headers to every answer.

    A page of another site can make a browser call this server: by a name that points here (Host), or under its own name
    (Origin, and the content types that a form may send).

    token: the secret, as ?token=, as a cookie of the name `cookie` or as "Authorization: Bearer"; empty: none. hosts:
    the names by which the server may be called; none: any. refused: (status, text) -> the answer to others.
    open_paths: those that need no token.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str,
        hosts: Collection[str],
        cookie: str,
        refused: Callable[[int, str], Response],
        open_paths: Collection[str] = (),
    ):
        self._app, self._token, self._hosts, self._cookie = app, token, hosts, cookie
        self._refused, self._open_paths = refused, open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        request.state.nonce = nonce = secrets.token_urlsafe()
        enters = self._token and is_same_secret(request.query_params.get("token", ""), self._token)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(
                    {**SECURITY_HEADERS, "Content-Security-Policy": CONTENT_SECURITY_POLICY.format(nonce=nonce)}
                )
                if enters:
                    headers.append("Set-Cookie", f"{self._cookie}={self._token}; HttpOnly; SameSite=Strict; Path=/")
            await send(message)

        await (self._refusal(request, enters) or self._app)(scope, receive, send_with_headers)

    def _refusal(self, request: Request, enters: bool) -> Response | None:
        host = request.headers.get("host", "")
        if self._hosts and re.sub(r":\d+$", "", host).strip("[]") not in self._hosts:
            return self._refused(403, f"this server is not {host!r}: open the address that it printed")
        if self._token and not enters and not self._has_token(request) and request.url.path not in self._open_paths:
            return self._refused(
                401,
                "open the address that the program printed when it started, with its ?token=; or send the token as "
                "Authorization: Bearer",
            )
        if request.method == "POST":
            origin = request.headers.get("origin", f"http://{host}")
            if origin.partition("://")[2] != host:
                return self._refused(403, f"a page of {origin} may not send anything here")
            if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
                return self._refused(415, "send JSON, with the content type application/json")
        return None

    def _has_token(self, request: Request) -> bool:
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        given = [request.cookies.get(self._cookie, ""), bearer.strip() if scheme.lower() == "bearer" else ""]
        return any(is_same_secret(secret, self._token) for secret in given)


def is_same_secret(given: str, secret: str) -> bool:
    return hmac.compare_digest(given.encode(), secret.encode())


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens there. UserError where that is not possible."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot serve at {host}:{port} ({error}): give another --port, 0 for a free one") from error


def server_address(host: str, listening: socket.socket) -> str:
    """The address to open, with a slash at its end."""
    name = socket.gethostname() if host in ("0.0.0.0", "::") else host
    return f"http://{f'[{name}]' if ':' in name else name}:{listening.getsockname()[1]}/"
