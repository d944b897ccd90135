"""denoising_diffusion_pytorch's Trainer keeps its loop to itself: a hook on its optimizer tells ebdiff of the steps.

    pip install denoising_diffusion_pytorch==1.11.1
    python examples/train_denoising_diffusion.py --images folder --steps 1000

`# ebdiff` marks all that was added or changed, `# was:` what stood there. The Trainer stops after a quarter of the
steps; its network, optimizer and EMA are cut down to the ticket where they are; and it goes on, draws and saves as
ever, in any number of processes, of which the first alone has an EMA. To `trainer.load` that in a later run, keep the
ticket (`ticket.save(folder)`) and cut down to it first.
"""

import argparse

import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet

from ebdiff import EarlyBird, NoiseProfile, SpeeD, Stratified, accelerate, shrink_, timesteps, trace  # ebdiff


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="a folder of at least 100 pictures")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=16, help="the Trainer wants at least 16")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--dim", type=int, default=32, help="channels at the highest resolution")
    parser.add_argument("--out", default="results")
    args = parser.parse_args()
    if min(args.steps, args.batch_size) < 1:
        parser.error("--steps and --batch-size are at least 1")

    torch.manual_seed(0)
    unet, size = Unet(dim=args.dim, dim_mults=(1, 2, 4)), args.size
    ddpm = GaussianDiffusion(unet, image_size=size, sampling_timesteps=20)
    timesteps.install(ddpm, Stratified(SpeeD(NoiseProfile.from_alphas_cumprod(ddpm.alphas_cumprod))))  # ebdiff
    watch = EarlyBird(ddpm, trace(ddpm, torch.zeros(1, 3, size, size)), [0.5], window=args.steps // 8 or 1)  # ebdiff
    trainer = Trainer(
        ddpm,
        args.images,
        train_batch_size=args.batch_size,
        # was: train_num_steps=args.steps,
        train_num_steps=args.steps // 4 or 1,  # ebdiff
        save_and_sample_every=max(1, args.steps // 2),
        num_samples=4,
        results_folder=args.out,
        calculate_fid=False,
    )
    trainer.opt.optimizer.register_step_post_hook(lambda *_: watch.step())  # ebdiff
    trainer.train()
    trainer.accelerator.print(ticket := watch.finish()[0.5], accelerate(ddpm, verbose=False), sep="\n")  # ebdiff
    shrink_(ddpm, ticket, optimizer=trainer.opt, ema=getattr(trainer, "ema", None))  # ebdiff
    trainer.model = trainer.accelerator.prepare(ddpm)  # ebdiff
    trainer.train_num_steps = args.steps  # ebdiff
    trainer.train()  # ebdiff
    trainer.save("last")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
