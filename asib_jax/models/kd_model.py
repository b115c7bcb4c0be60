"""A backbone with its classifier and adapters: the form teachers and students share (SPEC 1)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from asib_jax.errors import UserError
from asib_jax.models.layers import Architecture, dropout, keys_of, linear


class Outputs(NamedTuple):
    """All that one forward pass gives.

    feat_4d: [B, h, w, F] in the compute dtype; feat_2d: [B, F]; distill_feat: [B, D], or None without a distillation
    adapter; logit: [B, C], -inf at classes that the network does not know. The last three are float32.
    """

    feat_4d: jax.Array
    feat_2d: jax.Array
    distill_feat: jax.Array | None
    logit: jax.Array


class DistillationAdapter(nn.Module):
    """Dense(D)(relu(Dense(H)(x))) in float32, initialised as PyTorch's `nn.Linear` (see `linear`)."""

    hidden: int
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return linear(nn.relu(linear(x, self.hidden, name="fc1")), self.features, name="fc2")


class KDModel(nn.Module):
    """Pixels to `Outputs`. Normalisation is inside because it belongs to the weights.

    architecture: the backbone. num_classes: C.
    mean, std: per channel of pixels scaled to 0..1; one value serves all channels.
    adapter_dim: D, the width of `distill_feat`; 0 builds no distillation adapter.
    adapter_hidden: H, the adapter's hidden width; 0 is max(F // 2, D).
    residual_adapter: x + conv1x1(x) after the last-but-one stage, in the manner of Rebuffi et al. (2017). Its kernel
        starts at zero, so that the network starts as the one without it.
    dtype: compute type of the stages. Parameters, BatchNorm statistics, the classifier and the distillation adapter
        are float32; the classifier starts as PyTorch's `nn.Linear` (see `linear`).
    axis_name: mapped axis over which training-mode BatchNorm takes its statistics; None: this device's batch.
    joins_probabilities: the distillation adapter reads the softmax of the logits beside the feature, see `key_feature`.
    classes: the labels that the network knows, in the order of its classifier's outputs; (): all of them (SPEC 11).

    Parameters are grouped as one entry per stage, "pooled_norm", "classifier", "distill_adapter" and
    "residual_adapter". The initial value of each depends on its name and the key only: adapters do not change the
    backbone's.
    """

    architecture: Architecture
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    adapter_dim: int = 0
    adapter_hidden: int = 0
    residual_adapter: bool = False
    dtype: Any = jnp.float32
    axis_name: str | None = None
    classes: tuple[int, ...] = ()
    joins_probabilities: bool = False

    def setup(self):
        if self.adapter_dim:
            hidden = self.adapter_hidden or max(self.architecture.feat_dim // 2, self.adapter_dim)
            self.distill_adapter = DistillationAdapter(hidden, self.adapter_dim)

    @nn.compact
    def __call__(
        self,
        pixels: jax.Array,
        *,
        train: bool,
        frozen_stages: int = 0,
        freeze_bn: bool = False,
        dropout_keys: jax.Array | None = None,
    ) -> Outputs:
        """pixels: [B, H, W, channels], uint8 or float32 in 0..255.

        train: BatchNorm uses and updates batch statistics, except in the first `frozen_stages` stages and, with
            `freeze_bn`, anywhere: there it uses its running statistics, which stand still.
        dropout_keys: [B] typed keys, one per example, for dropout and stochastic depth in the stages that are not
            frozen and before the classifier; None: none.

        Raises UserError if mean or std have neither one value nor one per channel, or the images are too small.
        """
        x = self._normalise(pixels)
        stages = self.architecture.stages
        for i, (name, factory) in enumerate(stages):
            stage = factory(name=name, dtype=self.dtype, axis_name=self.axis_name)
            x = stage(
                x,
                train=train and not freeze_bn and i >= frozen_stages,
                dropout_keys=dropout_keys if i >= frozen_stages else None,
            )
            if self.residual_adapter and i == len(stages) - 2:
                x += nn.Conv(
                    x.shape[-1],
                    (1, 1),
                    use_bias=False,
                    dtype=self.dtype,
                    name="residual_adapter",
                    kernel_init=nn.initializers.zeros,
                )(x)
        if 0 in x.shape:  # their mean would be nan
            height, width = pixels.shape[1:3]
            raise UserError(
                f"images of {height}x{width} pixels leave a map of {x.shape[1:3]} after the last stage; "
                "take larger ones, dataset.small_input=True, or another network"
            )
        feat_2d = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        if self.architecture.pooled_norm:
            feat_2d = self.architecture.pooled_norm(name="pooled_norm")(feat_2d)
        dropped = dropout(feat_2d, self.architecture.dropout, keys_of(self, dropout_keys))
        logit = linear(dropped, len(self.classes) or self.num_classes, name="classifier")
        if self.classes:
            logit = jnp.full((len(logit), self.num_classes), -jnp.inf).at[:, np.array(self.classes)].set(logit)
        return Outputs(x, feat_2d, self.distill(key_feature(self, feat_2d, logit)), logit)

    def distill(self, feature: jax.Array) -> jax.Array | None:
        """The distillation adapter alone: what `key_feature` gives -> distill_feat [B, D]; None if the model has
        none."""
        return self.distill_adapter(feature) if self.adapter_dim else None

    def _normalise(self, pixels: jax.Array) -> jax.Array:
        channels = pixels.shape[-1]
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise UserError(
                    f"{name} = {values} has {len(values)} values, the images have {channels} channels: "
                    f"set {name} to one value or {channels}"
                )
        return (pixels.astype(jnp.float32) / 255 - jnp.array(self.mean)) / jnp.array(self.std)


def in_compute_type(model: KDModel, variables: Mapping[str, Any]) -> dict[str, Any]:
    """`variables` of a frozen network with half the bytes, where its compute type has 16 bits; every output as before.

    The kernels and biases of convolutions and dense layers in the stages, which are cast to the compute type wherever
    they are used, are held in it. Normalisations, the classifier and the adapters stay float32.
    """
    params = flatten_dict(variables["params"])
    narrow = {
        path: leaf.astype(model.dtype)
        for path, leaf in params.items()
        if path[0] in stage_names(model) and (*path[:-1], "kernel") in params
    }
    return {**variables, "params": unflatten_dict(params | narrow)}


def stage_names(model: KDModel) -> tuple[str, ...]:
    """The model's stages from input to output, as partial freezing counts them."""
    return tuple(name for name, _ in model.architecture.stages)


def known(model: KDModel) -> np.ndarray:
    """Which of the classes the model knows: [C] of bool."""
    return np.isin(np.arange(model.num_classes), model.classes or range(model.num_classes))


def key_feature(model: KDModel, feat_2d: jax.Array, logit: jax.Array) -> jax.Array:
    """What a network is read by, before its distillation adapter: its feature [B, F], and where it
    `joins_probabilities` the softmax of its logits [B, C], without gradient: [B, F + C] (SPEC 12)."""
    if not model.joins_probabilities:
        return feat_2d
    return jnp.concatenate([feat_2d, jax.lax.stop_gradient(jax.nn.softmax(logit))], axis=-1)


def feature_dim(model: KDModel) -> int:
    """Width at which a teacher is read: `distill_feat` if it has an adapter, else `key_feature` (SPEC 1)."""
    joined = model.num_classes if model.joins_probabilities else 0
    return model.adapter_dim or model.architecture.feat_dim + joined
