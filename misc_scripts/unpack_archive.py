"""Unpack a zip archive from the network into a new folder, whole or not at all.

Refused are paths that lead out of the folder, links, and archives that unpack to more than 20 times
their size. Checksums are compared while unpacking. Needs nothing but Python.

Exit status 2 says that the archive is bad, 1 that the machine failed (a full disk, ...) and the
archive may be good.
"""

import argparse
import shutil
import stat
import sys
import zipfile
import zlib
from pathlib import Path, PureWindowsPath

BOMB = 20  # photographs do not compress; text does, about fivefold


def check(archive: zipfile.ZipFile, size: int, images: int | None) -> None:
    """Refuse an archive that would do harm, or is not the expected one.

    Args:
        archive: an open archive.
        size: of its file, in bytes.
        images: how many .jpg it must hold.

    Raises:
        ValueError: saying why.
    """
    for member in archive.infolist():
        path = PureWindowsPath(member.filename)  # knows both separators
        if path.anchor or ".." in path.parts:
            raise ValueError(f"holds a path that leads out of its folder: {member.filename!r}")
        if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ValueError(f"holds a link or special file: {member.filename!r}")
    unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > BOMB * size:
        raise ValueError(f"would unpack to {unpacked} bytes, more than {BOMB} times its size")
    found = sum(name.endswith(".jpg") for name in archive.namelist())
    if images is not None and found != images:
        raise ValueError(f"holds {found} .jpg images, expected {images}")


def unpack(path: Path, output: Path, inside: str = "", images: int | None = None) -> None:
    """Unpack ``path`` so that its folder ``inside`` becomes ``output``.

    Raises:
        ValueError: if the archive is hostile, damaged or incomplete.
        OSError: if it cannot be read, or ``output`` cannot be written.
    """
    if output.exists():
        raise FileExistsError(f"not unpacked: {output} exists")
    temporary = output.with_name(f".{output.name}.part")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # a killed process's
        with zipfile.ZipFile(path) as archive:
            check(archive, path.stat().st_size, images)
            temporary.mkdir(parents=True)
            archive.extractall(temporary)
        if not (temporary / inside).is_dir():
            raise ValueError(f"holds no folder {inside!r}")
        (temporary / inside).rename(output)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"is damaged ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example:\n  python misc_scripts/unpack_archive.py --input a.zip --output folder",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--input", type=Path, required=True, help="zip archive (required)")
    parser.add_argument("--output", type=Path, required=True, help="its new folder (required)")
    parser.add_argument("--inside", default="", help="folder of the archive to take (default: all)")
    parser.add_argument("--images", type=int, help="how many .jpg it must hold (default: any)")
    args = parser.parse_args(argv)
    try:
        unpack(args.input, args.output, args.inside, args.images)
    except (ValueError, OSError) as error:
        print(f"unpack_archive.py: error: {args.input}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
