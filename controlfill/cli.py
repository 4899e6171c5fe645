"""The commands: read options, make one call, print one line. Heavy imports stand inside each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from controlfill import options as opts
from controlfill.cli_models import MODELS
from controlfill.cli_prepare import PREPARES
from controlfill.cli_skin_generate import SKIN_GENERATE
from controlfill.cli_skins import SKINS
from controlfill.console import (
    ERR,
    fail,
    is_first_process,
    progress_bar,
    quiet_libraries,
    reporter,
    reporting,
    say,
)
from controlfill.errors import UserError
from controlfill.reading import read_options, take_engine

if TYPE_CHECKING:
    from rich.progress import Progress


def run(argv: Sequence[str]) -> int:
    """Run one command; returns the exit code: 0 done, 2 the user's mistake, 130 interrupted."""
    if not argv or argv[0] in ("-h", "--help"):
        say(overview())
        return 0
    words = 2 if " ".join(argv[:2]) in COMMANDS else 1
    name, arguments = " ".join(argv[:words]), list(argv[words:])
    if name not in COMMANDS:
        return fail(f"no command is called {name!r}; there are: {', '.join(COMMANDS)}")
    try:
        name, arguments = take_engine(name, arguments)
        cls, command = COMMANDS[name]
        options = read_options(cls, name, arguments)
        opts.check_numbers(options)
        command(options)
    except (UserError, OSError) as error:
        return fail(" ".join(str(error).split()))
    except KeyboardInterrupt as error:
        return fail(str(error) or "interrupted; checkpoints saved before are untouched", 130)
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


def overview() -> str:
    """What `controlfill --help` says."""
    lines = ["usage: controlfill COMMAND ... (COMMAND --help tells its options)", ""]
    for name, (cls, _) in COMMANDS.items():
        lines.append(f"  {name:<15} {(cls.__doc__ or '').splitlines()[0]}")
    return "\n".join(
        [*lines, "", "Every command takes --config FILE.yaml with its options as keys."]
    )


def train(options: opts.RunOptions) -> None:
    """`controlfill train`, also `python train.py`, and `controlfill finetune`."""
    quiet_libraries()
    from controlfill.training.run import train as train_steps

    with training_bar(options.log_steps) as (show, report):
        for step in train_steps(options, report=report):
            show(step)


def train_lightning(options: opts.FitOptions) -> None:
    """The same with `--engine lightning`, also `python train_lightning.py`."""
    quiet_libraries()
    from controlfill.training.lightning import train_lightning as fit

    with training_bar(options.log_every_n_steps) as (show, report):
        fit(options, on_step=show, report=report)


@contextmanager
def training_bar(log_steps: int) -> Iterator[tuple[Callable[[Any], None], Any]]:
    """A bar that shows Steps with their loss and rate; without a terminal, a line now and then.

    Beside it something that shows what comes before the first step.
    """
    steps = 0
    with progress_bar() as bar:
        task = bar.add_task("training", total=None)

        def show(step: Any) -> None:
            nonlocal steps
            steps, text = steps + 1, None
            if step.index % log_steps == 0 or step.index == step.total:
                text = f"loss {float(step.loss):.4f} lr {step.learning_rate:.1e}"
                if not ERR.is_terminal and is_first_process():
                    say(f"step {step.index}/{step.total} {text}")
            bar.update(task, completed=step.index, total=step.total, description=text)

        yield show, reporter(bar)
    if not steps:
        say("nothing left to train: the checkpoint already has all its steps")


def inpaint(options: opts.InpaintOptions) -> None:
    """`controlfill inpaint`."""
    quiet_libraries()
    from controlfill.images import as_photo
    from controlfill.inference.complete import inpaint as fill
    from controlfill.inference.holes import open_hole

    photo, mask = as_photo(options.image), as_photo(options.mask)
    open_hole(mask, photo, options)  # a mistake is told before anything is loaded
    run_seeds(options, "inpainted", lambda p, o, progress: fill(p, photo, mask, o, progress))


def outpaint(options: opts.OutpaintOptions) -> None:
    """`controlfill outpaint`."""
    quiet_libraries()
    from controlfill.images import as_photo
    from controlfill.inference.outpaint import choose_sides
    from controlfill.inference.outpaint import outpaint as grow

    photo = as_photo(options.image)
    choose_sides(photo.size, options)
    run_seeds(options, "outpainted", lambda p, o, progress: grow(p, photo, o, progress))


