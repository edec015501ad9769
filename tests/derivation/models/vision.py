"""Models of images: transformers with their projections packed in all orders, diffusion, convolutions and mixers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.derivation.models.frame import (
    CLASSES,
    HIDDEN,
    ROWS,
    WIDTH,
    FeedForward,
    Patches,
    Residual,
    drawn,
    image_batch,
    model,
)

HEADS, SIZE = 8, 4


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of [B, heads, S, D]."""
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


class Packed(nn.Module):
    """A linear for queries, keys and values, which lie in it in some order."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.size = HEADS, SIZE
        self.to_qkv, self.to_out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)


class HeadsThenSize(Packed):
    """rearrange(t, "b n (h d) -> b h n d") of three chunks."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, self.size)).permute(0, 2, 1, 3) for t in self.to_qkv(x).chunk(3, dim=-1)
        )
        out: Tensor = self.to_out(attended(q, k, v).permute(0, 2, 1, 3).flatten(2))
        return out


class SizeThenHeads(Packed):
    """rearrange(t, "b n (d h) -> b h n d") of three chunks: a head's features lie apart."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (-1, self.heads)).permute(0, 3, 1, 2) for t in self.to_qkv(x).chunk(3, dim=-1))
        out: Tensor = self.to_out(attended(q, k, v).permute(0, 2, 3, 1).flatten(2))
        return out


class ThreeFirst(Packed):
    """timm's: viewed as (3, heads, size) and unbound."""

    def forward(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        q, k, v = self.to_qkv(x).reshape(B, N, 3, self.heads, self.size).permute(2, 0, 3, 1, 4).unbind(0)
        seen = functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.to_out(seen.transpose(1, 2).reshape(B, N, self.heads * self.size))
        return out


class HeadsFirst(Packed):
    """viewed as (heads, 3, size)."""

    def forward(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        qkv = self.to_qkv(x).view(B, N, self.heads, 3, self.size).permute(3, 0, 2, 1, 4)
        out: Tensor = self.to_out(
            attended(qkv[0], qkv[1], qkv[2]).transpose(1, 2).reshape(B, N, self.heads * self.size)
        )
        return out


class Merged(Packed):
    """Heads merged with the batch for bmm, as old codes do."""

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = (
            t.view(B, N, HEADS, SIZE).transpose(1, 2).reshape(B * HEADS, N, SIZE) for t in self.to_qkv(x).chunk(3, -1)
        )
        seen = torch.bmm(torch.bmm(q * 0.5, k.transpose(1, 2)).softmax(-1), v)
        out: Tensor = self.to_out(seen.view(B, HEADS, N, SIZE).transpose(1, 2).reshape(B, N, C))
        return out


class LayerScale(nn.Module):
    """CaiT's block: a learned number for each feature of what is added."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.mlp = ThreeFirst(), FeedForward()
        self.gamma1, self.gamma2 = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma1 * self.attn(self.norm1(x))
        return x + self.gamma2 * self.mlp(self.norm2(x))


class ViT(Patches):
    """With a token for the class in front."""

    def __init__(self) -> None:
        super().__init__(Residual(HeadsThenSize(), FeedForward()), Residual(HeadsThenSize(), FeedForward()))
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).transpose(1, 2) + self.place
        x = torch.cat((self.cls.expand(len(x), -1, -1), x), dim=1)
        for block in self.blocks:
            x = block(x)
        return functional.cross_entropy(self.head(self.norm(x[:, 0])), labels)


class FoldedPatches(nn.Module):
    """Patches by views and a linear, and hidden features all along."""

    def __init__(self) -> None:
        super().__init__()
        self.to_patch = nn.Sequential(nn.LayerNorm(48), nn.Linear(48, WIDTH), nn.LayerNorm(WIDTH))
        self.block, self.head = Residual(SizeThenHeads(), FeedForward()), nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        B = len(images)
        x = images.view(B, 3, 4, 4, 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(B, 16, 48)
        return functional.cross_entropy(self.head(self.block(self.to_patch(x)).mean(1)), labels)


class Time(nn.Module):
    """Sines of a time [B] to [B, 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, WIDTH))

    def forward(self, t: Tensor) -> Tensor:
        at = t[:, None] * torch.logspace(0, -3, 8, device=t.device, dtype=t.dtype)
        out: Tensor = self.net(torch.cat((at.cos(), at.sin()), dim=-1))
        return out


def noise_batch(seed: int) -> dict[str, Tensor]:
    """``{"x": [5, 16, 32], "t": [5], "y": [5, 16, 32]}``."""
    made = drawn(seed)
    x, y = (torch.randn(ROWS, 16, WIDTH, generator=made) for _ in range(2))
    return {"x": x, "t": torch.rand(ROWS, generator=made) * 10, "y": y}


class DiTBlock(nn.Module):
    """adaLN-zero: shifts, scales and gates are made of the condition."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.attn, self.mlp = ThreeFirst(), FeedForward()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time, self.blocks = Time(), nn.ModuleList(DiTBlock() for _ in range(2))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.time(t)
        for block in self.blocks:
            x = block(x, c)
        return functional.mse_loss(self.out(x), y)


class UViT(nn.Module):
    """Long skips: a linear over two streams side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.time = Time()
        self.down = nn.ModuleList(Residual(ThreeFirst(), FeedForward()) for _ in range(2))
        self.up = nn.ModuleList(Residual(ThreeFirst(), FeedForward()) for _ in range(2))
        self.skips = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x, kept = torch.cat((self.time(t)[:, None], x), dim=1), []
        for block in self.down:
            x = block(x)
            kept.append(x)
        for block, skip in zip(self.up, self.skips):
            x = block(skip(torch.cat((x, kept.pop()), dim=-1)))
        return functional.mse_loss(x[:, 1:], y)


class DoubleStream(nn.Module):
    """Flux's: two streams with weights of their own attend to both."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.mods = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(2))
        self.qkvs = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.norms = nn.ModuleList(nn.RMSNorm(SIZE) for _ in range(4))
        self.projs = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.mlps = nn.ModuleList(FeedForward() for _ in range(2))

    def forward(self, img: Tensor, txt: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        parts = []
        for at, x in enumerate((txt, img)):
            shift, scale = self.mods[at](functional.silu(c))[:, None].chunk(2, dim=-1)
            x = functional.layer_norm(x, (WIDTH,)) * (1 + scale) + shift
            q, k, v = self.qkvs[at](x).view(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
            parts.append((self.norms[2 * at](q), self.norms[2 * at + 1](k), v))
        q, k, v = (torch.cat(both, dim=2) for both in zip(*parts))
        seen = attended(q, k, v).permute(0, 2, 1, 3).flatten(2)
        txt_seen, img_seen = seen[:, : txt.shape[1]], seen[:, txt.shape[1] :]
        txt, img = txt + self.projs[0](txt_seen), img + self.projs[1](img_seen)
        return img + self.mlps[1](img), txt + self.mlps[0](txt)


class SingleStream(nn.Module):
    """Flux's: one linear for queries, keys, values and the MLP, and one for what comes of both."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.hidden_size, self.mlp_hidden_dim = HEADS, WIDTH, HIDDEN
        self.linear1 = nn.Linear(WIDTH, 3 * WIDTH + HIDDEN)
        self.linear2 = nn.Linear(WIDTH + HIDDEN, WIDTH)
        self.q_norm, self.k_norm = nn.RMSNorm(SIZE), nn.RMSNorm(SIZE)
        self.modulation = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(functional.silu(c))[:, None].chunk(3, dim=-1)
        mod = functional.layer_norm(x, (WIDTH,)) * (1 + scale) + shift
        qkv, mlp = torch.split(self.linear1(mod), [3 * self.hidden_size, self.mlp_hidden_dim], dim=-1)
        q, k, v = qkv.view(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        seen = attended(self.q_norm(q), self.k_norm(k), v).permute(0, 2, 1, 3).flatten(2)
        return x + gate * self.linear2(torch.cat((seen, functional.gelu(mlp, approximate="tanh")), 2))


class Flux(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time, self.text = Time(), nn.Parameter(torch.randn(6, WIDTH))
        self.both, self.single, self.out = DoubleStream(), SingleStream(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.time(t)
        img, txt = self.both(x, self.text.expand(len(x), -1, -1), c)
        x = self.single(torch.cat((txt, img), dim=1), c)[:, 6:]
        return functional.mse_loss(self.out(x), y)


class MixerBlock(nn.Module):
    """MLP-Mixer's: an MLP along tokens and one along features."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.tokens, self.channels = FeedForward(16), FeedForward(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        out: Tensor = x + self.channels(self.norm2(x))
        return out


class ConvStem(Patches):
    """Three convolutions with batch norms instead of one of patches."""

    def __init__(self) -> None:
        super().__init__(*(Residual(HeadsFirst(), FeedForward()) for _ in range(3)))
        self.stem = nn.Sequential(  # type: ignore[assignment]
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, WIDTH, 3, stride=2, padding=1),
        )


class SqueezeExcite(nn.Module):
    """Channels are weighed by an MLP of their means; the convolutions around are 1x1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(WIDTH, HIDDEN, 1), nn.Conv2d(HIDDEN, WIDTH, 1)
        self.down, self.up = nn.Linear(HIDDEN, 16), nn.Linear(16, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.gelu(self.conv1(x))
        scale = self.up(functional.relu(self.down(y.mean((2, 3))))).sigmoid()
        return x + self.conv2(y * scale[:, :, None, None])


class SqueezeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.blocks, self.head = nn.Sequential(SqueezeExcite(), SqueezeExcite()), nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(self.head(self.blocks(self.stem(images)).mean((2, 3))), labels)


class ConvNeXtBlock(nn.Module):
    """A depthwise convolution, then an MLP on channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.norm, self.gamma = nn.LayerNorm(WIDTH), nn.Parameter(torch.ones(WIDTH))
        self.pwconv1, self.pwconv2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(functional.gelu(self.pwconv1(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(SqueezeNet):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(ConvNeXtBlock(), ConvNeXtBlock())


class InvertedResidual(nn.Module):
    """MobileNet's: 1x1 up, depthwise, 1x1 down."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(WIDTH, HIDDEN, 1),
            nn.ReLU6(),
            nn.Conv2d(HIDDEN, HIDDEN, 3, padding=1, groups=HIDDEN),
            nn.ReLU6(),
            nn.Conv2d(HIDDEN, WIDTH, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.net(x)
        return out


class MobileNet(SqueezeNet):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(InvertedResidual(), InvertedResidual())


class UNet(nn.Module):
    """Two resolutions, group norms, attention by 1x1 convolutions at the lower one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, WIDTH, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(4, WIDTH)
        self.qkv, self.proj = nn.Conv2d(WIDTH, 3 * WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)
        self.up, self.last = nn.Conv2d(WIDTH, 16, 1), nn.Conv2d(32, 3, 1)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        high = functional.silu(self.first(images))
        low = self.down(high)
        q, k, v = self.qkv(self.norm(low)).flatten(2).unflatten(1, (3, HEADS, SIZE)).transpose(-1, -2).unbind(1)
        low = low + self.proj(attended(q, k, v).transpose(-1, -2).reshape(low.shape))
        both = torch.cat((high, functional.interpolate(self.up(low), scale_factor=2.0)), dim=1)
        return functional.mse_loss(self.last(both), images.roll(1, 0)) + 0 * labels.sum()


class ResNetBlock(nn.Module):
    """Diffusion's: group norms and convolutions, and a time that is added between them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, WIDTH), nn.Conv2d(WIDTH, HIDDEN, 3, padding=1)
        self.time, self.norm2 = nn.Linear(WIDTH, HIDDEN), nn.GroupNorm(8, HIDDEN)
        self.conv2 = nn.Conv2d(HIDDEN, WIDTH, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.conv1(functional.silu(self.norm1(x))) + self.time(functional.silu(t))[:, :, None, None]
        h = functional.avg_pool2d(functional.silu(self.norm2(h)), 2)
        return x + functional.interpolate(self.conv2(h), scale_factor=2.0)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time, self.blocks = Time(), nn.ModuleList(ResNetBlock() for _ in range(2))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x, c = x.transpose(1, 2).unflatten(-1, (4, 4)).contiguous(), self.time(t)
        for block in self.blocks:
            x = block(x, c)
        return functional.mse_loss(x.flatten(2).transpose(1, 2), y)


class VAE(nn.Module):
    """Means and variances, a draw, and a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(768, HIDDEN), nn.ReLU())
        self.mu, self.logvar = nn.Linear(HIDDEN, 8), nn.Linear(HIDDEN, 8)
        self.decoder = nn.Sequential(nn.Linear(8, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 768))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        h = self.encoder(images)
        mu, logvar = self.mu(h), self.logvar(h)
        noise = torch.linspace(-1, 1, mu.numel(), device=mu.device, dtype=mu.dtype).view_as(mu)
        made = self.decoder(mu + noise * (0.5 * logvar).exp())
        kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).mean()
        return functional.mse_loss(made, images.flatten(1)) + kl + 0 * labels.sum()


MODELS = (
    model("ViT with a class token", ViT, 0.53, 0.29, image_batch),
    model("ViT of folded patches, (d h)", FoldedPatches, 0.52, 0.28, image_batch),
    model("ViT, (d h)", lambda: Patches(Residual(SizeThenHeads(), FeedForward())), 0.54, 0.31, image_batch),
    model("ViT, (3 h d)", lambda: Patches(Residual(ThreeFirst(), FeedForward())), 0.54, 0.31, image_batch),
    model("ViT, (h 3 d)", lambda: Patches(Residual(HeadsFirst(), FeedForward())), 0.54, 0.31, image_batch),
    model("ViT, heads in the batch", lambda: Patches(Residual(Merged(), FeedForward())), 0.54, 0.31, image_batch),
    model("LayerScale", lambda: Patches(LayerScale(), LayerScale()), 0.53, 0.3, image_batch),
    model("conv stem", ConvStem, 0.53, 0.29, image_batch),
    model("DiT", DiT, 0.51, 0.26, noise_batch, quick=True),
    model("U-ViT", UViT, 0.52, 0.27, noise_batch),
    model("Flux", Flux, 0.51, 0.26, noise_batch),
    model("MLP-Mixer", lambda: Patches(MixerBlock(), MixerBlock()), 0.54, 0.31, image_batch),
    model("squeeze and excite", SqueezeNet, 0.51, 0.27, image_batch),
    model("ConvNeXt", ConvNeXt, 0.53, 0.29, image_batch),
    model("MobileNet", MobileNet, 0.57, 0.35, image_batch),
    model("U-Net", UNet, 0.51, 0.26, image_batch),
    model("ResNet of diffusion", ResNet, 0.51, 0.26, noise_batch, quick=True),
    model("VAE", VAE, 0.51, 0.26, image_batch),
)
