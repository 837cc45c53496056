"""A search box for an index of videos, in a browser on this machine.

    python -m extras.serve index/                       # http://127.0.0.1:8000

Starlette and uvicorn serve the page and the indexed videos (with range requests, so that a player
can seek), and nothing else. Only this machine can connect unless --host says otherwise.
"""
import support  # first, for a Ctrl-C while torch is imported
import argparse
import functools
import html
import pathlib

from extras import show
from extras.index import Index, summary
from extras.search import is_found, retriever_of, search
from support import files, options
from support.errors import Mistake, reported

LONGEST = 300                   # characters of a query
FORM = ("<form action=\"/\"><input name=\"q\" type=\"search\" value=\"{}\" maxlength=\"300\" "
        "aria-label=\"what to look for\" placeholder=\"a person opens the door\" autofocus>"
        "<button>Search</button></form>")


def application(index: Index, retriever, hosts: list[str]):
    """The Starlette application. hosts: accepted Host headers, against DNS rebinding."""
    applications = files.need("starlette.applications", "serving")
    responses = files.need("starlette.responses", "serving")
    routing = files.need("starlette.routing", "serving")
    trusted = files.need("starlette.middleware.trustedhost", "serving")
    folder, names = pathlib.Path(index.content["folder"]), list(index.content["videos"])
    numbers = {name: i for i, name in enumerate(names)}

    @functools.lru_cache(maxsize=64)
    def answer(query: str) -> str:
        hits = search(index, retriever, [query])[0]
        rows = []
        for hit in hits:
            number, m = numbers[hit.video], hit.moment
            middle_ms = round(500 * (m.start_sec + m.end_sec))
            rows.append((f"/video/{number}", hit.video, f"/frame/{number}/{middle_ms}", m,
                         hit.order))
        return show.section(0, query, is_found(hits), rows)

    def page(request):
        query = request.query_params.get("q", "")[:LONGEST].strip()
        note = f"{summary(index)}. " + (show.PLAYING if query else "Say what to look for.")
        return responses.HTMLResponse(show.fill_page(
            "Moments", note, [answer(query)] if query else [],
            form=FORM.format(html.escape(query))))

    def file_of(request) -> pathlib.Path | None:
        number = request.path_params["number"]
        path = folder / names[number] if number < len(names) else None
        return path if path and path.is_file() else None

    def whole(request):
        path = file_of(request)
        return responses.FileResponse(path) if path else responses.Response(status_code=404)

    def frame(request):
        path, content = file_of(request), None
        if path:
            try:
                content = show.jpeg(path, request.path_params["ms"] / 1000)
            except Mistake:                     # the video was damaged since it was indexed
                pass
        return responses.Response(content, 200 if content else 404, media_type="image/jpeg")

    routes = [routing.Route("/", page), routing.Route("/video/{number:int}", whole),
              routing.Route("/frame/{number:int}/{ms:int}", frame)]
    app = applications.Starlette(routes=routes)
    app.add_middleware(trusted.TrustedHostMiddleware, allowed_hosts=hosts)
    return app


def main() -> None:
    arguments = options.parser("a search box in a browser", prog="python -m extras.serve")
    add = arguments.add_argument
    add("index", help="folder of the index (python -m extras.index makes it)")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all, for anyone who "
                                            "can reach this machine")
    add("--port", type=int, default=8000, help="port to listen on")
    add("--device", **options.DEVICE)
    with reported():
        run(arguments.parse_args())


def run(given: argparse.Namespace) -> None:
    uvicorn = files.need("uvicorn", "serving")
    index = Index(given.index)
    if not index.rows():
        raise Mistake(f"{given.index} contains no video; add some with: python -m extras.index")
    local = ["127.0.0.1", "localhost", "[::1]"]
    hosts = local if given.host in (*local, "::1") else ["*"]
    app = application(index, retriever_of(index, given.device), hosts)
    print(f"{summary(index)}; open http://{given.host}:{given.port} (stop with Ctrl-C)", flush=True)
    uvicorn.run(app, host=given.host, port=given.port, log_level="warning")


if __name__ == "__main__":
    main()
