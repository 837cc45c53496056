"""What retrieve.py found, for people and programs: text, json, plot, page, clips.

Shapes: F frames of a video, S sentences, N clips, W windows, P moments of a window.
"""
import base64
import html
import io
import mimetypes
import os
import pathlib
import string
import sys
import urllib.parse

import numpy as np
from tqdm import tqdm

import clip
import video
from support import files
from support.errors import Mistake
from support.text import printable

PAGE = files.ASSETS / "page.html"
EMBEDDED = 32 * 2 ** 20         # a larger video is linked from the page instead of embedded in it
PLAYABLE = {"h264", "vp8", "vp9", "av1"}                # codecs, and endings, that browsers play
CONTAINERS = {".mp4", ".m4v", ".mov", ".webm"}
PLAYING = ("A button plays its moment and stops at its end. The bar compares scores with the best "
           "and is not a probability.")


def clock(seconds: float) -> str:
    """m:ss.s, or h:mm:ss.s."""
    tenths = round(10 * seconds)
    hours, minutes, rest = tenths // 36000, tenths // 600 % 60, tenths % 600 / 10
    return f"{hours}:{minutes:02d}:{rest:04.1f}" if hours else f"{minutes}:{rest:04.1f}"


def short(sentence: str, length: int = 100) -> str:
    """A sentence as it is printed back: without control characters, and cut off."""
    return printable(sentence if len(sentence) <= length else sentence[:length] + "...")


def verdict(answer) -> str:
    """"" if the sentence was found."""
    return "" if answer.found else "nothing here fits; the least bad:"


def as_text(encoded, retriever, answers: list) -> str:
    name, length = printable(encoded.path), clock(encoded.duration_sec)
    lines = [f"{name}, {length} long; moments start and end on a grid of "
             f"{retriever.grid_sec(encoded):.2f} s"]
    if retriever.kind == "clip":
        lines.append("CLIP alone, without training: it sees who and what, but neither direction "
                     "nor order")
    for answer in answers:
        lines += ["", f"\"{short(answer.sentence)}\"", *filter(None, [verdict(answer)]),
                  "       start       end   score (for ranking only; not a probability)"]
        lines += [f"{k:3d} {clock(m.start_sec):>8s}  {clock(m.end_sec):>8s}   {m.score:.3f}"
                  for k, m in enumerate(answer.moments, 1)]
    return "\n".join(lines)


def as_json(encoded, retriever, answers: list) -> dict:
    """One json object; times in seconds."""
    results = [{"sentence": a.sentence, "found": a.found, "z": round(a.z, 3),
                "moments": [m._asdict() for m in a.moments]} for a in answers]
    return {"video": encoded.path, "duration_sec": encoded.duration_sec,
            "resolution_sec": retriever.grid_sec(encoded), "scorer": retriever.kind,
            "results": results}


# ------------------------------------------------------------------------------------------- a plot

def drawable(text: str) -> str:
    """`text` without the characters that no installed font has. Fonts that have them are added to
    those that matplotlib draws with."""
    files.pyplot()
    import matplotlib
    from matplotlib import font_manager, ft2font

    def glyphs(path: str) -> set[int]:
        return set(ft2font.FT2Font(path).get_charmap())

    known = glyphs(font_manager.findfont("DejaVu Sans"))
    families, missing = ["DejaVu Sans"], {ord(c) for c in text} - known
    for font in font_manager.fontManager.ttflist if missing else ():
        more = missing & glyphs(font.fname)
        if more and not font.name.startswith("Last Resort"):    # which has a box for everything
            families.append(font.name)
            missing -= more
    matplotlib.rcParams["font.family"] = families
    return "".join("\N{WHITE SQUARE}" if ord(c) in missing else c for c in text)


