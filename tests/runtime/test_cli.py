import json
import os
import signal
import sys
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from apm.config import TrainConfig
from apm.flags import OUTPUTS, add_fields, make_parser, positive_int, take_fields
from apm.runtime.cli import Results, Stop, command
from apm.runtime.files import ROOT


def failing(error):
    @command
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("bad\n  value"), 2, "error: bad value"),
        (FileNotFoundError("a: no such file"), 2, "error: a: no such file"),
        (MemoryError(), 2, "error: out of memory; try smaller"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_went_wrong_is_one_line_and_a_status(capsys, error, status, line):
    assert failing(error)([]) == status
    printed = capsys.readouterr().err
    assert printed.startswith(f"{Path(sys.argv[0]).name}: {line}") and printed.count("\n") == 1


def test_bugs_are_not_hidden(monkeypatch):
    for error in (TypeError("a bug"), RuntimeError("a bug")):
        with pytest.raises(type(error), match="a bug"):
            failing(error)([])
    monkeypatch.setenv("APM_TRACEBACK", "1")
    with pytest.raises(ValueError, match="where"):
        failing(ValueError("where"))([])


def test_a_script_that_ends_well_returns_0_and_its_own_handler_is_gone(capsys):
    before = signal.getsignal(signal.SIGTERM)

    @command
    def main(argv):
        assert signal.getsignal(signal.SIGTERM) != before
        print(argv)

    assert main(["a"]) == 0 and capsys.readouterr().out == "['a']\n"
    assert signal.getsignal(signal.SIGTERM) == before


def looping(stopped_by, seen, saved):
    @command
    def main(argv):
        with Stop() as stop:
            for item in stop.between(range(4), lambda: saved.append(list(seen))):
                seen.append(item)
                if item == 1:
                    for number in stopped_by:
                        signal.raise_signal(number)
                        seen.append("noted")

    return main


@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_between_two_steps_saves_and_ends(capsys, number, status, word):
    before, seen, saved = signal.getsignal(number), [], []
    assert looping([number], seen, saved)([]) == status
    assert seen == [0, 1, "noted"] and saved == [seen]
    assert capsys.readouterr().err.endswith(f": {word}\n")
    assert signal.getsignal(number) == before


def test_a_second_signal_ends_at_once(capsys):
    seen, saved = [], []
    assert looping([signal.SIGTERM, signal.SIGINT], seen, saved)([]) == 130
    assert seen == [0, 1, "noted"] and not saved


def test_no_signal_and_nothing_is_saved():
    seen, saved = [], []
    assert looping([], seen, saved)([]) == 0
    assert seen == [0, 1, 2, 3] and not saved


@dataclass(frozen=True)
class Fields:
    count: int = field(default=3, metadata={"help": "how many"})
    learning_rate: float = field(default=1.0, metadata={"help": "how fast"})
    kind: str = field(default="a", metadata={"help": "which", "choices": ("a", "b")})
    augment: bool = field(default=False, metadata={"help": "whether"})

    def __post_init__(self):
        if self.count < 0:
            raise ValueError(f"--count {self.count}")


def take(kind, *argv):
    parser = make_parser("", "--seed", "--dtype")
    add_fields(parser, kind)
    return take_fields(kind, parser.parse_args(argv))


def test_fields_become_flags_and_flags_fields(capsys):
    assert take(Fields) == Fields() and take(TrainConfig) == TrainConfig()
    changed = take(Fields, "--count", "5", "--learning-rate", "1e-3", "--kind", "b", "--augment")
    assert changed == Fields(5, 1e-3, "b", True)
    with pytest.raises(ValueError, match="--count -1"):
        take(Fields, "--count", "-1")
    for wrong in (["--kind", "c"], ["--count", "1.5"]):
        with pytest.raises(SystemExit, match="2"):
            take(Fields, *wrong)
    assert capsys.readouterr().err.count("\n") == 2  # a line each, no usage


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "x", ""])
def test_numbers_of_at_least_1(text):
    with pytest.raises(Exception, match=r"must be at least 1|invalid literal"):
        positive_int(text)
    assert positive_int("7") == 7


def test_help_shows_defaults_as_they_are_typed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    flags, required = ("--seed", "--limit", "--output", "--teacher-block"), ["--masks"]
    parser = make_parser(
        *("What it does.", *flags), required=required, output=OUTPUTS / "x%y", teacher_block=-1
    )
    add = parser.add_argument
    add("--input", type=Path, nargs=2, default=(ROOT / "assets" / "a.jpg", Path("b.jpg")), help="p")
    add("--report-at", default=(1, 5, 10), help="q")
    add("--elsewhere", type=Path, default=Path("/elsewhere"), help="r")
    add("--switch", action="store_true", help="s")
    add("--nothing", help="t")
    add_fields(parser, Fields)
    printed = parser.format_help()
    for line in (
        "seed of all randomness (default: 0)",
        "at most this many images, from all over (default: all)",
        f"folder for the results (default: outputs{os.sep}x%y)",
        f" p (default: assets{os.sep}a.jpg b.jpg)",
        " q (default: 1,5,10)",
        " r (default: /elsewhere)",
        " how fast (default: 1.0)",
        " s\n",
        " t (default: none)\n",
        "named as the images (required)\n",
        "-1 last (default: -1)\n",
        " whether\n",
    ):
        assert line in printed, line
    assert "None" not in printed and "False" not in printed and str(ROOT) not in printed
    groups = ["input and output:", "model:", "training:", "machine:"]
    assert [line for line in printed.splitlines() if line in groups] == groups
    assert "picture:" not in printed  # which would be empty


def test_results_are_kept_with_their_origin(tmp_path):
    args = Namespace(seed=3, output=tmp_path, report_at=(1, 2), limit=None)
    results = Results(args, torch.device("cpu"))
    results.save(tmp_path, loss=np.float32(0.5))
    results.save(tmp_path, rows=[{"ari": 1.0}])
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["arguments"] == {
        "seed": 3,
        "output": str(tmp_path),
        "report_at": [1, 2],
        "limit": None,
    }
    assert content["loss"] == 0.5 and content["rows"] == [{"ari": 1.0}] and content["seconds"] >= 0
    assert set(content["versions"]) == {"python", "torch"} and "cpu" in content["device"]
