"""The command line: `jaxdistill COMMAND …`. What is typed is understood here, before anything heavy is imported.

Errors that the user can do something about are one message and exit status 2; all others keep their traceback.
"""

from __future__ import annotations

import inspect
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg

from jaxdistill.recipes import parse_recipe

DType = Literal["float32", "bfloat16", "float16"]
DEBUG = "JAXDISTILL_DEBUG"


class UsageError(ValueError):
    """A command line that cannot be run as it is."""


def main() -> None:
    """The `jaxdistill` command."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs one command; returns the exit status. `--debug` before the command shows every traceback."""
    arguments = list(arguments)
    debug = bool(os.environ.get(DEBUG)) or arguments[:1] == ["--debug"]
    if arguments[:1] == ["--debug"]:
        arguments.pop(0)
    try:
        _dispatch(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read the output (head, less) has left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if debug or not is_expected(error):
            raise
        print("\n".join([f"error: {message(error)}", *getattr(error, "__notes__", ())]), file=sys.stderr)
        return 2
    return 0


def is_expected(error: Exception) -> bool:
    """Whether an error was raised on purpose by this package or by the file system, rather than by a fault in it."""
    if isinstance(error, OSError):
        return True
    if not isinstance(error, ValueError | RuntimeError):
        return False
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(raised_in).is_relative_to(Path(__file__).parent)


def message(error: Exception) -> str:
    """What an error says; the file it is about comes first where the system reports one."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}."
    return str(error)


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return
    name, rest = split_command(arguments)
    if name not in COMMANDS:
        raise UsageError(f"there is no command {name!r}; the commands are {', '.join(COMMANDS)}.")
    if name in RECIPES and rest and not rest[0].startswith("-"):
        RECIPES[name](rest[0], rest[1:])
        return
    tyro.cli(COMMANDS[name], args=rest, prog=f"jaxdistill {name}")


def split_command(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The command's name, which has one word or two, and what follows."""
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    return " ".join(arguments[:words]), list(arguments[words:])


def _help() -> str:
    lines = ["usage: jaxdistill [--debug] COMMAND ...", "", "Distil language models with JAX.", "", "commands:"]
    for name, command in COMMANDS.items():
        summary = inspect.cleandoc(command.__doc__ or "").splitlines()[0]
        lines.append(f"  {name:<{max(map(len, COMMANDS))}} {summary}")
    return "\n".join([*lines, "", "`jaxdistill COMMAND --help` tells more; --debug shows the traceback of any error."])


# Commands. Their arguments and docstrings are what `--help` shows.


def train(recipe: Annotated[Positional[str], arg(metavar="RECIPE")]) -> None:
    """Run a recipe: distil a teacher into a student, or go on with a run that was interrupted.

    `jaxdistill train configs/NAME.py --help` shows the recipe's settings; each can be given after it, as in
    `--teacher.path DIR --data.path FILE --student.prune.layers 16 --out RUN`.

    Args:
        recipe: A Python file with a function `get_config()`.
    """
    _train(recipe, [])


def search(recipe: Annotated[Positional[str], arg(metavar="RECIPE")]) -> None:
    """Find the best shape under a budget: prune candidates, distil each briefly, rank them.

    `jaxdistill search configs/search.py --help` shows the settings; each can be given after it, as in
    `--train.teacher.path DIR --train.data.path FILE --train.held-out.path FILE --budget.parameters 0.75 --out OUT`.
    The same command goes on after an interruption.

    Args:
        recipe: A Python file with a function `get_config()` that returns a SearchConfig.
    """
    _search(recipe, [])


def evaluate(
    models: Annotated[Positional[tuple[str, ...]], arg(metavar="MODEL")],
    teacher: str | None = None,
    ensemble: Literal["scores", "probabilities"] | None = None,
    text: tuple[str, ...] = (),
    heldout: bool = False,
    field: str = "text",
    domain_field: str | None = None,
    bytes_per_domain: int | None = 9000,
    bytes_per_document: int | None = 1500,
    piqa: int | None = None,
    choices: str | None = None,
    prompt: str = "Question: {question}\nAnswer:",
    length: int = 512,
    batch_size: int = 2,
    prepend_bos: bool = False,
    activations: Literal["float32", "bfloat16"] = "float32",
    out: str | None = None,
) -> None:
    """Measure models on held-out text and multiple choice, and print one table.

    Args:
        models: Checkpoints, Hugging Face directories or .gguf files.
        teacher: Also measure this model, and compare the others with it (KL in nats, top-1 agreement).
        ensemble: Also measure the models as one, their scores or probabilities averaged; they share a tokenizer.
        text: Files of held-out text (.txt, .jsonl, .parquet, .array_record, directories): one domain each.
        heldout: The six domains of the project's own held-out text (fetched when it is not there).
        field: The key or column of the text, where the format has one.
        domain_field: The key or column that names a text's domain, instead of one domain for each file.
        bytes_per_domain: Evaluate the first so many bytes of each domain; None takes all.
        bytes_per_document: Of each document, the first so many bytes; None takes all.
        piqa: The first so many PIQA questions (fetched when they are not there).
        choices: A JSON Lines file of multiple-choice items: question, options "A. ...\\nB. ...", answer.
        prompt: What stands before an option; fields of the item in braces.
        length: Tokens of a window; windows do not see each other.
        batch_size: Windows in a batch.
        prepend_bos: Begin each text with the begin-of-text token.
        activations: The precision of activations.
        out: Also write the numbers to this JSON file.
    """
    from jaxdistill.jobs.evaluate import EvaluateConfig, evaluate_models

    evaluate_models(
        EvaluateConfig(
            models=models,
            teacher=teacher,
            ensemble=ensemble,
            text=text,
            heldout=heldout,
            field=field,
            domain_field=domain_field,
            bytes_per_domain=bytes_per_domain,
            bytes_per_document=bytes_per_document,
            piqa=piqa,
            choices=choices,
            prompt=prompt,
            length=length,
            batch_size=batch_size,
            prepend_bos=prepend_bos,
            activations=activations,
            out=out,
        )
    )


def generate(
    model: Annotated[Positional[str], arg(metavar="MODEL")],
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int = 0,
    chat: bool = False,
    prepend_bos: bool = False,
    activations: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Continue a prompt.

    Args:
        model: A checkpoint, a Hugging Face directory or a .gguf file.
        prompt: The text to continue, or with --chat the user's message.
        max_new_tokens: The most tokens to add; the model may end earlier.
        temperature: 0 takes the most probable token; 1 samples the model's own distribution.
        top_p: Sample among the most probable tokens that together have this probability.
        top_k: Sample among this many most probable tokens.
        seed: Of the sampling; equal seeds give equal text.
        chat: Put the prompt into the model's chat template.
        prepend_bos: Begin the prompt with the beginning-of-sequence token, as Llama's and Gemma's training text does.
        activations: The precision of activations.
    """
    from jaxdistill.generate import Sampling
    from jaxdistill.jobs.generate import generate_text

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    text = generate_text(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        chat=chat,
        prepend_bos=prepend_bos,
        activations=activations,
    )
    print(text)


def convert(
    source: Annotated[Positional[str], arg(metavar="SOURCE")],
    destination: Annotated[Positional[str], arg(metavar="DESTINATION")],
    to: Literal["jaxdistill", "hf"] = "jaxdistill",
    dtype: DType = "float32",
    pad: bool = False,
) -> None:
    """Write a model in another format: GGUF, Hugging Face and our checkpoints in, the last two out.

    Args:
        source: A checkpoint, a Hugging Face directory or a .gguf file.
        destination: A new directory.
        to: Our checkpoint, or a Hugging Face directory (config.json, safetensors, tokenizer.json).
        dtype: What the parameters are stored as.
        pad: Make all layers as wide as the widest, with zeros, so that a format for equal layers can hold the model;
            its outputs stay the same.
    """
    from jaxdistill.jobs.convert import convert_model

    convert_model(source, destination, to=to, dtype=dtype, pad=pad)


def prune(
    model: Annotated[Positional[str], arg(metavar="MODEL")],
    out: str,
    data: str | None = None,
    layers: int | None = None,
    keep_layers: tuple[int, ...] = (),
    mlp: int | tuple[int, ...] | None = None,
    embed: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    experts: int | None = None,
    plan: str | None = None,
    scorer: Literal["activations", "mask-gradients", "weights", "random"] = "activations",
    over_tokens: Literal["mean", "l2", "variance"] = "mean",
    over_rows: Literal["mean", "l2", "variance"] = "l2",
    depth: Literal["scorer", "loss", "kl", "block-by-loss", "block-by-kl"] = "scorer",
    batches: int = 128,
    length: int = 512,
    batch_size: int = 8,
    field: str = "text",
    prepend_bos: bool = False,
    seed: int = 0,
    sort: bool = False,
    merge_heads: bool = False,
    norm_repair: Literal["none", "exact"] = "none",
    to: Literal["jaxdistill", "hf"] = "jaxdistill",
    dtype: Literal["float32", "bfloat16"] = "float32",
    activations: Literal["float32", "bfloat16"] = "float32",
    mesh_data: Annotated[int, arg(name="mesh.data")] = 1,
    mesh_fsdp: Annotated[int, arg(name="mesh.fsdp")] = -1,
    mesh_sequence: Annotated[int, arg(name="mesh.sequence")] = 1,
    mesh_tensor: Annotated[int, arg(name="mesh.tensor")] = 1,
    mesh_expert: Annotated[int, arg(name="mesh.expert")] = 1,
) -> None:
    """Make a smaller model out of a large one: keep the parts that matter most on some text.

    OUT/model is the smaller model, OUT/plan.json says what was kept (edit it, and give it with --plan), and
    OUT/importance.npz holds the scores: other sizes with the same --out start from them. Distil it back with
    `jaxdistill train configs/distill.py --teacher.path MODEL --student.path OUT/model …`.

    Args:
        model: A checkpoint, a Hugging Face directory or a .gguf file.
        out: Where the results go.
        data: Text to measure importance on (.txt, .jsonl, .parquet, .array_record, directories).
        layers: Keep this many layers.
        keep_layers: Keep exactly these layers.
        mlp: Keep this many neurons of every layer's feed-forward network, or of each expert; or one number for each
            layer that is kept.
        embed: Keep this many channels of the residual stream.
        heads: Keep this many query heads of every layer, equally many for each key-value head.
        kv_heads: Keep this many key-value heads, and the query heads that belong to them.
        experts: Keep this many experts of every mixture.
        plan: Cut by this file; measures nothing.
        scorer: Minitron's activations; MiniMA's gradients of masks; norms of weights; or at random, to compare with.
        over_tokens: How the activations of a row's tokens become one number.
        over_rows: How the numbers of all rows become one (2407.14679: these two are the best).
        depth: How layers are chosen: by the scorer (activations: Block Influence), by the loss or the KL to the whole
            model when one is left out, or as the contiguous block whose absence is felt least.
        batches: Batches of text to measure on.
        length: Tokens of a row.
        batch_size: Rows of a batch.
        field: The key or column of the text, where the format has one.
        prepend_bos: Begin each text with the begin-of-text token.
        seed: Of the order of the text, and of random scores.
        sort: Order the kept parts by importance, so that every prefix (of heads: in each group) is the best
            choice of its size.
        merge_heads: Add what dropped query heads differ by to kept ones (2407.14679).
        norm_repair: "exact" rescales norms so that dropping channels that are zero changes nothing.
        to: The format of OUT/model.
        dtype: What the parameters are read and stored as.
        activations: The precision of activations while measuring.
        mesh_data: Devices that hold the same parameters; -1, here or below, is all that are left.
        mesh_fsdp: Devices that split channels.
        mesh_sequence: Devices that split the tokens of a row.
        mesh_tensor: Devices that split heads, neurons and the vocabulary.
        mesh_expert: Devices that split experts.
    """
    from jaxdistill.data.pipeline import DataConfig
    from jaxdistill.jobs.prune import PruneConfig
    from jaxdistill.jobs.prune import prune as run_prune
    from jaxdistill.prune.choose import Target
    from jaxdistill.sharding import MeshConfig

    if layers is not None and keep_layers:
        raise UsageError("--layers and --keep-layers are both given; say how many, or which.")
    text = {"path": data, "field": field, "length": length, "batch_size": batch_size, "seed": seed}
    run_prune(
        PruneConfig(
            model=model,
            out=out,
            target=Target(
                layers=keep_layers or layers, mlp=mlp, embed=embed, heads=heads, kv_heads=kv_heads, experts=experts
            ),
            data=DataConfig(**text, prepend_bos=prepend_bos),
            batches=batches,
            scorer=scorer,
            over_tokens=over_tokens,
            over_rows=over_rows,
            depth=depth,
            plan=plan,
            sort=sort,
            merge_heads=merge_heads,
            norm_repair=norm_repair,
            to=to,
            dtype=dtype,
            activations=activations,
            mesh=MeshConfig(
                data=mesh_data, fsdp=mesh_fsdp, sequence=mesh_sequence, tensor=mesh_tensor, expert=mesh_expert
            ),
        )
    )


def retokenize(
    model: Annotated[Positional[str], arg(metavar="MODEL")],
    tokenizer: str,
    out: str,
    multiple: int = 1,
    seed: int = 0,
    to: Literal["jaxdistill", "hf"] = "jaxdistill",
    dtype: DType = "float32",
    suffixes: bool = False,
) -> None:
    """Move a model to another tokenizer: its embedding is made anew, from the tokens that spell the new ones.

    The result has not learnt to read the new tokens yet. `jaxdistill train configs/retokenize.py --teacher.path MODEL
    --student.tokenizer PATH …` does the same and teaches it, with MODEL as its own teacher.

    Args:
        model: A checkpoint, a Hugging Face directory or a .gguf file.
        tokenizer: A directory with a tokenizer, a tokenizer.json, a SentencePiece model, a .gguf file, or "bytes".
        out: A new directory.
        multiple: Round the vocabulary up to a multiple of this.
        seed: Of the rows that nothing is known of.
        to: Our checkpoint, or a Hugging Face directory.
        dtype: What the parameters are read and stored as.
        suffixes: A model of bytes keeps the old embedding as well, and adds to its input that of the longest old token
            which ends at each byte.
    """
    from jaxdistill.jobs.retokenize import RetokenizeConfig
    from jaxdistill.jobs.retokenize import retokenize as run_retokenize

    run_retokenize(
        RetokenizeConfig(
            model=model,
            tokenizer=tokenizer,
            out=out,
            multiple=multiple,
            seed=seed,
            to=to,
            dtype=dtype,
            suffixes=suffixes,
        )
    )


def inspect_(path: Annotated[Positional[str], arg(metavar="PATH")], tensors: bool = False) -> None:
    """Tell what a model or a run is, without reading arrays.

    `jaxdistill inspect alignment --help` is about two tokenizations of a text.

    Args:
        path: A checkpoint, a Hugging Face directory, a .gguf file or a run's directory.
        tensors: Also list every tensor with its axes, shape and dtype.
    """
    from jaxdistill.jobs.inspect import describe_path

    print(describe_path(path, tensors=tensors))


def inspect_alignment(
    text: Annotated[Positional[str | None], arg(metavar="[TEXT]")] = None,
    *,
    teacher: str,
    student: str,
    file: str | None = None,
    record: int = 0,
    field: str = "text",
    bytes_per_document: int | None = 1000,
    prepend_bos: bool = False,
    append_eos: bool | None = None,
    chunks: Literal["minimal", "words"] = "minimal",
    merge_threshold: float | None = 0.1,
    temperature: float = 100.0,
    white_space: tuple[str, ...] = (" ", "\t", "\n"),
    activations: Literal["float32", "bfloat16"] = "float32",
    html: str | None = None,
) -> None:
    """Show a text in two tokenizations, chunk by chunk, with both models' log-likelihoods: what ALM compares.

    Both sides of a chunk stand one under the other, and below them log-likelihoods in nats, by how much the student's
    is higher, and the divergence (times 1000) of the chunks that are compared as one. Colours need a terminal and no
    NO_COLOR. (A model in a directory named "alignment" is ./alignment.)

    Args:
        text: The text itself, or give --file.
        teacher: A model (checkpoint, Hugging Face directory, .gguf file), or a tokenizer alone: tokenizer.json, a
            SentencePiece model, or the word bytes. Without a model there are no likelihoods on its side.
        student: The same, of the student.
        file: Take the text from here (.txt, .jsonl, .parquet, .array_record): a plain text, a prompt and its
            completion, or a conversation.
        record: Which record of the file, from 0.
        field: The key or column of the text, where the format has one.
        bytes_per_document: Of a plain text in a file, the first so many bytes; None takes all.
        prepend_bos: Begin the text with the begin-of-text token, on the sides that have one.
        append_eos: End it with the end-of-text token, on the sides that have one. None does so as training does,
            if one of them has it, but not where a text was cut.
        chunks: Chunks end wherever a token ends on both sides, or only where a word may begin next.
        merge_threshold: Join a chunk with the next where the teacher's probability that a word ends is lower; None
            joins none.
        temperature: What log-likelihoods are divided by in the divergence.
        white_space: What a token begins with where a word may begin.
        activations: The precision of activations.
        html: Also write the same as a page.
    """
    from jaxdistill.jobs.inspect_alignment import AlignmentConfig
    from jaxdistill.jobs.inspect_alignment import inspect_alignment as view_of
    from jaxdistill.report.alignment import alignment_text
    from jaxdistill.report.alignment_page import write_alignment

    view = view_of(
        AlignmentConfig(
            text=text,
            teacher=teacher,
            student=student,
            file=file,
            record=record,
            field=field,
            bytes_per_document=bytes_per_document,
            prepend_bos=prepend_bos,
            append_eos=append_eos,
            chunks=chunks,
            merge_threshold=merge_threshold,
            temperature=temperature,
            white_space=white_space,
            activations=activations,
        )
    )
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(alignment_text(view, width=shutil.get_terminal_size((100, 24)).columns, colour=colour))
    if html is not None:
        print(write_alignment(view, html, student=student, teacher=teacher))


def report(run: Annotated[Positional[str], arg(metavar="RUN")]) -> None:
    """Write a run's page, RUN/report.html: curves, evaluation, samples, times.

    Args:
        run: The run's directory.
    """
    from jaxdistill.report import write_report

    print(write_report(run))


COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "prune": prune,
    "retokenize": retokenize,
    "search": search,
    "evaluate": evaluate,
    "generate": generate,
    "convert": convert,
    "inspect": inspect_,
    "inspect alignment": inspect_alignment,
    "report": report,
}


# Commands that run a recipe.


def _train(recipe: str, overrides: list[str]) -> None:
    config = parse_recipe(recipe, overrides)
    # Before the loop and what it needs is imported: a wrong setting is told at once.
    config.check()
    from jaxdistill.train.loop import train

    train(config)


def _search(recipe: str, overrides: list[str]) -> None:
    from jaxdistill.search import SearchConfig, search

    config = parse_recipe(recipe, overrides, kind=SearchConfig, command="search")
    config.check()
    search(config)


RECIPES: dict[str, Callable[[str, list[str]], None]] = {"train": _train, "search": _search}
