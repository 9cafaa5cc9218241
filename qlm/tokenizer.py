"""The checkpoint's tokenizer, with BOS by the family's rule, without transformers.

Reads tokenizer.json, or vocab.json and merges.txt (byte-level BPE: the official OPT repositories have only those).
Which special tokens there are is decided by family and config.json, never by tokenizer_config.json. OPT's first id is
always 2 (`</s>`); the other families add nothing.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qlm.arch import FamilySpec
from qlm.checkpoint.config import read_config
from qlm.checkpoint.reader import Checkpoint
from qlm.errors import DataError, MissingInput

# Imported where it is used: it takes a while, and not every model that is opened reads text.
if TYPE_CHECKING:
    from tokenizers import Tokenizer


def read_tokenizer(checkpoint: Checkpoint) -> "Tokenizer":
    """The tokenizer. `encode(text).ids` starts with BOS where the family wants it; nothing is cut or padded.

    Raises:
        MissingInput: the folder has no tokenizer.
        DataError: it cannot be read, or does not turn a letter into what it should.
    """
    from tokenizers import AddedToken, processors

    spec, fields = read_config(checkpoint)
    tokenizer = _read_files(checkpoint)
    specials = special_tokens(spec, fields, tokenizer)
    bos = specials.get("bos_token")
    if spec.bos_first:
        if bos is None:
            raise DataError(
                f"{checkpoint.folder}: the tokenizer has no token {spec.bos_id}, with which every text starts"
            )
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, spec.bos_id)]
        )
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # In a text they are these tokens and not their letters, and are left out of what is decoded; tokenizer.json has
    # most of them marked so already.
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    added = dict.fromkeys(token for token in specials.values() if token not in known)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in added])

    ids = tokenizer.encode("a").ids
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    wanted = [spec.bos_id, *plain] if spec.bos_first else plain
    if ids != wanted or not plain:
        raise DataError(f"{checkpoint.folder}: the tokenizer turns 'a' into {ids}, expected {wanted}")
    return tokenizer


def special_tokens(spec: FamilySpec, fields: Mapping[str, Any], tokenizer: "Tokenizer") -> dict[str, str]:
    """Text of "bos_token", "eos_token" and "pad_token", as far as the config names them and the tokenizer has them."""
    ids = {name: _first(fields.get(f"{name}_id")) for name in ("bos_token", "eos_token", "pad_token")}
    if spec.bos_id is not None:
        ids["bos_token"] = spec.bos_id
    texts = {name: tokenizer.id_to_token(index) for name, index in ids.items() if index is not None and index >= 0}
    return {name: text for name, text in texts.items() if text is not None}


def stop_ids(fields: Mapping[str, Any], tokenizer: "Tokenizer") -> list[int]:
    """The ids that end a text: EOS as the tokenizer has it, then every other id of the config's list.

    Args:
        fields: of the config, complete (`qlm.arch.shapes.complete_fields`).
    """
    configured = fields["eos_token_id"]
    first = _first(configured)
    several = configured if isinstance(configured, list) else []
    text = tokenizer.id_to_token(first) if first is not None and first >= 0 else None
    own = None if text is None else tokenizer.token_to_id(text)
    if own is None and not several:
        own = first
    return list(dict.fromkeys([*([] if own is None else [own]), *several]))


def _first(ids: int | list[int] | None) -> int | None:
    return ids[0] if isinstance(ids, list) else ids


def _read_files(checkpoint: Checkpoint) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    single, vocabulary, merges = (checkpoint.path(n) for n in ("tokenizer.json", "vocab.json", "merges.txt"))
    if single is None and (vocabulary is None or merges is None):
        raise MissingInput(f"{checkpoint.folder}: no tokenizer.json, and no vocab.json with merges.txt")
    content = checkpoint.read_json("tokenizer.json")
    if content is not None and "Precompiled" in str(content.get("normalizer")):
        # SentencePiece's; its reader panics on damaged ones, and prints that before it can be caught.
        raise DataError(f"{single}: has a Precompiled normalizer, which no tokenizer of these families has")
    try:
        if single is not None:
            return Tokenizer.from_str(single.read_text("utf-8"))
        tokenizer = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer
    except BaseException as error:
        # A panic of the Rust side is no Exception; Ctrl-C and SIGTERM are none either, and pass.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        name = "tokenizer.json" if single is not None else "vocab.json and merges.txt"
        raise DataError(f"{checkpoint.folder}: {name}: not a tokenizer: {str(error) or type(error).__name__}") from None
