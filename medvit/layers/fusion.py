"""Fusion of feature maps of two scales as HBFormer's bridge does it, over images ``(B, C, *spatial)`` of any rank.

Zheng et al., "HBFormer: A Hybrid-Bridge Transformer for Microtumor and Miniature Organ Segmentation" (BIBM 2025);
lzeeorno/HBFormer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medvit.dims import batch_norm, conv, conv_transpose


class LRD(nn.Module):
    """Local residual block: conv 3, norm, LeakyReLU, conv 1, norm, plus the projected input, LeakyReLU; no conv bias.

    Args:
        spatial_dims: rank of the image.
        in_channels, out_channels: widths.

    Shapes: ``(B, in_channels, *spatial)`` to ``(B, out_channels, *spatial)``.
    """

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int):
        super().__init__()
        self.conv1 = conv(spatial_dims, in_channels, out_channels, 3, padding=1, bias=False)
        self.norm1 = batch_norm(spatial_dims, out_channels)
        self.conv2 = conv(spatial_dims, out_channels, out_channels, 1, bias=False)
        self.norm2 = batch_norm(spatial_dims, out_channels)
        self.shortcut = conv(spatial_dims, in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """One block; see the class."""
        out = F.leaky_relu(self.norm1(self.conv1(x)), 0.01)
        return F.leaky_relu(self.norm2(self.conv2(out)) + self.shortcut(x), 0.01)


class ECA(nn.Module):
    """Efficient channel attention: each channel is scaled by a gate that sees its two neighbours' means too.

    Shapes: ``(B, C, *spatial)`` to the same. Source: Wang et al., "ECA-Net" (CVPR 2020), with a fixed kernel of 3.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(1, 1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Gate the channels; see the class."""
        gate: Tensor = self.conv(x.flatten(2).mean(2)[:, None])[:, 0].sigmoid()
        return x * gate.reshape(*gate.shape, *[1] * (x.dim() - 2))


class MixedSeparableConv(nn.Module):
    """Depthwise-separable convolution mixed of experts, batch norm, SiLU; the caller weighs the experts per image.

    The experts' depthwise outputs are mixed, then their pointwise kernels with the same weights: being linear, that is
    the mixture of the pointwise outputs.

    Args:
        spatial_dims: rank of the image.
        in_channels, out_channels: widths.
        dilation: of the 3-wide depthwise kernels.
        experts: their number.
    """

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int, dilation: int, experts: int):
        super().__init__()
        self.dilation = dilation
        near = {"padding": dilation, "dilation": dilation, "groups": in_channels, "bias": False}
        self.depthwise = nn.ModuleList(conv(spatial_dims, in_channels, in_channels, 3, **near) for _ in range(experts))
        self.pointwise = nn.ModuleList(
            conv(spatial_dims, in_channels, out_channels, 1, bias=False) for _ in range(experts)
        )
        self.norm = batch_norm(spatial_dims, out_channels)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """``(B, in_channels, *spatial)`` and ``(B, experts)`` to ``(B, out_channels, *spatial)``."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            y = self._depthwise_each(x, weights)
        else:
            y = self._depthwise_mixed(x, weights)
        kernels = torch.stack([kernel.flatten(1) for kernel in self.pointwise.parameters()])
        mixed = torch.einsum("be,eoc->boc", weights, kernels) @ y.flatten(2)
        return F.silu(self.norm(mixed.reshape(*mixed.shape[:2], *y.shape[2:])))

    def _depthwise_each(self, x: Tensor, weights: Tensor) -> Tensor:
        """The definition: every expert runs, the results are mixed. For graphs, which must take any batch."""
        per_expert = weights.to(x.dtype).reshape(*weights.shape, *[1] * (x.dim() - 1)).unbind(1)
        return torch.stack([w * expert(x) for w, expert in zip(per_expert, self.depthwise, strict=True)]).sum(0)

    def _depthwise_mixed(self, x: Tensor, weights: Tensor) -> Tensor:
        """The same for one expert's work: the kernels are mixed, and the batch's images become groups of channels."""
        kernels = torch.stack([kernel.flatten(1) for kernel in self.depthwise.parameters()])
        dims = x.dim() - 2
        mixed = torch.einsum("be,eck->bck", weights, kernels).reshape(-1, 1, *[3] * dims).to(x.dtype)
        flat, near = x.reshape(1, -1, *x.shape[2:]), [self.dilation] * dims
        out = torch.convolution(flat, mixed, None, [1] * dims, near, near, False, [0] * dims, mixed.shape[0])
        return out.reshape(x.shape)


class DSPP(nn.Module):
    """Dilated separable pyramid: branches of several dilations, fused by channel attention.

    Two gates, made of the input's means, weigh the branches and the experts within each branch.

    Args:
        spatial_dims: rank of the image.
        in_channels, out_channels: widths.
        rates: dilation of each branch.
        experts: experts of each branch.

    Shapes: ``(B, in_channels, *spatial)`` to ``(B, out_channels, *spatial)``. Source: HBFormer's ``Med_DSPP``.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        rates: Sequence[int] = (1, 4, 8),
        experts: int = 4,
    ):
        super().__init__()
        self.branch_gate = self._gate(spatial_dims, in_channels, len(rates))
        self.expert_gate = self._gate(spatial_dims, in_channels, experts)
        self.branches = nn.ModuleList(
            MixedSeparableConv(spatial_dims, in_channels, out_channels, rate, experts) for rate in rates
        )
        self.attention = ECA()
        self.fuse = conv(spatial_dims, len(rates) * out_channels, out_channels, 1, bias=False)
        self.norm = batch_norm(spatial_dims, out_channels)

    @staticmethod
    def _gate(spatial_dims: int, channels: int, choices: int) -> nn.Sequential:
        hidden = max(1, channels // 8)
        squeeze = conv(spatial_dims, channels, hidden, 1)
        # means differ little between images: in a narrow block the one hidden unit may be off for all of them, for ever
        nn.init.ones_(dict(squeeze.named_parameters())["bias"])
        return nn.Sequential(squeeze, nn.ReLU(), conv(spatial_dims, hidden, choices, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Fuse the branches; see the class."""
        means = x.mean(tuple(range(2, x.dim())), keepdim=True)
        of_branches = self.branch_gate(means).softmax(1)
        of_experts = self.expert_gate(means).softmax(1).flatten(1)
        out = [branch(x, of_experts) * of_branches[:, i : i + 1] for i, branch in enumerate(self.branches)]
        fused: Tensor = self.norm(self.fuse(self.attention(torch.cat(out, 1))))
        return fused


class MFF(nn.Module):
    """Multi-scale feature fusion: a coarse map doubled in size, joined with a skip; LRD, DSPP, ReLU, batch norm.

    Args:
        spatial_dims: rank of the image.
        in_channels: width of the coarse map.
        skip_channels: width of the skip.
        out_channels: width of the result.
    """

    def __init__(self, spatial_dims: int, in_channels: int, skip_channels: int, out_channels: int):
        super().__init__()
        self.up = conv_transpose(spatial_dims, in_channels, out_channels, 2, stride=2)
        self.lrd = LRD(spatial_dims, out_channels + skip_channels, out_channels)
        self.dspp = DSPP(spatial_dims, out_channels, out_channels)
        self.norm = batch_norm(spatial_dims, out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """``(B, in_channels, *grid)``, ``(B, skip_channels, *2 grid)`` to ``(B, out_channels, *2 grid)``."""
        out: Tensor = self.norm(F.relu(self.dspp(self.lrd(torch.cat((self.up(x), skip), 1)))))
        return out


class GeometryAligner(nn.Module):
    """Channel gate made of each channel's mean plus its mean edge strength.

    Part of the paper, not of the published network. Edge filters start as Sobel's and are trained.

    Args:
        spatial_dims: rank of the image.
        channels: width.

    Shapes: ``(B, channels, *spatial)`` to the same.
    """

    def __init__(self, spatial_dims: int, channels: int):
        super().__init__()
        self.edges = nn.ModuleList(
            conv(spatial_dims, channels, channels, 3, padding=1, groups=channels, bias=False)
            for _ in range(spatial_dims)
        )
        with torch.no_grad():
            for axis, kernel in enumerate(self.edges.parameters()):
                kernel.copy_(_sobel(spatial_dims, axis))
        hidden = max(1, channels // 8)
        self.gate = nn.Sequential(
            nn.Linear(channels, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, channels, bias=False), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Gate the channels; see the class."""
        # the norm has a gradient of 0 where the image is flat; the root of a sum of squares has none
        strength = torch.linalg.vector_norm(torch.stack([edge(x) for edge in self.edges]), dim=0)
        gate: Tensor = self.gate((x + strength).flatten(2).mean(2))
        return x * gate.reshape(*gate.shape, *[1] * (x.dim() - 2))


def _sobel(spatial_dims: int, axis: int) -> Tensor:
    """Sobel's kernel along one axis: central difference there, (1, 2, 1) along the others."""
    kernel = torch.ones(())
    for a in range(spatial_dims):
        kernel = kernel[..., None] * torch.tensor([-1.0, 0.0, 1.0] if a == axis else [1.0, 2.0, 1.0])
    return kernel
