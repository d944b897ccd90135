"""Unconditional training as diffusers' own scripts do it. The three lines marked SpeeD are all that ebdiff adds.

    accelerate launch examples/train_unconditional.py --steps 500

Timesteps come from (seed, step) alone and are drawn for all processes together, so 1 and 4 GPUs see the same ones.
"""

import argparse

import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import ebdiff
from ebdiff.data import load_images, to_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", default="runs/unconditional")
    args = parser.parse_args()

    accelerator = Accelerator()
    images = TensorDataset(to_model(load_images("fashion16").train))
    loader = DataLoader(images, batch_size=args.batch_size, shuffle=True, drop_last=True)
    model = UNet2DModel(16, 1, 1, block_out_channels=(32, 32, 64, 64), layers_per_block=1, norm_num_groups=8)
    noise_scheduler = DDPMScheduler(num_train_timesteps=1000)
    sampler = ebdiff.Stratified(ebdiff.SpeeD(ebdiff.NoiseProfile.from_scheduler(noise_scheduler)))  # SpeeD
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.steps // 10, args.steps)
    ema = EMAModel(model.parameters(), decay=0.995, use_ema_warmup=True)
    # Not the schedule: accelerate would step it once per process, and --steps are steps of all processes together.
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    ema.to(accelerator.device)

    model.train()
    step = 0
    while step < args.steps:
        for (clean,) in loader:
            noise = torch.randn_like(clean)
            where = {"rank": accelerator.process_index, "world": accelerator.num_processes, "device": clean.device}
            t, weight = sampler.sample(len(clean), step=step, **where)  # SpeeD, instead of torch.randint
            noisy = noise_scheduler.add_noise(clean, noise, t)
            predicted = model(noisy, t).sample
            error = F.mse_loss(predicted, noise, reduction="none").mean((1, 2, 3))
            loss = (weight * error).mean()  # SpeeD, instead of error.mean()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            ema.step(model.parameters())
            step += 1
            if step % 100 == 0:
                rate = schedule.get_last_lr()[0]
                accelerator.print(f"step {step}: loss {loss.item():.4f}, learning rate {rate:.1e}")
            if step == args.steps:
                break

    if accelerator.is_main_process:
        network = accelerator.unwrap_model(model)
        ema.copy_to(network.parameters())
        DDPMPipeline(network, noise_scheduler).save_pretrained(args.out)


if __name__ == "__main__":
    main()
