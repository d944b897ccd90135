"""Make the embedded image set `ebdiff/assets/fashion16.npz` from Fashion-MNIST's four IDX files.

    python benchmarks/make_fashion16.py --source FOLDER     # e.g. where Debian's dataset-fashion-mnist put them

- 20,000 training images: 2,000 of each class, drawn from the 60,000 with seed 0 and shuffled; all 10,000 test images.
- 28x28 -> 16x16 with Pillow's BICUBIC, which widens its kernel when shrinking and so antialiases. Measured by scaling
  500 test images up again: RMSE 26.4/255, against 28.5 for BOX (which blurs stripes and checks) and 26.0 for LANCZOS
  (whose ringing costs an 8% larger file).
- Each split is one 16-pixel-wide PNG, its images below each other: 4.6 MB, 10% smaller than deflate alone, and read in
  0.1 s without any pickle.
"""

from __future__ import annotations

import argparse
import gzip
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ebdiff.files import write_bytes

SIZE, TRAIN, CLASSES, SEED = 16, 20_000, 10, 0
ASSET = Path(__file__).parent.parent / "ebdiff" / "assets" / "fashion16.npz"

Bytes = NDArray[np.uint8]


def read_idx(path: Path) -> Bytes:
    """An IDX file: two zero bytes, 8 for uint8, the number of dimensions, each as big-endian uint32, then the data."""
    content = gzip.decompress(path.read_bytes())
    if content[:3] != b"\0\0\x08":
        raise SystemExit(f"{path} is no IDX file of bytes")
    shape = np.frombuffer(content, ">u4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)


def balanced(labels: Bytes, count: int) -> NDArray[np.int64]:
    """Seeded indices of `count` items, equally many of each class, in a shuffled order."""
    random = np.random.default_rng(SEED)
    per_class = [random.choice(np.flatnonzero(labels == c), count // CLASSES, replace=False) for c in range(CLASSES)]
    return random.permutation(np.concatenate(per_class))


def smaller(images: Bytes) -> Bytes:
    """uint8 [N, 28, 28] -> uint8 [N, 16, 16]."""
    shrunk = [Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for image in images]
    return np.stack([np.asarray(image) for image in shrunk])


def strip(images: Bytes) -> Bytes:
    """The images below each other, as the bytes of one PNG."""
    png = io.BytesIO()
    Image.fromarray(images.reshape(-1, SIZE)).save(png, "PNG", optimize=True)
    return np.frombuffer(png.getvalue(), np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder of the four *-ubyte.gz files")
    parser.add_argument("--out", type=Path, default=ASSET)
    args = parser.parse_args()

    x, y = (read_idx(args.source / f"train-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    x_test, y_test = (read_idx(args.source / f"t10k-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    chosen = balanced(y, TRAIN)
    file = io.BytesIO()
    np.savez(file, train=strip(smaller(x[chosen])), train_y=y[chosen], test=strip(smaller(x_test)), test_y=y_test)
    write_bytes(args.out, file.getvalue())
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