def plot(path: str, retriever, encoded, answers: list, threshold: float) -> None:
    """A film strip; for each sentence the best score at each instant, in standard deviations above
    unrelated sentences, with the threshold and the moments as bars; and with a checkpoint the 2D
    map of the window with the best one, whose cell is marked."""
    plt = files.pyplot()
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    sentences = [answer.sentence for answer in answers]
    generic, curves = retriever.generic_best(encoded), retriever.curve(encoded, sentences)
    trained = retriever.kind == "checkpoint"
    figure = plt.figure(figsize=(13, 1.9 + 2.6 * len(answers)))
    grid = figure.add_gridspec(len(answers) + 1, 2, width_ratios=(4, 1),
                               height_ratios=[1.1] + [2] * len(answers))
    strip = figure.add_subplot(grid[0, 0])
    times_sec = video.frame_centres(encoded.duration_sec, 9)
    frames = [clip.crop(frame[None], 96)[0].permute(1, 2, 0).numpy()
              for frame in video.frames_at(encoded.path, times_sec)]
    strip.imshow(np.concatenate(frames, 1), extent=(0, encoded.duration_sec, 0, 1), aspect="auto")
    strip.set(yticks=[], xticks=[])
    strip.set_title(drawable(printable(pathlib.Path(encoded.path).name)), loc="left",
                    parse_math=False)
    at = (np.arange(len(encoded.frames)) + 0.5) * encoded.each_sec
    for i, (answer, scores) in enumerate(zip(answers, curves)):
        curve = figure.add_subplot(grid[i + 1, 0])
        curve.plot(at, (scores - generic.mean()) / generic.std().clamp(min=1e-9), color="black",
                   linewidth=1)
        curve.axhline(threshold, color="black", linewidth=0.8, linestyle=":")
        for k, moment in enumerate(answer.moments):
            height = -4.6 - 0.5 * k
            curve.barh(height, moment.end_sec - moment.start_sec, 0.4, moment.start_sec,
                       color=f"C{k}" if answer.found else "lightgrey")
            curve.text(moment.end_sec, height, f" {k + 1}", va="center", fontsize=8)
        curve.set(xlim=(0, encoded.duration_sec), ylim=(-5 - 0.5 * len(answer.moments), 6),
                  yticks=(-4, -2, 0, 2, 4, 6), xlabel="seconds")
        curve.set_title(drawable(f"\"{short(answer.sentence)}\" {verdict(answer).split(';')[0]}"),
                        loc="left", fontsize=10, parse_math=False)
        if i == 0:
            curve.set_ylabel("standard deviations above\nunrelated sentences", fontsize=8)
        if trained:
            draw_map(figure.add_subplot(grid[i + 1, 1]), retriever, encoded, answer.sentence)
    figure.tight_layout()
    files.save_figure(figure, path)


