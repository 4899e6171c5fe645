"""The commands: read options, make one call, print one line. Heavy imports stand inside each."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from controlfill import options as opts
from controlfill.errors import UserError

OUT = Console(highlight=False, soft_wrap=True)
ERR = Console(stderr=True, highlight=False, soft_wrap=True)


def run(argv: Sequence[str]) -> int:
    """Run one command; returns the exit code: 0 done, 2 the user's mistake, 130 interrupted."""
    if not argv or argv[0] in ("-h", "--help"):
        say(overview())
        return 0
    name, arguments = argv[0], list(argv[1:])
    if name not in COMMANDS:
        return fail(f"no command is called {name!r}; there are: {', '.join(COMMANDS)}")
    cls, command = COMMANDS[name]
    try:
        options = read_options(cls, name, arguments)
        opts.check_numbers(options)
        command(options)
    except (UserError, OSError) as error:
        return fail(" ".join(str(error).split()))
    except KeyboardInterrupt:
        return fail("interrupted; checkpoints saved before are untouched", 130)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return fail(
            "out of memory; use smaller pictures, a smaller --batch_size or --image_size, or "
            f"--mixed_precision bf16 ({' '.join(str(error).split())[:120]})"
        )
    return 0


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on the CPU or a GPU, told without importing torch."""
    names = {cls.__name__ for cls in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "can't allocate memory" in str(
        error
    )


def fail(message: str, code: int = 2) -> int:
    """Say one line on stderr; returns the exit code."""
    ERR.print(f"controlfill: error: {message}", markup=False)
    return code


def say(message: str) -> None:
    """Say one line on stdout."""
    OUT.print(message, markup=False)


def overview() -> str:
    """What `controlfill --help` says."""
    lines = ["usage: controlfill COMMAND ... (COMMAND --help tells its options)", ""]
    for name, (cls, _) in COMMANDS.items():
        lines.append(f"  {name:<10} {(cls.__doc__ or '').splitlines()[0]}")
    return "\n".join(
        [*lines, "", "Every command takes --config FILE.yaml with its options as keys."]
    )


def read_options(cls: type[Any], name: str, arguments: list[str]) -> Any:
    """Options from `--config FILE.yaml` and flags; flags win. Raises UserError."""
    config, arguments = take_config(arguments)
    values = read_config(cls, config) if config else {}
    default = None
    if values:
        blank = {
            f.name: tyro.MISSING
            for f in dataclasses.fields(cls)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        default = cls(**{**blank, **values})
    return tyro.cli(
        cls,
        prog=f"controlfill {name}",
        args=arguments,
        default=default,
        use_underscores=True,
    )


def take_config(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Split `--config FILE` off the arguments."""
    for i, word in enumerate(arguments):
        if word.startswith("--config="):
            return word.partition("=")[2], arguments[:i] + arguments[i + 1 :]
        if word == "--config":
            if i + 1 == len(arguments):
                raise UserError("--config needs the path of a YAML file")
            return arguments[i + 1], arguments[:i] + arguments[i + 2 :]
    return None, arguments


