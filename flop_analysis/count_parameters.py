"""Count the parameters of the paper's Table 4, in millions, and of each model's modules."""

import sys
from argparse import Namespace
from collections import Counter
from typing import Any

from apm.flags import OUTPUTS, make_parser
from apm.runtime.cli import Results, answer_flags, command


def parse(argv: list[str] | None) -> Namespace:
    """The script's flags."""
    example, output = "flop_analysis/count_parameters.py", OUTPUTS / "count_parameters"
    return make_parser(__doc__, "--output", example=example, output=output).parse_args(argv)


answer_flags(__name__, parse)

import torch
from baselines import CLIP_SIZES, TABLE_4, clip_model, swin_model, tpt_model
from table import compare, print_notes, print_table
from torch import nn

from apm import APM, APMConfig
from apm.runtime.files import prepare_output

META = torch.device("meta")  # shapes are enough


def build_models() -> dict[str, nn.Module]:
    """Every model of Table 4, and those whose counts explain it."""
    with META:
        models = {"Swin-B": swin_model(), "TPT (CLIP ViT-B/16)": tpt_model()}
        models |= {f"CLIP {name}": clip_model(name) for name in CLIP_SIZES}
        apms = {"COCO": APMConfig.coco(), "TTT": APMConfig.tta()}
        return models | {f"APM, {name} model": APM(config) for name, config in apms.items()}


def by_module(model: nn.Module) -> dict[str, int]:
    """Parameters of a model's direct children, modules and parameters alike, largest first."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[name.partition(".")[0]] += parameter.numel()
    return dict(counts.most_common())


def table_rows(counts: dict[str, int]) -> list[dict[str, Any]]:
    """Each model beside the paper's number, in millions."""
    paper = {
        "Swin-B": TABLE_4["Swin"].parameters,
        "TPT (CLIP ViT-B/16)": TABLE_4["TPT"].parameters,
        "CLIP ViT-B/16": TABLE_4["CLIP"].parameters,
        # The paper gives the sum alone.
        "APM, TTT model": TABLE_4["APM"].parameters - TABLE_4["CLIP"].parameters,
    }
    rows = [compare(name, number / 1e6, paper.get(name)) for name, number in counts.items()]
    together = counts["CLIP ViT-B/16"] + counts["APM, TTT model"]
    total = compare("CLIP ViT-B/16 + APM, TTT model", together / 1e6, TABLE_4["APM"].parameters)
    return [*rows, total]


def explain(models: dict[str, Any], counts: dict[str, int]) -> list[str]:
    """A line per deviation from the paper."""
    projection = models["CLIP ViT-B/16"].visual.proj.numel()
    student, clip = TABLE_4["APM"].parameters - TABLE_4["CLIP"].parameters, counts["CLIP ViT-B/16"]
    return [
        f"TPT: the paper's {TABLE_4['TPT'].parameters} M is the count of CLIP ViT-B/32 "
        f"({counts['CLIP ViT-B/32']:,}); with the ViT-B/16 of its other rows TPT is that model "
        "and its context tokens.",
        f"CLIP ViT-B/16: the paper's {TABLE_4['CLIP'].parameters} M equals {clip:,} less the image "
        f"tower's output projection ({projection:,}): {(clip - projection) / 1e6:.1f} M.",
        f"APM: the paper's sum leaves {student:.1f} M for the student; the TTT model as released "
        f"has {counts['APM, TTT model']:,}, the unused layer norm included.",
    ]


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    output = prepare_output(args.output)
    results = Results(args, META)

    models = build_models()
    modules = {name: by_module(model) for name, model in models.items()}
    counts = {name: sum(parts.values()) for name, parts in modules.items()}
    rows, notes = table_rows(counts), explain(models, counts)

    print_table("Parameters (M), Table 4", rows)
    print("\nBy module (M)")
    for name, parts in modules.items():
        listed = ", ".join(f"{part} {number / 1e6:.3f}" for part, number in parts.items())
        print(f"{name}: {listed}")
    print_notes(notes)
    results.save(output, rows=rows, counts=counts, modules=modules, notes=notes)
    print(f"\n{output / 'results.json'} has these numbers")


if __name__ == "__main__":
    sys.exit(main())
