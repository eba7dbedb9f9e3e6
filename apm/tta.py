"""Test-time training on a single token (paper, section 3.2 and Figure 3).

A student that knows nothing learns one vector, its teacher's embedding of one image. For the next
image it starts again from nothing.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.optim import Adam
from torch.optim.lr_scheduler import StepLR

from apm.model import APM, APMConfig
from apm.runtime.cli import precision

INITIAL_STD = 0.01


@dataclass
class Adaptation:
    """What came of one image.

    Attributes:
        losses: mean squared error before each step.
        pooled: ``(F,)``, after the last step.
        features: ``(N, F)``, after the last step, row by row.
        pooled_at: ``(iterations + 1, F)``, the pooled output after 0, 1, 2, ... steps.
        features_at: ``(N, F)`` after each number of steps that was asked for.
    """

    losses: list[float]
    pooled: Tensor
    features: Tensor
    pooled_at: Tensor
    features_at: dict[int, Tensor] = field(default_factory=dict)


class TestTimeTrainer:
    """Trains a student on one image at a time, or many students on one image each.

    The defaults are the released settings. A step costs a forward and a backward pass of the shared
    MLP, and nothing else: the target is given, there is one copy of the image, no RGB head, and the
    pooled output is computed without features or keys for each location.

    Args:
        model: the student, with a pooled head; default the paper's. Its weights are redrawn.
        iterations: steps for each image.
        learning_rate: Adam's, multiplied by ``decay`` every ``decay_every`` steps.
        dtype: precision of the matrix products, ``"float32"`` or ``"bfloat16"``.
        device: where the students live.

    Raises:
        ValueError: if the student has no pooled head or ``iterations`` is below 1.
    """

    __test__ = False  # not a test, whatever pytest makes of the name

    def __init__(
        self,
        model: APM | None = None,
        *,
        iterations: int = 20,
        learning_rate: float = 1e-4,
        decay: float = 0.1,
        decay_every: int = 200,
        dtype: str = "float32",
        device: torch.device | str = "cpu",
    ) -> None:
        model = model or APM(APMConfig.tta())
        if model.config.pooling is None:
            raise ValueError("test-time training needs a student with pooling, got pooling None")
        if iterations < 1:
            raise ValueError(f"iterations {iterations} must be at least 1")
        self.iterations, self.learning_rate = iterations, learning_rate
        self.decay, self.decay_every = decay, decay_every
        self.dtype, self.device = dtype, torch.device(device)
        self._student = _Student(model).to(self.device)
        self.reset(0)

    @property
    def model(self) -> APM:
        """The student that ``adapt`` trains."""
        return self._student.model

    def reset(self, seed: int) -> None:
        """Forget everything: redraw every parameter, fresh optimiser and schedule."""
        drawn = _draw(self._student, [seed])
        with torch.no_grad():
            for name, parameter in self._student.named_parameters():
                parameter.copy_(drawn[name][0])
        self.optimizer, self.scheduler = self._optimizer(self._student.parameters())

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
            features_at: after how many steps the feature grid shall be kept as well.
            on_step: called after each step, for a progress bar.

        Raises:
            ValueError: if the target is not as wide as the student's answer, or ``features_at``
                asks for more steps than are taken.
        """
        images = image[None].to(self.device)
        return self._run(
            partial(self._student, images),
            target[None].to(self.device),
            self.optimizer,
            self.scheduler,
            features_at,
            on_step,
        )[0]

    def step(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the student on ``(1, 3, H, W)`` and ``(1, F)``, both on its device.

        Returns:
            Pooled outputs ``(1, F)`` and losses ``(1,)`` before the step.
        """
        answer = partial(self._student, images)
        return self._step(answer, targets, self.optimizer, self.scheduler)

    def adapt_many(
        self,
        images: Tensor,
        targets: Tensor,
        seeds: Sequence[int],
        features_at: Collection[int] = (),
    ) -> list[Adaptation]:
        """Train one new student an image, all at once; each as after ``reset(seed)`` and ``adapt``.

        The students' weights are stacked, so that their products are one batched product.
        ``self.model`` is left alone.

        Args:
            images: ``(K, 3, H, W)``, preprocessed.
            targets: ``(K, F)``.
            seeds: of the K students.
            features_at: as in ``adapt``.
        """
        weights = _draw(self._student, seeds)
        images = images[:, None].to(self.device)  # (K, 1, 3, H, W)

        def answer(dense: bool) -> Tensor:
            def one(weights: dict[str, Tensor], image: Tensor) -> Tensor:
                return functional_call(self._student, weights, (image, dense))

            return vmap(one)(weights, images).squeeze(1)

        optimizer, scheduler = self._optimizer(weights.values())
        return self._run(answer, targets.to(self.device), optimizer, scheduler, features_at)

    def _optimizer(self, parameters: Iterable[Tensor]) -> tuple[Adam, StepLR]:
        # Fused: one pass over 23 million parameters instead of a dozen.
        optimizer = Adam(parameters, lr=self.learning_rate, fused=True)
        return optimizer, StepLR(optimizer, self.decay_every, self.decay)

    def _run(
        self,
        answer: Callable[[bool], Tensor],
        targets: Tensor,
        optimizer: Adam,
        scheduler: StepLR,
        features_at: Collection[int],
        on_step: Callable[[], object] = lambda: None,
    ) -> list[Adaptation]:
        """Fit K answers to ``(K, F)`` targets; students share no weight, so neither gradients."""
        width = self.model.config.feature_dim
        if targets.shape[1:] != (width,):
            raise ValueError(f"targets have shape {tuple(targets.shape)}, expected (K, {width})")
        if not set(features_at) <= set(range(self.iterations + 1)):
            raise ValueError(f"features_at {features_at}: there are {self.iterations} iterations")
        losses, pooled_at, kept = [], [], {}
        for step in range(self.iterations):
            if step in features_at:
                kept[step] = self._answer_now(answer, dense=True).cpu()
            pooled, loss = self._step(answer, targets, optimizer, scheduler)
            losses.append(loss)
            pooled_at.append(pooled)
            on_step()
        pooled_at.append(self._answer_now(answer, dense=False))
        kept[self.iterations] = self._answer_now(answer, dense=True).cpu()
        # One copy from the device an image, not two a step.
        all_losses, all_pooled = torch.stack(losses).cpu(), torch.stack(pooled_at).cpu()
        return [
            Adaptation(
                losses=all_losses[:, k].tolist(),
                pooled=all_pooled[-1, k],
                features=kept[self.iterations][k],
                pooled_at=all_pooled[:, k],
                features_at={step: kept[step][k] for step in features_at},
            )
            for k in range(len(targets))
        ]

    def _step(
        self,
        answer: Callable[[bool], Tensor],
        targets: Tensor,
        optimizer: Adam,
        scheduler: StepLR,
    ) -> tuple[Tensor, Tensor]:
        """One step; pooled outputs ``(K, F)`` and losses ``(K,)`` before it."""
        with precision(self.device, self.dtype):
            pooled = answer(False).float()
        losses = (pooled - targets).square().mean(dim=1)
        optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()
        optimizer.step()
        scheduler.step()
        return pooled.detach(), losses.detach()

    @torch.no_grad()
    def _answer_now(self, answer: Callable[[bool], Tensor], *, dense: bool) -> Tensor:
        with precision(self.device, self.dtype):
            return answer(dense).float()


class _Student(nn.Module):
    """An APM whose forward pass, which functional_call can reach, is what a step needs."""

    def __init__(self, model: APM) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, dense: bool) -> Tensor:
        """``(B, 3, H, W)`` -> pooled ``(B, F)`` or, dense, features ``(B, N, F)``."""
        column = self.model.encode(images)
        if dense:
            return self.model.query(column, images=images)[0]
        return self.model.pooled(column, images)


def _draw(student: nn.Module, seeds: Sequence[int]) -> dict[str, Tensor]:
    """All parameters of K students from N(0, 0.01^2), stacked: name -> ``(K, ...)``."""
    weights = {
        name: torch.empty((len(seeds), *parameter.shape), device=parameter.device)
        for name, parameter in student.named_parameters()
    }
    for k, seed in enumerate(seeds):
        generator = torch.Generator(next(student.parameters()).device).manual_seed(seed)
        for stacked in weights.values():
            stacked[k].normal_(0, INITIAL_STD, generator=generator)
    return {name: stacked.requires_grad_() for name, stacked in weights.items()}
