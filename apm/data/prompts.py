"""Sentences about classes, for teachers that read."""

from pathlib import Path

SINGLE = ("a photo of a {}",)  # the released script's
CLIP80 = Path(__file__).resolve().parents[2] / "single_token_segmentation" / "clip80.txt"


def load_templates(choice: str) -> tuple[str, ...]:
    """Templates with ``{}`` where the class name goes.

    Args:
        choice: ``"single"``, ``"clip80"`` (CLIP's 80 for ImageNet, of which the paper's accuracies
            are) or a text file with one template a line.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no text or a line has not exactly one ``{}``.
    """
    if choice == "single":
        return SINGLE
    path = CLIP80 if choice == "clip80" else Path(choice)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of templates (or single, clip80)")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not text ({error})") from error
    templates = tuple(line.strip() for line in lines if line.strip())
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"{path}: {template[:80]!r} must have exactly one {{}}")
    if not templates:
        raise ValueError(f"{path}: holds no template")
    return templates
