"""video.py and support/ffmpeg.py: what a viewer sees, in files of the kinds that cause trouble. The
smallest of each kind is generated here; those of `shared/cases` run, too, where they are there."""
import json
import os
import pathlib
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch

import data
import films
import video
from conftest import HERE, SHARED
from extras import show
from support import ffmpeg, files

CASES = SHARED.parent / "cases" / "videos"


def seen(path, at_sec: list[float]) -> list[float]:
    """Mean grey level on screen at these instants (as the nearest of many samples)."""
    found = video.inspect(path)
    count = max(200, round(found.duration_sec * 20))
    levels = [frame.float().mean().item() for frame in video.centre_frames(found, count)]
    return [levels[min(count - 1, int(t / found.duration_sec * count))] for t in at_sec]


def ramp(path, *options, seconds=4, rate=10) -> pathlib.Path:
    """A video whose grey level is 20 + 40 t at t seconds."""
    levels = [20 + 40 * i / rate for i in range(seconds * rate)]
    return films.film(path, films.greys(levels), *options, rate=rate)


def test_the_frame_on_screen_at_an_instant(tmp_path):
    """Ten frames per second, frame i has level 10 i: at 0.35 s frame 3 is on screen; the last one
    stands at the very end."""
    path = films.film(tmp_path / "a.mkv", films.greys(range(0, 200, 10)), "-c:v", "ffv1")
    found = video.inspect(path)
    assert found.duration_sec == pytest.approx(2.0) and (found.width, found.height) == (48, 32)
    frames = list(video.frames_every(found, 0.35, 0.8, 3))              # 0.35, 1.15, 1.95 s
    assert [frame.float().mean().item() for frame in frames] == pytest.approx([30, 110, 190], abs=2)
    frames, duration_sec = video.sample_frames(path, 4, 32)             # 0.25, 0.75, 1.25, 1.75 s
    assert frames.shape == (4, 3, 32, 32) and duration_sec == found.duration_sec
    levels = frames.float().mean((1, 2, 3)).tolist()
    assert levels == pytest.approx([20, 70, 120, 170], abs=2)


def test_frames_are_those_of_the_program_to_the_bit(tmp_path):
    """Compared with all frames, decoded in one pass without any filter."""
    rng = np.random.default_rng(0)
    path = films.film(tmp_path / "a.mp4", rng.integers(0, 255, (30, 48, 64, 3), dtype=np.uint8),
                      "-pix_fmt", "yuv420p")
    raw = subprocess.run([films.FFMPEG, "-v", "error", "-i", path, "-f", "rawvideo", "-pix_fmt",
                          "rgb24", "-"], capture_output=True, check=True).stdout
    plain = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(30, 48, 64, 3)
    frames = torch.stack(list(video.centre_frames(video.inspect(path), 10)))    # the 2nd of three
    assert torch.equal(frames, plain[1::3].permute(0, 3, 1, 2))


def test_late_pictures_and_long_sound(tmp_path):
    """Pictures from 2 s on, sound to 10 s: the first stands before them, the last after them."""
    ramp(tmp_path / "v.mp4", "-c:v", "libx264", "-pix_fmt", "yuv420p")
    for ending in ("mp4", "mkv"):
        path = tmp_path / f"late.{ending}"
        films.ffmpeg("-itsoffset", 2, "-i", tmp_path / "v.mp4", "-f", "lavfi", "-i",
                     "anullsrc=r=44100:d=10", "-map", "0:v", "-map", "1:a", "-c:v", "copy", "-c:a",
                     "aac", path)
        assert video.probe_duration(path) == pytest.approx(10, abs=0.1)
        assert seen(path, [1.0, 4.0, 9.0]) == pytest.approx([20, 100, 176], abs=8)


