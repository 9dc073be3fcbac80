"""Adversarial distillation (Sauer et al., 2023) of a flow's forty network evaluations into one.

Three networks: a teacher that stays as it is, a student that begins as its copy, a critic.

    python examples/flow_matching.py --workers 2
    python examples/distill.py --teacher runs/flow_matching --workers 2
"""

import argparse
import copy
from pathlib import Path

import ganglion
import torch
import torch.nn.functional as F
from flow_matching import FlowMatching, UNet, guided
from torch import Tensor, nn


class Critic(nn.Module):
    """Logits (n) of images (n, 1, 28, 28), given their classes (n) (Miyato and Koyama, 2018, equation 3)."""

    def __init__(self, width: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 7),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
        )
        self.logit = nn.Linear(4 * width, 1)
        self.classes = nn.Embedding(classes, 4 * width)

    def forward(self, images: Tensor, classes: Tensor) -> Tensor:
        features = self.features(images)
        return self.logit(features).squeeze(1) + (features * self.classes(classes)).sum(dim=1)


class Distillation(ganglion.Objective):
    """Student's images against those of the teacher, and against real ones (equations 1 to 4)."""

    WEIGHT, PENALTY = 2.5, 0.1
    phases = [
        ganglion.Phase("criticise", updates=["critic"], optimizer=ganglion.Adam(5e-4, beta1=0.0, beta2=0.99)),
        ganglion.Phase("distill", updates=["student"], optimizer=ganglion.Adam(2e-4, beta1=0.0, beta2=0.99)),
    ]
    average = ["student"]
    reduction = "mean"

    def __init__(self, teacher: UNet, width: int = 32, guidance: float = 2.0) -> None:
        super().__init__()
        self.guidance = guidance
        self.student = copy.deepcopy(teacher)
        self.teacher = teacher.requires_grad_(False)
        self.critic = Critic(width)

    def drawn(self, noise: Tensor, classes: Tensor) -> Tensor:
        """Student's images (n, 1, 28, 28): one step of Euler's method."""
        return noise + self.student(noise, noise.new_zeros(len(noise)), classes)

    def criticise(self, batch: ganglion.Batch, draw: ganglion.Draw) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            fake = self.drawn(draw.normal(batch.images.shape), batch.classes)
        real = batch.images.requires_grad_()
        real_logits, fake_logits = self.critic(real, batch.classes), self.critic(fake, batch.classes)
        (gradient,) = torch.autograd.grad(real_logits.sum(), real, create_graph=True)
        penalty = self.PENALTY * gradient.square().flatten(1).sum(dim=1).mean()
        hinge = F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()
        return hinge + penalty, {"real": real_logits.mean(), "fake": fake_logits.mean(), "penalty": penalty}

    def distill(self, batch: ganglion.Batch, draw: ganglion.Draw) -> tuple[Tensor, dict[str, Tensor]]:
        n, shape = len(batch), batch.images.shape
        classes = draw.integers(n, 0, self.teacher.none)
        fake = self.drawn(draw.normal(shape), classes)
        # The teacher sees the student's images with noise, and says where they should be.
        times = draw.uniform(n)
        with torch.no_grad():
            left = (1 - times)[:, None, None, None]
            noisy = torch.lerp(fake, draw.normal(shape), left)
            target = noisy + left * guided(self.teacher, noisy, times, classes, self.guidance)
        # The more noise, the less it counts.
        distance = (times * (fake - target).square().flatten(1).mean(dim=1)).mean()
        adversarial = -self.critic(fake, classes).mean()
        return adversarial + self.WEIGHT * distance, {"adversarial": adversarial, "distance": distance}

    def sample(self, draw: ganglion.Draw, n: int, classes: Tensor) -> Tensor:
        return self.drawn(draw.normal(n, 1, 28, 28), classes).clamp(-1, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path, default=Path("runs/flow_matching"), help="run of flow_matching.py")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--data", default="mnist-10k", help="28 x 28 grey images with classes, such as folder:pictures")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/distill"))
    parser.add_argument("--small", action="store_true", help="tiny networks, as those of flow_matching.py --small")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    flow = FlowMatching(width=4, levels=2, euler_steps=2) if arguments.small else FlowMatching()
    flow.load_state_dict(ganglion.load(arguments.teacher).state_dict(average=True))
    distillation = Distillation(flow.velocity, width=4 if arguments.small else 32)
    arguments.run_dir.parent.mkdir(parents=True, exist_ok=True)
    data = ganglion.images(1, 28, classes=10)
    package = ganglion.export(distillation, arguments.run_dir.with_suffix(".pt2"), data=data, shard_batch=16)
    run = ganglion.train(
        package, workers=arguments.workers, data=arguments.data, run_dir=arguments.run_dir, steps=arguments.steps
    )
    print(ganglion.sample(run).path)


if __name__ == "__main__":
    main()
