import torch
from diffusers import DDIMPipeline, DDPMScheduler, UNet2DModel

import ebdiff
from ebdiff.data import load_images, to_model

images, noise, steps = to_model(load_images("fashion16").train), DDPMScheduler(), 200
model = UNet2DModel(16, 1, 1, block_out_channels=(32, 32, 64, 64), layers_per_block=1, norm_num_groups=8)


def train(net, sampler):  # your own loop; ebdiff.train is one with checkpoints, EMA and mixed precision
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for _ in range(steps):
        x = images[torch.randint(len(images), (32,))]
        (t, weight), epsilon = sampler.sample(len(x)), torch.randn_like(x)
        error = net(noise.add_noise(x, epsilon, t), t).sample - epsilon
        (weight * error.square().mean((1, 2, 3))).mean().backward()
        optimizer.step()
        yield
        optimizer.zero_grad()


plan = ebdiff.trace(model, images[:1], torch.tensor([0]))  # every prunable axis, and what was frozen and why
watch = ebdiff.EarlyBird(model, plan, ratios=(0.6,), window=steps // 4)
for _ in train(model, ebdiff.Stratified(1000)):
    watch.step()  # after optimizer.step(), before zero_grad(); watch.tickets[0.6] is None until it has settled
partition = ebdiff.Partition(0, 240, 440, 1000)
small = [ebdiff.shrink(model, watch.finish()[0.6]) for _ in partition]  # a ticket: which 40% of the channels stay
for net, region in zip(small, partition, strict=True):
    list(train(net, ebdiff.Within(region, ebdiff.Uniform(1000))))
DDIMPipeline(ebdiff.TimestepRouter(partition, small), noise)().images[0].save("sample.png")
