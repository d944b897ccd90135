"""Unconditional training as diffusers' own scripts do it: accelerate, a learning rate schedule, diffusers' EMA.

    accelerate launch examples/train_unconditional.py --steps 500

`# ebdiff` marks all that was added or changed, `# was:` what stood there. A quarter of the steps is the search; then
the network, its optimizer and its EMA are cut down to the ticket where they are, and the loop goes on. Timesteps come
from (seed, step) alone and are drawn for all processes together, so 1 and 4 GPUs see the same ones.
"""

import argparse
import time

import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from ebdiff import EarlyBird, NoiseProfile, SpeeD, Stratified, accelerate, shrink_, timesteps, trace  # ebdiff
from ebdiff.data import load_images, to_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", default="runs/unconditional")
    args = parser.parse_args()
    if min(args.steps, args.batch_size) < 1:
        parser.error("--steps and --batch-size are at least 1")

    accelerator = Accelerator()
    images = TensorDataset(to_model(load_images("fashion16").train))
    if args.batch_size * accelerator.num_processes > len(images):
        parser.error(f"--batch-size is of each process: at most {len(images) // accelerator.num_processes}")
    loader = DataLoader(images, batch_size=args.batch_size, shuffle=True, drop_last=True)
    network = UNet2DModel(16, 1, 1, block_out_channels=(32, 32, 64, 64), layers_per_block=1, norm_num_groups=8)
    noise_scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    sampler = timesteps.ScheduleSampler(Stratified(SpeeD(NoiseProfile.from_scheduler(noise_scheduler))))  # ebdiff
    watch = EarlyBird(network, trace(network, images[:1][0], 0), [0.5], window=args.steps // 8 or 1)  # ebdiff
    accelerate(network, optimizer, verbose=accelerator.is_main_process)  # ebdiff
    schedule = get_cosine_schedule_with_warmup(optimizer, args.steps // 10, args.steps)
    ema = EMAModel(network.parameters(), decay=0.995, use_ema_warmup=True)
    # Not the schedule: accelerate would step it once per process, and --steps are steps of all processes together.
    model, optimizer, loader = accelerator.prepare(network, optimizer, loader)
    ema.to(accelerator.device)

    model.train()
    step, every, since = 0, args.steps // 10 or 1, time.perf_counter()
    while step < args.steps:
        for (clean,) in loader:
            noise = torch.randn_like(clean)
            # was: t = torch.randint(1000, (len(clean),), device=clean.device)
            t, weight = sampler.sample(len(clean), clean.device)  # ebdiff
            noisy = noise_scheduler.add_noise(clean, noise, t)
            error = F.mse_loss(model(noisy, t).sample, noise, reduction="none").mean((1, 2, 3))
            # was: loss = error.mean()
            loss = (weight * error).mean()  # ebdiff
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            watch.step()  # ebdiff
            if watch.steps == (args.steps // 4 or 1):  # ebdiff
                accelerator.print(ticket := watch.finish()[0.5])  # ebdiff
                model = accelerator.prepare(shrink_(network, ticket, optimizer=optimizer, ema=ema))  # ebdiff
            optimizer.zero_grad()
            ema.step(model.parameters())
            step += 1
            if step % every == 0:
                rate, took = schedule.get_last_lr()[0], (time.perf_counter() - since) / every
                accelerator.print(f"step {step}: loss {loss:.4f}, learning rate {rate:.1e}, {took * 1e3:.1f} ms a step")
                since = time.perf_counter()
            if step == args.steps:
                break

    if accelerator.is_main_process:
        ema.copy_to(network.parameters())
        DDPMPipeline(network, noise_scheduler).save_pretrained(args.out)
    accelerator.end_training()


if __name__ == "__main__":
    main()
