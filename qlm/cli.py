"""The command line: parses, calls one verb, prints. Nothing else happens here but turning errors into one line and an exit code.

Results go to stdout, progress and errors to stderr. Heavy imports wait for the command that needs them, so that `qlm --help` is quick.
"""

import io
import json
import logging
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from qlm.errors import QlmError, UsageError, printable

app = typer.Typer(
    name="qlm",
    help="Quantize, fine-tune, evaluate and run OPT, GPT-NeoX and GPTBigCode models.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Argument(help="A model folder, or a model on the hub: owner/name.")]
Recipes = Annotated[list[Path], typer.Argument(help="Recipe files (YAML).")]


def _check_json_file(target: Path | None) -> Path | None:
    """A place that cannot be written is better known now than after the work."""
    if target is not None and str(target) != "-":
        from qlm.checkpoint.files import check_file

        check_file(target)
    return target


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json", help="Also write the result as JSON to this file ('-' is stdout).", callback=_check_json_file
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Devices = Annotated[
    str, typer.Option("--device", help="cpu, cuda, cuda:N, or auto: all GPUs, for models larger than one.")
]
Revision = Annotated[str | None, typer.Option(help="Commit, tag or branch of a model on the hub.")]
Dtype = Annotated[str, typer.Option(help="What to compute in: auto, float32, bfloat16 or float16.")]
Attention = Annotated[
    str | None, typer.Option("--attention", help="Of transformers: eager, sdpa (its default) or flash_attention_2.")
]
RuntimeName = Annotated[str | None, typer.Option("--runtime", help="engine (qlm's own, on CPUs) or transformers.")]
Head = Annotated[str, typer.Option(help="Engine: hold the language-model head in int8 or float; auto: as the model.")]
CacheDtype = Annotated[
    str, typer.Option(help="Engine: dtype of keys and values: float32, float16, bfloat16, int8 or auto.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that is there already.")]
AdapterFolder = Annotated[Path | None, typer.Option("--adapter", help="Folder of an adapter to put on the model.")]
Threads = Annotated[int | None, typer.Option(min=1, max=256, help="CPU threads; all cores by default.")]


# What published perplexities of these models are measured on.
WIKITEXT_2 = {"name": "Salesforce/wikitext", "config": "wikitext-2-raw-v1", "split": "test"}


def _write_json(value: Any, target: Path | None) -> None:
    if target is None:
        return
    if str(target) == "-":
        sys.stdout.write(_json(value, sys.stdout.encoding))
    else:
        from qlm.checkpoint.files import write_file

        write_file(target, _json(value, "utf-8"))


def _json(value: Any, encoding: str | None) -> str:
    """As JSON, with JSON's own escapes where the encoding lacks a character."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return (text if _can_encode(text, encoding) else json.dumps(value, indent=2)) + "\n"


def _can_encode(text: str, encoding: str | None) -> bool:
    try:
        text.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _note_escapes(text: str) -> None:
    """Say so if stdout could not take a text as it is (`main` has it escape what it lacks)."""
    if not _can_encode(text, sys.stdout.encoding):
        typer.echo(
            f"qlm: note: stdout is {sys.stdout.encoding}: other characters of the text are written as \\x.. or \\u....; "
            "with PYTHONIOENCODING=utf-8 they come as they are",
            err=True,
        )


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _check_text(option: str, texts: list[str]) -> None:
    """Refuse what the shell passed on in another encoding than UTF-8: Python has put surrogates in its place."""
    for text in texts:
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise UsageError(f"{option}: found {text!r}, which is not UTF-8")


def _show(value: dict[str, Any], target: Path | None) -> None:
    """A mapping as a table, or as JSON where that was asked for on stdout."""
    from qlm.report import facts_table, output_console

    if str(target) != "-":
        output_console().print(facts_table(value))
    _write_json(value, target)


@app.command()
def quantize(
    recipes: Recipes,
    force: Force = False,
    device: Device = "cpu",
    threads: Threads = None,
    json_file: JsonFile = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Quantize as each recipe says, measure the results, and print one table. Run again to continue after an interruption."""
    from qlm.recipe import load_recipe, refuse_shared_outputs

    loaded = {str(path): load_recipe(path) for path in recipes}
    refuse_shared_outputs(loaded)
    _set_threads(threads)
    from qlm.load import check_device
    from qlm.report import Reporter, output_console, results_table
    from qlm.run import run_recipe

    check_device(device)
    reporter = Reporter(quiet)
    rows = []
    try:
        for number, (path, recipe) in enumerate(loaded.items(), 1):
            title = f"[{number}/{len(loaded)}] {Path(path).stem}"
            try:
                with reporter.progress(title) as tell:
                    rows.append(run_recipe(path, recipe, force=force, device=device, tell=tell))
            except QlmError as error:
                raise (type(error)(f"{path}: {error}") if len(loaded) > 1 else error) from None
            result = rows[-1].result
            resumed = f" ({result.resumed} blocks were there already)" if result.resumed else ""
            picture = f", their bits in {result.output / 'bits.svg'}" if result.choice is not None else ""
            reporter.note(f"{title}: {len(result.layers)} linears -> {result.output}{picture}{resumed}")
    finally:
        # What the recipes before a failing one gave is shown all the same.
        if rows and str(json_file) != "-":
            output_console().print(results_table(rows))
        if rows:
            _write_json([row.to_json() for row in rows], json_file)


@app.command()
def finetune(
    recipe: Annotated[Path, typer.Argument(help="A fine-tuning recipe (YAML), with a train section.")],
    force: Force = False,
    device: Device = "cpu",
    threads: Threads = None,
    json_file: JsonFile = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train an adapter as a recipe says. Run again to continue after an interruption."""
    from qlm.recipe import load_finetune_recipe

    loaded = load_finetune_recipe(recipe)
    _set_threads(threads)
    from qlm.finetune import finetune as train
    from qlm.finetune import saved_step
    from qlm.report import Reporter, facts_table, output_console

    reporter, start = Reporter(quiet), time.perf_counter()
    try:
        with reporter.progress(recipe.stem) as tell:
            result = train(
                loaded, force=force, device=device, progress=tell,
                planned=lambda needs: reporter.note(f"{recipe.stem}: {needs.in_words()}"),
            )  # fmt: skip
    except (KeyboardInterrupt, _Terminated):
        # Of several processes the first speaks.
        if (step := saved_step(loaded)) is not None and os.environ.get("RANK", "0") == "0":
            reporter.note(f"{recipe.stem}: step {step} is saved")
        raise
    if result.resumed == result.steps:
        reporter.note(f"{recipe.stem}: {result.output} was there already")
    if str(json_file) != "-":
        output_console().print(facts_table(result.summary(time.perf_counter() - start)))
        for line in result.next_commands():
            reporter.note(f"next: {line}")
    facts = {
        "adapter": str(result.output), "base": result.base, "steps": result.steps, "resumed_steps": result.resumed,
        **result.training,
    }  # fmt: skip
    _write_json(facts, json_file)


@app.command()
def merge(
    base: Annotated[str, typer.Argument(help="The model that the adapter is for: a folder, or owner/name on the hub.")],
    adapter: Annotated[Path, typer.Argument(help="Folder of the adapter.")],
    into: Annotated[str, typer.Option(help="What the result is stored as: float, nf4, gptq or int8.")],
    output: Annotated[Path, typer.Option(help="Folder to create.")],
    quality: Annotated[str | None, typer.Option(help="Of quantizing: fast, balanced or best.")] = None,
    bits: Annotated[int | None, typer.Option(help="gptq: 2, 3, 4 or 8.")] = None,
    group_size: Annotated[int | None, typer.Option(help="gptq: 32, 64, 128 or -1.")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Text that quantizing looks at, a text file or a .jsonl file; gptq needs one.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Windows of the calibration text.")] = None,
    calibration_length: Annotated[int | None, typer.Option(min=2, help="Tokens in each of them.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Text to measure the result on, beside the base with its adapter: a text file or a .jsonl file."
        ),
    ] = None,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens in a window of that text.")] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="Only its first so many windows.")] = None,
    revision: Revision = None,
    attention: Attention = None,
    force: Force = False,
    device: Device = "cpu",
    threads: Threads = None,
    json_file: JsonFile = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Add an adapter to its base's weights, and quantize those again. With --data: perplexity and KL divergence, merged against apart."""
    from qlm.recipe import CalibrationRecipe, EvaluateRecipe

    looked_at = _source(
        CalibrationRecipe, "--calibration", calibration, {"samples": samples, "length": calibration_length}
    )
    measured = _source(EvaluateRecipe, "--data", data, {"length": length, "windows": windows})
    settings = {"quality": quality, "bits": bits, "group_size": group_size}
    given = {key: value for key, value in settings.items() if value is not None}
    _set_threads(threads)
    from qlm.merge import merge as add_and_quantize
    from qlm.report import Reporter

    reporter = Reporter(quiet)
    with reporter.progress("merge") as tell:
        result = add_and_quantize(
            base, adapter, into, output, quantize_settings={"backend": into, **given} if given else None,
            calibration=looked_at, evaluate_on=measured, revision=revision, attn_implementation=attention or "sdpa",
            force=force, device=device, progress=tell,
        )  # fmt: skip
    if result.was_there:
        reporter.note(f"merge: {result.output} was there already")
    measures = result.evaluation and {"baseline": "the base with the adapter", **result.evaluation.to_json()}
    facts = {
        "output": str(result.output), "into": result.into, "onto": result.onto, "base": result.base, "linears": result.linears,
        "bytes": result.bytes, "evaluation": measures,
    }  # fmt: skip
    _show(facts, json_file)


def _source(kind: Any, option: str, data: str | None, more: dict[str, Any]) -> Any:
    """A recipe's section about a text from an option and those that belong to it; None where there is no text."""
    given = {key: value for key, value in more.items() if value is not None}
    if data is None:
        for key in given:
            name = "--calibration-length" if (option, key) == ("--calibration", "length") else f"--{key}"
            raise UsageError(f"{name}: has no effect without {option}; give a text, or leave it out")
        return None
    try:
        return kind.model_validate({"data": data, **given})
    except ValueError:
        raise UsageError(f"{option}: found {data!r}; expected the path of a text file or a .jsonl file") from None


@app.command()
def plan(recipes: Recipes, device: Device = "cpu", json_file: JsonFile = None, debug: Debug = False) -> None:
    """Predict memory, disk and time of recipes, without doing anything."""
    from qlm.load import check_device
    from qlm.plan import plan as make_plan
    from qlm.recipe import FinetuneRecipe, load_any_recipe
    from qlm.training.plan import plan_training

    check_device(device)
    loaded = {str(path): load_any_recipe(path) for path in recipes}
    plans = {
        path: (
            plan_training(recipe, device) if isinstance(recipe, FinetuneRecipe) else make_plan(recipe, device)
        ).to_json()
        for path, recipe in loaded.items()
    }
    _show(plans if len(plans) > 1 else next(iter(plans.values())), json_file)


@app.command()
def validate(recipes: Recipes, debug: Debug = False) -> None:
    """Check recipes, of both kinds, without opening a model."""
    from qlm.recipe import load_any_recipe, refuse_shared_outputs

    refuse_shared_outputs({str(path): load_any_recipe(path) for path in recipes})
    for path in recipes:
        typer.echo(f"{path}: valid")


@app.command()
def schema(
    finetune: Annotated[bool, typer.Option("--finetune", help="That of recipes for qlm finetune.")] = False,
    debug: Debug = False,
) -> None:
    """Print the JSON Schema of recipes, for editors."""
    from qlm.recipe import finetune_json_schema, json_schema

    _write_json(finetune_json_schema() if finetune else json_schema(), Path("-"))


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="A shipped recipe to copy, such as opt-125m/gptq-4bit.")] = None,
    to: Annotated[
        Path | None, typer.Argument(help="Where to copy it: a file or a folder; the current folder by default.")
    ] = None,
    debug: Debug = False,
) -> None:
    """List the recipes that come with qlm, and accelerate's configurations (`qlora/accelerate/...`), or copy one."""
    from qlm.shipped import copy_recipe, list_recipes

    if name is None:
        for shipped in list_recipes():
            typer.echo(shipped)
    else:
        typer.echo(copy_recipe(name, to or Path(".")))


