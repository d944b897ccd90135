"""SpeeD in training code of the guided-diffusion family (DiT, improved-diffusion, ...): one line is another.

    python examples/dit_schedule_sampler.py --steps 200

Those codebases call `schedule_sampler.sample(batch, device) -> (t, weights)`; everything else stays as it is there.
"""

import argparse

import torch
from diffusers import DiTTransformer2DModel
from torch.nn import functional as F

import ebdiff
from ebdiff.data import load_images, to_model
from ebdiff.timesteps import ScheduleSampler


class GaussianDiffusion:
    """As in those codebases: the schedule, and the loss of each sample at given timesteps."""

    def __init__(self, betas: torch.Tensor) -> None:
        self.alphas_cumprod = (1 - betas).cumprod(0)

    def training_losses(self, model, x, t, labels):
        signal, noise = self.alphas_cumprod[t].view(-1, 1, 1, 1).to(x.dtype), torch.randn_like(x)
        noisy = signal.sqrt() * x + (1 - signal).sqrt() * noise
        predicted = model(noisy, timestep=t, class_labels=labels).sample
        return {"loss": F.mse_loss(predicted, noise, reduction="none").mean((1, 2, 3))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()

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
        num_embeds_ada_norm=10,
        norm_num_groups=1,
    )
    profile = ebdiff.NoiseProfile.from_alphas_cumprod(diffusion.alphas_cumprod)
    schedule_sampler = ScheduleSampler(ebdiff.Stratified(ebdiff.SpeeD(profile)))  # was create_named_schedule_sampler
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(1, args.steps + 1):
        chosen = torch.randint(len(images), (args.batch_size,))
        t, weights = schedule_sampler.sample(args.batch_size, "cpu")
        losses = diffusion.training_losses(model, images[chosen], t, labels[chosen])
        loss = (losses["loss"] * weights).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == args.steps:
            print(f"step {step}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
