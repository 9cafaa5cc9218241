"""Random-weight models of every variant of the three families, small enough for any test.

Every weight and bias is random (transformers' defaults leave biases at zero, which hides wrong bias handling), and widths are
multiples of 128 so that groups of 128 exist.
"""

from collections.abc import Callable

import torch
from transformers import (
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

VOCABULARY = 320
POSITIONS = 64


def opt(**changes) -> OPTForCausalLM:
    settings = dict(
        vocab_size=VOCABULARY, hidden_size=128, ffn_dim=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=POSITIONS, word_embed_proj_dim=128,
    )  # fmt: skip
    return OPTForCausalLM(OPTConfig(**{**settings, **changes}))


def gpt_neox(rotary_pct: float = 0.25, **changes) -> GPTNeoXForCausalLM:
    settings = dict(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=POSITIONS, bos_token_id=0, eos_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": rotary_pct},
    )  # fmt: skip
    return GPTNeoXForCausalLM(GPTNeoXConfig(**{**settings, **changes}))


def gpt_bigcode(**changes) -> GPTBigCodeForCausalLM:
    settings = dict(
        vocab_size=VOCABULARY, n_embd=128, n_inner=256, n_layer=2, n_head=4, n_positions=POSITIONS, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return GPTBigCodeForCausalLM(GPTBigCodeConfig(**{**settings, **changes}))


VARIANTS: dict[str, Callable[[], PreTrainedModel]] = {
    "opt": opt,
    "opt-post-norm": lambda: opt(do_layer_norm_before=False),
    "opt-350m": lambda: opt(do_layer_norm_before=False, word_embed_proj_dim=64),
    "opt-project": lambda: opt(word_embed_proj_dim=64),
    "opt-no-final-norm": lambda: opt(_remove_final_layer_norm=True),
    "neox-parallel-rotary-0.25": gpt_neox,
    "neox-parallel-rotary-1.0": lambda: gpt_neox(rotary_pct=1.0),
    "neox-sequential-rotary-0.25": lambda: gpt_neox(use_parallel_residual=False),
    "neox-sequential-rotary-1.0": lambda: gpt_neox(use_parallel_residual=False, rotary_pct=1.0),
    "bigcode-multi-query": gpt_bigcode,
    "bigcode-multi-head": lambda: gpt_bigcode(multi_query=False),
    "bigcode-unscaled": lambda: gpt_bigcode(scale_attn_weights=False),
}
# One variant a family, for tests that need no more.
FAMILIES = ("opt", "neox-parallel-rotary-0.25", "bigcode-multi-query")


def build(variant: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The variant with random weights: matrices N(0, 0.08), LayerNorm weights around 1, biases N(0, 0.1)."""
    torch.manual_seed(seed)
    return randomized(VARIANTS[variant](), dtype)


def randomized(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model with weights from torch's seed, as `build` says."""
    model = model.eval()
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if (parameter.ndim == 1 and "norm" in name.lower()) or ".ln_" in name:
                parameter.normal_(1.0 if name.endswith("weight") else 0.0, 0.1)
            elif parameter.ndim == 1:
                parameter.normal_(0.0, 0.1)
            else:
                parameter.normal_(0.0, 0.08)
        # Not model.to(dtype): that would round GPT-NeoX's rotary frequencies, which are buffers, as well.
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def token_ids(batch: int = 2, length: int = 33, seed: int = 0) -> torch.Tensor:
    """int64 [batch, length]; no special tokens."""
    return torch.randint(4, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
