"""QLoRA as anybody writes it: transformers' model loaded by bitsandbytes in NF4, PEFT's LoRA on all linears, transformers' Trainer. No qlm.

    python evals/peer_finetune.py CHECKPOINT TEXT OUTPUT [--steps 12] [--batch-size 2] [--length 256] [--r 16] [--precision float32]
                                  [--device cpu] [--gradient-checkpointing] [--optimizer adamw] [--threads N]

TEXT is cut into rows of --length tokens. The last line printed is JSON: the moment at which each step was over, in seconds since training began,
peak memory, trained parameters and the adapter's bytes.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

# qlm's names, and the Trainer's.
OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}


class Clock(transformers.TrainerCallback):
    """When each step's loss was known. Logging fetches it from the device, so that nothing is on its way any more."""

    def __init__(self) -> None:
        self.stamps: list[float] = []
        self.losses: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.began = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        if "loss" in logs:
            self.stamps.append(time.perf_counter() - self.began)
            self.losses.append(float(logs["loss"]))


def status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


def rows_of(checkpoint: Path, text: Path, length: int) -> list[dict[str, list[int]]]:
    ids = transformers.AutoTokenizer.from_pretrained(checkpoint)(text.read_text("utf-8"))["input_ids"]
    starts = range(0, len(ids) - length + 1, length)
    rows = [ids[start : start + length] for start in starts]
    return [{"input_ids": row, "attention_mask": [1] * length, "labels": row} for row in rows]


def load_model(options: argparse.Namespace) -> Any:
    dtype = getattr(torch, options.precision)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        options.checkpoint,
        dtype=dtype,
        device_map={"": options.device},
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        ),
    )
    model = prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=options.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    lora = LoraConfig(
        r=options.r, lora_alpha=2 * options.r, lora_dropout=options.dropout, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(model, lora)


def parse() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("checkpoint", type=Path)
    arguments.add_argument("text", type=Path)
    arguments.add_argument("output", type=Path, help="folder for the adapter")
    arguments.add_argument("--steps", type=int, default=12)
    arguments.add_argument("--batch-size", type=int, default=2)
    arguments.add_argument("--length", type=int, default=256)
    arguments.add_argument("--r", type=int, default=16)
    arguments.add_argument("--dropout", type=float, default=0.05)
    arguments.add_argument("--precision", choices=("float32", "bfloat16", "float16"), default="float32")
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--gradient-checkpointing", action="store_true")
    arguments.add_argument("--optimizer", choices=OPTIMIZERS, help="by default adamw on a CPU, else adamw_8bit")
    arguments.add_argument("--threads", type=int)
    return arguments.parse_args()


def main() -> None:
    options = parse()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    on_cpu = options.device == "cpu"
    rows = rows_of(options.checkpoint, options.text, options.length)
    model, clock = load_model(options), Clock()
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(options.output),
            per_device_train_batch_size=options.batch_size,
            max_steps=options.steps,
            learning_rate=2e-4,
            lr_scheduler_type="cosine",
            optim=OPTIMIZERS[options.optimizer or ("adamw" if on_cpu else "adamw_8bit")],
            bf16=options.precision == "bfloat16",
            fp16=options.precision == "float16",
            use_cpu=on_cpu,
            gradient_checkpointing=options.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if options.gradient_checkpointing else None,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=not on_cpu,
        ),
        train_dataset=rows,
        data_collator=transformers.default_data_collator,
        callbacks=[clock],
    )
    trainer.train()
    model.save_pretrained(options.output)
    found: dict[str, Any] = {
        "stamps": clock.stamps,
        "losses": clock.losses,
        "peak_rss_bytes": status_bytes("VmHWM"),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "adapter_bytes": (options.output / "adapter_model.safetensors").stat().st_size,
    }
    if not on_cpu:
        found |= {
            "peak_gpu_bytes": torch.cuda.max_memory_allocated(),
            "reserved_gpu_bytes": torch.cuda.max_memory_reserved(),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