def test_slides(tmp_path):
    """Three pictures at 0, 1 and 2 s, the last shown while the sound goes on to 9 s."""
    films.film(tmp_path / "v.mp4", films.greys([40, 120, 200]), "-pix_fmt", "yuv420p", rate=1)
    path = tmp_path / "slides.mp4"
    films.ffmpeg("-i", tmp_path / "v.mp4", "-f", "lavfi", "-i", "anullsrc=r=44100:d=9", "-c:v",
                 "copy", "-c:a", "aac", path)
    assert seen(path, [0.5, 1.5, 2.5, 8.0]) == pytest.approx([40, 120, 200, 200], abs=4)


def test_clocks_and_headers_that_lie(tmp_path):
    """A clock that starts at 1000 s; two recordings joined; a wrong duration in the header."""
    ramp(tmp_path / "v.mp4", "-c:v", "libx264", "-pix_fmt", "yuv420p")
    films.ffmpeg("-i", tmp_path / "v.mp4", "-c", "copy", "-output_ts_offset", 1000,
                 tmp_path / "off.mkv")
    films.ffmpeg("-i", tmp_path / "v.mp4", "-c", "copy", tmp_path / "v.ts")
    (tmp_path / "cat.ts").write_bytes((tmp_path / "v.ts").read_bytes() * 2)
    content = bytearray((tmp_path / "v.mp4").read_bytes())
    for box in (b"mvhd", b"tkhd", b"mdhd"):             # a fifth of the duration
        place = content.index(box) + 4 + {b"mvhd": 16, b"tkhd": 20, b"mdhd": 16}[box]
        duration = int.from_bytes(content[place:place + 4], "big")
        content[place:place + 4] = (duration // 5).to_bytes(4, "big")
    (tmp_path / "lie.mp4").write_bytes(content)
    for name, seconds in (("off.mkv", 4), ("cat.ts", 8), ("lie.mp4", 4)):
        assert video.probe_duration(tmp_path / name) == pytest.approx(seconds, abs=0.15), name
    assert seen(tmp_path / "off.mkv", [1.0, 3.0]) == pytest.approx([60, 140], abs=8)
    assert seen(tmp_path / "cat.ts", [3.0, 5.0]) == pytest.approx([140, 60], abs=8)


def test_an_edit_list(tmp_path):
    """Cut without decoding: the packets since the keyframe are in the file, but never shown."""
    ramp(tmp_path / "v.mp4", "-c:v", "libx264", "-pix_fmt", "yuv420p")
    films.ffmpeg("-ss", 2.3, "-i", tmp_path / "v.mp4", "-c", "copy", tmp_path / "cut.mp4")
    assert video.probe_duration(tmp_path / "cut.mp4") == pytest.approx(1.7, abs=0.05)
    assert seen(tmp_path / "cut.mp4", [0.05, 1.55]) == pytest.approx([112, 172], abs=6)


def test_a_last_picture_without_a_duration(tmp_path):
    """As in WMV: it stands as long as the one before it; alone, for a moment."""
    films.film(tmp_path / "three.wmv", films.greys([40, 120, 200]), "-c:v", "wmv2", rate=1)
    films.film(tmp_path / "one.wmv", films.greys([120]), "-c:v", "wmv2", rate=1)
    assert video.probe_duration(tmp_path / "three.wmv") == pytest.approx(3, abs=0.01)
    assert seen(tmp_path / "three.wmv", [2.5]) == pytest.approx([200], abs=6)
    assert len(video.sample_frames(tmp_path / "one.wmv", 4, 32)[0]) == 4


def test_long_sound_is_read_in_one_pass(tmp_path, monkeypatch):
    """However long its pictures take: there is no second pass, in which nothing would be printed
    until the last of them."""
    films.film(tmp_path / "v.mkv", films.greys([9] * 30), "-c:v", "ffv1")
    films.ffmpeg("-i", tmp_path / "v.mkv", "-f", "lavfi", "-i", "anullsrc=r=8000:d=9", "-c:v",
                 "copy", tmp_path / "a.mkv")
    started, ran = [], ffmpeg.Ffmpeg
    monkeypatch.setattr(ffmpeg, "Ffmpeg", lambda *given, **options: started.append(0) or ran(
        *given, **options))
    assert len(list(video.centre_frames(video.inspect(tmp_path / "a.mkv"), 60))) == 60
    assert len(started) == 2                            # one lists the packets, one decodes


def test_the_last_picture_stands(tmp_path):
    """Not one before it, however far apart the instants are: 12 s of sound, 4 s of pictures."""
    plain = ramp(tmp_path / "v.mp4", "-c:v", "libx264", "-pix_fmt", "yuv420p")
    path = tmp_path / "a.mkv"
    films.ffmpeg("-i", plain, "-f", "lavfi", "-i", "anullsrc=r=8000:d=12", "-c:v", "copy", path)
    frames = video.frames_every(video.inspect(path), 12 / 14, 12 / 7, 7)
    levels = [frame.float().mean().item() for frame in frames]
    assert levels == pytest.approx([52, 120, 176, 176, 176, 176, 176], abs=3)


@pytest.mark.parametrize("ending, codec", [("avi", "mpeg4"), ("ogv", "libtheora"),
                                           ("mkv", "mpeg4")])
def test_ticks_as_long_as_a_frame(tmp_path, ending, codec):
    """Half a second before a frame begins, the one before it is on screen."""
    path = films.film(tmp_path / f"a.{ending}", films.greys(range(20, 220, 20)), "-c:v", codec,
                      "-q:v", 2, rate=1)
    frames = video.frames_every(video.inspect(path), 2.5, 1.0, 5)
    assert [frame.float().mean().item() for frame in frames] == pytest.approx(
        [60, 80, 100, 120, 140], abs=5)
    (tmp_path / "a.jpg").write_bytes(show.jpeg(path, 0.5))
    assert seen(tmp_path / "a.jpg", [0.0]) == pytest.approx([20], abs=5)


def first_beep_sec(path) -> float:
    """When a file begins to be loud, on the clock of its pictures."""
    raw = subprocess.run([films.FFMPEG, "-v", "error", "-i", path, "-vn", "-af",
                          "aresample=async=1:first_pts=0", "-f", "s16le", "-ac", "1", "-ar", "8000",
                          "-"], capture_output=True, check=True).stdout
    return float(np.argmax(abs(np.frombuffer(raw, dtype=np.int16).astype(int)) > 2000) / 8000)


@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts"])
def test_clips_keep_the_sound_in_step(tmp_path, ending):
    """A beep from 2 to 2.2 s; also where the sound begins a second late."""
    plain = ramp(tmp_path / "v.mp4", "-c:v", "libx264", "-pix_fmt", "yuv420p")
    beep = "aevalsrc='if(between(t,2,2.2),sin(2764*t),0)':s=44100:d=4"
    for late_sec in (0, 1):
        path = tmp_path / f"{late_sec}.{ending}"
        films.ffmpeg("-i", plain, "-itsoffset", late_sec, "-f", "lavfi", "-i", beep, "-c:v", "copy",
                     "-c:a", "aac", path)
        for start_sec in (0.0, 1.5):
            clip = tmp_path / "clip.mp4"
            show.cut(path, start_sec, 3.9, clip)
            expected_sec = 2 + late_sec - start_sec
            assert first_beep_sec(clip) == pytest.approx(expected_sec, abs=0.1), late_sec


def test_theora_is_the_same_every_time(tmp_path):
    """Its decoder is not, when it has several threads."""
    levels = [20 + 4 * i for i in range(50)]
    path = films.film(tmp_path / "a.ogv", films.greys(levels), "-c:v", "libtheora", "-q:v", 8)
    first = video.sample_frames(path, 8, 32)[0]
    assert all(torch.equal(first, video.sample_frames(path, 8, 32)[0]) for _ in range(5))


@pytest.mark.parametrize("kind", ["plain", "late", "late.ts", "slides", "uneven", "avi", "joined",
                                  "flv", "silent"])
def test_thumbnails_and_clips_show_what_is_on_screen(tmp_path, kind):
    """At instants all over the video, and in clips from its start, its middle and its end."""
    plain = ramp(tmp_path / "v.mp4", "-c:v", "libx264", "-pix_fmt", "yuv420p")
    sound = ("-f", "lavfi", "-i", "anullsrc=r=8000:d=9", "-map", "0:v", "-map", "1:a", "-c:v",
             "copy", "-c:a", "aac")
    path = tmp_path / "a.mkv"
    if kind == "plain":
        path = plain
    elif kind.startswith("late"):                       # pictures from 3 s on
        path = tmp_path / f"a.{kind}"
        films.ffmpeg("-itsoffset", 3, "-i", plain, *sound, *(
            () if kind == "late.ts" else ("-f", "matroska")), path)
    elif kind == "slides":                              # at 0, 3 and 6 s
        films.film(tmp_path / "s.mkv", films.greys([40, 120, 200]), "-c:v", "ffv1", rate="1/3")
        films.ffmpeg("-i", tmp_path / "s.mkv", *sound, path)
    elif kind == "uneven":                              # a slide of two seconds, then motion
        films.ffmpeg("-i", plain, "-vf", "select='eq(n,0)+gte(n,20)'", "-fps_mode", "passthrough",
                     path)
    elif kind == "avi":                                 # with B-frames
        path = ramp(tmp_path / "a.avi", "-c:v", "mpeg4", "-bf", 2)
    elif kind == "joined":                              # two recordings, under another suffix
        films.ffmpeg("-i", plain, "-c", "copy", tmp_path / "v.ts")
        path = tmp_path / "joined.mp4"
        path.write_bytes((tmp_path / "v.ts").read_bytes() * 2)
    elif kind == "flv":                                 # without an index
        path = tmp_path / "a.flv"
        films.ffmpeg("-i", plain, "-c", "copy", path)
    else:                                               # its sound has a codec that nobody knows
        films.ffmpeg("-i", plain, *sound, path)
        path.write_bytes(path.read_bytes().replace(b"A_AAC", b"A_XYZ"))
    duration_sec = video.probe_duration(path)
    instants_sec = [duration_sec * share for share in (0.01, 0.26, 0.51, 0.77, 0.985)]
    expected = seen(path, instants_sec)
    for time_sec, level in zip(instants_sec, expected):
        (tmp_path / "a.jpg").write_bytes(show.jpeg(path, time_sec))
        assert seen(tmp_path / "a.jpg", [0.0]) == pytest.approx([level], abs=8), time_sec
    for start, end in ((0.0, 0.2), (0.45, 0.6), (0.8, 1.0)):
        start_sec, end_sec = start * duration_sec, end * duration_sec
        show.cut(path, start_sec, end_sec, tmp_path / "clip.mp4")
        seconds = end_sec - start_sec
        assert video.probe_duration(tmp_path / "clip.mp4") == pytest.approx(seconds, abs=0.2)
        at_sec = [seconds * share for share in (0.1, 0.5, 0.9)]
        assert seen(tmp_path / "clip.mp4", at_sec) == pytest.approx(
            seen(path, [start_sec + t for t in at_sec]), abs=10), start


def test_thumbnails_as_displayed(tmp_path):
    """Pixels twice as wide as high; an instant long after the end; a clip that goes nowhere."""
    path = films.film(tmp_path / "a.mp4", films.greys([99] * 3), "-pix_fmt", "yuv420p", "-aspect",
                      "3:1")
    for time_sec in (0.1, 1e12, float("inf")):
        (tmp_path / "a.jpg").write_bytes(show.jpeg(path, time_sec))
        assert video.inspect(tmp_path / "a.jpg")[2:4] == (480, 160)
    dot = films.film(tmp_path / "dot.mkv", films.greys([99] * 3, (1, 1)), "-c:v", "ffv1")
    show.cut(dot, 0.0, 0.2, tmp_path / "dot.mp4")       # H.264 needs even sides
    assert video.inspect(tmp_path / "dot.mp4")[2:4] == (2, 2)
    with pytest.raises(data.VideoError, match="clip.mp4 could not be written: .*No such file"):
        show.cut(path, 0.0, 0.2, tmp_path / "none" / "clip.mp4")


def test_damage_is_counted_and_noted(tmp_path, capsys):
    """What is lost is counted from the packets that gave no frame; a file with a damaged packet is
    read, and one that ends early is shorter, not damaged."""
    path = ramp(tmp_path / "v.mkv", "-c:v", "mpeg4", "-g", 5, seconds=20)
    whole = path.read_bytes()
    few = bytearray(whole)
    middle = len(whole) // 2
    few[middle:middle + 60] = b"\xff" * 60
    (tmp_path / "few.mkv").write_bytes(few)
    frames, duration_sec = video.sample_frames(tmp_path / "few.mkv", 8, 32)
    assert len(frames) == 8 and duration_sec == pytest.approx(20, abs=0.2)
    packets = np.array([[i / 10, (i + 1) / 10, 9] for i in range(100)])
    assert video.lost_sec(packets, packets) == 0
    assert video.lost_sec(packets, packets[::2]) == 0                   # two fields make a frame
    lost = video.lost_sec(packets, np.concatenate([packets[:40], packets[60:]]))
    assert lost == pytest.approx(2.0, abs=0.15)
    assert video.lost_sec(packets, packets[:80]) == pytest.approx(2.0, abs=0.15)
    empty = packets.copy()
    empty[1::4, 2] = empty[2::4, 2] = empty[3::4, 2] = 0                # Theora's repeated pictures
    assert video.lost_sec(empty, packets[::4]) == 0
    (tmp_path / "cut.mkv").write_bytes(whole[:middle])
    capsys.readouterr()
    frames, duration_sec = video.sample_frames(tmp_path / "cut.mkv", 8, 32)
    assert 5 < duration_sec < 15 and "cannot be decoded" not in capsys.readouterr().err


def test_a_video_of_which_much_is_lost_is_refused(tmp_path, monkeypatch, capsys):
    path = ramp(tmp_path / "v.mkv", "-c:v", "ffv1")
    for lost, refused in ((0.3, False), (0.5, True)):   # of 4 s
        monkeypatch.setattr(video, "lost_sec", lambda packets, decoded, lost=lost: lost)
        if refused:
            with pytest.raises(data.VideoError, match=r"0.5 s of its 4.0 s cannot be decoded"):
                video.sample_frames(path, 4, 32)
        else:
            assert len(video.sample_frames(path, 4, 32)[0]) == 4
            assert "note: " in capsys.readouterr().err


def corners(image: np.ndarray) -> list[float]:
    h, w = image.shape
    return [float(image[y, x]) for y in (h // 8, -h // 8) for x in (w // 8, -w // 8)]


@pytest.mark.parametrize("rotation, flips, turn", [
    (0, (), lambda x: x), (90, (), lambda x: np.rot90(x)), (180, (), lambda x: np.rot90(x, 2)),
    (0, ("-display_hflip",), lambda x: x[:, ::-1]), (0, ("-display_vflip",), lambda x: x[::-1])])
def test_the_display_matrix(tmp_path, rotation, flips, turn):
    """Rotated and mirrored as a player shows it; four corners have four levels."""
    image = np.zeros((32, 48, 3), dtype=np.uint8)
    for k, (y, x) in enumerate(((0, 0), (0, 24), (16, 0), (16, 24))):
        image[y:y + 16, x:x + 24] = 40 + 60 * k
    films.film(tmp_path / "a.mp4", np.stack([image] * 5), "-c:v", "libx264", "-pix_fmt", "yuv420p")
    films.ffmpeg("-display_rotation", rotation, *flips, "-i", tmp_path / "a.mp4", "-c", "copy",
                 tmp_path / "b.mp4")
    frame = next(video.centre_frames(video.inspect(tmp_path / "b.mp4"), 1))
    expected = turn(image[..., 0])
    assert frame.shape[1:] == expected.shape
    assert corners(frame[0].numpy()) == pytest.approx(corners(expected), abs=6)


@pytest.mark.parametrize("pixels", ["yuv444p", "gray", "yuv420p10le", "bgra", "yuv422p"])
def test_pixel_formats_and_odd_sizes(tmp_path, pixels):
    image = np.broadcast_to(np.linspace(20, 220, 47)[None, :, None], (33, 47, 3)).astype(np.uint8)
    codec = "ffv1" if pixels != "bgra" else "png"
    path = films.film(tmp_path / "a.mkv", np.stack([image] * 3), "-c:v", codec, "-pix_fmt", pixels)
    frame = next(video.centre_frames(video.inspect(path), 1))
    assert frame.shape == (3, 33, 47)
    assert (frame.float() - torch.from_numpy(image).permute(2, 0, 1)).abs().max() <= 6


def test_wide_pixels_and_strips(tmp_path):
    """Pixels twice as wide as high; and a strip of 4096 x 2, of which the middle is read."""
    path = films.film(tmp_path / "a.mp4", films.greys([99] * 3), "-pix_fmt", "yuv420p", "-aspect",
                      "3:1")
    assert video.inspect(path)[2:4] == (96, 32)
    path = films.film(tmp_path / "strip.mkv", films.greys([99] * 3, (2, 4096)), "-c:v", "ffv1")
    assert video.inspect(path)[2:4] == (2 * video.MAX_ASPECT, 2)
    frames, _ = video.sample_frames(path, 2, 224)
    assert frames.shape == (2, 3, 224, 224) and abs(frames.float().mean() - 99) < 2


def test_colours():
    """Untagged HD is BT.709, untagged SD and tagged pictures are left to the program; HDR is
    tone-mapped; a strip is cropped."""
    assert "bt709" in video.displayed(1280, 720, 1.0, "(progressive)")[2]
    assert "auto" in video.displayed(640, 480, 1.0, "")[2]
    assert "auto" in video.displayed(1920, 1080, 1.0, "(tv, smpte170m)")[2]
    assert "tonemap" in video.displayed(1920, 1080, 1.0, "(tv, bt2020nc/bt2020/smpte2084)")[2]
    assert "tonemap" in video.displayed(1920, 1080, 1.0, "(tv, bt2020nc/bt2020/arib-std-b67)")[2]
    assert "bt709" in video.displayed(1280, 720, 1.0, "(tv, unknown/bt709/bt709, progressive)")[2]
    assert video.displayed(48, 32, 1.0, "") == (48, 32, "scale=48:32:in_color_matrix=auto")


@pytest.mark.parametrize("tags", ["", ":colorspace=bt2020nc", ":color_primaries=bt2020"])
@pytest.mark.parametrize("curve", ["smpte2084", "arib-std-b67"])
def test_hdr_with_some_of_its_tags(tmp_path, curve, tags):
    """The same as with all of them, also with odd sides."""
    image = np.zeros((1, 33, 47, 3), dtype=np.uint8)
    image[...] = (140, 60, 60)
    frames = []
    for kind in (tags, ":colorspace=bt2020nc:color_primaries=bt2020"):
        path = films.film(tmp_path / "a.mkv", image, "-vf", "scale=out_color_matrix=bt2020,format="
                          f"yuv420p10le,setparams=color_trc={curve}{kind}", "-c:v", "ffv1")
        frames.append(next(video.centre_frames(video.inspect(path), 1)))
    assert frames[0].shape == (3, 33, 47) and torch.equal(*frames)


def test_untagged_hd_is_bt709(tmp_path):
    """Saturated green in BT.709's matrix, without a tag, comes back within four levels."""
    image = np.zeros((2, 720, 1280, 3), dtype=np.uint8)
    image[...] = (20, 200, 40)
    path = films.film(tmp_path / "a.mkv", image, "-vf", "scale=out_color_matrix=bt709,"
                      "setparams=colorspace=unknown", "-c:v", "ffv1", "-pix_fmt", "yuv444p")
    frame = next(video.centre_frames(video.inspect(path), 1))
    assert frame.float().mean((1, 2)).tolist() == pytest.approx([20, 200, 40], abs=4)


def test_the_stream_that_a_player_picks(tmp_path):
    """Of two video streams the one marked as default; a song with a cover has none."""
    films.film(tmp_path / "a.mp4", films.greys([50] * 9), "-pix_fmt", "yuv420p")
    films.film(tmp_path / "b.mp4", films.greys([150] * 9), "-pix_fmt", "yuv420p")
    films.ffmpeg("-i", tmp_path / "a.mp4", "-i", tmp_path / "b.mp4", "-map", 0, "-map", 1, "-c",
                 "copy", "-disposition:v:0", 0, "-disposition:v:1", "default",
                 tmp_path / "two.mkv")
    assert seen(tmp_path / "two.mkv", [0.4]) == pytest.approx([150], abs=4)
    films.ffmpeg("-f", "lavfi", "-i", "anullsrc=r=8000:d=2", tmp_path / "a.m4a")
    films.ffmpeg("-i", tmp_path / "a.mp4", "-frames:v", 1, tmp_path / "cover.png")
    films.ffmpeg("-i", tmp_path / "a.m4a", "-i", tmp_path / "cover.png", "-map", 0, "-map", 1, "-c",
                 "copy", "-disposition:v:0", "attached_pic", tmp_path / "song.mp4")
    with pytest.raises(data.VideoError, match="no video stream, only a cover picture"):
        video.probe_duration(tmp_path / "song.mp4")


def test_a_program_stream_is_not_damaged(tmp_path, capsys):
    """Not all of its packets have a time of their own."""
    films.ffmpeg("-f", "lavfi", "-i", "testsrc=s=96x64:r=25:d=5", "-f", "lavfi", "-i",
                 "sine=r=44100:d=5", "-c:v", "mpeg2video", "-c:a", "mp2", tmp_path / "a.mpg")
    assert len(video.sample_frames(tmp_path / "a.mpg", 8, 32)[0]) == 8
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("ending", [".ts", ".mts", ".m2ts"])
def test_transport_streams_are_videos(tmp_path, ending):
    ramp(tmp_path / f"a{ending}", "-f", "mpegts", "-c:v", "mpeg2video", seconds=2, rate=25)
    path = files.find_files(tmp_path, video.VIDEOS)["a"]
    pixels, duration_sec = video.sample_frames(path, 4, 32)
    assert pixels.shape == (4, 3, 32, 32) and duration_sec == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize("name", ["-i.mkv", "12:30 a.mkv", "a'b\"c$d.mkv", "schön.mkv",
                                  os.fsdecode(b"\xff\xfe.mkv")])
def test_names(tmp_path, name):
    """That begin with a dash, have colons, quotes, or bytes that are not UTF-8."""
    path = films.film(tmp_path / "plain.mkv", films.greys([99] * 3), "-c:v", "ffv1")
    path = path.rename(tmp_path / name)
    assert video.probe_duration(path) == pytest.approx(0.3, abs=0.01)


def test_what_titles_and_names_claim(tmp_path):
    """The program's report contains them, too."""
    path = films.film(tmp_path / "a.mkv", films.greys([99] * 3), "-c:v", "ffv1")
    for title in ("wrapped_avframe, rgb24, 10x10", "  Stream #0:1 -> #1:0 (h264"):
        films.ffmpeg("-i", path, "-c", "copy", "-metadata", f"title={title}", tmp_path / "b.mkv")
        assert video.inspect(tmp_path / "b.mkv")[2:4] == (48, 32)
    path = path.rename(tmp_path / "wrapped_avframe, x, 10x10.mkv")
    assert video.inspect(path)[2:4] == (48, 32)
    (tmp_path / "Input #0.mp4").write_bytes(b"broken")
    with pytest.raises(data.VideoError, match="cannot be opened as a video"):
        video.inspect(tmp_path / "Input #0.mp4")


def test_hostile_files(tmp_path):
    """Playlists that name other files, an empty file, text, and a picture of absurd size."""
    secret = films.film(tmp_path / "secret.mkv", films.greys([99] * 3), "-c:v", "ffv1")
    (tmp_path / "a.m3u8").write_text(f"#EXTM3U\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n",
                                     encoding="utf-8")
    (tmp_path / "a.ffconcat").write_text(f"ffconcat version 1.0\nfile '{secret}'\n",
                                         encoding="utf-8")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("no video", encoding="utf-8")
    (tmp_path / "http.mp4").write_text("http://127.0.0.1:9/a.mp4", encoding="utf-8")
    for path in sorted(tmp_path.glob("*.*")):
        if path != secret:
            with pytest.raises(data.VideoError, match="cannot be opened as a video") as error:
                video.sample_frames(path, 2, 32)
            assert "\n" not in str(error.value)


def test_a_program_that_hangs_is_stopped(tmp_path):
    """Here: one that waits for input that never comes."""
    run = ffmpeg.Ffmpeg(["-f", "rawvideo", "-s", "16x16", "-i", "-", "-f", "null", "-"], 0.5,
                        stdin=subprocess.PIPE)
    assert run.read_all() == b"" and run.has_hung
    run.close()
    assert run.process.returncode != 0


def test_a_strip_takes_little_memory(tmp_path):
    """Whole, 16384 x 2 pixels would be 1.8 million wide when their short side is 224."""
    path = films.film(tmp_path / "strip.mkv", films.greys([9] * 2, (2, 16384)), "-c:v", "ffv1")
    program = (f"import sys; sys.path.insert(0, {str(HERE)!r}); import video, resource\n"
               f"before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
               f"video.sample_frames({str(path)!r}, 2, 224)\n"
               f"print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)")
    grown = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    unit = 1 if sys.platform == "darwin" else 1024
    assert resource and int(grown.stdout) * unit < 200e6


@pytest.mark.skipif(not (CASES / "cases.json").exists(), reason=f"no problem videos in {CASES}")
def test_published_cases():
    """What a viewer sees in 22 files that people report as trouble."""
    cases = json.loads((CASES / "cases.json").read_text(encoding="utf-8"))
    for name, case in cases.items():
        if name == "about":
            continue
        path = CASES / name
        if "error" in case:
            with pytest.raises(data.VideoError, match=case["error"]):
                video.probe_duration(path)
            continue
        found = video.inspect(path)
        if "duration_sec" in case:
            assert found.duration_sec == pytest.approx(case["duration_sec"], abs=0.25), name
        if "size" in case:
            assert [found.width, found.height] == case["size"], name
        levels = seen(path, [at for at, _ in case.get("seen", [])])
        for (_, filmed_at), level in zip(case.get("seen", []), levels):
            ours = (level * 219 / 255 + 16 - 30) / case.get("slope", 20)
            if case.get("slope", 20) == 20:
                assert ours == pytest.approx(filmed_at, abs=0.3), (name, filmed_at)
            else:                                       # noise: half a grey level is 0.2 s
                assert ours == pytest.approx(filmed_at, abs=1.0), (name, filmed_at)
        if "corners" in case:
            frame = next(video.centre_frames(found, 1)).float()         # [3, h, w]
            h, w = frame.shape[1:]
            for kind, (y, x) in zip(case["corners"], ((h // 8, w // 8), (h // 8, -w // 8),
                                                      (-h // 8, w // 8), (-h // 8, -w // 8))):
                colour = {"w": [255, 255, 255], "r": [255, 0, 0], "k": [0, 0, 0]}[kind]
                assert frame[:, y, x].tolist() == pytest.approx(colour, abs=30), (name, kind)
