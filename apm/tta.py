"""Test-time training on a single token (paper, section 3.2 and Figure 3).

A student that knows nothing learns one vector, its teacher's embedding of one image. For the next
image it starts again from nothing.
"""

import math
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.optim import Adam

from apm.config import APMConfig
from apm.model import APM
from apm.runtime.device import generator_at, precision

# In pages of 4 KB, Linux takes longer to give gradients their memory than Adam to use them. torch
# reads this when it makes its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

INITIAL_STD = 0.01
DECAY, DECAY_EVERY = 0.1, 200  # of the learning rate, in steps
# What the pooled answer to an image does not ask for: it gets no gradient, and keeps its weights.
UNTRAINED = ("rgb_first.", "rgb_head.", "pooling.unused_norm.", "trunk_first.local_null")


@dataclass
class Adaptation:
    """What came of one image: N locations, features F wide.

    Attributes:
        losses: mean squared error before each step, of the step's locations.
        pooled_at: ``(F,)``, the pooled output of all locations, after each number of steps that was
            asked for.
        features_at: ``(N, F)``, row by row, in the same way.
    """

    losses: list[float]
    pooled_at: dict[int, Tensor]
    features_at: dict[int, Tensor]

    @property
    def pooled(self) -> Tensor:
        """``(F,)``, after the last step."""
        return self.pooled_at[len(self.losses)]

    @property
    def features(self) -> Tensor:
        """``(N, F)``, after the last step; ``adapt_many`` has none."""
        return self.features_at[len(self.losses)]


class _Student(nn.Module):
    """An APM whose forward pass is what a step needs.

    ``(B, 3, H, W)`` and ``(M, 2)`` positions -> pooled ``(B, F)``; without positions all locations.
    """

    def __init__(self, model: APM) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, positions: Tensor | None = None) -> Tensor:
        return self.model.query_pooled(self.model.encode(images), positions, images=images)


