"""Test-time training on a single token (paper, section 3.2 and Figure 3).

A student that knows nothing learns one vector, its teacher's embedding of one image. For the next
image it starts again from nothing.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.optim import Adam

from apm.config import APMConfig
from apm.model import APM
from apm.runtime.device import precision

INITIAL_STD = 0.01
DECAY, DECAY_EVERY = 0.1, 200  # of the learning rate, in steps


@dataclass
class Adaptation:
    """What came of one image: N locations, features F wide.

    Attributes:
        losses: mean squared error before each step.
        pooled_at: ``(iterations + 1, F)``, the pooled output after 0, 1, 2, ... steps.
        features_at: ``(N, F)``, row by row, after each number of steps that was asked for.
    """

    losses: list[float]
    pooled_at: Tensor
    features_at: dict[int, Tensor]

    @property
    def pooled(self) -> Tensor:
        """``(F,)``, after the last step."""
        return self.pooled_at[-1]

    @property
    def features(self) -> Tensor:
        """``(N, F)``, after the last step; ``adapt_many`` has none."""
        return self.features_at[len(self.losses)]


class _Student(nn.Module):
    """An APM whose forward pass is what a step needs: ``(B, 3, H, W)`` -> pooled ``(B, F)``."""

    def __init__(self, model: APM) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.query_pooled(self.model.encode(images), images=images)


class TestTimeTrainer:
    """Trains a student on one image at a time, or many students on one image each.

    The defaults are the released settings. A step is a forward and a backward pass of the shared
    MLP and Adam's update, and nothing else: one copy of the image, no RGB head, and no features or
    keys for each location.

    Args:
        model: the student, with a pooled head; default the paper's. Its weights are redrawn.
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
        dtype: str = "float32",
        device: torch.device | str = "cpu",
    ) -> None:
        model = model or APM(APMConfig.tta())
        if model.pooling is None or iterations < 1:
            got = f"pooling {model.config.pooling}, iterations {iterations}"
            raise ValueError(f"needs a student with pooling and at least one iteration, got {got}")
        self.iterations, self.learning_rate = iterations, learning_rate
        self.dtype, self.device = dtype, torch.device(device)
        self.model = model.to(self.device)
        self._student = _Student(self.model)
        self.reset(0)

    def reset(self, seed: int) -> None:
        """Forget everything: redraw every parameter, fresh optimiser and schedule."""
        drawn = self._draw([seed])
        with torch.no_grad():
            for name, parameter in self._student.named_parameters():
                parameter.copy_(drawn[name][0])
        self.optimizer = self._optimizer(self._student.parameters())

    def adapt(
        self,
        image: Tensor,
        target: Tensor,
        features_at: Collection[int] = (),
        on_step: Callable[[], object] = lambda: None,
    ) -> Adaptation:
        """Train the student on one image, from its present weights: ``reset`` it first.

        Args:
            image: ``(3, H, W)``, preprocessed.
            target: ``(F,)``, the teacher's embedding of the image.
            features_at: numbers of steps after which the features are kept, besides the last.
            on_step: called after each step.
        """
        if not set(features_at) <= set(range(self.iterations + 1)):
            raise ValueError(f"features_at {features_at}: there are {self.iterations} iterations")
        images, kept = image[None].to(self.device), dict[int, Tensor]()

        @torch.no_grad()
        def keep(steps: int) -> None:
            if steps in (*features_at, self.iterations):
                with precision(self.device, self.dtype):
                    kept[steps] = self.model(images)[0][0].float().cpu()
            if steps:
                on_step()

        answer = partial(self._student, images)
        losses, pooled = self._run(answer, target[None], self.optimizer, keep)
        return Adaptation(losses[:, 0].tolist(), pooled[:, 0], kept)

    def adapt_many(self, images: Tensor, targets: Tensor, seeds: Sequence[int]) -> list[Adaptation]:
        """Train K new students on ``(K, 3, H, W)`` images and ``(K, F)`` targets, all at once.

        Equal to ``reset(seed)`` and ``adapt`` of each, without features. Their weights are stacked,
        so that their products are one batched product. ``self.model`` is left alone.
        """
        weights, images = self._draw(seeds), images.to(self.device)

        def one(weights: dict[str, Tensor], image: Tensor) -> Tensor:
            return functional_call(self._student, weights, image[None])[0]

        answer, optimizer = partial(vmap(one), weights, images), self._optimizer(weights.values())
        losses, pooled = self._run(answer, targets, optimizer)
        return [Adaptation(losses[:, k].tolist(), pooled[:, k], {}) for k in range(len(images))]

    def step(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """One step on ``(1, 3, H, W)`` and ``(1, F)``: loss ``(1,)`` and output before it."""
        return self._step(partial(self._student, images), targets, self.optimizer)

    def _optimizer(self, weights: Iterable[Tensor]) -> Adam:
        # Fused: one pass over 23 million parameters instead of a dozen.
        return Adam([{"params": list(weights), "steps_done": 0}], fused=True)

    def _run(
        self,
        answer: Callable[[], Tensor],
        targets: Tensor,
        optimizer: Adam,
        on_step: Callable[[int], None] = lambda steps: None,
    ) -> tuple[Tensor, Tensor]:
        """Fit K students: losses ``(iterations, K)``, outputs ``(iterations + 1, K, F)``."""
        if targets.shape[1:] != (width := self.model.config.feature_dim,):
            raise ValueError(f"targets have shape {tuple(targets.shape)}, expected (K, {width})")
        targets, losses, pooled = targets.to(self.device), [], []
        on_step(0)
        for steps in range(1, self.iterations + 1):
            loss, output = self._step(answer, targets, optimizer)
            losses.append(loss)
            pooled.append(output)
            on_step(steps)
        with torch.no_grad():
            pooled.append(self._answer(answer))
        return torch.stack(losses).cpu(), torch.stack(pooled).cpu()  # one copy, not two a step

    def _step(
        self, answer: Callable[[], Tensor], targets: Tensor, optimizer: Adam
    ) -> tuple[Tensor, Tensor]:
        pooled = self._answer(answer)  # (K, F)
        losses = (pooled - targets).square().mean(dim=1)  # (K,); students share no weight
        optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()
        [group] = optimizer.param_groups
        group["lr"] = self.learning_rate * DECAY ** (group["steps_done"] // DECAY_EVERY)
        optimizer.step()
        group["steps_done"] += 1
        return losses.detach(), pooled.detach()

    def _answer(self, answer: Callable[[], Tensor]) -> Tensor:
        with precision(self.device, self.dtype):
            return answer().float()

    def _draw(self, seeds: Sequence[int]) -> dict[str, Tensor]:
        """Parameters of K students from N(0, ``INITIAL_STD``^2), stacked: name -> ``(K, ...)``."""
        weights = {
            name: torch.empty((len(seeds), *parameter.shape), device=self.device)
            for name, parameter in self._student.named_parameters()
        }
        for k, seed in enumerate(seeds):
            generator = torch.Generator(self.device).manual_seed(seed)
            for stacked in weights.values():
                stacked[k].normal_(0, INITIAL_STD, generator=generator)
        return {name: stacked.requires_grad_() for name, stacked in weights.items()}
