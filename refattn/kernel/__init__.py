"""Kernel attention: exp(q·k) becomes a product of features φ(q)·φ(k)."""

from refattn.kernel import gaussian, linear_transformer, polynomial
from refattn.kernel._feature_map import FeatureMap, elu_plus_one

__all__ = ["FeatureMap", "elu_plus_one", "gaussian", "linear_transformer", "polynomial"]