class TestTimeTrainer:
    """Trains a student on one image at a time, or many students on one image each.

    The defaults are the released settings. A step is a forward and a backward pass of the shared
    MLP and Adam's update, and nothing else: one copy of the image, no RGB head, and no features or
    keys for each location. Every location is answered on its own, so a step may train on a random
    few; what is reported is the answer of all of them.

    Args:
        model: the student, with a pooled head; default the paper's. Its weights are redrawn.
        locations: random locations of a step; default, or where the grid has no more, all of them.
        location_seed: decides, with the step's number, which; all students share them.
        iterations: steps for each image.
        learning_rate: Adam's, multiplied by ``DECAY`` every ``DECAY_EVERY`` steps.
        dtype: precision of the matrix products, ``"float32"`` or ``"bfloat16"``.
    """

    __test__ = False  # for pytest, which would take it for a test by its name

    def __init__(
        self,
        model: APM | None = None,
        *,
        iterations: int = 20,
        learning_rate: float = 1e-4,
        locations: int | None = None,
        location_seed: int = 0,
        dtype: str = "float32",
        device: torch.device | str = "cpu",
    ) -> None:
        model = model or APM(APMConfig.tta())
        if model.pooling is None or iterations < 1:
            got = f"pooling {model.config.pooling}, iterations {iterations}"
            raise ValueError(f"needs a student with pooling and at least one iteration, got {got}")
        if locations is not None and locations < 1:
            raise ValueError(f"locations {locations}: a step needs at least one, or None for all")
        if not 0 < learning_rate < math.inf:
            raise ValueError(f"learning rate {learning_rate} must be above 0 and finite")
        self.iterations, self.learning_rate = iterations, learning_rate
        few = locations is not None and locations < model.config.column_dim
        self.locations, self.location_seed = locations if few else None, location_seed
        self.dtype, self.device = dtype, torch.device(device)
        self.model = model.to(self.device)
        self._student = _Student(self.model)
        self.reset(0)

    def reset(self, seed: int) -> None:
        """Forget everything: redraw every trained parameter, fresh optimiser and schedule."""
        parameters = self._trained().values()
        self._draw((parameter.data for parameter in parameters), seed)
        self.optimizer = self._optimizer(parameters)

    def adapt(
        self,
        image: Tensor,
        target: Tensor,
        features_at: Collection[int] = (),
        on_step: Callable[[], object] = lambda: None,
        pooled_at: Collection[int] = (),
    ) -> Adaptation:
        """Train the student on one image, from its present weights: ``reset`` it first.

        Args:
            image: ``(3, H, W)``, preprocessed.
            target: ``(F,)``, the teacher's embedding of the image.
            features_at: numbers of steps after which the features are kept, besides the last.
            on_step: called after each step.
            pooled_at: numbers of steps after which the pooled output is kept, besides the last.
        """
        self._check_steps(features_at)
        images, kept = image[None].to(self.device), dict[int, Tensor]()

        @torch.no_grad()
        def keep(steps: int) -> Tensor | None:
            if steps:
                on_step()
            if steps not in (*features_at, self.iterations):
                return None
            with precision(self.device, self.dtype):
                features = self._features(images)
                pooled = self.model.pool(features)  # of them, which spares another pass
            kept[steps] = features[0].float().cpu()
            return pooled.float()

        answer = partial(self._student, images)
        [(losses, pooled)] = self._run(answer, target[None], self.optimizer, pooled_at, keep)
        return Adaptation(losses, pooled, kept)

    def adapt_many(
        self,
        images: Tensor,
        targets: Tensor,
        seeds: Sequence[int],
        pooled_at: Collection[int] = (),
    ) -> list[Adaptation]:
        """Train K new students on ``(K, 3, H, W)`` images and ``(K, F)`` targets, all at once.

        Equal to ``reset(seed)`` and ``adapt`` of each, without features. Their weights are stacked,
        so that their products are one batched product; that pays on an accelerator, on a CPU it is
        slower than one after the other. ``self.model`` is left alone.
        """
        images = images.to(self.device)
        weights = {
            name: torch.empty((len(seeds), *parameter.shape), device=self.device)
            for name, parameter in self._trained().items()
        }
        for k, seed in enumerate(seeds):
            self._draw((stacked[k] for stacked in weights.values()), seed)
        weights = {name: stacked.requires_grad_() for name, stacked in weights.items()}

        def answer(positions: Tensor | None = None) -> Tensor:
            def one(weights: dict[str, Tensor], image: Tensor) -> Tensor:
                return functional_call(self._student, weights, (image[None], positions))[0]

            return vmap(one)(weights, images)

        runs = self._run(answer, targets, self._optimizer(weights.values()), pooled_at)
        return [Adaptation(losses, pooled, {}) for losses, pooled in runs]

    def step(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """One step on ``(1, 3, H, W)`` and ``(1, F)``: loss ``(1,)`` and output before it."""
        return self._step(partial(self._student, images), targets, self.optimizer)

    def _optimizer(self, weights: Iterable[Tensor]) -> Adam:
        # Fused: one pass over 23 million parameters instead of a dozen.
        return Adam([{"params": list(weights), "steps_done": 0}], fused=True)

    def _run(
        self,
        answer: Callable[..., Tensor],
        targets: Tensor,
        optimizer: Adam,
        pooled_at: Collection[int],
        on_step: Callable[[int], Tensor | None] = lambda steps: None,
    ) -> list[tuple[list[float], dict[int, Tensor]]]:
        """Fit K students: for each the losses, and outputs ``(F,)``, which ``on_step`` may know."""
        self._check_steps(pooled_at)
        if targets.shape[1:] != (width := self.model.config.feature_dim,):
            raise ValueError(f"targets have shape {tuple(targets.shape)}, expected (K, {width})")
        targets, losses, pooled = targets.to(self.device), list[Tensor](), dict[int, Tensor]()
        for steps in range(self.iterations + 1):
            known = on_step(steps)
            if steps in (*pooled_at, self.iterations):
                with torch.no_grad():
                    pooled[steps] = self._answer(answer) if known is None else known
            if steps < self.iterations:
                losses.append(self._step(answer, targets, optimizer)[0])
        by_student = torch.stack(losses, dim=1).tolist()  # one copy, not one a step
        outputs = torch.stack([*pooled.values()], dim=1).cpu()  # (K, steps, F)
        if not outputs.isfinite().all():
            rate = self.learning_rate
            raise ValueError(f"a student's answer is not finite: lower the learning rate {rate}")
        return [
            (one, dict(zip(pooled, rows, strict=True)))
            for one, rows in zip(by_student, outputs, strict=True)
        ]

    def _step(
        self, answer: Callable[..., Tensor], targets: Tensor, optimizer: Adam
    ) -> tuple[Tensor, Tensor]:
        [group] = optimizer.param_groups
        pooled = self._answer(answer, self._positions(group["steps_done"]))  # (K, F)
        losses = (pooled - targets).square().mean(dim=1)  # (K,); students share no weight
        optimizer.zero_grad()
        losses.sum().backward()
        group["lr"] = self.learning_rate * DECAY ** (group["steps_done"] // DECAY_EVERY)
        optimizer.step()
        group["steps_done"] += 1
        return losses.detach(), pooled.detach()

    def _answer(self, answer: Callable[..., Tensor], positions: Tensor | None = None) -> Tensor:
        with precision(self.device, self.dtype):
            return answer(positions).float()

    def _positions(self, step: int) -> Tensor | None:
        """The locations of a step, ``(M, 2)``; None: all of them."""
        if self.locations is None:
            return None
        grid = self.model.grid_positions()
        order = torch.randperm(len(grid), generator=generator_at(self.location_seed, step))
        return grid[order[: self.locations].to(grid.device)]

    def _features(self, images: Tensor) -> Tensor:
        """All locations' features ``(B, N, F)``, without the colours."""
        model = self.model
        query = model.unfold(model.encode(images), model.grid_positions(), images)
        return model.feature_head(model.hidden(query))

    def _trained(self) -> dict[str, Tensor]:
        """The student's parameters that a step changes, by their names."""
        return {
            name: parameter
            for name, parameter in self._student.named_parameters()
            if not name.removeprefix("model.").startswith(UNTRAINED)
        }

    def _draw(self, weights: Iterable[Tensor], seed: int) -> None:
        """Fill one student's weights from N(0, ``INITIAL_STD``^2)."""
        generator = torch.Generator(self.device).manual_seed(seed)
        for weight in weights:
            weight.normal_(0, INITIAL_STD, generator=generator)

    def _check_steps(self, asked: Collection[int]) -> None:
        if not set(asked) <= set(range(self.iterations + 1)):
            raise ValueError(f"after {sorted(asked)} steps: there are {self.iterations} iterations")
