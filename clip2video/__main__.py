"""The command line of clip2video/__init__.py."""
import json

import clip2video
from clip2video import data, evaluate, search, train
from clip2video.model import PRESETS, Config, configure
from support import options, parallel
from support.errors import reported
from support.text import printable


def parse_arguments(argv: list[str] | None = None):
    """The options of one command."""
    parser = options.parser(clip2video.__doc__.split("\n")[0], prog="python -m clip2video")
    commands = parser.add_subparsers(dest="command", required=True)

    def start(name: str, text: str, root: str | None = None):
        """A parser for one command; returns its `add_argument`."""
        command = commands.add_parser(name, help=text, description=text,
                                      formatter_class=options.Formatter)
        command.add_argument("--device", **options.DEVICE)
        note = "" if root else " (default: the one used in training)"   # a checkpoint knows it
        command.add_argument("--root", default=root, help=f"folder of all datasets{note}")
        if name == "train":                     # has an option for every other field of Config
            options.add_options(command, Config, PRESETS, without=("device", "root"))
        return command.add_argument

    add = start("train", "train, and evaluate on the test videos", "data")
    add("--resume", action="store_true", help="continue the run in --out")
    add = start("prepare", "make captions and features of a published dataset", "data")
    add("dataset", choices=data.READERS, help="its name")       # shapes: `train` builds it
    add("--annotations", required=True, help="folder of its published files")
    add("--videos", required=True, help="folder of its video files")
    # features made by 'shapes' are useless on real videos, but show that everything runs
    add("--clip", default=Config.clip, help="a published CLIP, a file, or 'shapes'")
    add("--gelu", action="store_true", help="its weights were trained with GELU, as LAION's are")
    add("--train-images", action="store_true", help="store pixels, for train --train-images true")
    add = start("evaluate", "compute the metrics of a checkpoint")
    add("checkpoint", help="ckpt.pt of a run")
    add("--split", default="test", help="split to evaluate (vatex also has test1k5)")
    add("--allow-missing", action="store_true", help="leave out videos without features")
    add("--json", action="store_true", help="print json")
    add = start("index", "index a folder of videos, or update its index")
    add("checkpoint", help="ckpt.pt of a run")
    add("folder", help="folder of videos")
    add("--out", required=True, help="folder of the index (may be that of python -m extras.index)")
    add = start("search", "rank the videos of an index by a sentence")
    add("index", help="folder of the index")
    add("sentences", nargs="+", help="what to look for")
    add("--top", type=int, default=10, help="number of answers per sentence")
    return parser.parse_args(argv)


def run(given) -> None:
    """Runs the command in the namespace `given`."""
    device = parallel.pick_device(given.device)         # first of all: a wrong one is a Mistake
    if given.command == "train":
        # what is left are fields of Config, and only those that were given
        fields = dict(vars(given))
        del fields["command"], fields["resume"]
        config = configure(**fields)
        print(options.settings(config))
        print(evaluate.table(train.train(config, given.resume)))
    elif given.command == "prepare":
        # frames and stride as in the dataset's preset, which training expects
        config = configure(dataset=given.dataset, clip=given.clip, root=given.root,
                           device=given.device, train_images=given.train_images)
        data.prepare(config, given.annotations, given.videos, given.gelu)
    elif given.command == "evaluate":
        results = evaluate.evaluate_checkpoint(given.checkpoint, given.root, device, given.split,
                                               given.allow_missing)
        if given.json:
            print(json.dumps(results))          # for other programs: with all digits
        else:
            print(evaluate.table(results))
    elif given.command == "index":
        search.update_index(given.checkpoint, given.folder, given.out, device, given.root)
    else:                                       # search
        ranker = search.Ranker(given.index, device, given.root)         # reads the checkpoint once
        for sentence, videos in zip(given.sentences, ranker.best(given.sentences, given.top)):
            # file names are other people's: they must not control the terminal
            print(f"\"{printable(sentence)}\"")
            for k, (name, score) in enumerate(videos, 1):
                print(f"{k:3d}  {score:.3f}  {printable(name)}")


if __name__ == "__main__":
    arguments = parse_arguments()
    with reported():
        run(arguments)
