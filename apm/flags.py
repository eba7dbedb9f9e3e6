"""The command line: parsers and types, and the flags that several scripts share, in one place."""

import argparse
import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from apm.choices import DTYPES, FITS, METHODS
from apm.runtime.files import ROOT

OUTPUTS = ROOT / "outputs"
CHECKPOINT = ROOT / "checkpoints" / "apm_small.safetensors"
DEVICES = ("auto", "cpu", "cuda", "mps")


def whole(low: int, high: float = math.inf) -> Callable[[str], int]:
    """An argparse type: a whole number of at least ``low``, and at most ``high``."""

    def number(text: str) -> int:
        if not low <= int(text) <= high:
            most = f" and at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} must be at least {low}{most}")
        return int(text)

    return number


positive_int, whole_number = whole(1), whole(0)


def worker_count(text: str) -> int:
    """An argparse type: a whole number of at least 0, cut to the number of cores."""
    return min(whole_number(text), os.cpu_count() or 1)


def _flag(kind: Any, text: str, **more: Any) -> dict[str, Any]:
    """What argparse wants of a flag of a type, or with choices, or of a switch (None)."""
    if kind is None:
        return {"action": "store_true", "help": text}
    return {"choices" if isinstance(kind, tuple) else "type": kind, "help": text, **more}


FLAGS: dict[str, dict[str, dict[str, Any]]] = {  # by groups, in the order of --help
    "input and output": {
        "--input": _flag(Path, "image file, or folder searched for images"),
        "--data-root": _flag(Path, "folder of the data set", default=ROOT / "data"),
        "--download": _flag(None, "let torchvision fetch the data set into --data-root"),
        "--masks": _flag(Path, "folder of semantic masks: PNG of class ids, named as the images"),
        "--limit": _flag(positive_int, "at most this many images, from all over (default: all)"),
        "--output": _flag(Path, "folder for the results"),
        "--save-features": _flag(None, "also write features, colours and islands, as .npz"),
    },
    "model": {
        "--checkpoint": _flag(Path, "ours (.safetensors), the paper's (.pth)", default=CHECKPOINT),
        "--feature-dim": _flag(positive_int, "width of the features, the teacher's"),
        "--teacher": _flag(str, "dense teacher: a plain ViT by timm's name"),
        "--teacher-weights": _flag(Path, "teacher's weights, a file (default: downloaded)"),
        "--teacher-block": _flag(
            int, "teacher's block to take tokens from, 0 first, -1 last (default: the checkpoint's)"
        ),
        "--teacher-margin": _flag(
            int,
            "patches that images are continued by on each side, mirrored, as a teacher's tokens at "
            "a border are often outliers (default: the checkpoint's)",
        ),
    },
    "picture": {
        "--grid": _flag(whole(1, 448), "places along a side, 1 to 448 (default: the model's own)"),
        "--fit": _flag(
            FITS,
            "how a photograph becomes the square that the model sees. stretch: all of it, shown in "
            "its own shape. crop: its centre, as in training (default: stretch, --score crop)",
        ),
        "--consensus": _flag(
            whole_number,
            "steps in which neighbours of like colour pull each other's features together. 0 shows "
            "what the model answers, 1 makes islands smoother, more let small ones vanish",
            default=0,
        ),
        "--method": _flag(
            METHODS,
            "how islands are coloured. tsne: neighbours in feature space get like colours; seconds "
            "a picture, most of the time. pca: the three principal components as RGB; nearly the "
            "same picture, at once. kmeans: six clusters, a flat colour each; at once",
            default="tsne",
        ),
        "--joint": _flag(None, "one palette: like colours are like features in all pictures"),
    },
    "test-time training": {
        "--templates": _flag(
            str,
            "prompts about a class. single: 'a photo of a {}'. clip80: CLIP's 80 for ImageNet, the "
            "paper's. Or a text file of prompts, one a line, with {} for the class's name",
        ),
    },
    "training": {
        "--save-every": _flag(positive_int, "steps between saved states (default: one an epoch)"),
        "--resume": _flag(None, "go on from --output's last state, if there is one"),
    },
    "machine": {
        "--device": _flag(DEVICES, "where to compute; auto: a GPU if there is one", default="auto"),
        "--dtype": _flag(DTYPES, "of matrix products; bfloat16: faster on GPUs", default="float32"),
        "--batch-size": _flag(positive_int, "images at a time; fewer take less memory", default=8),
        "--chunk-size": _flag(
            positive_int, "places answered at a time; fewer take less memory (default: 4096)"
        ),
        "--workers": _flag(
            worker_count, "processes or threads that read images, at most one a core", default=0
        ),
        "--repeats": _flag(positive_int, "timed runs of a row, of which the median counts"),
        "--seed": _flag(whole(0, 2**32 - 1), "seed of all randomness", default=0),
    },
}


class Parser(argparse.ArgumentParser):
    """A parser whose flags are in groups, and whose errors are one line."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=_HelpFormatter, **settings)
        self.groups = {title: self.add_argument_group(title) for title in FLAGS}

    def add(self, group: str, flag: str, **settings: Any) -> None:
        """As ``add_argument``, into one of the groups of ``FLAGS``."""
        self.groups[group].add_argument(flag, **settings)

    def error(self, message: str) -> NoReturn:
        """One line on stderr, and exit status 2."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines; shows defaults, paths from the repository's root on."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help or "", action.default
        if action.required:
            return f"{text} (required)"
        if default is False or default == argparse.SUPPRESS:
            return text
        if default is None:
            return text if "(default: " in text else f"{text} (default: none)"
        if isinstance(default, (list, tuple)):
            default = (" " if action.nargs else ",").join(map(str, default))
        shown = str(default).replace(f"{ROOT}{os.sep}", "").replace("%", "%%")
        return f"{text.partition(' (default: ')[0]} (default: {shown})"


def make_parser(
    description: str,
    *flags: str,
    required: Sequence[str] = (),
    example: str = "",
    **defaults: Any,
) -> Parser:
    """A parser with some of the shared ``FLAGS``, and defaults by their destination names.

    ``example`` is what follows ``python``, from the repository's root, to do what most want.
    """
    parser = Parser(description=description, epilog=f"example:\n  python {example}")
    for group, table in FLAGS.items():
        for flag, settings in table.items():
            if flag in (*flags, *required):
                parser.add(group, flag, required=flag in required, **settings)
    parser.set_defaults(**defaults)
    return parser


def add_fields(parser: Parser, fields: type) -> None:
    """A flag for each field of a dataclass: its default, and what argparse wants as metadata.

    Of a flag that the parser has already, the default alone.
    """
    present = {action.dest for action in parser._actions}
    for field in dataclasses.fields(fields):
        if field.name not in present:
            kind = {"action": "store_true"} if field.default is False else {"type": field.type}
            flag = "--" + field.name.replace("_", "-")
            parser.add("training", flag, **kind, **field.metadata)
    parser.set_defaults(**{field.name: field.default for field in dataclasses.fields(fields)})


def take_fields(fields: type, args: argparse.Namespace) -> Any:
    """The dataclass that ``add_fields``'s flags fill, or the ``ValueError`` of its constructor."""
    return fields(**{field.name: getattr(args, field.name) for field in dataclasses.fields(fields)})
