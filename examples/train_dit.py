"""Class-conditional training of a transformer as DiT and other code of the guided-diffusion family does it.

    python examples/train_dit.py --steps 400

`# ebdiff` marks all that was added or changed, `# was:` what stood there. A quarter of the steps is the search; then
whole heads, the channels of the MLPs and of the timestep's embedding go, from the network, its optimizer and its EMA.
"""

import argparse
import time
from copy import deepcopy

import torch
from diffusers import DiTTransformer2DModel
from torch.nn import functional as F

from ebdiff import EarlyBird, NoiseProfile, SpeeD, Stratified, accelerate, shrink_, trace  # ebdiff
from ebdiff.data import load_images, to_model

CLASSES = 10  # and one more label, for images whose own was dropped: what guidance leads away from


class GaussianDiffusion:
    """As in those codebases: the schedule, and the loss of each sample at given timesteps."""

    def __init__(self, betas):
        self.num_timesteps, self.alphas_cumprod = len(betas), (1 - betas).cumprod(0)

    def training_losses(self, model, x, t, model_kwargs):
        signal, noise = self.alphas_cumprod[t].view(-1, 1, 1, 1).to(x.dtype), torch.randn_like(x)
        noisy = signal.sqrt() * x + (1 - signal).sqrt() * noise
        predicted = model(noisy, timestep=t, **model_kwargs).sample
        return {"loss": F.mse_loss(predicted, noise, reduction="none").mean((1, 2, 3))}


@torch.no_grad()
def update_ema(ema, model, decay=0.995):
    averages = dict(ema.named_parameters())
    for name, parameter in model.named_parameters():
        averages[name].lerp_(parameter, 1 - decay)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", default="runs/dit")
    args = parser.parse_args()
    if min(args.steps, args.batch_size) < 1:
        parser.error("--steps and --batch-size are at least 1")

    torch.manual_seed(0)
    data = load_images("fashion16")
    images, labels = to_model(data.train), data.labels
    diffusion = GaussianDiffusion(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=1,
        num_layers=4,
        sample_size=16,
        num_embeds_ada_norm=CLASSES,
        norm_num_groups=1,
    ).eval()  # in train mode every block of diffusers' class drops labels of its own; here they are dropped below
    ema = deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sampler = Stratified(SpeeD(NoiseProfile.from_alphas_cumprod(diffusion.alphas_cumprod)))  # ebdiff
    plan = trace(model, images[:1], timestep=torch.tensor([0]), class_labels=labels[:1])  # ebdiff
    watch = EarlyBird(model, plan, ratios=[0.5], window=args.steps // 8 or 1)  # ebdiff
    every, since = args.steps // 10 or 1, time.perf_counter()
    for step in range(1, args.steps + 1):
        chosen = torch.randint(len(images), (args.batch_size,))
        y = torch.where(torch.rand(args.batch_size) < 0.1, CLASSES, labels[chosen])
        # was: t = torch.randint(diffusion.num_timesteps, (args.batch_size,))
        t, weight = sampler.sample(args.batch_size)  # ebdiff
        losses = diffusion.training_losses(model, images[chosen], t, {"class_labels": y})
        # was: loss = losses["loss"].mean()
        loss = (losses["loss"] * weight).mean()  # ebdiff
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        watch.step()  # ebdiff
        if step == (args.steps // 4 or 1):  # ebdiff
            print(ticket := watch.finish()[0.5])  # ebdiff
            accelerate(shrink_(model, ticket, optimizer=optimizer, ema=ema), optimizer)  # ebdiff
        update_ema(ema, model)
        if step % every == 0:
            print(f"step {step}: loss {loss:.4f}, {(time.perf_counter() - since) / every * 1e3:.1f} ms a step")
            since = time.perf_counter()
    ema.save_pretrained(args.out)


if __name__ == "__main__":
    main()
