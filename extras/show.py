"""The answers of retrieve.py for people and programs: text, JSON, plot, page, clips.

Shapes: F frames of a video, S sentences, N clips, W windows, P moments of a window.
"""
import base64
import mimetypes
import os
import pathlib
import sys
import urllib.parse

import numpy as np
from tqdm import tqdm

import clip
import video
from extras import figures
from support import ffmpeg, files
from support.errors import Mistake
from support.text import printable

PAGE = files.ASSETS / "page.html"
EMBEDDED = 32 * 2 ** 20         # bytes; a larger video is linked from the page, not embedded in it
PLAYABLE = {"h264", "vp8", "vp9", "av1"}                # codecs, and suffixes, that browsers play
JOINED = {"mpegts", "mpeg", "ogg"}                      # may be several recordings in one file
CONTAINERS = {".mp4", ".m4v", ".mov", ".webm"}
PLAYING = ("A button plays its moment and stops at its end. The bar compares scores with the best "
           "and is not a probability.")
NO_MATCH = "no moment matches; closest candidates:"
HEADS = "       start       end   score"


def clock(seconds: float) -> str:
    """m:ss.s, or h:mm:ss.s."""
    minutes, tenths = divmod(round(10 * seconds), 600)      # rounded first: 59.96 s is 1:00.0
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{tenths / 10:04.1f}"
    return f"{minutes}:{tenths / 10:04.1f}"


def short(sentence: str, length: int = 100) -> str:
    """A sentence as it is printed back: without control characters, and cut off."""
    if len(sentence) > length:
        sentence = sentence[:length] + "..."
    return printable(sentence)


def line(rank: int, moment) -> str:
    """A moment as a row below HEADS."""
    start, end = clock(moment.start_sec), clock(moment.end_sec)
    return f"{rank:3d} {start:>8s}  {end:>8s}   {moment.score:.3f}"


def as_text(encoded, retriever, answers: list) -> str:
    lines = [f"{printable(encoded.path)}, {clock(encoded.duration_sec)} long; moments start and "
             f"end on a grid of {retriever.grid_sec(encoded):.2f} s"]
    if retriever.kind == "clip":
        lines.append("CLIP alone, without training: it recognises people and objects, but not "
                     "direction or order")
    for answer in answers:
        lines += ["", f"\"{short(answer.sentence)}\""]
        if not answer.found:
            lines.append(NO_MATCH)
        lines.append(f"{HEADS} (for ranking only; not a probability)")
        lines += [line(rank, moment) for rank, moment in enumerate(answer.moments, 1)]
    return "\n".join(lines)


def as_json(encoded, retriever, answers: list) -> dict:
    """One JSON object; times in seconds."""
    results = []
    for answer in answers:
        moments = [moment._asdict() for moment in answer.moments]
        results.append({"sentence": answer.sentence, "found": answer.found,
                        "z": round(answer.z, 3), "moments": moments})
    return {"video": encoded.path, "duration_sec": encoded.duration_sec,
            "resolution_sec": retriever.grid_sec(encoded), "scorer": retriever.kind,
            "results": results}


# ------------------------------------------------------------------------------------------- a plot

