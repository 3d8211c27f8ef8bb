"""Gates: small networks that turn the noise level into logits.

Shapes: B batch, G gates, F gate width, L layers.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PHI_WIDTH = 128
GATE_WIDTH = 512


def phi(t: Tensor, scale: float) -> Tensor:
    """Cosines and sines of ``scale * t`` at frequencies exp(-ln(1e4) k / 64): [B] -> fp32 [B, 128].

    With t in [0, 1] and scale 1, as in the authors' code, phi is almost one-dimensional; 1000 is
    what diffusion transformers use.
    """
    half = PHI_WIDTH // 2
    k = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = scale * t.float()[:, None] * torch.exp(-math.log(1e4) * k / half)  # [B, 64]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Gates(nn.Module):
    """G gates g(phi(t)) = Linear(SiLU(Linear(phi))), with stacked parameters: one product for all.

    The last layer starts at zero, so that every weight starts at 1/L.
    """

    def __init__(self, num_gates: int, num_layers: int) -> None:
        super().__init__()
        self.weight_in = nn.Parameter(torch.empty(num_gates, GATE_WIDTH, PHI_WIDTH))
        self.bias_in = nn.Parameter(torch.zeros(num_gates, GATE_WIDTH))
        self.weight_out = nn.Parameter(torch.zeros(num_gates, num_layers, GATE_WIDTH))
        self.bias_out = nn.Parameter(torch.zeros(num_gates, num_layers))
        for weight in self.weight_in:
            nn.init.xavier_uniform_(weight)

    def forward(self, features: Tensor) -> Tensor:
        """[B, 128] -> [B, G, L], in fp32."""
        with torch.autocast(features.device.type, enabled=False):
            x = torch.einsum("bp,gfp->bgf", features, self.weight_in) + self.bias_in  # [B, G, F]
            x = F.silu(x)  # [B, G, F]
            return torch.einsum("bgf,glf->bgl", x, self.weight_out) + self.bias_out  # [B, G, L]
