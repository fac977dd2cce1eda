"""Kernel attention: exp(q·k) becomes a product of features φ(q)·φ(k)."""

from refattn.kernel import features, linear_transformer, moments, performer
from refattn.kernel._feature_map import FeatureMap, elu_plus_one

__all__ = ["FeatureMap", "elu_plus_one", "features", "linear_transformer", "moments", "performer"]
