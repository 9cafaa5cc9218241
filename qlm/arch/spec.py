"""What a model family looks like, as data. Nothing here behaves.

Shape letters, used in every docstring of the project:
T tokens, I in features, O out features, G groups, H heads, D head dim, V vocabulary, L layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Task = Literal["causal-lm", "sequence-classification", "token-classification", "question-answering", "base"]
# Of the tasks that have a head of their own beside the language model's: its module, directly in the model.
HEADS: dict[Task, str] = {
    "sequence-classification": "score",
    "token-classification": "classifier",
    "question-answering": "qa_outputs",
}


@dataclass(frozen=True)
class LinearGroup:
    """Linears of one block that read the same tensor, so that one Hessian serves them all.

    Attributes:
        linears: paths inside the block, in the order of the forward pass.
        norm: path inside the block of the LayerNorm whose output they read, if any.
        norm_if: config field that must be true for `norm` to come right before them (OPT's `do_layer_norm_before`).
    """

    linears: tuple[str, ...]
    norm: str | None = None
    norm_if: str | None = None


@dataclass(frozen=True)
class Fold:
    """Where a scale and a shift of each input feature of some linears may go so that the block computes the same: into what makes
    that input (SmoothQuant, arXiv:2211.10438, section 4; the shift: Outlier Suppression+, arXiv:2304.09145, section 3).

    Attributes:
        source: path inside the block of what makes the input: a LayerNorm or a linear.
        linears: paths of all that reads it.
        through: what lies between. "norm": nothing, the source is a LayerNorm. "attention": averages over tokens of the source's
            value rows, with weights that sum to 1. "relu": ReLU, which a scale passes and a shift does not.
        when: config fields with the values that make it so.
    """

    source: str
    linears: tuple[str, ...]
    through: Literal["norm", "attention", "relu"]
    when: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class FamilySpec:
    """One family.

    Attributes:
        model_type: the config's `model_type`.
        config_class: transformers' config class.
        model_classes: transformers' class for each task that the family has.
        prefix: attribute of the headed classes that holds the base model; the prefix of its tensors' names in files.
        blocks: path of the list of blocks, inside the base model.
        stages: the linears of a block in the order of the forward pass. The groups of one stage do not depend on each other,
            so that one forward pass gathers the statistics of all of them; a stage depends on those before it, if only because it
            makes up for what they have lost in the residual stream.
        parallel_stages: the same for a block with parallel residual, where the MLP does not wait for the attention.
        parallel_if: config field that says that `parallel_stages` hold.
        fused_qkv: how the fused projection's rows are laid out: None (three linears), "per_head" ([q|k|v] for each head in
            turn), or "multi_query" (all q heads, then one k, then one v; per head when the config says multi-head).
        fused_linear: path of that projection inside a block (`arch.parts.fused_parts`).
        folds: the places of a block where scales and shifts of activations may go without a change to its output.
        head: the language-model head's name in memory; `published_head` is its name in files.
        head_tied: whether the head is the embedding when the config does not say.
        attention: path of the attention inside a block, which returns (output, weights); `attention_out` is its last linear.
        mlp_out: path of the MLP's last linear. Its output and that of `attention_out` are added to the residual stream.
        embedding: path of the token embedding, inside the base model.
        position_offset: rows at the start of the position table that no position uses.
        bos_first: whether every text starts with the BOS token.
        bos_id: the id that it then has.
        defaults: what a field of a causal LM means when config.json leaves it out; the sizes that it must not leave out
            and `tie_word_embeddings` (`head_tied`) have none. transformers' config classes say the same (a test compares).
        multiples: fields that, absent or null, are so many times another field.
        fields: config fields that change numbers or shapes, with the type that they must have. Passed on to the config class.
        fixed_fields: config fields that are allowed with these values only.
        inert_fields: config fields that are known and change no number; they are dropped.
        ignored_tensors: regular expressions (full match, without the base prefix) of buffers that older files carry.
        positions: config field with the number of positions; `hidden_size`, `layers` and `heads` likewise.
        lora_targets: last path components of the linears that adapters attach to.
    """

    model_type: str
    config_class: str
    model_classes: Mapping[Task, str]
    prefix: str
    blocks: str
    stages: tuple[tuple[LinearGroup, ...], ...]
    attention: str
    attention_out: str
    mlp_out: str
    embedding: str
    head: str
    published_head: str
    head_tied: bool
    fields: Mapping[str, tuple[type, ...]]
    lora_targets: tuple[str, ...]
    positions: str
    defaults: Mapping[str, object]
    hidden_size: str = "hidden_size"
    layers: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    multiples: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    parallel_stages: tuple[tuple[LinearGroup, ...], ...] | None = None
    parallel_if: str | None = None
    fused_qkv: Literal["per_head", "multi_query"] | None = None
    fused_linear: str | None = None
    folds: tuple[Fold, ...] = ()
    position_offset: int = 0
    bos_first: bool = False
    bos_id: int | None = None
    fixed_fields: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    inert_fields: frozenset[str] = frozenset()
    ignored_tensors: tuple[str, ...] = ()

    @property
    def residual_linears(self) -> tuple[str, str]:
        """Those whose output is added to the residual stream, in the order of the forward pass."""
        return self.attention_out, self.mlp_out


# Known to transformers' base config or written by one of its versions; none of them changes a logit of a model in evaluation
# mode. Generation settings among them (eos excepted) are dropped too: qlm's own options decide how text is generated.
COMMON_INERT_FIELDS = frozenset(
    [
        "_name_or_path",
        "_commit_hash",
        "architectures",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "use_cache",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "torchscript",
        "use_bfloat16",
        "is_encoder_decoder",
        "task_specific_params",
        "finetuning_task",
        "problem_type",
        "tokenizer_class",
        "prefix",
        "decoder_start_token_id",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
        "max_length",
        "min_length",
        "do_sample",
        "early_stopping",
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "num_return_sequences",
        "output_scores",
        "return_dict_in_generate",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "cross_attention_hidden_size",
        "sep_token_id",
        "initializer_range",
        "init_std",
        "attn_implementation",
        "_attn_implementation_autoset",
        "gradient_checkpointing",
        "keys_to_ignore_at_inference",
        "is_composition",
        "base_model_tp_plan",
        "base_model_pp_plan",
    ]
)

# Fields that every family passes on.
COMMON_FIELDS: dict[str, tuple[type, ...]] = {
    "vocab_size": (int,),
    "bos_token_id": (int, type(None)),
    "eos_token_id": (int, list, type(None)),
    "pad_token_id": (int, type(None)),
    "tie_word_embeddings": (bool,),
    "num_labels": (int,),
    "id2label": (dict,),
    "label2id": (dict,),
}

# Allowed with the value that means "nothing special"; anything else would change numbers in a way that is not known here.
COMMON_FIXED_FIELDS: dict[str, tuple[object, ...]] = {
    "is_decoder": (False, True),
    "add_cross_attention": (False,),
    "pruned_heads": ({}, None),
    "chunk_size_feed_forward": (0,),
    "trust_remote_code": (False, None),
}
