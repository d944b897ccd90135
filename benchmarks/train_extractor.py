"""Train the embedded feature extractor `ebdiff/assets/fashion16-classifier.safetensors`.

    python benchmarks/train_extractor.py

It sees the 20,000 embedded training images only; the stated accuracy is the one on all 10,000 test images, after the
last epoch (no epoch is chosen by it). Seeded; about 4 minutes on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ebdiff.data import load_images, to_model
from ebdiff.evaluation.features import Classifier16
from ebdiff.files import write_tensors

ASSET = Path(__file__).parent.parent / "ebdiff" / "assets" / "fashion16-classifier.safetensors"


def with_batch_norm(body: nn.Sequential) -> nn.Sequential:
    """The same layers, a batch norm after each convolution; the convolutions are shared."""
    layers: list[nn.Module] = []
    for layer in body:
        layers += [layer, nn.BatchNorm2d(layer.out_channels)] if isinstance(layer, nn.Conv2d) else [layer]
    return nn.Sequential(*layers)


def fold(trained: nn.Sequential) -> None:
    """Write each batch norm's running statistics and affine into the convolution before it."""
    for conv, norm in pairwise(trained):
        if isinstance(norm, nn.BatchNorm2d):
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Flip every other image, shift each by up to one pixel, filling with black (-1)."""
    count, _, side, _ = x.shape
    flip = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    x = F.pad(torch.where(flip, x.flip(-1), x), (1, 1, 1, 1), value=-1.0)
    top, left = torch.randint(0, 3, (2, count, 1, 1), generator=generator)
    rows, columns = top + torch.arange(side).view(1, side, 1), left + torch.arange(side).view(1, 1, side)
    return x[torch.arange(count).view(-1, 1, 1), 0, rows, columns].unsqueeze(1)


@torch.inference_mode()
def accuracy(model: Classifier16, images: Tensor, labels: Tensor) -> float:
    right = sum(
        (model.logits(x).argmax(1) == y).sum() for x, y in zip(images.split(1000), labels.split(1000), strict=True)
    )
    return float(right) / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ASSET)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    data = load_images("fashion16")
    x, y = to_model(data.train), data.labels
    model = Classifier16()
    body = with_batch_norm(model.body).to(memory_format=torch.channels_last)
    net = nn.Sequential(body, nn.Dropout(0.2), model.head)
    batch = 125
    steps = args.epochs * len(x) // batch
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=6e-3, total_steps=steps, pct_start=0.2)
    began = time.process_time()
    for epoch in range(args.epochs):
        total = 0.0
        for chosen in torch.randperm(len(x), generator=generator).split(batch):
            loss = F.cross_entropy(net(augmented(x[chosen], generator)), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(chosen)
        print(f"epoch {epoch + 1}: loss {total / len(x):.4f}, {time.process_time() - began:.0f} CPU s", flush=True)

    fold(body.eval())
    reached = accuracy(model.eval(), data.test, data.test_labels)
    facts = {
        "name": f"fashion16-cnn-{100 * reached:.1f}",
        "accuracy": f"{reached:.4f}",
        "command": f"python benchmarks/train_extractor.py --epochs {args.epochs} --seed {args.seed}",
        "data": data.fingerprint,
        "licence": "MIT, see fashion16-LICENSE.txt",
    }
    write_tensors(args.out, model.state_dict(), **facts)
    print(facts, f"{sum(p.numel() for p in model.parameters())} parameters, {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
