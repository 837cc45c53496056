"""A search box for an index of videos, in a browser on this machine.

    python -m extras.serve index/                       # http://127.0.0.1:8000

Starlette and uvicorn serve the page, the indexed videos (with range requests, so that a player can
seek), thumbnails and clips of them, and nothing else. Only this machine can connect unless --host
says otherwise.
"""
import contextlib
import pathlib
import socket
import sys
import tempfile
import threading

import video
from extras import show
from extras.index import Entry, Index, summary
from extras.search import is_found, retriever_of, search
from support import files, options
from support.errors import Mistake, reported
from support.text import printable

LONGEST = 300                   # characters of a query, as in assets/page.html
LONGEST_CLIP_SEC = 600
LOCAL = ["127.0.0.1", "localhost", "[::1]"]             # what a Host header calls this machine


def application(index: Index, retriever, hosts: list[str]):
    """The Starlette application. hosts: accepted Host headers, against DNS rebinding."""
    # optional packages, imported only by this command
    applications = files.need("starlette.applications", "serving")
    exceptions = files.need("starlette.exceptions", "serving")
    responses = files.need("starlette.responses", "serving")
    tasks = files.need("starlette.background", "serving")
    routing = files.need("starlette.routing", "serving")
    trusted = files.need("starlette.middleware.trustedhost", "serving")

    cutting = threading.Lock()

    def latest() -> Index:
        """The index as it is on disk now: an update may have replaced its table."""
        nonlocal index
        if index.is_outdated():
            with contextlib.suppress(Mistake):          # made again with another checkpoint: keep
                newer = Index(index.folder, index.made)
                newer.load()
                index = newer
        return index

    def answer(index: Index, query: str) -> dict:
        hits = search(index, retriever, [query])[0]
        buttons = []
        for hit in hits:
            # addresses contain a fingerprint, not a path: only indexed files are served
            key = index.entries[hit.video].file
            middle_ms = round(500 * (hit.moment.start_sec + hit.moment.end_sec))
            buttons.append({"moment": hit.moment, "value": hit.order, "name": hit.video,
                            "source": f"/video/{key}", "thumbnail": f"/frame/{key}/{middle_ms}"})
        return {"sentence": query, "found": is_found(hits), "buttons": buttons}

    def page(request):
        index = latest()
        query = request.query_params.get("q", "")[:LONGEST].strip()
        sections = []
        note = f"{summary(index)}. Describe what to look for."
        if query:
            sections = [answer(index, query)]
            note = f"{summary(index)}. {show.PLAYING}"
        return responses.HTMLResponse(show.fill_page("Moments", note, sections, query=query))

    def video_of(request) -> tuple[pathlib.Path, Entry]:
        index = latest()
        for name, entry in index.entries.items():
            # not if it was removed or replaced since it was indexed
            if entry.file == request.path_params["key"] and index.is_current(name):
                return index.path_of(name), entry
        raise exceptions.HTTPException(404)

    def whole(request):
        return responses.FileResponse(video_of(request)[0])     # answers range requests, too

    def frame(request):
        path, entry = video_of(request)
        time_sec = min(request.path_params["ms"] / 1000, entry.duration_sec)
        content = show.jpeg(path, time_sec)
        return responses.Response(content, media_type="image/jpeg")

    def clip(request):
        path, entry = video_of(request)
        start_sec = request.path_params["start"]
        end_sec = min(request.path_params["end"], entry.duration_sec)
        if not 0 < end_sec - start_sec <= LONGEST_CLIP_SEC:
            raise exceptions.HTTPException(400, f"a clip must end after its start, and at most "
                                                f"{LONGEST_CLIP_SEC} seconds after it")
        folder = tempfile.TemporaryDirectory()                  # until the clip has been sent
        out = pathlib.Path(folder.name, "clip.mp4")
        with cutting:                                           # which takes all cores
            show.cut(path, start_sec, end_sec, out)
        name = printable(show.clip_name(path, start_sec, end_sec))
        return responses.FileResponse(out, filename=name,
                                      background=tasks.BackgroundTask(folder.cleanup))

    def unreadable(request, error: video.VideoError):           # damaged since it was indexed
        print(printable(str(error)), file=sys.stderr)           # its path is not for the browser
        return responses.PlainTextResponse("this video cannot be read", 404)

    app = applications.Starlette(exception_handlers={video.VideoError: unreadable}, routes=[
        routing.Route("/", page),
        routing.Route("/video/{key}", whole),
        routing.Route("/clip/{key}/{start:float}/{end:float}", clip),
        routing.Route("/frame/{key}/{ms:float}", frame)])       # a float, which has no limit
    # DNS rebinding: another site's name could resolve to this machine
    app.add_middleware(trusted.TrustedHostMiddleware, allowed_hosts=hosts)
    return app


def check_address(host: str, port: int) -> None:
    """Mistake if nobody can listen there."""
    if not 0 < port < 65536:
        raise Mistake(f"--port must be between 1 and 65535, not {port}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise Mistake(f"cannot listen on port {port} of {host} ({error.strerror}); choose another "
                      f"with --port or --host") from error


def main() -> None:
    arguments = options.parser("a search box in a browser", prog="python -m extras.serve")
    add = arguments.add_argument
    add("index", help="folder of the index (python -m extras.index makes it)")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets everyone who can "
                                            "reach this machine connect")
    add("--port", type=int, default=8000, help="port to listen on")
    add("--device", **options.DEVICE)
    given = arguments.parse_args()
    with reported():
        uvicorn = files.need("uvicorn", "serving")
        index = Index(given.index)
        index.load()
        check_address(given.host, given.port)           # before a model is loaded
        # if others may connect, the names by which they reach this machine are unknown
        hosts = LOCAL if given.host in LOCAL + ["::1"] else ["*"]
        app = application(index, retriever_of(index, given.device), hosts)
        host = f"[{given.host}]" if ":" in given.host else given.host           # IPv6
        print(f"{summary(index)}; open http://{host}:{given.port} (stop with Ctrl-C)", flush=True)
        uvicorn.run(app, host=given.host, port=given.port, log_level="warning")
        sys.exit(130)                                   # it returns after Ctrl-C only


if __name__ == "__main__":
    main()
