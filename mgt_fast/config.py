"""The model's configuration: what a checkpoint must know to rebuild the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True, kw_only=True)
class MGTConfig:
    """Sizes and choices of one MGT network; the defaults are the published ones (12.2 M parameters).

    Attributes:
        task: "predict" (fusion of the views into a prediction) or "pretrain" (denoising heads).
        channels: width C of atom, edge and crystal features, and number of RBF centres.
        num_scalars: scalar channels ns of the tensor products.
        num_vectors: l = 1 and l = 2 channels nv of the tensor products.
        num_blocks: transformer blocks in each encoder (the published `conv_layers` less one).
        expert_hidden: hidden width of each expert.
        output_dim: predicted values a crystal.
        views: "both", or one encoder alone ("se3", "so3").
        fusion: "router" (mixture of experts) or "concat" (one network on both embeddings); with one
            view there is nothing to fuse and its expert predicts alone.
        denoising: what the pretraining heads predict: "crystal" (published: the crystal's mean noise) or
            "edge" (the noise of each edge).
        dropout: dropout probability of projection heads and experts.
    """

    task: Literal["predict", "pretrain"] = "predict"
    channels: int = 256
    num_scalars: int = 64
    num_vectors: int = 8
    num_blocks: int = 2
    expert_hidden: int = 128
    output_dim: int = 1
    views: Literal["both", "se3", "so3"] = "both"
    fusion: Literal["router", "concat"] = "router"
    denoising: Literal["crystal", "edge"] = "crystal"
    dropout: float = 0.1

    __pydantic_config__: ClassVar[dict] = {"extra": "forbid"}

    def __post_init__(self):
        for name in ("channels", "num_scalars", "num_vectors", "num_blocks", "expert_hidden", "output_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout = {self.dropout}; it must lie in [0, 1)")
        for name, allowed in (
            ("task", ("predict", "pretrain")),
            ("views", ("both", "se3", "so3")),
            ("fusion", ("router", "concat")),
            ("denoising", ("crystal", "edge")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} = {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