@app.command()
def evaluate(
    model: Model,
    data: Annotated[str, typer.Option(help="A text file or a .jsonl file; WikiText-2's test split by default.")] = "",
    column: Annotated[str, typer.Option(help="Field of a .jsonl file's objects that holds the text.")] = "text",
    baseline: Annotated[
        str | None, typer.Option(help="A float model to measure KL divergence and same-top-1 against.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens in a window; the model's positions, at most 2048.")
    ] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="Only the first so many windows.")] = None,
    adapter: AdapterFolder = None,
    revision: Revision = None,
    runtime: RuntimeName = "transformers",
    device: Devices = "cpu",
    dtype: Dtype = "auto",
    attention: Attention = None,
    threads: Threads = None,
    head: Head = "auto",
    cache_dtype: CacheDtype = "auto",
    json_file: JsonFile = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Perplexity of a model on a text, and KL divergence from a baseline."""
    from qlm.engine.runtime import choose_runtime

    chosen, _ = choose_runtime(
        runtime, model, revision=revision, device=device, dtype=dtype, attention=attention, head=head,
        cache_dtype=cache_dtype,
    )  # fmt: skip
    _set_threads(threads)
    from qlm.recipe import EvaluateRecipe
    from qlm.report import Reporter
    from qlm.run import evaluate_on

    values: dict[str, Any] = {"data": data or WIKITEXT_2, **({"column": column} if data.endswith(".jsonl") else {})}
    try:
        source = EvaluateRecipe.model_validate(values)
    except ValueError:
        raise UsageError(f"--data: found {data!r}; expected the path of a text file or a .jsonl file") from None
    with Reporter(quiet).progress("evaluate") as tell:
        result = evaluate_on(
            model, source, length=length, windows=windows, adapter=adapter, baseline=baseline, revision=revision,
            device=device, dtype=dtype, attn_implementation=attention or "sdpa", runtime=chosen, threads=threads,
            head=head, cache_dtype=cache_dtype, tell=tell,
        )  # fmt: skip
    _show(result.to_json(), json_file)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[list[str], typer.Option(help="Text to continue; give it again for several.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="Above 1 is wilder, below 1 tamer.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k likeliest tokens only.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the likeliest tokens that make up this probability.")
    ] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 avoids what was said already.")] = 1.0,
    num_return_sequences: Annotated[int, typer.Option(min=1, max=1024, help="How many continuations.")] = 1,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.")] = False,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; give it again for several.")] = None,
    no_graphs: Annotated[
        bool,
        typer.Option("--no-graphs", help="Launch each step anew instead of recording it as a CUDA graph (GPUs only)."),
    ] = False,
    adapter: AdapterFolder = None,
    revision: Revision = None,
    runtime: RuntimeName = None,
    device: Devices = "cpu",
    dtype: Dtype = "auto",
    attention: Attention = None,
    threads: Threads = None,
    head: Head = "auto",
    cache_dtype: CacheDtype = "auto",
    json_file: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Continue prompts; one is printed as it goes. Runs on qlm's engine on CPUs, else on transformers."""
    from qlm.engine.runtime import choose_runtime

    chosen, why = choose_runtime(
        runtime, model, revision=revision, device=device, dtype=dtype, attention=attention, head=head,
        cache_dtype=cache_dtype,
    )  # fmt: skip
    if why:
        typer.echo(f"qlm: note: running on transformers: {why}", err=True)

    _check_text("--prompt", prompt)
    _check_text("--stop", stop or [])
    echoed = False

    def stream(piece: str) -> None:
        # The prompt comes with the first piece, when everything has been checked.
        nonlocal echoed
        sys.stdout.write(piece if echoed else prompt[0] + piece)
        sys.stdout.flush()
        echoed = True

    streaming = num_return_sequences == 1 and len(prompt) == 1 and str(json_file) != "-"
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p,
        "repetition_penalty": repetition_penalty, "num_return_sequences": num_return_sequences, "seed": seed,
        "greedy": greedy, "stop": stop or [],
    }  # fmt: skip
    piecewise = stream if streaming else None
    settings: dict[str, Any]
    if chosen == "engine":
        from qlm.engine.engine import Engine

        settings = {"head": head, "cache_dtype": cache_dtype}
        with Engine(model, revision=revision, threads=threads, adapter=adapter, **settings) as engine:
            texts = engine.generate(prompt, **options, stream=piecewise)
    else:
        _set_threads(threads)
        from qlm.generate import generate as make_text
        from qlm.load import load_tokenizer
        from qlm.run import load_with_adapter

        settings = {"device": device, "dtype": dtype, "attn_implementation": attention or "sdpa"}
        loaded = load_with_adapter(model, adapter, revision=revision, **settings)
        tokenizer = load_tokenizer(model, revision=revision)
        graphs = False if no_graphs else None
        texts = [make_text(loaded, tokenizer, each, **options, stream=piecewise, graphs=graphs) for each in prompt]
    on_top = {} if adapter is None else {"adapter": str(adapter)}
    how = {"model": model, **on_top, "revision": revision, "runtime": chosen, "options": {**options, **settings}}
    found = [{"prompt": each, "texts": of_it, **how} for each, of_it in zip(prompt, texts, strict=True)]
    if streaming:
        stream("\n")
    elif str(json_file) != "-":
        numbered = [each + text for each, of_it in zip(prompt, texts, strict=True) for text in of_it]
        for number, text in enumerate(numbered, 1):
            sys.stdout.write(f"--- {number} ---\n{text}\n")
    if str(json_file) != "-":
        _note_escapes("".join([*prompt, *(text for of_it in texts for text in of_it)]))
    _write_json(found[0] if len(found) == 1 else found, json_file)


