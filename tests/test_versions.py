"""pyproject.toml says which versions will do; what else names one agrees with it."""

import re
import subprocess

from conftest import ROOT

PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
WANTED = PROJECT[PROJECT.index("\ndependencies") : PROJECT.index("\n[tool.")]
UNBOUNDED = {"regex", "apm[tensorboard]"}
RANGES = [wanted for wanted in re.findall(r'"([^"]+)"', WANTED) if wanted not in UNBOUNDED]


def test_every_range_has_two_ends():
    assert len(RANGES) > 20
    for wanted in RANGES:
        assert re.fullmatch(r"[\w-]+>=[\w.]+,<[\d.]+", wanted), wanted


def test_the_oldest_environment_has_every_lower_end():
    (command,) = re.findall(r"^\t(sed .*?) > ", MAKEFILE, re.MULTILINE)
    lowest = subprocess.check_output(command, shell=True, cwd=ROOT, text=True).split()
    assert lowest == [wanted.split(",")[0].replace(">=", "==") for wanted in RANGES]


def test_one_lowest_python():
    (lowest,) = re.findall(r'^requires-python = ">=(\S+)"$', PROJECT, re.MULTILINE)
    assert f'python_version = "{lowest}"' in PROJECT
    assert f"python{lowest}\n" in MAKEFILE
    assert f"sys.version_info < ({lowest.replace('.', ', ')})" in MAKEFILE
    assert f"Python {lowest} or newer" in MAKEFILE
    assert f"Python {lowest} or newer" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_plain_install_is_the_package_without_extras():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["-e ."]
