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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from baselines import TABLE_4, TPT, Paper, clip_inputs, clip_model, swin_model
from table import print_notes, print_table
from torch import nn
from torch.optim import Adam, AdamW, Optimizer
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm

from apm import APM, APMConfig
from apm.runtime.cli import OUTPUTS, Results, command, make_parser, select_device
from apm.runtime.files import prepare_output
from apm.tta import TestTimeTrainer

CHUNKS = (128, 512, 1024)
PROMPTS = 10  # classes that TPT tells apart; its text tower's activations grow with them
MEASURED = "measured"  # marks the work in the profiler's trace


class Workload(NamedTuple):
    """What holds memory for good, and the work whose peak is measured."""

    model: nn.Module
    run: Callable[[], object]
    optimizer: Optimizer | None = None


class Case(NamedTuple):
    """A row: how to build it, on the default device, and the paper's line."""

    build: Callable[[], Workload]
    paper: Paper | None = None


def forward(model: nn.Module, run: Callable[[], object]) -> Workload:
    """A workload without a backward pass."""
    return Workload(model, torch.inference_mode()(run))


def swin_forward() -> Workload:
    """Swin-B, one image."""
    model, (image, _) = swin_model(), clip_inputs()
    return forward(model, lambda: model(image))


def clip_forward() -> Workload:
    """CLIP, one image and one prompt."""
    model, inputs = clip_model("ViT-B/16"), clip_inputs()
    return forward(model, lambda: model(*inputs))


def tpt_step() -> Workload:
    """One step of test-time prompt tuning."""
    model = TPT(clip_model("ViT-B/16"))
    optimizer = AdamW([model.context], lr=5e-3)
    inputs = clip_inputs(TPT.VIEWS, PROMPTS)
    return Workload(model, partial(model.step, optimizer, *inputs), optimizer)


def student_inference(chunk_size: int) -> Workload:
    """Features and colours of the whole grid, ``chunk_size`` locations at a time."""
    model, images = APM(APMConfig.tta()), torch.rand(1, 3, 448, 448)
    return forward(model, lambda: model.query(model.encode(images), chunk_size=chunk_size))


def student_step(chunk_size: int) -> Workload:
    """A step through features of the whole grid, ``chunk_size`` locations at a time."""
    model, images = APM(APMConfig.tta()), torch.rand(1, 3, 448, 448)
    optimizer = Adam(model.parameters(), lr=1e-4, fused=True)
    target = torch.randn(1, model.config.feature_dim)

    def run() -> None:
        features = model.query(model.encode(images), chunk_size=chunk_size)[0]
        optimizer.zero_grad()
        F.mse_loss(model.pool(features), target).backward()
        optimizer.step()

    run()  # Adam's state exists from its first step on
    return Workload(model, run, optimizer)


def trainer_step() -> Workload:
    """A step of ``TestTimeTrainer``, which needs the pooled vector alone."""
    trainer = TestTimeTrainer(device=torch.get_default_device())
    images, target = torch.rand(1, 3, 448, 448), torch.randn(1, trainer.model.config.feature_dim)
    run = partial(trainer.step, images, target)
    run()  # Adam's state exists from its first step on
    return Workload(trainer.model, run, trainer.optimizer)


def teacher_and_trainer_step() -> Workload:
    """Both models in memory: the teacher's forward pass, then a student's step."""
    teacher, student = clip_forward(), trainer_step()

    def run() -> None:
        teacher.run()
        student.run()

    return Workload(nn.ModuleList([teacher.model, student.model]), run, student.optimizer)


CASES = {
    "Swin-B, forward": Case(swin_forward, TABLE_4["Swin"]),
    f"TPT, step, {TPT.VIEWS} views, {PROMPTS} prompts": Case(tpt_step, TABLE_4["TPT"]),
    "CLIP ViT-B/16, forward": Case(clip_forward, TABLE_4["CLIP"]),
    "CLIP ViT-B/16 + APM, TTT step": Case(teacher_and_trainer_step, TABLE_4["APM"]),
    "APM, TTT step": Case(trainer_step),
    **{f"APM, TTT step, chunks of {c}": Case(partial(student_step, chunk_size=c)) for c in CHUNKS},
    **{
        f"APM, forward, chunks of {c}": Case(partial(student_inference, chunk_size=c))
        for c in CHUNKS
    },
}