@app.command()
def bench(
    model: Model,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt, drawn at random.")] = 128,
    new: Annotated[int, typer.Option(min=1, help="Tokens to decode after it.")] = 64,
    batch: Annotated[int, typer.Option(min=1, max=1024, help="Sequences side by side.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; the medians count.")] = 5,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    attention: Attention = None,
    threads: Threads = None,
    head: Head = "auto",
    cache_dtype: CacheDtype = "auto",
    revision: Revision = None,
    json_file: JsonFile = None,
    debug: Debug = False,
) -> None:
    """Time prefill and decoding on this machine, beside the memory bandwidth that bounds it: the engine's on CPUs, recorded steps on GPUs."""
    from qlm.engine.runtime import choose_runtime

    sizes: dict[str, Any] = {
        "prompt_tokens": prompt, "new_tokens": new, "batch": batch, "repeats": repeats, "revision": revision,
    }  # fmt: skip
    if device == "cpu":
        for option, given in (("--dtype", dtype != "auto"), ("--attention", attention is not None)):
            if given:
                raise UsageError(f"{option}: is for --device cuda; the CPU's engine has its own, leave it out")
    chosen, _ = choose_runtime(
        None if device != "cpu" else "engine", model, revision=revision, device=device, dtype=dtype, attention=attention, head=head,
        cache_dtype=cache_dtype,
    )  # fmt: skip
    result: Any
    if chosen == "engine":
        from qlm.bench import bench as measure

        result = measure(model, **sizes, threads=threads, head=head, cache_dtype=cache_dtype)
    else:
        from qlm.gpu_bench import gpu_bench

        _set_threads(threads)
        result = gpu_bench(model, **sizes, device=device, dtype=dtype, attn_implementation=attention or "sdpa")
    _show(result.to_json(), json_file)


