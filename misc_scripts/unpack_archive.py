"""Unpack a zip archive from a stranger into a new folder, whole or not at all.

Refused are absolute paths, paths with .., links, encryption, and archives that unpack to more than
20 times their size. Checksums are compared while unpacking. Needs nothing but Python.

Exit status 2 says that the archive is bad, 1 that the machine failed (a full disk, ...) and the
archive may be good.
"""

import argparse
import shutil
import stat
import sys
import zipfile
import zlib
from pathlib import Path, PurePosixPath, PureWindowsPath

BOMB = 20  # photographs do not compress; text does, about fivefold


def check_member(member: zipfile.ZipInfo) -> None:
    """Refuse a member that would land outside the folder, or is no file.

    Raises:
        ValueError: naming it.
    """
    name = member.filename
    parts = PurePosixPath(name.replace("\\", "/")).parts
    windows = PureWindowsPath(name)
    if name.startswith(("/", "\\")) or windows.drive or ".." in parts or not parts:
        raise ValueError(f"holds a path that leads out of its folder: {name!r}")
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise ValueError(f"holds a link or special file: {name!r}")
    if member.flag_bits & 1:
        raise ValueError(f"holds an encrypted file: {name!r}")


def checked_members(
    archive: zipfile.ZipFile, size: int, images: int | None
) -> list[zipfile.ZipInfo]:
    """The archive's members, all of them found harmless.

    Args:
        archive: an open archive.
        size: of its file, in bytes.
        images: how many .jpg it must hold.

    Raises:
        ValueError: if one is not, or the archive is a bomb or incomplete.
    """
    members = archive.infolist()
    for member in members:
        check_member(member)
    unpacked = sum(member.file_size for member in members)
    if unpacked > BOMB * size:
        raise ValueError(f"would unpack to {unpacked} bytes, more than {BOMB} times its size")
    found = sum(member.filename.endswith(".jpg") for member in members)
    if images is not None and found != images:
        raise ValueError(f"holds {found} .jpg images, expected {images}")
    return members


def unpack(path: Path, output: Path, inside: str = "", images: int | None = None) -> None:
    """Unpack ``path`` so that its folder ``inside`` becomes ``output``.

    Raises:
        ValueError: if the archive is hostile, damaged or incomplete.
        OSError: if it cannot be read, or ``output`` cannot be written.
    """
    temporary = output.with_name(f".{output.name}.part")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        with zipfile.ZipFile(path) as archive:
            members = checked_members(archive, path.stat().st_size, images)
            temporary.mkdir(parents=True)
            for member in members:
                archive.extract(member, temporary)
        if not (temporary / inside).is_dir():
            raise ValueError(f"holds no folder {inside!r}")
        (temporary / inside).rename(output)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"is damaged ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", type=Path, required=True, help="zip archive")
    parser.add_argument("--output", type=Path, required=True, help="folder that it becomes")
    parser.add_argument("--inside", default="", help="folder of the archive to take (default: all)")
    parser.add_argument("--images", type=int, help="how many .jpg it must hold")
    args = parser.parse_args(argv)
    try:
        if args.output.exists():
            raise FileExistsError(f"not unpacked: {args.output} exists")
        unpack(args.input, args.output, args.inside, args.images)
    except (ValueError, OSError) as error:
        print(f"unpack_archive.py: error: {args.input}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
