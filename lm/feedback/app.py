"""The page on which people rank, and the requests it makes.

    GET /              the page                      GET /results    the results so far
    GET /next?rater=   the next item to rank         GET /export     every verdict, as JSON lines
    POST /verdict      records one verdict
    POST /undo         removes the rater's latest verdict

A request that cannot be served gets {"error": "one line"}: 400 for an invalid request, 401 without the token, 403 for a
rater or an origin that is not admitted, 503 while the database cannot be written (the page sends it again).
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jinja2
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from lm.core.errors import UserError
from lm.data.annotations import Annotation, AnnotationStore, RankingItem, StoreUnavailable
from lm.data.preferences import RATING_AXES, RESPONSE_FLAGS, ranking_json
from lm.feedback import results
from lm.feedback.web import LOOPBACK_HOSTS, RequestGuard

COOKIE_NAME = "ranking"  # holds the token
MAX_NAME_LENGTH = 64  # characters of a rater's name
REQUIRED_KEYS = {"key", "item", "digest", "rater", "ranking"}  # of a verdict; digest: of the item as it was shown
OPTIONAL_KEYS = {"verdict", "axes", "flags", "seconds"}


def make_app(
    store: AnnotationStore,
    *,
    title: str = "Which answer is better?",
    raters: Collection[str] = (),
    token: str = "",
    hosts: Collection[str] = LOOPBACK_HOSTS,
) -> Starlette:
    """The server's application.

    raters: the names that are admitted; none: any name. token: the secret that a browser must send, first as ?token=,
    then as a cookie; empty: no secret. hosts: the names by which the server may be called; none: any.
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(loader=loader, autoescape=True).get_template("page.html")
    setup = {"raters": list(raters), "axes": RATING_AXES, "flags": RESPONSE_FLAGS}

    def page(request: Request) -> Response:
        return HTMLResponse(template.render(title=title, setup=setup, nonce=request.state.nonce))

    def next_item(request: Request) -> Response:
        rater = checked_rater_name(request.query_params.get("rater"), raters)
        return item_response(store, rater, store.next_item(rater))

    async def verdict(request: Request) -> Response:
        body = await json_body(request, REQUIRED_KEYS, OPTIONAL_KEYS)
        await run_in_threadpool(record_verdict, store, body, raters)
        return JSONResponse({"recorded": body["key"]})

    async def undo(request: Request) -> Response:
        rater = checked_rater_name((await json_body(request, {"rater"}))["rater"], raters)
        item = await run_in_threadpool(store.undo_latest, rater)
        if item is None:
            raise UserError(f"{rater} has no verdict to take back")
        return await run_in_threadpool(item_response, store, rater, item)

    def summary(request: Request) -> Response:
        return HTMLResponse(results.results_page(store.rankings(), title=title))

    def export(request: Request) -> Response:
        lines = "".join(f"{ranking_json(ranking)}\n" for ranking in store.rankings())
        attachment = {"Content-Disposition": 'attachment; filename="rankings.jsonl"'}
        return PlainTextResponse(lines, headers=attachment, media_type="application/jsonl")

    return Starlette(
        routes=[
            Route("/", page),
            Route("/next", next_item),
            Route("/verdict", verdict, methods=["POST"]),
            Route("/undo", undo, methods=["POST"]),
            Route("/results", summary),
            Route("/export", export),
        ],
        middleware=[Middleware(RequestGuard, token=token, hosts=hosts, cookie=COOKIE_NAME, refused=error_response)],
        exception_handlers={
            StoreUnavailable: lambda request, error: error_response(503, str(error)),
            UserError: lambda request, error: error_response(400, str(error)),
            HTTPException: lambda request, error: error_response(error.status_code, error.detail),
        },
    )


def record_verdict(store: AnnotationStore, body: Mapping[str, Any], raters: Collection[str]) -> None:
    """Stores the verdict that a page sent. UserError unless the page showed the item as it is in the store."""
    rater, item = checked_rater_name(body["rater"], raters), stored_item(store, body["item"])
    if body["digest"] != item_digest(item):
        raise UserError(f"item {item.id} is not what was shown: the page is of another database, reload it")
    if not isinstance(body["key"], str) or not body["key"]:
        raise UserError(f"key is {body['key']!r}, not a text of the client's own")
    verdict = {name: value for name, value in body.items() if name != "digest"}
    store.record_verdict(Annotation(**verdict, shown=display_order(item, rater)))


def item_response(store: AnnotationStore, rater: str, item: RankingItem | None) -> Response:
    """The item as JSON for the page, and how many of all this rater has judged; null where none is left."""
    judged, total = store.progress(rater)
    return JSONResponse({"item": item and item_for_page(item, rater), "judged": judged, "all": total})


def item_for_page(item: RankingItem, rater: str) -> dict[str, Any]:
    """The item as the page shows it, without the names of the models."""
    return {
        "id": item.id,
        "digest": item_digest(item),
        "prompt": item.prompt,
        "responses": item.responses,
        "shown": display_order(item, rater),
    }


def display_order(item: RankingItem, rater: str) -> list[int]:
    """The responses in this rater's order: random, but always the same."""
    return sorted(range(len(item.responses)), key=lambda i: json_sha256([rater, item.id, i]))


def item_digest(item: RankingItem) -> str:
    return json_sha256([item.prompt, item.responses])


def json_sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def checked_rater_name(rater: Any, raters: Collection[str]) -> str:
    """The rater's name. UserError for an invalid name, HTTPException 403 for a name that is not among `raters`."""
    if (
        not isinstance(rater, str)
        or not 1 <= len(rater) <= MAX_NAME_LENGTH
        or not rater.isprintable()
        or rater != rater.strip()
    ):
        raise UserError(
            f"rater is {rater!r}: a name has 1 to {MAX_NAME_LENGTH} printable characters, none of them outer blanks"
        )
    if raters and rater not in raters:
        raise HTTPException(403, f"rater {rater!r} is not admitted here; who is: {', '.join(raters)}")
    return rater


def stored_item(store: AnnotationStore, id: Any) -> RankingItem:
    """The item of that number."""
    if type(id) is not int or not 0 < id < 2**63:  # beyond, SQLite has no integer
        raise UserError(f"item is {id!r}, not a number of one")
    return store.item(id)


async def json_body(request: Request, required: Collection[str], optional: Collection[str] = ()) -> dict[str, Any]:
    """The JSON object of the request. It must have the `required` keys, and may have the `optional` ones."""
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {error}") from error
    if not isinstance(body, Mapping) or not set(required) <= set(body) <= {*required, *optional}:
        allowed = f" and, of the others, only {', '.join(sorted(optional))}" if optional else " and no other"
        raise UserError(f"not an object with the keys {', '.join(sorted(required))}{allowed}")
    return body


def error_response(status: int, text: str) -> Response:
    return JSONResponse({"error": text}, status)