@app.command()
def inspect(model: Model, revision: Revision = None, json_file: JsonFile = None, debug: Debug = False) -> None:
    """What is in a model folder: family, shapes, backend, bits per weight, bytes by part."""
    from qlm.report import inspect as look

    _show(look(model, revision), json_file)


@app.command()
def verify(folder: Annotated[Path, typer.Argument(help="A folder that qlm wrote.")], debug: Debug = False) -> None:
    """Hash every file of an output and compare with its manifest."""
    from qlm.checkpoint.manifest import verify as check

    for line in check(folder):
        typer.echo(line)


@app.command()
def doctor(json_file: JsonFile = None, debug: Debug = False) -> None:
    """Versions, CPU features, which kernels will be used, and transformers' forward pass against qlm's own reference."""
    from qlm.doctor import examine

    report = examine()
    _show(report, json_file)
    if report["verdict"] != "healthy":
        raise typer.Exit(1)


class _Terminated(BaseException):
    """SIGTERM, as an exception, so that folders and locks are left in order."""


def _terminate(number: int, frame: object) -> NoReturn:
    raise _Terminated


def _fail(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"qlm: {message}\n")
    sys.stderr.flush()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os._exit(code)
    # Not sys.exit: threads of torch and of the tokenizers may be at work, and nothing is left to clean up.
    if code in (130, 143):
        os._exit(code)
    sys.exit(code)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Ends with an exit code of the table in errors.py."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    continues = "; the same command continues" if arguments[:1] in (["quantize"], ["finetune"], ["merge"]) else ""
    command = typer.main.get_command(app)
    signal.signal(signal.SIGTERM, _terminate)
    # A model may write any character, and nobody knows beforehand: one that stdout's encoding lacks is escaped with a
    # backslash, as Python does on stderr, rather than the rest of the text lost.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    # Warnings of libraries are no part of what a user asked for; what matters is an error here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    # It advises every user of a CPU to install a package that qlm makes no use of.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        if not arguments:
            arguments = ["--help"]
        code = command.main(args=arguments, prog_name="qlm", standalone_mode=False)
        sys.stdout.flush()
        if code == 130:  # typer turns Ctrl-C into this code
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except SystemExit as ended:
        # typer and rich end the process themselves when nobody reads stdout any more (`qlm ... | head`).
        if isinstance(ended.__context__, BrokenPipeError):
            os._exit(0)
        raise
    except QlmError as error:
        if debug:
            traceback.print_exc()
        _fail(f"error: {error}", error.exit_code)
    except KeyboardInterrupt:
        _fail(f"interrupted{continues}", 130)
    except _Terminated:
        _fail(f"terminated{continues}", 143)
    except BrokenPipeError:
        os._exit(0)
    except MemoryError:
        _fail("error: out of memory; `qlm plan` says how much a recipe needs", 69)
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's own: a wrong option or argument
            context = getattr(error, "ctx", None)
            of = "qlm" if context is None else context.command_path
            _fail(f"error: {printable(error.format_message().rstrip('.'))}; see {of} --help", 2)
        if type(error).__name__ == "Abort":
            _fail(f"interrupted{continues}", 130)
        if debug:
            traceback.print_exc()
        _fail(
            f"error: {type(error).__name__}: {printable(str(error))}; this is a defect of qlm, --debug shows where", 1
        )
