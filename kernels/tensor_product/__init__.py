"""The equivariant encoder's two tensor products with mean aggregation, factored per atom."""

from .reference import TensorProductShape, spherical_harmonics, tensor_product_1, tensor_product_2

__all__ = ["TensorProductShape", "spherical_harmonics", "tensor_product_1", "tensor_product_2"]
