"""A network and a loop of one's own, in nothing but torch: ebdiff follows the network's axes by itself.

    python examples/train_plain.py --steps 400

`# ebdiff` marks all that was added or changed, `# was:` what stood there. A quarter of the steps is the search; then
the network and its optimizer are cut down to the ticket where they are, and the loop goes on. What is saved names its
classes: `ebdiff.load` needs them imported, so in a project they stand in a module of their own, not in the script.
"""

import argparse
import math
import time

import torch
from torch import nn
from torch.nn import functional as F

from ebdiff import EarlyBird, NoiseProfile, SpeeD, Stratified, accelerate, save, shrink_, trace  # ebdiff
from ebdiff.data import load_images, to_model


class Block(nn.Module):
    """Two convolutions around what the timestep adds, and a way past them."""

    def __init__(self, inputs, outputs, time):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.time = nn.Linear(time, 2 * outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x, emb):
        scale, shift = self.time(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))


class Attention(nn.Module):
    """Every pixel looks at every other."""

    def __init__(self, channels, heads):
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(8, channels)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, self.heads, -1)).transpose(3, 4).unbind(1)
        h = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(1, 2)
        return x + self.out(h.unflatten(2, x.shape[2:]))


class UNet(nn.Module):
    """Three resolutions; what goes down is concatenated to what comes up."""

    def __init__(self, channels=(32, 64, 64), heads=4):
        super().__init__()
        a, b, c = channels
        self.frequencies, time = a // 2, 4 * a
        self.time = nn.Sequential(nn.Linear(a, time), nn.SiLU(), nn.Linear(time, time), nn.SiLU())
        self.first = nn.Conv2d(1, a, 3, padding=1)
        self.down = nn.ModuleList([Block(a, a, time), Block(a, b, time), Block(b, c, time)])
        self.middle = Attention(c, heads)
        self.up = nn.ModuleList([Block(2 * c, b, time), Block(2 * b, a, time), Block(2 * a, a, time)])
        self.last = nn.Sequential(nn.GroupNorm(8, a), nn.SiLU(), nn.Conv2d(a, 1, 3, padding=1))

    def forward(self, x, t):
        rates = torch.exp(-math.log(1e4) * torch.arange(self.frequencies, device=t.device) / self.frequencies)
        angles = t[:, None] * rates
        emb, h, kept = self.time(torch.cat([angles.sin(), angles.cos()], dim=1)), self.first(x), []
        for block in self.down:
            h = block(h, emb)
            kept.append(h)
            h = F.avg_pool2d(h, 2)
        h = self.middle(h)
        for block in self.up:
            h = block(torch.cat([F.interpolate(h, scale_factor=2), kept.pop()], dim=1), emb)
        return self.last(h)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", default="runs/plain")
    args = parser.parse_args()
    if min(args.steps, args.batch_size) < 1:
        parser.error("--steps and --batch-size are at least 1")

    torch.manual_seed(0)
    images, model = to_model(load_images("fashion16").train), UNet()
    alphas_cumprod = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sampler = Stratified(SpeeD(NoiseProfile.from_alphas_cumprod(alphas_cumprod)))  # ebdiff
    watch = EarlyBird(model, trace(model, images[:1], torch.tensor([0])), [0.5], window=args.steps // 8 or 1)  # ebdiff
    every, since = args.steps // 10 or 1, time.perf_counter()
    for step in range(1, args.steps + 1):
        x = images[torch.randint(len(images), (args.batch_size,))]
        # was: t = torch.randint(1000, (args.batch_size,))
        t, weight = sampler.sample(args.batch_size)  # ebdiff
        signal, noise = alphas_cumprod[t].float().view(-1, 1, 1, 1), torch.randn_like(x)
        error = model(signal.sqrt() * x + (1 - signal).sqrt() * noise, t) - noise
        # was: loss = error.square().mean()
        loss = (weight * error.square().mean((1, 2, 3))).mean()  # ebdiff
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        watch.step()  # ebdiff
        if step == (args.steps // 4 or 1):  # ebdiff
            print(ticket := watch.finish()[0.5])  # ebdiff
            accelerate(shrink_(model, ticket, optimizer=optimizer), optimizer)  # ebdiff
        if step % every == 0:
            print(f"step {step}: loss {loss:.4f}, {(time.perf_counter() - since) / every * 1e3:.1f} ms a step")
            since = time.perf_counter()
    # was: torch.save(model.state_dict(), args.out)
    save(model, args.out)  # ebdiff


if __name__ == "__main__":
    main()
