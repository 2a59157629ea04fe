"""The page on which people rank, and the requests it makes.

    GET /              the page                      GET /results    what the verdicts say
    GET /next?rater=   what to rank next             GET /export     every verdict, as JSON lines
    POST /verdict      records one verdict
    POST /undo         takes the rater's latest back

Whatever cannot be served is {"error": "one line"}: 400 for a request that will never do, 401 without the token, 403 for
a rater or an origin that is not admitted, 503 while the database cannot be written (the page sends it again).
"""

import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jinja2
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lm.data import rankings as records
from lm.data.store import Item, Store, Unavailable, Verdict
from lm.errors import UserError
from lm.ranking import results

LOOPBACK = ("127.0.0.1", "localhost", "::1")
COOKIE = "ranking"  # holds the token
LONGEST = 64  # characters of a rater's name
REQUIRED = {"key", "item", "digest", "rater", "ranking"}  # of a verdict; digest: of the item as it was shown
OPTIONAL = {"verdict", "axes", "flags", "seconds"}
POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}


def make_app(
    store: Store,
    *,
    title: str = "Which answer is better?",
    raters: Collection[str] = (),
    token: str = "",
    hosts: Collection[str] = LOOPBACK,
) -> Starlette:
    """The server's application.

    raters: the names that are admitted; none: any name. token: what a browser must bring, once as ?token=, then as a
    cookie; empty: nothing. hosts: the names by which the server may be called; none: any.
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(loader=loader, autoescape=True).get_template("page.html")
    setup = {"raters": list(raters), "axes": records.AXES, "flags": records.FLAGS}

    def page(request: Request) -> Response:
        return HTMLResponse(template.render(title=title, setup=setup, nonce=request.state.nonce))

    def upcoming(request: Request) -> Response:
        rater = admitted(request.query_params.get("rater"), raters)
        return shown(rater, store.next(rater))

    async def verdict(request: Request) -> Response:
        said = await body(request, REQUIRED, OPTIONAL)
        return await run_in_threadpool(record, said)

    def record(said: Mapping[str, Any]) -> Response:
        rater, item = admitted(said["rater"], raters), known(store, said["item"])
        if said["digest"] != digest_of(item):
            raise UserError(f"item {item.id} is not what was shown: the page is of another database, reload it")
        if not isinstance(said["key"], str) or not said["key"]:
            raise UserError(f"key is {said['key']!r}, not a text of the client's own")
        verdict = {name: value for name, value in said.items() if name != "digest"}
        store.record(Verdict(**verdict, shown=order(item, rater)))
        return JSONResponse({"recorded": said["key"]})

    async def undo(request: Request) -> Response:
        rater = admitted((await body(request, {"rater"}))["rater"], raters)
        item = await run_in_threadpool(store.undo, rater)
        if item is None:
            raise UserError(f"{rater} has no verdict to take back")
        return await run_in_threadpool(shown, rater, item)

    def shown(rater: str, item: Item | None) -> Response:
        judged, total = store.progress(rater)
        return JSONResponse({"item": item and displayed(item, rater), "judged": judged, "all": total})

    def summary(request: Request) -> Response:
        return HTMLResponse(results.page(store.rankings(), title=title))

    def export(request: Request) -> Response:
        lines = "".join(f"{records.line(ranking)}\n" for ranking in store.rankings())
        attachment = {"Content-Disposition": 'attachment; filename="rankings.jsonl"'}
        return PlainTextResponse(lines, headers=attachment, media_type="application/jsonl")

    return Starlette(
        routes=[
            Route("/", page),
            Route("/next", upcoming),
            Route("/verdict", verdict, methods=["POST"]),
            Route("/undo", undo, methods=["POST"]),
            Route("/results", summary),
            Route("/export", export),
        ],
        middleware=[Middleware(Guard, token=token, hosts=hosts)],
        exception_handlers={
            Unavailable: lambda request, error: refusal(503, str(error)),
            UserError: lambda request, error: refusal(400, str(error)),
            HTTPException: lambda request, error: refusal(error.status_code, error.detail),
        },
    )


class Guard:
    """Lets through what the page itself asks for, and gives every answer the headers that keep it safe.

    A page of another site can make a browser call this server: by a name that it has pointed here (Host), or in its own
    name (Origin, and the content types that a form may send).
    """

    def __init__(self, app: ASGIApp, *, token: str, hosts: Collection[str]):
        self._app, self._token, self._hosts = app, token, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        request.state.nonce = nonce = secrets.token_urlsafe()
        enters = self._token and equal(request.query_params.get("token", ""), self._token)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update({**HEADERS, "Content-Security-Policy": POLICY.format(nonce=nonce)})
                if enters:
                    headers.append("Set-Cookie", f"{COOKIE}={self._token}; HttpOnly; SameSite=Strict; Path=/")
            await send(message)

        await (self._refused(request, enters) or self._app)(scope, receive, guarded)

    def _refused(self, request: Request, enters: bool) -> Response | None:
        host = request.headers.get("host", "")
        if self._hosts and re.sub(r":\d+$", "", host).strip("[]") not in self._hosts:
            return refusal(403, f"this server is not {host!r}: open the address that it printed")
        if self._token and not enters and not equal(request.cookies.get(COOKIE, ""), self._token):
            return refusal(401, "open the address that the program printed when it started, with its ?token=")
        if request.method == "POST":
            origin = request.headers.get("origin", f"http://{host}")
            if origin.partition("://")[2] != host:
                return refusal(403, f"a page of {origin} may not send anything here")
            if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
                return refusal(415, "send JSON, with the content type application/json")
        return None


def displayed(item: Item, rater: str) -> dict[str, Any]:
    """What the page shows of an item: not which model gave which response."""
    return {
        "id": item.id,
        "digest": digest_of(item),
        "prompt": item.prompt,
        "responses": item.responses,
        "shown": order(item, rater),
    }


def order(item: Item, rater: str) -> list[int]:
    """The responses in the order in which this rater sees them: a random one, and always the same."""
    return sorted(range(len(item.responses)), key=lambda i: sha256([rater, item.id, i]))


def digest_of(item: Item) -> str:
    return sha256([item.prompt, item.responses])


def sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def equal(given: str, secret: str) -> bool:
    return hmac.compare_digest(given.encode(), secret.encode())


def admitted(rater: Any, raters: Collection[str]) -> str:
    """The rater's name. UserError for what is none, HTTPException 403 for one that is not among `raters`."""
    if (
        not isinstance(rater, str)
        or not 1 <= len(rater) <= LONGEST
        or not rater.isprintable()
        or rater != rater.strip()
    ):
        raise UserError(
            f"rater is {rater!r}: a name has 1 to {LONGEST} printable characters, none of them outer blanks"
        )
    if raters and rater not in raters:
        raise HTTPException(403, f"rater {rater!r} is not admitted here; who is: {', '.join(raters)}")
    return rater


def known(store: Store, id: Any) -> Item:
    """The item of that number."""
    if type(id) is not int or not 0 < id < 2**63:  # beyond, SQLite has no integer
        raise UserError(f"item is {id!r}, not a number of one")
    return store.item(id)


async def body(request: Request, required: Collection[str], optional: Collection[str] = ()) -> dict[str, Any]:
    """The JSON object that was sent, once it has the `required` keys and beyond them only `optional` ones."""
    try:
        found = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {error}") from error
    if not isinstance(found, Mapping) or not set(required) <= set(found) <= {*required, *optional}:
        allowed = f" and, of the others, only {', '.join(sorted(optional))}" if optional else " and no other"
        raise UserError(f"not an object with the keys {', '.join(sorted(required))}{allowed}")
    return found


def refusal(status: int, text: str) -> Response:
    return JSONResponse({"error": text}, status)
