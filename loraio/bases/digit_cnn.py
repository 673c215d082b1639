"""The small network for digits."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class DigitCNN(nn.Module):
    """Three stride-2 convolutions and one linear layer, for 28x28 grey images and ten classes; 113,162 parameters.

    Input (n, 1, 28, 28), output (n, 10) logits. The convolutions alone hold 92,672 parameters, biases included.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, kernel_size=3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(64, 128, kernel_size=3, stride=2, padding=1)
        self.fc = nn.Linear(128 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (n, 10) of images (n, 1, 28, 28)."""
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        # flatten before the activation: its gradient is then contiguous, whatever the memory format of the images
        logits: Tensor = self.fc(F.relu(self.conv3(x).flatten(1)))
        return logits