def plot(path: str, retriever, encoded, answers: list, threshold: float) -> None:
    """A film strip; for each sentence the best score at each instant, in standard deviations above
    unrelated sentences, with the threshold and the moments as bars; and with a checkpoint the 2D
    map of the window with the best one, whose cell is marked."""
    plt = files.pyplot()
    generic = retriever.generic_best(encoded)                           # [G]
    curves = retriever.curve(encoded, [answer.sentence for answer in answers])      # [S, F]
    # as z, the unit of the threshold
    curves = (curves - generic.mean()) / generic.std().clamp(min=1e-9)
    figure = plt.figure(figsize=(13, 1.9 + 2.6 * len(answers)))
    grid = figure.add_gridspec(len(answers) + 1, 2, width_ratios=(4, 1),
                               height_ratios=[1.1] + [2] * len(answers))
    strip = figure.add_subplot(grid[0, 0])
    frames = video.centre_frames(video.inspect(encoded.path), 9)
    images = [clip.crop(frame[None], 96)[0].permute(1, 2, 0).numpy() for frame in frames]
    strip.imshow(np.concatenate(images, 1),                             # [96, 9 * 96, 3]
                 extent=(0, encoded.duration_sec, 0, 1), aspect="auto")
    strip.set(yticks=[], xticks=[])
    # subtle: parse_math=False, or two dollar signs in a text make a formula
    strip.set_title(printable(pathlib.Path(encoded.path).name), loc="left", parse_math=False)
    at_sec = (np.arange(len(encoded.frames)) + 0.5) * encoded.each_sec  # [F]
    for i, (answer, scores) in enumerate(zip(answers, curves)):
        curve = figure.add_subplot(grid[i + 1, 0])
        curve.plot(at_sec, scores, color="black", linewidth=1)
        curve.axhline(threshold, color="black", linewidth=0.8, linestyle=":")       # found above it
        doubt = "" if answer.found else " (no moment matches)"
        # the bars lie below the curve, whose axis ends at -4
        for k, moment in enumerate(answer.moments):
            height = -4.6 - 0.5 * k
            color = f"C{k}" if answer.found else "lightgrey"            # C0: the first colour
            length_sec = moment.end_sec - moment.start_sec
            curve.barh(height, length_sec, 0.4, left=moment.start_sec, color=color)
            curve.text(moment.end_sec, height, f" {k + 1}", va="center", fontsize=8)
        curve.set(xlim=(0, encoded.duration_sec), ylim=(-5 - 0.5 * len(answer.moments), 6),
                  yticks=(-4, -2, 0, 2, 4, 6), xlabel="seconds")
        curve.set_title(f"\"{short(answer.sentence)}\"{doubt}", loc="left", fontsize=10,
                        parse_math=False)
        if i == 0:
            curve.set_ylabel("standard deviations above\nunrelated sentences", fontsize=8)
        if retriever.kind == "checkpoint":
            draw_map(figure.add_subplot(grid[i + 1, 1]), retriever, encoded, answer.sentence)
    files.save_figure(figure, path)


def draw_map(axes, retriever, encoded, sentence: str) -> None:
    """Scores of all moments of the window with the best one, from 0 to 1."""
    windows = len(encoded.starts)
    scores = retriever.scores(encoded, [sentence])[1].view(windows, -1)         # [W, P]
    window = int(scores.amax(1).argmax())
    model = retriever.run.retriever
    title = f"window {window + 1} of {windows}" if windows > 1 else ""          # of a long video
    grid = model.to_map(scores[window].to(retriever.device)).cpu()              # [N, N]
    figures.score_map(axes, grid, model.candidates.cpu(), title)
    axes.images[0].set_clim(0, 1)
    axes.set(xticks=(0, retriever.N - 1), yticks=(0, retriever.N - 1))      # whole clips


# ------------------------------------------------------------------------------------------- a page

def fill_page(title: str, note: str, sections: list[dict], **more) -> str:
    """assets/page.html with its parts.

    sections   for each sentence: sentence, found, and buttons, best first. A button has a moment,
               the value it is ordered by, and maybe the source of its video, a name, a thumbnail
    more       source: the video that is shown first; query: what the search box contains; sources:
               the videos that a button's source "#0", "#1", ... stands for"""
    jinja2 = files.need("jinja2", "a page")
    # autoescape: sentences and file names are text, never HTML
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    environment.filters.update(clock=clock, short=short, printable=printable)
    template = environment.from_string(PAGE.read_text(encoding="utf-8"))
    return template.render(title=title, note=note, sections=sections, **more)


