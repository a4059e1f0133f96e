"""Small versions of well-known PyTorch architectures, for `zoo.py`: up to 300,000 parameters each.

Images are (n, 3, 32, 32), sequences have 16 steps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (PyTorch's own name for it)

CLASSES = 10
VOCABULARY = 100
LENGTH = 16


def conv_bn(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution without bias and its batch norm."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)
    )


class Head(nn.Sequential):
    """Global average pooling and a linear classifier."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


class ResidualBlock(nn.Module):
    """The basic block of ResNet."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv_bn(inputs, outputs, 3, stride), conv_bn(outputs, outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut: nn.Module = nn.Identity() if same else conv_bn(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return `relu(shortcut(x) + branch(x))`."""
        return F.relu(self.shortcut(x) + self.conv2(F.relu(self.conv1(x))))


def resnet() -> nn.Module:
    """ResNet with its max pooling."""
    return nn.Sequential(
        conv_bn(3, 24, 7, 2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        ResidualBlock(24, 24, 1),
        ResidualBlock(24, 48, 2),
        ResidualBlock(48, 64, 2),
        Head(64),
    )


class SqueezeExcite(nn.Module):
    """A gate per channel, of the channels' means."""

    def __init__(self, width: int, activation: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(width, width // 4, 1), nn.Conv2d(width // 4, width, 1)
        self.activation, self.gate = activation, gate

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` scaled by the gates."""
        return x * self.gate(self.expand(self.activation(self.reduce(x.mean((2, 3), keepdim=True)))))


class InvertedResidual(nn.Module):
    """The block of MobileNetV3 and EfficientNet: expand, depthwise, squeeze and excite, project."""

    def __init__(
        self, widths: tuple[int, int], stride: int, activation: type[nn.Module], gate: type[nn.Module]
    ) -> None:
        super().__init__()
        inputs, outputs = widths
        hidden = 4 * inputs
        reduced = nn.ReLU() if gate is nn.Hardsigmoid else nn.SiLU()
        self.branch = nn.Sequential(
            conv_bn(inputs, hidden, 1),
            activation(),
            conv_bn(hidden, hidden, 5, stride, groups=hidden),
            activation(),
            SqueezeExcite(hidden, reduced, gate()),
            conv_bn(hidden, outputs, 1),
        )
        self.same = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Return the branch, with a shortcut where shapes allow it."""
        return x + self.branch(x) if self.same else self.branch(x)


def _inverted_residuals(activation: type[nn.Module], gate: type[nn.Module]) -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 16, 3, 2),
        activation(),
        InvertedResidual((16, 16), 1, activation, gate),
        InvertedResidual((16, 24), 2, activation, gate),
        InvertedResidual((24, 24), 1, activation, gate),
        conv_bn(24, 96, 1),
        activation(),
        Head(96),
    )


def mobilenet() -> nn.Module:
    """MobileNetV3: HardSwish and HardSigmoid."""
    return _inverted_residuals(nn.Hardswish, nn.Hardsigmoid)


def efficientnet() -> nn.Module:
    """EfficientNet: SiLU and Sigmoid."""
    return _inverted_residuals(nn.SiLU, nn.Sigmoid)


class ConvNextBlock(nn.Module):
    """Depthwise 7x7, LayerNorm over channels, MLP with GELU, layer scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.scale = nn.Parameter(0.1 + 0.1 * torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return `x + scale * mlp(norm(depthwise(x)))`, channels last inside."""
        y = self.mlp(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))
        return x + (self.scale * y).permute(0, 3, 1, 2)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over axis 1."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised channels."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    """ConvNeXt of two stages."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 4, 4),
        ChannelNorm(32),
        ConvNextBlock(32),
        ConvNextBlock(32),
        ChannelNorm(32),
        nn.Conv2d(32, 64, 2, 2),
        ConvNextBlock(64),
        Head(64),
    )


class Attention(nn.Module):
    """Multi-head self-attention, written with MatMul and Softmax; keys and values perhaps of a smaller image."""

    def __init__(self, width: int, heads: int, reduction: int = 1) -> None:
        super().__init__()
        self.heads, self.reduction = heads, reduction
        self.query, self.output = nn.Linear(width, width), nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        if reduction > 1:
            self.reduce, self.norm = nn.Conv2d(width, width, reduction, reduction), nn.LayerNorm(width)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Attention of (n, tokens, width); `bias` is added to the scores."""
        n, tokens, width = x.shape
        source = self._reduced(x) if self.reduction > 1 else x
        q = self.query(x).reshape(n, tokens, self.heads, width // self.heads).transpose(1, 2)
        pairs = self.key_value(source).reshape(n, -1, 2, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        k, v = pairs[0], pairs[1]
        scores = q @ k.transpose(-2, -1) / math.sqrt(width // self.heads)
        if bias is not None:
            scores = scores + bias
        return self.output((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, tokens, width))

    def _reduced(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        side = math.isqrt(tokens)
        image = x.transpose(1, 2).reshape(n, width, side, side)
        return self.norm(self.reduce(image).flatten(2).transpose(1, 2))


class TransformerBlock(nn.Module):
    """Attention and MLP, each behind a LayerNorm and with a shortcut."""

    def __init__(self, width: int, heads: int, reduction: int = 1) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, reduction)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Tokens in, tokens out."""
        x = x + self.attention(self.norm1(x), bias)
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """ViT with a class token; PyTorch's own encoder layer, so that its fused attention is exported too."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.position = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        layers = [
            nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(2)
        ]
        self.blocks = nn.ModuleList(layers)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits from the class token."""
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], 1) + self.position
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens)[:, 0])


class SwinBlock(nn.Module):
    """Attention within windows of 4x4, rolled by `shift`, with a bias by relative position."""

    def __init__(self, width: int, heads: int, side: int, shift: int) -> None:
        super().__init__()
        self.window, self.shift, self.side = 4, shift, side
        self.block = TransformerBlock(width, heads)
        self.table = nn.Parameter(torch.randn((2 * self.window - 1) ** 2, heads) * 0.2)
        points = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")).flatten(1)
        apart = (points[:, :, None] - points[:, None, :] + 3).permute(1, 2, 0)
        self.register_buffer("index", apart[..., 0] * 7 + apart[..., 1])
        self.register_buffer("mask", self._mask())

    def _mask(self) -> Tensor:
        """Keeps what the roll brought together apart."""
        regions = torch.zeros(1, self.side, self.side, 1)
        if self.shift:
            cuts = (slice(0, -self.window), slice(-self.window, -self.shift), slice(-self.shift, None))
            for number, (rows, columns) in enumerate((r, c) for r in cuts for c in cuts):
                regions[:, rows, columns] = number
        parts = self._split(regions).squeeze(-1)
        return (parts[:, None, :] != parts[:, :, None]).float() * -100.0

    def _split(self, x: Tensor) -> Tensor:
        n, side, _, width = x.shape
        count = side // self.window
        x = x.reshape(n, count, self.window, count, self.window, width)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, self.window**2, width)

    def forward(self, x: Tensor) -> Tensor:
        """Channels last in and out."""
        n, side, _, width = x.shape
        count = side // self.window
        windows = self._split(torch.roll(x, (-self.shift, -self.shift), (1, 2)) if self.shift else x)
        bias = self.table[self.index.reshape(-1)].reshape(1, 16, 16, -1).permute(0, 3, 1, 2)
        if self.shift:
            bias = bias + self.mask[:, None].repeat(n, 1, 1, 1)
        windows = self.block(windows, bias).reshape(n, count, count, self.window, self.window, width)
        merged = windows.permute(0, 1, 3, 2, 4, 5).reshape(n, side, side, width)
        return torch.roll(merged, (self.shift, self.shift), (1, 2)) if self.shift else merged


class Swin(nn.Module):
    """Swin: patches, two blocks, patch merging, one block."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.stage = nn.Sequential(SwinBlock(width, 4, 8, 0), SwinBlock(width, 4, 8, 2))
        self.norm, self.merge = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)
        self.last = SwinBlock(2 * width, 4, 4, 0)
        self.head = nn.Linear(2 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits from the mean of the tokens."""
        x = self.stage(self.patches(x).permute(0, 2, 3, 1))
        corners = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        return self.head(self.last(self.merge(self.norm(torch.cat(corners, -1)))).mean((1, 2)))


class SegFormer(nn.Module):
    """Overlapping patches, attention to a reduced image, and a decoder that enlarges and joins the stages."""

    def __init__(self) -> None:
        super().__init__()
        self.embed1, self.embed2 = nn.Conv2d(3, 32, 7, 4, 3), nn.Conv2d(32, 64, 3, 2, 1)
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(64)
        self.block1, self.block2 = TransformerBlock(32, 2, 4), TransformerBlock(64, 4, 2)
        self.project1, self.project2 = nn.Conv2d(32, 32, 1), nn.Conv2d(64, 32, 1)
        self.fuse, self.classify = conv_bn(64, 32, 1), nn.Conv2d(32, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits per pixel of a quarter of the size."""
        first = self._stage(self.embed1(x), self.norm1, self.block1)
        second = self._stage(self.embed2(first), self.norm2, self.block2)
        large = F.interpolate(self.project2(second), size=(8, 8), mode="bilinear", align_corners=False)
        return self.classify(F.relu(self.fuse(torch.cat([self.project1(first), large], 1))))

    def _stage(self, image: Tensor, norm: nn.Module, block: nn.Module) -> Tensor:
        n, width, height, columns = image.shape
        tokens = block(norm(image.flatten(2).transpose(1, 2)))
        return tokens.transpose(1, 2).reshape(n, width, height, columns)


class UNet(nn.Module):
    """Two levels with transposed convolutions and concatenated shortcuts."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = self._double(3, 16), self._double(16, 32)
        self.bottom = self._double(32, 64)
        self.up2, self.up1 = nn.ConvTranspose2d(64, 32, 2, 2), nn.ConvTranspose2d(32, 16, 2, 2)
        self.merge2, self.merge1 = self._double(64, 32), self._double(32, 16)
        self.classify = nn.Conv2d(16, 3, 1)

    @staticmethod
    def _double(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(conv_bn(inputs, outputs), nn.ReLU(), conv_bn(outputs, outputs), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Logits per pixel."""
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        bottom = self.bottom(F.max_pool2d(second, 2))
        second = self.merge2(torch.cat([self.up2(bottom), second], 1))
        return self.classify(self.merge1(torch.cat([self.up1(second), first], 1)))


class Recurrent(nn.Module):
    """A GRU or LSTM over features, and a classifier of its last step."""

    def __init__(self, cell: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 32)
        self.cell = cell(32, 48, batch_first=True)
        self.head = nn.Linear(48, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of (n, 16, 12)."""
        return self.head(self.cell(F.relu(self.embed(x)))[0][:, -1])


class Yolo(nn.Module):
    """Two scales, nearest upsampling, Split and Concat, and boxes decoded on a grid."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 16, 3, 2), nn.SiLU(), conv_bn(16, 32, 3, 2), nn.SiLU())
        self.split, self.join = conv_bn(16, 16), conv_bn(48, 32, 1)
        self.deep = nn.Sequential(conv_bn(32, 64, 3, 2), nn.SiLU())
        self.pools = nn.ModuleList([nn.MaxPool2d(5, 1, 2) for _ in range(2)])
        self.squeeze = conv_bn(192, 32, 1)
        self.heads = nn.ModuleList([nn.Conv2d(64, 5 + CLASSES, 1), nn.Conv2d(32, 5 + CLASSES, 1)])

    def forward(self, x: Tensor) -> Tensor:
        """Boxes, (n, 80, 15): centre, size, confidence, classes."""
        x = self.stem(x)
        left, right = x.chunk(2, 1)
        near = F.silu(self.join(torch.cat([left, right, F.silu(self.split(right))], 1)))
        far = self.deep(near)
        once = self.pools[0](far)
        far = F.silu(self.squeeze(torch.cat([far, once, self.pools[1](once)], 1)))
        near = torch.cat([F.interpolate(far, scale_factor=2.0, mode="nearest"), near], 1)
        levels = ((self.heads[0](near), 8), (self.heads[1](far), 4))
        return torch.cat([self._decode(level, side) for level, side in levels], 1)

    def _decode(self, raw: Tensor, side: int) -> Tensor:
        stride = 32 // side
        steps = torch.arange(side, dtype=torch.float32)
        grid = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1).reshape(1, -1, 2)
        values = raw.flatten(2).transpose(1, 2).sigmoid()
        centre, size, rest = values.split([2, 2, 1 + CLASSES], -1)
        return torch.cat([(centre * 2 - 0.5 + grid) * stride, (size * 2) ** 2 * stride, rest], -1)


class Bert(nn.Module):
    """Token, position and segment embeddings, masked attention, and a classifier of the first token."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(LENGTH, width)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList([TransformerBlock(width, 4) for _ in range(2)])
        self.pool, self.head = nn.Linear(width, width), nn.Linear(width, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits of (n, 16) token ids and mask."""
        steps = torch.arange(LENGTH)[None]
        x = self.norm(self.words(input_ids) + self.positions(steps))
        bias = (1.0 - attention_mask[:, None, None].float()) * -10000.0
        for block in self.blocks:
            x = block(x, bias)
        return self.head(torch.tanh(self.pool(x[:, 0])))


class LanguageModel(nn.Module):
    """A causal transformer whose output projection is its embedding table."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.position = nn.Parameter(torch.randn(LENGTH, width) * 0.02)
        self.blocks = nn.ModuleList([TransformerBlock(width, 4) for _ in range(2)])
        self.norm = nn.LayerNorm(width)
        self.register_buffer("causal", torch.full((LENGTH, LENGTH), -10000.0).triu(1))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of the next token at every step."""
        x = self.embedding(input_ids) + self.position
        for block in self.blocks:
            x = block(x, self.causal)
        return F.linear(self.norm(x), self.embedding.weight)


def group_norm() -> nn.Module:
    """GroupNorm and InstanceNorm."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1),
        nn.GroupNorm(8, 32),
        nn.ReLU(),
        nn.Conv2d(32, 48, 3, 2, 1),
        nn.InstanceNorm2d(48, affine=True),
        nn.LeakyReLU(0.1),
        Head(48),
    )


def prelu_elu() -> nn.Module:
    """PReLU, ELU, Softplus and average pooling."""
    return nn.Sequential(
        conv_bn(3, 24),
        nn.PReLU(24),
        nn.AvgPool2d(2),
        conv_bn(24, 48, 3, 2),
        nn.ELU(),
        conv_bn(48, 48, 1),
        nn.Softplus(),
        Head(48),
    )


@torch.jit.script
def _branch(x: Tensor) -> Tensor:
    """One of two scales, by the data."""
    if bool(x.mean() > 0):  # noqa: SIM108 (TorchScript makes an If of a statement)
        y = x * 2.0
    else:
        y = x * 0.5
    return y


@torch.jit.script
def _loop(x: Tensor, weight: Tensor, times: int) -> Tensor:
    """Apply a matrix several times."""
    for _ in range(times):
        x = torch.tanh(x @ weight)
    return x


class Branching(nn.Module):
    """A convolutional net with an If: scripted control flow, or `torch.cond` for the exporter that traces it."""

    def __init__(self, scripted: bool) -> None:
        super().__init__()
        self.scripted = scripted
        self.stem = nn.Sequential(conv_bn(3, 24, 3, 2), nn.ReLU())
        self.head = Head(24)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.stem(x)
        if self.scripted:
            return self.head(_branch(x))
        return self.head(torch.cond(x.mean() > 0, lambda y: y * 2.0, lambda y: y * 0.5, (x,)))


class Looping(nn.Module):
    """An MLP with a Loop around a matrix; for the TorchScript exporter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(12, 32), nn.Linear(32, CLASSES)
        self.weight = nn.Parameter(torch.randn(32, 32) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of (n, 12)."""
        return self.head(_loop(F.relu(self.first(x)), self.weight, x.shape[1] // 4))


def randomise_norms(model: nn.Module) -> None:
    """Give normalisations scales and shifts that differ by channel."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm | nn.InstanceNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.2)


def settle(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Take the statistics of every batch norm from the data that reaches it, and leave training mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches
    model.train()
    with torch.no_grad():
        model(*inputs)
    model.eval()
