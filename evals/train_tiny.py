"""Train one of the three tiny checkpoints that the demo and the tests run on.

    python evals/train_tiny.py tiny-opt|tiny-gpt-neox|tiny-gpt-bigcode TRAINING_DIR [--steps 2200] [--threads 2]

TRAINING_DIR is what make_texts.py wrote. The result is evals/checkpoints/NAME: fp16 safetensors of at most 8 MB, a tokenizer of
its own, and training.log. transformers' own classes, plain AdamW, bf16 autocast, a warm-up and half a cosine. Held-out text is
not looked at here: `qlm evaluate` does that.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).resolve().parent.parent
LENGTH = 512
BATCH = 8
PEAK_LEARNING_RATE = 2e-3
WARMUP = 0.04
WEIGHT_DECAY = 0.1

# Each just below 4 million parameters, which is 8 MB in fp16. Width 256 and 4 x 256 so that groups of 128 exist.
MODELS = {
    "tiny-opt": (
        "english",
        lambda: OPTForCausalLM(
            OPTConfig(
                vocab_size=2048, hidden_size=256, ffn_dim=1024, num_hidden_layers=4, num_attention_heads=4,
                max_position_embeddings=LENGTH, word_embed_proj_dim=256, dropout=0.0,
            )
        ),
    ),
    "tiny-gpt-neox": (
        "english",
        lambda: GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=1536, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
                max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=0,
            )
        ),
    ),
    "tiny-gpt-bigcode": (
        "python",
        lambda: GPTBigCodeForCausalLM(
            GPTBigCodeConfig(
                vocab_size=1536, n_embd=256, n_inner=1024, n_layer=5, n_head=4, n_positions=LENGTH, bos_token_id=0,
                eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            )
        ),
    ),
}  # fmt: skip


def train_tokenizer(name: str, documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer. OPT's has the published ids (<s> 0, <pad> 1, </s> 2, <unk> 3) and puts </s> first."""
    is_opt = name == "tiny-opt"
    specials = ["<s>", "<pad>", "</s>", "<unk>"] if is_opt else ["<|endoftext|>", "<|padding|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(documents[::2], trainer)
    if not is_opt:
        return PreTrainedTokenizerFast(
            tokenizer_object=bpe, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|padding|>",
            model_max_length=LENGTH,
        )  # fmt: skip
    bpe.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="</s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        model_max_length=LENGTH,
    )  # fmt: skip


def token_stream(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> np.ndarray:
    """All documents one after the other, an end-of-text token before each."""
    encodings = tokenizer._tokenizer.encode_batch_fast(documents, add_special_tokens=False)
    ids = [np.concatenate(([tokenizer.eos_token_id], e.ids)) for e in encodings]
    return np.concatenate(ids).astype(np.int32)


def decay_groups(model: torch.nn.Module) -> list[dict]:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]


def train(model: torch.nn.Module, stream: np.ndarray, steps: int, log) -> None:
    optimizer = torch.optim.AdamW(decay_groups(model), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    generator = np.random.default_rng(0)
    start, mean_loss = time.perf_counter(), None
    # torch.compile would change the state dict's names; compiling the forward alone does not.
    forward = torch.compile(lambda ids: model(input_ids=ids, use_cache=False).logits)
    model.train()
    for step in range(1, steps + 1):
        progress = step / steps
        shape = min(progress / WARMUP, 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * shape
        starts = generator.integers(0, len(stream) - LENGTH - 1, BATCH)
        rows = torch.from_numpy(np.stack([stream[s : s + LENGTH + 1] for s in starts]).astype(np.int64))
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(rows[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean_loss = loss.item() if mean_loss is None else 0.98 * mean_loss + 0.02 * loss.item()
        if step % 100 == 0 or step == 1:
            seconds = time.perf_counter() - start
            line = {
                "step": step, "loss": round(mean_loss, 4), "learning_rate": round(PEAK_LEARNING_RATE * shape, 6),
                "tokens": step * BATCH * LENGTH, "tokens_per_s": round(step * BATCH * LENGTH / seconds),
                "seconds": round(seconds),
            }  # fmt: skip
            print(json.dumps(line), file=log, flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("name", choices=MODELS)
    arguments.add_argument("training_dir", type=Path)
    arguments.add_argument("--steps", type=int, default=2200)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--out", type=Path, default=ROOT / "evals" / "checkpoints")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    language, build = MODELS[options.name]
    with open(options.training_dir / f"{language}.jsonl", encoding="utf-8") as lines:
        documents = [json.loads(line)["text"] for line in lines]
    model = build()
    out = options.out / options.name
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(options.name, documents, model.config.vocab_size)
    stream = token_stream(tokenizer, documents)
    with open(out / "training.log", "w") as log:
        parameters = sum(p.numel() for p in model.parameters())
        print(json.dumps({"parameters": parameters, "training_tokens": len(stream)}), file=log, flush=True)
        train(model, stream, options.steps, log)
    lines = (out / "training.log").read_text().splitlines()
    (out / "training.log").write_text("\n".join([lines[0], "…", *lines[-5:]]) + "\n")

    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    for path in out.iterdir():
        path.chmod(0o644)  # safetensors writes 0600


if __name__ == "__main__":
    main()