def unplayable(path: str | os.PathLike) -> str:
    """Why a browser may not play a video file; "" if it can."""
    path = pathlib.Path(path)
    codec = video.inspect(path).codec
    if codec in PLAYABLE and path.suffix.lower() in CONTAINERS:
        return ""
    return (f"{printable(path.name)} is {codec} in {path.suffix}, which many browsers cannot play; "
            f"retrieve.py --clips writes each moment as H.264")


def opened(found: video.VideoFile, origin_sec: float) -> tuple[list[str], float]:
    """Options that open a video at `origin_sec`, and where they do. A long film is sought, not
    decoded; but joined recordings have several clocks, and an AVI may have nothing to seek in its
    first second."""
    if found.container in JOINED or origin_sec < 1:
        return found.opening, 0.0
    origin_sec = round(origin_sec, 3)
    return ["-ss", f"{origin_sec:.3f}"] + found.opening, origin_sec


def origin_of(found: video.VideoFile, time_sec: float) -> float:
    """Two seconds before the picture on screen at an instant began, because some formats cannot be
    sought to the frame."""
    begins_sec = found.packets_sec[:, 0]
    shown = np.searchsorted(begins_sec, time_sec, side="right") - 1
    return time_sec if shown < 0 else float(begins_sec[shown]) - 2


def jpeg(path: str | os.PathLike, time_sec: float, side: int = 160) -> bytes:
    """The frame on screen at an instant, its short side `side` pixels, as a JPEG file. VideoError
    if it cannot be read."""
    found = video.inspect(path, whole=False)            # how it is displayed
    # the last picture that began in the ten seconds before
    content, reason = picture(found, time_sec, time_sec - 10, side, is_last=True)
    if not content:
        # it began earlier, or is the first of all, which began later
        found = video.inspect(path)
        time_sec = min(time_sec, float(found.packets_sec[-1, 0]))       # or the last
        content, reason = picture(found, time_sec, origin_of(found, time_sec), side)
    if not content:
        raise video.VideoError(f"{path} has no picture at {time_sec:.1f} s: {reason}")
    return content


def picture(found: video.VideoFile, time_sec: float, origin_sec: float, side: int,
            is_last: bool = False) -> tuple[bytes, str]:
    """A JPEG file of what is on screen at `time_sec`, decoded from `origin_sec` on (is_last: see
    video.shifted); if there is nothing, the reason."""
    opening, origin_sec = opened(found, origin_sec)
    size = f"scale='if(gt(iw,ih),-2,{side})':'if(gt(iw,ih),{side},-2)'"
    filters = f"{video.shifted(time_sec - origin_sec, is_last)},fps=1:start_time=0:round=up"
    beside = []
    if found.container in JOINED:
        beside = ["-t", f"{time_sec + 1:.3f}"] + ffmpeg.WITH_SOUND
    run = ffmpeg.Ffmpeg(["-v", "error"] + opening + [
        "-an", "-sn", "-dn", "-frames:v", "1", "-vf", f"{filters},{found.filters},{size}",
        "-f", "image2pipe", "-c:v", "mjpeg", "-"] + beside,
        ffmpeg.SILENCE_SEC + time_sec - origin_sec)
    return run.read_all(), run.reason()


def address_of(path: pathlib.Path, out: str | os.PathLike) -> str:
    """Where a page finds a video: in itself, or in a file relative to the page."""
    if path.stat().st_size <= EMBEDDED:
        # embedded, so that the page is a single file
        kind = mimetypes.guess_type(path.name)[0] or "video/mp4"
        return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    # relative, so that the page and the video can be moved together
    relative = os.path.relpath(path, pathlib.Path(out).resolve().parent)
    return urllib.parse.quote(os.fsencode(relative))    # a name need not be UTF-8


def write_page(out: str, encoded, grid_sec: float, answers: list) -> None:
    """One HTML page with the video, the sentences, and a button for each moment."""
    path = pathlib.Path(encoded.path)
    reason = unplayable(path)
    if reason:
        print(f"note: {reason}", file=sys.stderr)
    note = f"{PLAYING} Moments start and end on a grid of {grid_sec:.2f} s. {reason}"
    sections = []
    for answer in answers:
        buttons = [{"moment": moment, "value": moment.score} for moment in answer.moments]
        sections.append({"sentence": answer.sentence, "found": answer.found, "buttons": buttons})
    page = fill_page(f"Moments of {printable(path.name)}", note, sections,
                     source=address_of(path, out))
    files.save(out, page)


