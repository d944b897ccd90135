"""How good are the images: scores in the features of a named extractor, and the held-out loss per timestep bin."""

from .classifier import Classifier
from .features import FeatureExtractor, InceptionExtractor, extractor_for
from .likeness import likeness
from .losses import LossProfile, loss_per_bin
from .metrics import Scores, evaluate, features_of, fid, kid, precision_recall

__all__ = [
    "Classifier",
    "FeatureExtractor",
    "InceptionExtractor",
    "LossProfile",
    "Scores",
    "evaluate",
    "extractor_for",
    "features_of",
    "fid",
    "kid",
    "likeness",
    "loss_per_bin",
    "precision_recall",
]