class Peak(NamedTuple):
    """The most bytes held at once by tensors while the work ran, and by the process ever."""

    tensors: int
    process: int


def peak_on_cuda(build: Callable[[], Workload]) -> tuple[Workload, Peak]:
    """Build a workload, run it, and ask the CUDA allocator."""
    workload = build()
    torch.cuda.reset_peak_memory_stats()
    workload.run()
    return workload, Peak(torch.cuda.max_memory_allocated(), process_peak())


def peak_on_cpu(build: Callable[[], Workload]) -> tuple[Workload, Peak]:
    """Build a workload, run it, and read torch's profiler.

    The profiler totals what it saw allocated and freed, so it watches the building too.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        workload = build()
        with record_function(MEASURED):
            workload.run()
    process = process_peak()  # before the trace is read
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    start = next(event["ts"] for event in events if event["name"] == MEASURED)
    memory = [event for event in events if event["name"] == "[memory]"]
    before = memory[0]["args"]["Total Allocated"] - memory[0]["args"]["Bytes"]
    totals = [event["args"]["Total Allocated"] for event in memory if event["ts"] >= start]
    return workload, Peak(max(totals) - before, process)


def process_peak() -> int:
    """Bytes of main memory that this process held at most."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(case: Case, device: torch.device) -> dict[str, float]:
    """GB of a case in this process."""
    with device:
        workload, peak = PEAK_ON[device.type](case.build)
    weights = sum(tensor.nbytes for tensor in workload.model.state_dict().values())
    states = workload.optimizer.state.values() if workload.optimizer else ()
    optimiser = sum(tensor.nbytes for state in states for tensor in state.values())
    numbers = {
        "peak": peak.tensors,
        "weights": weights,
        "optimiser": optimiser,
        "rest": peak.tensors - weights - optimiser,
        "process": peak.process,
    }
    return {name: size / 1e9 for name, size in numbers.items()}


PEAK_ON = {"cpu": peak_on_cpu, "cuda": peak_on_cuda}


def measure_apart(name: str, device: torch.device) -> dict[str, float]:
    """``measure`` in a process of its own.

    Raises:
        ChildProcessError: if it fails, for lack of memory for example.
    """
    command_line = [sys.executable, __file__, "--case", name, "--device", device.type]
    # glibc would keep freed tensors in its heap, between the profiler's small records, unused.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    child = subprocess.run(command_line, capture_output=True, text=True, env=environment)
    if child.returncode:
        raise ChildProcessError(f"{name}: exit status {child.returncode}. {child.stderr[-500:]}")
    return json.loads(child.stdout)


def compare_memory(name: str, device: torch.device) -> dict[str, Any]:
    """A row: the paper's two numbers, ours on the device, their difference, and its parts."""
    paper, numbers = CASES[name].paper, measure_apart(name, device)
    peak = numbers.pop("peak")
    return {
        "name": name,
        "paper": paper and paper.memory_measured,
        "ideal": paper and paper.memory_ideal,
        "CPU": peak if device.type == "cpu" else "not measured",
        "CUDA": peak if device.type == "cuda" else "not measured",
        "difference": paper and peak - paper.memory_measured,
    } | numbers


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
    parser = make_parser(__doc__, "--output", "--device", output=OUTPUTS / "count_memory")
    parser.add_argument(
        "--case", choices=CASES, metavar="ROW", help="measure this row in this process, print JSON"
    )
    args = parser.parse_args(argv)
    device = select_device(args.device)
    if device.type not in PEAK_ON:
        raise ValueError(f"--device {device.type}: memory is measured on {' or '.join(PEAK_ON)}")
    if args.case:
        print(json.dumps(measure(CASES[args.case], device)))
        return
    output = prepare_output(args.output)
    results = Results(args, device)
    rows = [compare_memory(name, device) for name in tqdm(CASES, disable=None)]
    print_table("Peak memory (GB), Table 4", rows)
    print_notes(NOTES)
    results.save(output, rows=rows, notes=NOTES)


if __name__ == "__main__":
    sys.exit(main())
