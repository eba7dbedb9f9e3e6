"""Measure the peak memory of the models of the paper's Table 4, in GB (10^9 bytes).

Each row is measured in a process of its own. Its peak is that of all tensors, temporary ones
included: on a CPU as torch's profiler sees them allocated and freed, on a GPU as the CUDA allocator
does. The process column is the most main memory that the process ever held, libraries included.
"""

import json
import os
import resource
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

from apm.flags import OUTPUTS, make_parser
from apm.runtime.cli import Results, answer_flags, command


def parse(argv: list[str] | None) -> Namespace:
    """The script's flags."""
    parser = make_parser(
        __doc__,
        *("--output", "--device"),
        example="flop_analysis/count_memory.py --device cpu",
        output=OUTPUTS / "count_memory",
    )
    help = "measure this row of the table alone, in this process, and print JSON (default: all)"
    parser.add("machine", "--case", metavar="ROW", help=help)
    return parser.parse_args(argv)


answer_flags(__name__, parse)

import torch
import workloads
from baselines import TABLE_4, Paper
from table import print_notes, print_table
from tqdm import tqdm
from workloads import Workload

from apm.peers import VIEWS
from apm.runtime.device import peak_bytes, select_device
from apm.runtime.files import prepare_output

Build = Callable[[], Workload]
CHUNKS = (128, 512, 1024)
MEASURABLE = ("cpu", "cuda")
CASES: dict[str, tuple[Build, Paper | None]] = {
    "Swin-B, forward": (workloads.swin_forward, TABLE_4["Swin"]),
    f"TPT, step, {VIEWS} views, {workloads.CLASSES} prompts": (
        workloads.tpt_step,
        TABLE_4["TPT"],
    ),
    "CLIP ViT-B/16, forward": (workloads.clip_forward, TABLE_4["CLIP"]),
    "CLIP ViT-B/16 + APM, TTT step": (workloads.teacher_and_trainer_step, TABLE_4["APM"]),
    "CLIP ViT-B/16, freed, then APM, 20 iterations, 64 locations": (
        partial(workloads.teacher_then_student, 64),
        TABLE_4["APM"],
    ),
    f"TPT, step, {VIEWS} views, 200 prompts": (partial(workloads.tpt_step, 200), None),
    "APM, TTT step": (workloads.trainer_step, None),
    "APM, TTT step, 64 locations": (partial(workloads.trainer_step, "float32", 64), None),
    **{f"APM, TTT step, chunks of {c}": (partial(workloads.student_step, c), None) for c in CHUNKS},
    **{
        f"APM, forward, chunks of {c}": (partial(workloads.student_forward, c), None)
        for c in CHUNKS
    },
}


def process_peak() -> int:
    """Bytes of main memory that this process held at most."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(build: Build, device: torch.device) -> dict[str, float]:
    """GB of a workload in this process."""
    process = 0

    def work(workload: Workload) -> None:
        nonlocal process
        workload.run()
        process = process_peak()  # before the profiler's trace is read

    with device:
        workload, peak = peak_bytes(build, work, device)
    weights = sum(tensor.nbytes for tensor in workload.model.state_dict().values())
    states = workload.optimizer.state.values() if workload.optimizer else ()
    optimiser = sum(tensor.nbytes for state in states for tensor in state.values())
    numbers = {"peak": peak, "weights": weights, "optimiser": optimiser}
    numbers |= {"rest": peak - weights - optimiser, "process": process}
    return {name: size / 1e9 for name, size in numbers.items()}


def measure_apart(name: str, device: torch.device) -> dict[str, Any]:
    """A row, measured in a process of its own: the paper's two numbers, ours, and its parts.

    Raises:
        ChildProcessError: if it fails, for lack of memory for example.
    """
    command_line = [sys.executable, __file__, "--case", name, "--device", device.type]
    # glibc would keep freed tensors in its heap, between the profiler's small records, unused.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    child = subprocess.run(command_line, capture_output=True, text=True, env=environment)
    if child.returncode:
        raise ChildProcessError(f"{name}: exit status {child.returncode}. {child.stderr[-500:]}")
    paper, numbers = CASES[name][1], json.loads(child.stdout)
    peak = numbers.pop("peak")
    return {
        "name": name,
        "paper": paper and paper.memory_measured,
        "ideal": paper and paper.memory_ideal,
        "CPU": peak if device.type == "cpu" else "not measured",
        "CUDA": peak if device.type == "cuda" else "not measured",
        "difference": paper and peak - paper.memory_measured,
        **numbers,
    }


NOTES = (
    "Peaks are of float32 tensors: weights + optimiser + rest (inputs, activations, gradients), "
    "without libraries or CUDA context. The paper does not say what its numbers include.",
    "paper and ideal are its measured and ideal columns; the difference is to the measured one.",
    "Chunks bound the memory of inference. A training step keeps the activations of all chunks for "
    "the backward pass, so there they bound nothing.",
    "The process column depends on the machine and includes libraries and the profiler.",
)


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = select_device(args.device)
    if device.type not in MEASURABLE:
        raise ValueError(f"--device {device.type}: memory is measured on {' or '.join(MEASURABLE)}")
    if args.case and args.case not in CASES:
        raise ValueError(f"--case {args.case!r}: no such row, expected one of {list(CASES)}")
    if args.case:
        print(json.dumps(measure(CASES[args.case][0], device)))
        return
    output = prepare_output(args.output)
    results = Results(args, device)
    rows = [measure_apart(name, device) for name in tqdm(CASES, unit="row", disable=None)]
    print_table("Peak memory (GB), Table 4", rows)
    print_notes(NOTES)
    results.save(output, rows=rows, notes=NOTES)
    print(f"\n{output / 'results.json'} has these numbers and the machine's")


if __name__ == "__main__":
    sys.exit(main())