def draw_map(axes, retriever, encoded, sentence: str) -> None:
    """Scores of all moments of the window with the best one, from 0 to 1."""
    N, windows = retriever.N, len(encoded.starts)
    scores = retriever.scores(encoded, [sentence])[1][0]                # [W * P]
    window, cell = divmod(int(scores.argmax()), len(scores) // windows)
    shown = np.full(N * N, np.nan)
    cells = retriever.run.retriever.cells.cpu()
    shown[cells] = scores.unflatten(0, (windows, -1))[window]
    axes.imshow(shown.reshape(N, N), vmin=0, vmax=1, cmap="viridis")
    start, end = divmod(int(cells[cell]), N)
    axes.plot(end, start, "s", markersize=9, markerfacecolor="none", color="red")
    axes.set(xlabel="last clip", ylabel="first clip", xticks=(0, N - 1), yticks=(0, N - 1))
    if windows > 1:
        axes.set_title(f"window {window + 1} of {windows}", fontsize=9)


# ------------------------------------------------------------------------------------------- a page

def unplayable(path: str | os.PathLike) -> str:
    """Why a browser may not play a video file; "" if it can."""
    path = pathlib.Path(path)
    with video.open_video(path) as container:
        codec = container.streams.video[0].codec_context.name
    codec = {"libdav1d": "av1", "libaom-av1": "av1"}.get(codec, codec)
    if codec in PLAYABLE and path.suffix.lower() in CONTAINERS:
        return ""
    return (f"{printable(path.name)} is {codec} in {path.suffix}, which many browsers cannot play; "
            f"retrieve.py --clips writes each moment as H.264")


def jpeg(path: str | os.PathLike, time_sec: float, side: int = 160) -> bytes:
    """The frame on screen at an instant, scaled to `side` pixels, as a JPEG file."""
    frame = next(video.frames_at(path, np.array([time_sec])))
    image = clip.crop(frame[None], side)[0].permute(1, 2, 0).contiguous().numpy()
    buffer = io.BytesIO()
    files.need("PIL.Image", "a thumbnail").fromarray(image).save(buffer, "JPEG")
    return buffer.getvalue()


def section(number: int, sentence: str, found: bool, rows: list[tuple]) -> str:
    """The answers to a sentence. rows: (address of the video, its name, address of a thumbnail,
    Moment, what orders them), best first; empty addresses and names are left out."""
    best = max((value for *_, value in rows), default=0)
    lines = [f"<section aria-labelledby=\"s{number}\"><h2 id=\"s{number}\">"
             f"{html.escape(short(sentence, 300))}</h2>"]
    if not found:
        lines.append("<p class=\"none\">Nothing here fits; the least bad:</p>")
    for address, name, thumbnail, m, value in rows:
        picture = f"<img alt=\"\" loading=\"lazy\" src=\"{html.escape(thumbnail)}\">"
        share = max(0.0, value / best) if best > 0 else 0.0
        lines.append(
            f"<button type=\"button\" aria-pressed=\"false\" data-source=\"{html.escape(address)}\""
            f" data-start=\"{m.start_sec:.3f}\" data-end=\"{m.end_sec:.3f}\">"
            f"{picture if thumbnail else ''}<span>{clock(m.start_sec)} to {clock(m.end_sec)} "
            f"<small>{html.escape(printable(name))}</small></span>"
            f"<meter min=\"0\" max=\"1\" value=\"{share:.3f}\">{share:.0%} of the best</meter>"
            f"</button>")
    return "\n".join([*lines, "</section>"])


def fill_page(title: str, note: str, sections: list[str], source: str = "", form: str = "") -> str:
    """assets/page.html with its parts; `title` and `note` are escaped here."""
    return string.Template(PAGE.read_text(encoding="utf-8")).substitute(
        title=html.escape(title), note=html.escape(note), sections="\n".join(sections),
        source=f"src=\"{html.escape(source)}\"" if source else "hidden", form=form)


def address_of(path: pathlib.Path, out: str | os.PathLike) -> str:
    """Where a page finds a video: in itself, or in a file relative to the page."""
    if path.stat().st_size <= EMBEDDED:
        kind = mimetypes.guess_type(path.name)[0] or "video/mp4"
        return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    return urllib.parse.quote(os.path.relpath(path, pathlib.Path(out).resolve().parent))


def as_page(out: str, encoded, grid_sec: float, answers: list) -> str:
    """One html page with the video, the sentences, and a button for each moment."""
    path = pathlib.Path(encoded.path)
    note = f"{PLAYING} Moments begin and end on steps of {grid_sec:.2f} s. {unplayable(path)}"
    sections = [section(i, a.sentence, a.found, [("", "", "", m, m.score) for m in a.moments])
                for i, a in enumerate(answers)]
    return fill_page(f"Moments of {printable(path.name)}", note, sections, address_of(path, out))


def write_page(out: str, encoded, retriever, answers: list) -> None:
    if reason := unplayable(encoded.path):
        print(f"note: {reason}", file=sys.stderr)
    files.save(out, as_page(out, encoded, retriever.grid_sec(encoded), answers))


# -------------------------------------------------------------------------------------------- clips

def write_clips(folder: str, path: str, answers: list) -> list[pathlib.Path]:
    """Each moment as an H.264 file named by its time: kitchen-0m08.6s-0m15.1s.mp4."""
    folder, stem = pathlib.Path(folder), pathlib.Path(path).stem
    moments = {}
    for moment in (moment for answer in answers for moment in answer.moments):
        times = (f"{int(sec // 60)}m{sec % 60:04.1f}s" for sec in moment[:2])
        moments[folder / f"{'-'.join([stem, *times])}.mp4"] = moment
    for out in moments:
        if out.exists():
            raise Mistake(f"{out} already exists; choose another folder for --clips")
    folder.mkdir(parents=True, exist_ok=True)
    with video.open_video(path) as source:
        rate = min(60, max(10, round(source.streams.video[0].average_rate or 25)))
    for out, moment in tqdm(moments.items(), desc="clips", unit="clip", disable=None):
        times_sec = np.arange(moment.start_sec, moment.end_sec, 1 / rate)
        video.write_video(out, video.frames_at(path, times_sec), rate)
    return list(moments)
