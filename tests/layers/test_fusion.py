"""HBFormer's fusion blocks against their formulas; their values are pinned by tests/models/test_hbformer_parity.py."""

import pytest
import torch
from torch.nn import functional as F

from medvit.layers.fusion import DSPP, ECA, LRD, MFF, GeometryAligner, MixedSeparableConv


def randomised(module, seed=0):
    """The module in evaluation mode with parameters and running statistics away from their initial values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in [*module.parameters(), *module.buffers()]:
            if value.is_floating_point():
                value.add_(torch.rand(value.shape, generator=generator) / 3)
    return module.eval()


def image(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def normalised(x, norm):
    """Batch norm in evaluation mode, by its formula."""
    mean, var, weight, bias = (
        v.reshape(-1, *[1] * (x.dim() - 2)) for v in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def inflated(deep, flat):
    """Load 2D weights into a 3D module: wide kernels act within the slice, at the middle of their first axis."""
    state = {}
    for name, value in deep.state_dict().items():
        state[name] = given = flat.state_dict()[name]
        if value.dim() > given.dim():
            state[name] = torch.zeros_like(value)
            state[name][:, :, value.shape[2] // 2] = given
    deep.load_state_dict(state)
    return deep.eval()


def test_lrd_adds_the_projected_input_before_the_last_activation():
    block, x = randomised(LRD(2, 3, 5)), image(2, 3, 7, 6)
    y = F.leaky_relu(normalised(F.conv2d(x, block.conv1.weight, padding=1), block.norm1), 0.01)
    y = normalised(F.conv2d(y, block.conv2.weight), block.norm2) + F.conv2d(x, block.shortcut.weight)
    torch.testing.assert_close(block(x), torch.where(y > 0, y, 0.01 * y), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_channel_attention_sees_each_channels_neighbours(rank):
    attention, x = ECA(), image(2, 4, *[3] * rank)
    with torch.no_grad():
        attention.conv.weight.copy_(torch.tensor([[[1.0, 0.0, 2.0]]]))
    means = x.flatten(2).mean(2)
    for c in range(4):
        gate = (means[:, c - 1] if c else 0) + 2 * (means[:, c + 1] if c < 3 else torch.zeros(2))
        expected = x[:, c] * torch.sigmoid(gate).reshape(-1, *[1] * rank)
        torch.testing.assert_close(attention(x)[:, c], expected, rtol=0, atol=1e-6)


# --- experts


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_mixed_kernels_are_the_mixture_of_the_experts_forward_and_backward(rank):
    conv, x = MixedSeparableConv(rank, 6, 5, dilation=2, experts=3), image(2, 6, *[7, 5, 4][:rank])
    weights = image(2, 3, seed=1)
    results = []
    for run in (conv._depthwise_each, conv._depthwise_mixed):
        inputs = [x.clone().requires_grad_(), weights.clone().requires_grad_(), *conv.depthwise.parameters()]
        out = run(inputs[0], inputs[1])
        results.append([out, *torch.autograd.grad((out * image(*out.shape, seed=2)).sum(), inputs)])
    for each, mixed in zip(*results, strict=True):
        torch.testing.assert_close(mixed, each, rtol=0, atol=1e-5)


def test_experts_are_weighed_twice():
    conv, x = randomised(MixedSeparableConv(2, 4, 3, dilation=4, experts=2)), image(2, 4, 6, 6)
    weights = torch.tensor([[0.3, 0.7], [1.0, 0.0]])
    per_expert = weights[:, :, None, None, None].unbind(1)
    depthwise = [F.conv2d(x, expert.weight, padding=4, dilation=4, groups=4) for expert in conv.depthwise]
    y = sum(w * out for w, out in zip(per_expert, depthwise, strict=True))
    z = sum(w * F.conv2d(y, expert.weight) for w, expert in zip(per_expert, conv.pointwise, strict=True))
    z = normalised(z, conv.norm)
    torch.testing.assert_close(conv(x, weights), z * torch.sigmoid(z), rtol=0, atol=1e-5)


def test_graphs_take_any_batch():
    conv, weights = randomised(MixedSeparableConv(2, 4, 3, dilation=1, experts=2)), image(5, 2)
    example = (image(2, 4, 6, 6), weights[:2])
    graph = torch.export.export(conv, example, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},) * 2).module()
    x = image(5, 4, 6, 6)
    torch.testing.assert_close(graph(x, weights), conv(x, weights), rtol=0, atol=1e-5)


# --- the pyramid


def test_the_pyramid_weighs_branches_and_experts_by_gates_of_the_means():
    block, x = randomised(DSPP(2, 16, 6, rates=(1, 2), experts=3)), image(2, 16, 5, 8)
    means = x.mean((2, 3))

    def gate(layers):
        hidden = F.relu(F.linear(means, layers[0].weight.flatten(1), layers[0].bias))
        return F.linear(hidden, layers[2].weight.flatten(1), layers[2].bias).softmax(1)

    branches, experts = gate(block.branch_gate), gate(block.expert_gate)
    assert branches.shape == (2, 2)
    assert experts.shape == (2, 3)
    out = [branch(x, experts) * branches[:, i, None, None, None] for i, branch in enumerate(block.branches)]
    out = F.conv2d(block.attention(torch.cat(out, 1)), block.fuse.weight)
    torch.testing.assert_close(block(x), normalised(out, block.norm), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("channels", "hidden"), [(64, 8), (23, 2), (8, 1), (3, 1)])
def test_gates_have_an_eighth_of_the_channels_and_at_least_one(channels, hidden):
    assert DSPP(2, channels, 4).branch_gate[0].out_channels == hidden
    assert GeometryAligner(2, channels).gate[0].out_features == hidden


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_fusion_doubles_the_coarse_map(rank):
    block = randomised(MFF(rank, 6, 4, 5))
    coarse, skip = image(2, 6, *[3, 2, 4][:rank]), image(2, 4, *[6, 4, 8][:rank])
    joined = torch.cat((block.up(coarse), skip), 1)
    expected = normalised(F.relu(block.dspp(block.lrd(joined))), block.norm)
    out = block(coarse, skip)
    assert out.shape == (2, 5, *skip.shape[2:])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


# --- the aligner


def test_the_aligner_starts_with_sobels_kernels():
    across, along = GeometryAligner(2, 3).edges
    assert across.weight[1, 0].tolist() == [[-1, -2, -1], [0, 0, 0], [1, 2, 1]]
    assert torch.equal(along.weight[2, 0], across.weight[0, 0].T)
    for axis, edge in enumerate(GeometryAligner(3, 2).edges):
        ramp = torch.arange(5.0).reshape([5 if a == axis else 1 for a in range(3)]).expand(5, 5, 5)
        response = edge(ramp[None, None].expand(1, 2, 5, 5, 5))[..., 2, 2, 2]
        assert response.tolist() == [[32, 32]]  # twice the slope, (1 + 2 + 1) ** 2 of it


def test_the_aligner_gates_channels_by_mean_and_edges():
    block, x = randomised(GeometryAligner(2, 3)), image(2, 3, 6, 5)
    gy, gx = (F.conv2d(x, edge.weight, padding=1, groups=3) for edge in block.edges)
    means = (x + (gx**2 + gy**2).sqrt()).mean((2, 3))
    gate = torch.sigmoid(F.relu(means @ block.gate[0].weight.T) @ block.gate[2].weight.T)
    torch.testing.assert_close(block(x), x * gate[:, :, None, None], rtol=0, atol=1e-5)


def test_a_flat_image_gives_the_aligner_finite_gradients():
    block, x = GeometryAligner(2, 8), torch.zeros(1, 8, 5, 5, requires_grad=True)
    block(x).sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in block.parameters())


# --- all of them


@pytest.mark.parametrize(
    "build",
    [lambda rank: LRD(rank, 4, 5), lambda rank: DSPP(rank, 4, 5), lambda rank: MixedSeparableConv(rank, 4, 5, 2, 4)],
)
def test_depth_one_is_2d_with_the_same_weights(build):
    flat = randomised(build(2))
    deep, x = inflated(build(3), flat), image(2, 4, 9, 7)
    more = (torch.softmax(image(2, 4, seed=1), 1),) if isinstance(flat, MixedSeparableConv) else ()
    torch.testing.assert_close(deep(x[:, :, None], *more), flat(x, *more)[:, :, None], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [2, 3])
def test_every_parameter_gets_a_gradient(rank):
    torch.manual_seed(0)
    block = MFF(rank, 16, 8, 8).train()  # gates of one hidden unit
    out = block(image(2, 16, *[4] * rank), image(2, 8, *[8] * rank))
    (out * image(*out.shape, seed=1)).sum().backward()
    assert [n for n, p in block.named_parameters() if p.grad is None or not p.grad.any()] == []
