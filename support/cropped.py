"""The proposal convolution of MMN, with the result of `mmn.Convolution` in less time.

The published formula pads the map once, for all L layers of kernel k, so that it shrinks back to
N x N (after the first of eight layers with kernel 5 the map of Charades-STA is 44 x 44):

    x_0 = pad(X^m, (k - 1) L / 2)
    x_l = relu(norm_l(conv_l(x_{l-1}))) * w_l,    w_l = 1 / n_l where n_l > 0, else 0
    n_l = number of valid cells under the kernel; a cell is valid for layer l + 1 where n_l > 0

A cell that no candidate moment has reached yet is 0 before a layer, and the layer's bias after its
convolution. So only the middle of each map is computed here: it grows by k - 1 cells a layer until
it has the published size. BatchNorm accounts for the missing cells in closed form, and for the maps
of all processes of torchrun. Outputs, gradients and running statistics equal those of the published
formula up to rounding (tests/test_mmn.py).
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support import parallel


class Convolution(nn.Module):
    """Arguments as of mmn.Convolution, in whose place MMN takes it.

    candidates  [N, N] bool, True = a candidate moment; kernel k; layers L"""

    def __init__(self, candidates: Tensor, kernel: int, layers: int):
        super().__init__()
        N = len(candidates)
        grow = kernel - 1
        valid = candidates[None, None].float()                          # [1, 1, N, N]
        window = torch.ones(1, 1, kernel, kernel, device=valid.device)
        self.sides = []                         # of the published maps
        self.padding = []
        before = N                              # side of the middle before and after a layer
        for i in range(layers):
            side = N + grow * (layers - 1 - i)
            # the middle grows while the published map shrinks, until they are the same
            after = min(side, N + grow * (i + 1))
            self.sides.append(side)
            self.padding.append((after - before + grow) // 2)
            before = after
            count = F.conv2d(valid, window, padding=self.padding[i])    # [1, 1, n, n]
            valid = (count > 0).float()
            self.register_buffer(f"weight{i}", valid / count.clamp(min=1), persistent=False)

    def forward(self, x: Tensor, convs: nn.ModuleList, norms: nn.ModuleList) -> Tensor:
        """[B, D, N, N] -> [B, C, N, N]."""
        for i, conv in enumerate(convs):
            x = F.conv2d(x, conv.weight, conv.bias, padding=self.padding[i])    # [B, C, n, n]
            x = batch_norm(norms[i], x, conv.bias, self.sides[i])
            x = F.relu(x) * self.get_buffer(f"weight{i}")
        return x


def batch_norm(norm: nn.BatchNorm2d, x: Tensor, around: Tensor, side: int) -> Tensor:
    """BatchNorm of maps of `side` x `side` cells, of which x [B, C, n, n] is the middle and every
    other cell holds `around` [C]."""
    B, _, n, _ = x.shape
    outside = side ** 2 - n ** 2                # cells that are not computed, per map and channel
    # evaluation uses the running statistics, which count all cells already
    if not norm.training or outside == 0 and parallel.size() == 1:
        return norm(x)
    # subtle: processes may have different numbers of videos, so sums are added up, not means
    count = parallel.total(torch.tensor(float(B * side ** 2), device=x.device))
    mean = parallel.total(x.sum((0, 2, 3)) + B * outside * around) / count      # [C]
    x = x - mean[:, None, None]
    var = parallel.total(x.square().sum((0, 2, 3))
                         + B * outside * (around - mean).square()) / count      # [C]
    with torch.no_grad():
        norm.num_batches_tracked += 1
        norm.running_mean.lerp_(mean, norm.momentum)
        # as in torch, the running variance is the unbiased one
        norm.running_var.lerp_(var * count / (count - 1), norm.momentum)
    scale = norm.weight * (var + norm.eps).rsqrt()
    return x * scale[:, None, None] + norm.bias[:, None, None]
