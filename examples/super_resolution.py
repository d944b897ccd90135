"""Super-resolution, SpeeD's second task: the image in low resolution stands beside the noisy one, in further channels.

    python examples/super_resolution.py --steps 400 --out runs/super-resolution.png

One dense network is trained, then a smaller one for each half of the timesteps; a router of them draws. The main job
does the same: ebdiff run conditional.by=low_res conditional.factor=4
"""

import argparse
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel

import ebdiff
from ebdiff.data import load_images, to_model, to_uint8
from ebdiff.evaluation import likeness
from ebdiff.plots import grid
from ebdiff.training.conditions import LOW_RES, Conditions, ask
from ebdiff.training.loop import TrainConfig, TrainState


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--factor", type=int, default=4)
    parser.add_argument("--count", type=int, default=16, help="images to draw")
    parser.add_argument("--out", default="super-resolution.png")
    args = parser.parse_args()
    if min(args.steps, args.batch_size, args.factor, args.count) < 1:
        parser.error("all numbers are at least 1")

    torch.manual_seed(0)
    data, schedule = load_images("fashion16"), DDPMScheduler()
    low_res = Conditions(factor=args.factor, dropout=0)
    config = TrainConfig(batch_size=args.batch_size, lr=1e-3, ema_decay=0.99, flip=True)
    sampler = ebdiff.Stratified(ebdiff.SpeeD(ebdiff.NoiseProfile.from_scheduler(schedule)))

    def train(state: TrainState, sampler: ebdiff.timesteps.Sampler, until: int) -> None:
        for report in ebdiff.train(
            state, data.train, scheduler=schedule, sampler=sampler, config=config, until=until, conditions=low_res
        ):
            if report.step % 100 == 0 or report.step == until:
                print(f"step {report.step}: loss {report.loss:.4f}")

    model = UNet2DModel(16, 2, 1, block_out_channels=(32, 32, 64, 64), layers_per_block=1, norm_num_groups=8)
    plan = ebdiff.trace(model, torch.zeros(1, 2, 16, 16), torch.tensor([0]))
    train(TrainState.begin(model, config), sampler, args.steps)
    mask = ebdiff.ChannelMask.draw(ebdiff.importance(model, plan), plan=plan, ratio=0.3)
    partition, networks = ebdiff.Partition(0, 440, 1000), []
    for region in partition:
        state = TrainState.begin(ebdiff.shrink(model, mask), config)
        train(state, ebdiff.Within(region, sampler), args.steps)
        state.ema.copy_to(state.model.parameters())
        networks.append(state.model.eval())
    router = ebdiff.TimestepRouter(partition, networks)

    real = data.test[: args.count]
    told = low_res.of(torch.arange(args.count), to_model(real))
    ddim, x = DDIMScheduler(timestep_spacing="trailing"), torch.randn(real.shape)
    ddim.set_timesteps(20)
    with torch.no_grad():
        for t in ddim.timesteps:
            x = ddim.step(ask(router, x, t, told), t, x).prev_sample
    pictures = {"low resolution": to_uint8(told[LOW_RES]), "drawn": to_uint8(x), "true": real}
    for name in ("low resolution", "drawn"):
        found = likeness(real, pictures[name])
        print(f"{name}: PSNR {found['psnr']:.2f}, SSIM {found['ssim']:.3f}")
    grid(pictures, Path(args.out))


if __name__ == "__main__":
    main()
