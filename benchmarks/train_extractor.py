"""Train the feature extractor of a labelled data set: what FID, KID, precision and recall look at.

    python benchmarks/train_extractor.py                                    # fashion16's
    python benchmarks/train_extractor.py --data FILE.npz --name cifar10 --epochs 10 --precision bf16

It sees the training images only; the stated accuracy is the one on the held-out images, after the last epoch (no epoch
is chosen by it) and with the weights as they are kept, in float16. Seeded. The two above are embedded in the package
(ebdiff/assets/<name>-classifier.safetensors, from 4 minutes on two CPU cores and 9 on one); any other is written here
and used by evaluate.extractor=FILE. What was measured stands in the file's metadata.
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

from ebdiff.data import Images, load_images, to_model
from ebdiff.errors import EbdiffError
from ebdiff.evaluation import Classifier
from ebdiff.files import write_tensors

ASSETS = Path(__file__).parent.parent / "ebdiff" / "assets"
LICENCES = {
    "fashion16": "MIT, see fashion16-LICENSE.txt",
    "cifar10": "the weights are this package's; CIFAR-10 (Krizhevsky 2009) states no licence, its images are not here",
}
BATCH = 125


def with_batch_norm(body: nn.Sequential) -> nn.Sequential:
    """The same layers, a batch norm after each convolution; the convolutions are shared."""
    layers: list[nn.Module] = []
    for layer in body:
        if isinstance(layer, nn.Conv2d):
            layers += [layer, nn.BatchNorm2d(layer.out_channels)]
        else:
            layers.append(with_batch_norm(layer) if isinstance(layer, nn.Sequential) else layer)
    return type(body)(*layers)


def fold(trained: nn.Sequential) -> None:
    """Write each batch norm's running statistics and affine into the convolution before it."""
    leaves = [module for module in trained.modules() if not list(module.children())]
    for conv, norm in pairwise(leaves):
        if isinstance(norm, nn.BatchNorm2d):
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Flip every other image; shift each by up to a sixteenth of its width, filling with black (-1)."""
    count, _, height, width = x.shape
    most = width // 16
    flip = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    x = F.pad(torch.where(flip, x.flip(-1), x), (most,) * 4, value=-1.0)
    top, left = torch.randint(0, 2 * most + 1, (2, count, 1, 1), generator=generator)
    rows, columns = top + torch.arange(height).view(1, height, 1), left + torch.arange(width).view(1, 1, width)
    return x[torch.arange(count).view(-1, 1, 1), :, rows, columns].permute(0, 3, 1, 2)


@torch.inference_mode()
def accuracy(model: Classifier, images: Tensor, labels: Tensor) -> float:
    right = sum(
        (model.logits(x).argmax(1) == y).sum() for x, y in zip(images.split(1000), labels.split(1000), strict=True)
    )
    return float(right) / len(labels)


def trained(data: Images, labels: Tensor, epochs: int, seed: int, precision: str) -> Classifier:
    """A classifier of the training images, its batch norms folded."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    x, channels, height, width = data.train, *data.train.shape[1:]
    model = Classifier((channels, height, width), int(labels.max()) + 1)
    body = with_batch_norm(model.body).to(memory_format=torch.channels_last)
    net = nn.Sequential(body, nn.Dropout(0.2), model.head)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.02)
    steps = epochs * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=6e-3, total_steps=steps, pct_start=0.2)
    began = time.process_time()
    for epoch in range(epochs):
        total = 0.0
        for chosen in torch.randperm(len(x), generator=generator).split(BATCH):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                logits = net(augmented(to_model(x[chosen]), generator))
            loss = F.cross_entropy(logits.float(), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(chosen)
        print(f"epoch {epoch + 1}: loss {total / len(x):.4f}, {time.process_time() - began:.0f} CPU s", flush=True)
    fold(body.eval())
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion16", help="with labels, as data.source of a configuration")
    parser.add_argument("--name", help="of the data set; by default that of the file")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="by default <name>-classifier.safetensors")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    data = load_images(args.data)
    if data.labels is None or data.test_labels is None:
        raise EbdiffError(f"{data.name} has no labels", expected="y beside the images, or folders of classes")
    name = args.name or Path(args.data).stem
    model = trained(data, data.labels, args.epochs, args.seed, args.precision)
    kept = {key: tensor.half() for key, tensor in model.state_dict().items()}
    model.load_state_dict(kept)
    reached = accuracy(model, data.test, data.test_labels)
    given = {"data": Path(args.data).name, "name": name, "epochs": args.epochs, "seed": args.seed}
    given |= {"precision": args.precision} if args.precision != "no" else {}
    facts = {
        "name": f"{name}-cnn-{100 * reached:.1f}",
        "accuracy": f"{reached:.4f}",
        "shape": "x".join(map(str, model.shape)),
        "command": " ".join(["python benchmarks/train_extractor.py", *(f"--{k} {v}" for k, v in given.items())]),
        "images": f"{len(data.train)} in training, {len(data.test)} held out",
        "data": data.fingerprint,
    }
    facts |= {"licence": LICENCES[name]} if name in LICENCES else {}
    out = args.out or (ASSETS if name in LICENCES else Path()) / f"{name}-classifier.safetensors"
    write_tensors(out, kept, **facts)
    print(facts, f"{sum(p.numel() for p in model.parameters())} parameters, {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