def read_config(cls: type[Any], file: str) -> dict[str, Any]:
    """The options in a YAML file, each checked against its field. Raises UserError."""
    import yaml
    from pydantic import TypeAdapter, ValidationError

    try:
        values = yaml.safe_load(Path(file).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {file} can't be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {file} holds no `option: value` lines")
    types = opts.field_types(cls)
    checked = {}
    for key, value in values.items():
        if key not in types:
            raise UserError(f"{file}: {key} is no option; there are: {', '.join(types)}")
        if value is False and "no" in get_args(types[key]):
            value = "no"  # noqa: PLW2901  (an unquoted no means false in YAML)
        try:
            checked[key] = TypeAdapter(types[key]).validate_python(value)
        except ValidationError as error:
            raise UserError(
                f"{file}: {key}: {error.errors()[0]['msg']}, found {value!r}"
            ) from error
    return checked


def quiet_libraries() -> None:
    """Let our own log lines through and keep the libraries' chatter away."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    logging.getLogger("controlfill").setLevel(logging.INFO)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar with counts, time spent and time left, on stderr."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("ETA"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=ERR, disable=not is_first_process()) as bar:
        yield bar


def is_first_process() -> bool:
    """Whether this is the process that speaks, of the several that a launcher may have started."""
    return os.environ.get("RANK", "0") == "0"


def train(options: opts.TrainOptions) -> None:
    """`controlfill train`, also `python train.py`."""
    quiet_libraries()
    from controlfill.training.run import train as train_steps

    steps = 0
    with progress_bar() as bar:
        task = bar.add_task("training", total=None)
        for step in train_steps(options):
            steps += 1
            text = None
            if step.index % options.log_steps == 0 or step.index == step.total:
                text = f"loss {float(step.loss):.4f} lr {step.learning_rate:.1e}"
                if not ERR.is_terminal and is_first_process():
                    say(f"step {step.index}/{step.total} {text}")
            bar.update(task, completed=step.index, total=step.total, description=text)
    if not steps:
        say("nothing left to train: the checkpoint already has all its steps")


def inpaint(options: opts.InpaintOptions) -> None:
    """`controlfill inpaint`."""
    quiet_libraries()
    from controlfill.images import as_mask, open_image
    from controlfill.inference.complete import inpaint as complete
    from controlfill.inference.pipeline import load

    photo = open_image(options.image)
    hole = as_mask(open_image(options.mask), photo.size)
    pipeline = load(
        options.base,
        options.control,
        conditioning=options.conditioning,
        device=options.device,
        mixed_precision=options.mixed_precision,
    )
    with progress_bar() as bar:
        task = bar.add_task("sampling", total=options.num_inference_steps)
        result = complete(
            pipeline, photo, hole, options,
            lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    say(f"wrote {result.save(options.output_dir)}")


def infer(options: opts.InferOptions) -> None:
    """`python infer.py`."""
    inpaint(options.as_inpaint())


def mask(options: opts.MaskOptions) -> None:
    """`controlfill mask`."""
    from controlfill.data.masks import make_test_mask
    from controlfill.images import save_image

    picture = make_test_mask(options)
    save_image(options.out, picture, settings=options.as_dict())
    say(f"wrote {options.out}: {(picture > 0).mean():.1%} white")


def preview(options: opts.PreviewOptions) -> None:
    """`controlfill preview`."""
    from controlfill.data.hints import open_spec
    from controlfill.data.preview import preview as draw
    from controlfill.data.sample import PreparedSource
    from controlfill.data.sources import make_preparation, open_source
    from controlfill.images import save_image

    source = open_source(options.data, options)
    data = PreparedSource(source, make_preparation(options), options.seed)
    picture, skipped = draw(data, open_spec(options.conditioning), options.num_samples)
    for reason in skipped:
        say(f"skipped: {reason}")
    save_image(options.output, picture, settings=options.as_dict())
    say(
        f"wrote {options.output}: {min(options.num_samples, len(source))} of {len(source)} pictures"
    )


def evaluate(options: opts.EvaluateOptions) -> None:
    """`controlfill evaluate`."""
    quiet_libraries()
    from controlfill.evaluation.evaluate import evaluate as measure
    from controlfill.evaluation.report import write_report
    from controlfill.inference.pipeline import load

    pipeline = load(
        options.base, options.control, conditioning=options.conditioning, device=options.device
    )
    with reporting() as report:
        result = measure(pipeline, options, report)
    summary = result.summary()
    for method, figures in summary["figures"]["all"].items():
        say(
            f"{method:<14} hole PSNR {figures['hole_psnr']:.2f} dB, "
            f"SSIM {figures['hole_ssim']:.3f}, seam {figures['seam']:.2f}, "
            f"known error {figures['known_max_error']:.0f}"
        )
    if summary["objects"]:
        say(f"objects: colour and shape right in {summary['objects']['colour_and_shape']:.1%}")
    say(f"wrote {write_report(result, pipeline.spec, options.output_dir)}")


@contextmanager
def reporting() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for work of several named parts."""
    with progress_bar() as bar:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield report


def doctor(options: opts.DoctorOptions) -> None:
    """`controlfill doctor`."""
    quiet_libraries()
    from controlfill.doctor import examine

    for line in examine(options.device):
        say(line)


def demo(options: opts.DemoOptions) -> None:
    """`controlfill demo`."""
    quiet_libraries()
    from controlfill.demo import demo as walk

    with reporting() as report:
        page = walk(options, report)
    say(f"open {page}")


COMMANDS: dict[str, tuple[type[Any], Callable[[Any], None]]] = {
    "demo": (opts.DemoOptions, demo),
    "doctor": (opts.DoctorOptions, doctor),
    "preview": (opts.PreviewOptions, preview),
    "mask": (opts.MaskOptions, mask),
    "train": (opts.TrainOptions, train),
    "inpaint": (opts.InpaintOptions, inpaint),
    "infer": (opts.InferOptions, infer),
    "evaluate": (opts.EvaluateOptions, evaluate),
}