def run_seeds(
    options: opts.InpaintOptions | opts.OutpaintOptions | opts.GenerateOptions,
    name: str,
    make: Callable[[Any, Any, Any], Any],
) -> None:
    """Make one result for each seed that `options` ask for, and a contact sheet of several."""
    from controlfill.inference.complete import save_sheet

    pipeline = load_pipeline(options)
    results = []
    for seed in range(options.seed, options.seed + options.num_images):
        with progress_bar() as bar:
            task = bar.add_task("sampling", total=options.num_inference_steps)

            def told(done: int, total: int, bar: Progress = bar, task: Any = task) -> None:
                bar.update(task, completed=done, total=total)

            results.append(make(pipeline, replace(options, seed=seed), told))
        one = f"{name}.png" if options.num_images == 1 else f"{name}_{seed}.png"
        say(f"wrote {results[-1].save(options.output_dir, one)}")
    if len(results) > 1:
        say(f"wrote {save_sheet(results, options.output_dir / 'contact.png')}")


def batch(options: opts.BatchOptions) -> None:
    """`controlfill batch`."""
    quiet_libraries()
    from controlfill.inference.batch import find_jobs, run_batch

    find_jobs(options)  # a mistake is told before anything is loaded
    pipeline = load_pipeline(options)
    with reporting() as report:
        written, skipped = run_batch(pipeline, options, report)
    for reason in skipped:
        say(f"skipped: {reason}")
    say(f"wrote {len(written)} pictures to {options.output_dir}, skipped {len(skipped)}")


def zoom(options: opts.ZoomOptions) -> None:
    """`controlfill zoom`."""
    quiet_libraries()
    from controlfill.images import as_photo
    from controlfill.inference.zoom import zoom as grow

    photo = as_photo(options.image)
    pipeline = load_pipeline(options)
    with reporting() as report:
        grow(pipeline, photo, options, report)
    say(f"wrote {options.out}")


def load_pipeline(options: Any) -> Any:
    """The pipeline that the options of a filling command name."""
    from controlfill.inference.pipeline import load_for

    return load_for(options)


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


def cache(options: opts.CacheOptions) -> None:
    """`controlfill cache`."""
    quiet_libraries()
    from controlfill.training.caching import build_cache

    with reporting() as report:
        folder, skipped = build_cache(options, report)
    for reason in skipped:
        say(f"skipped: {reason}")
    say(f"wrote {folder}; train with --cache_dir {folder}")


def generate(options: opts.GenerateOptions) -> None:
    """`controlfill generate`."""
    quiet_libraries()
    from controlfill.images import as_photo
    from controlfill.inference.complete import follow

    hint = as_photo(options.hint)
    run_seeds(options, "generated", lambda p, o, progress: follow(p, hint, o, progress))


def prepare_table(options: opts.PrepareTableOptions) -> None:
    """`controlfill prepare table`."""
    from controlfill.data.prepare import prepare_table as prepare

    with reporting() as report:
        say_prepared(prepare(options, report))


def prepare_shards(options: opts.PrepareShardsOptions) -> None:
    """`controlfill prepare shards`."""
    from controlfill.data.prepare import prepare_shards as prepare

    with reporting() as report:
        say_prepared(prepare(options, report))


def say_prepared(prepared: Any) -> None:
    """Say what was written where, and what was left out."""
    for reason in prepared.skipped:
        say(f"skipped: {reason}")
    say(f"wrote {prepared.samples} pictures to {prepared.folder}")


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
    "train_lightning": (opts.LightningOptions, train_lightning),
    "finetune": (opts.FinetuneOptions, train),
    "finetune_lightning": (opts.FinetuneLightningOptions, train_lightning),
    "inpaint": (opts.InpaintOptions, inpaint),
    "outpaint": (opts.OutpaintOptions, outpaint),
    "batch": (opts.BatchOptions, batch),
    "zoom": (opts.ZoomOptions, zoom),
    "infer": (opts.InferOptions, infer),
    **SKINS,
    **SKIN_GENERATE,
    "generate": (opts.GenerateOptions, generate),
    "evaluate": (opts.EvaluateOptions, evaluate),
    "cache": (opts.CacheOptions, cache),
    "prepare table": (opts.PrepareTableOptions, prepare_table),
    "prepare shards": (opts.PrepareShardsOptions, prepare_shards),
    **PREPARES,
    **MODELS,
}
