"""The GLM-4 family of 2025 (GLM-4-0414, GLM-Z1): GLM's layers, sandwiched between norms."""

from pdjax.device.models.family import Tensor
from pdjax.device.models.glm import Glm
from pdjax.device.models.post_norms import PostNorms


class Glm4(PostNorms, Glm):
    """See `ModelFamily`."""

    name = "glm4"
    gguf: str | None = "glm4"
    gguf_keys = frozenset(["rope.dimension_count"])
    post_norms = (
        Tensor("post_self_attn_layernorm.weight", "post_attention_norm.weight", "D"),
        Tensor("post_mlp_layernorm.weight", "post_ffw_norm.weight", "D"),
    )