# -------------------------------------------------------------------------------------------- clips

def cut(path: str | os.PathLike, start_sec: float, end_sec: float, out: pathlib.Path) -> None:
    """Writes [start, end) of a video, as displayed and with its sound, as H.264 in mp4. VideoError,
    and no file, if it has no picture there."""
    found = video.inspect(path)
    seconds = end_sec - start_sec
    begins_sec = found.packets_sec[:, 0]
    opening, origin_sec = opened(found, origin_of(found, start_sec))
    # the picture on screen at the start comes first: the last of all, if that is earlier
    picture_sec = min(start_sec, float(begins_sec[-1])) - origin_sec
    sound_sec = start_sec - origin_sec
    steps_sec = np.diff(begins_sec[(start_sec <= begins_sec) & (begins_sec < end_sec)])
    rate = 10                                           # of slides; else about its own
    if len(steps_sec):
        rate = max(rate, round(1 / max(1 / 60, np.median(steps_sec))))
    # H.264 needs even sides
    filters = (f"{video.shifted(picture_sec)},fps={rate}:start_time=0:round=up,{found.filters},"
               f"scale='max(2,trunc(iw/2)*2)':'max(2,trunc(ih/2)*2)'")
    sound = ["-c:a", "aac", "-af", f"atrim=start={sound_sec},asetpts=PTS-{sound_sec}/TB"]
    for stream in (sound, ["-an"]):             # without it, if nothing can decode its sound
        run = ffmpeg.Ffmpeg(["-v", "error"] + opening + [
            "-t", f"{seconds:.3f}", "-vf", filters, "-c:v", "libx264", "-pix_fmt", "yuv420p", "-sn",
            "-dn"] + stream + ["-y", "-f", "mp4", "file:" + os.path.abspath(out)],
            ffmpeg.SILENCE_SEC + sound_sec + 30 * seconds)      # it prints nothing until the end
        if run.finish() == 0:
            break
    try:
        if run.process.returncode:
            raise video.VideoError(f"{out} could not be written: {run.reason()}")
        video.inspect(out)                      # VideoError if nothing could be decoded there
    except video.VideoError:
        out.unlink(missing_ok=True)
        raise


def clip_name(path: str | os.PathLike, start_sec: float, end_sec: float) -> str:
    """kitchen-0m08.6s-0m15.1s.mp4."""
    name = pathlib.Path(path).stem
    for sec in (start_sec, end_sec):
        minutes, tenths = divmod(round(10 * sec), 600)      # rounded first: 59.96 s is 1m00.0s
        name += f"-{minutes}m{tenths / 10:04.1f}s"
    return f"{name}.mp4"


def write_clips(folder: str, encoded, answers: list, padding_sec: float = 0.0
                ) -> list[pathlib.Path]:
    """Each moment, with padding before and after it, as an H.264 file named by its time."""
    folder = pathlib.Path(folder)
    spans = {}                                  # by file: two sentences may share a moment
    for answer in answers:
        for moment in answer.moments:
            start_sec = max(0.0, moment.start_sec - padding_sec)
            end_sec = min(encoded.duration_sec, moment.end_sec + padding_sec)
            spans[folder / clip_name(encoded.path, start_sec, end_sec)] = (start_sec, end_sec)
    # checked before the first clip is written
    for out in spans:
        if out.exists():
            raise Mistake(f"{out} already exists; choose another folder for --clips")
    folder.mkdir(parents=True, exist_ok=True)
    for out, (start_sec, end_sec) in tqdm(spans.items(), desc="clips", unit="clip", disable=None):
        cut(encoded.path, start_sec, end_sec, out)
    return list(spans)
