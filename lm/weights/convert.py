"""Converts other people's models into a workdir, and ours into a Hugging Face folder.

    python -m lm convert --source=DIR --workdir=runs/theirs
    python -m lm convert --workdir=runs/quickstart/sft --destination=DIR

--source is a folder from Hugging Face, a .gguf file, or smollm2-135m, a model of 93 MB that a package carries. The
workdir then works with every stage (--config.init_from) and with lm chat. --destination gets a folder that transformers
and the programs around it read. Nothing is written before everything is read.
"""

import dataclasses
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lm.core.config import parsed_flags
from lm.core.errors import UserError
from lm.core.types import Params
from lm.model.config import ModelConfig
from lm.model.params import param_count, param_specs
from lm.runs.checkpoint import Checkpoints
from lm.runs.console import Progress, run_program, say, warn
from lm.runs.workdir import load_trained_model, open_workdir, require_decoder, with_run_date
from lm.tokenizer import Tokenizer
from lm.weights import config_map, folder, gguf, packages, tokenizers
from lm.weights.names import HEAD_TENSOR

FLAGS = {
    "source": dict(
        default="", metavar="DIR|FILE|NAME", help=f"what to read; also {', '.join(packages.KNOWN_PACKAGES)}"
    ),
    "workdir": dict(required=True, metavar="DIR", help="the workdir to make, or to write from"),
    "destination": dict(default="", metavar="DIR", help="the folder to write"),
    "dtype": dict(default="float32", metavar="NAME", help=f"of the tensors written: {', '.join(folder.EXPORT_DTYPES)}"),
    "step": dict(type=int, metavar="N", help="the checkpoint to write from; the newest, if not given"),
}


def read_source(source: Path) -> tuple[ModelConfig, Params, Tokenizer, str]:
    """Config, float32 parameters, tokenizer, and the model_type that the source names ("" in a GGUF file)."""
    with TensorProgress() as note:
        if not source.is_dir():
            c, params, tokenizer = gguf.read_gguf(source, note)
            kind = ""
        else:
            hf = folder.read_config(source)
            tokenizer, kind = tokenizers.read_tokenizer_files(source, hf), hf["model_type"]
            check_vocabulary(config_map.model_config_from_json(hf), tokenizer, source)  # before gigabytes are read
            c, params = folder.read_folder(source, note)
            if config_map.model_config_from_json(hf).tie_embeddings and not c.tie_embeddings:
                warn(
                    f"{source}: config.json says tie_word_embeddings, but {HEAD_TENSOR} differs from the embedding: "
                    "read untied, as transformers does"
                )
    check_vocabulary(c, tokenizer, source)
    return c, params, tokenizer, kind


def check_vocabulary(c: ModelConfig, tokenizer: Tokenizer, source: Path) -> None:
    """UserError for a tokenizer with ids that the model has no row for; rows without an id are merely unused."""
    if tokenizer.vocab_size > c.vocab_size:
        raise UserError(
            f"{source}: its tokenizer has {tokenizer.vocab_size} ids, but its model only {c.vocab_size}: "
            "they do not belong together"
        )
    if max(tokenizer.stop_ids) >= c.vocab_size:
        raise UserError(
            f"{source}: id {max(tokenizer.stop_ids)} ends its texts, but its model has only {c.vocab_size} "
            "rows and could "
            "never stop: correct eos_token_id, or take both from the same model"
        )


class TensorProgress:
    """Progress whose total becomes known with the first tensor."""

    def __enter__(self):
        self._progress = None
        return self

    def __call__(self, done: int, total: int) -> None:
        if self._progress is None:
            self._progress = Progress("weights", total, unit="tensor").__enter__()
        self._progress.update(done, {})

    def __exit__(self, *exception) -> None:
        if self._progress is not None:
            self._progress.__exit__(*exception)


def import_model(source: Path, workdir: Path) -> None:
    """Reads all, then makes the workdir: a policy if its tokenizer has a chat template, else a model of text."""
    c, params, tokenizer, kind = read_source(source)
    stage = "sft" if tokenizer.has_chat_template else "pretrain"
    meta = {"stage": stage, "fingerprint": tokenizer.fingerprint, "model": dataclasses.asdict(c)}
    with open_workdir(workdir, {"convert": {"source": str(source), "kind": kind}}) as opened:
        with_run_date(tokenizer, opened)
        with Checkpoints(opened.checkpoints_path, warn=warn) as checkpoints:
            checkpoints.save(0, {"params": {"lm": params}}, meta)
        parameters = param_count(param_specs(c))
        opened.write_summary({"stage": stage, "parameters": parameters, "source": str(source), "kind": kind})
    say(f"{workdir}: {parameters:,} parameters, {c.layers} layers of width {c.width}, context {c.context}, {stage}")
    say(f"{'chat' if stage == 'sft' else 'continue text'}: python -m lm chat --workdir={workdir}")


def export_model(workdir: Path, destination: Path, *, dtype: str, step: int | None) -> None:
    """The newest checkpoint of a workdir as a Hugging Face folder, complete or not written at all."""
    if destination.exists() and any(destination.iterdir()):
        raise UserError(f"{destination} is not empty: give a new --destination")
    trained = load_trained_model(workdir, backend="cpu", step=step, warn=warn)
    require_decoder(trained, "lm convert")
    kind = trained.summary["kind"] if "kind" in trained.summary else ""  # where its weights came from, if not from us
    check_vocabulary(trained.model_config, trained.tokenizer, workdir)
    with complete_folder(destination) as unfinished:
        ids = tokenizers.write_tokenizer_files(unfinished, trained.tokenizer)
        folder.write_folder(unfinished, trained.model_config, trained.params["lm"], dtype=dtype, ids=ids, kind=kind)
    if "value" in trained.params:
        say("the scalar head (of values or rewards) has no place there and stays behind")
    say(f"{destination}: transformers.AutoModelForCausalLM.from_pretrained({str(destination)!r})")


@contextmanager
def complete_folder(destination: Path) -> Iterator[Path]:
    """A folder that gets its name when it is complete, and is removed if anything fails."""
    unfinished = destination.with_name(f"{destination.name}.{os.getpid()}.tmp")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        if destination.exists():
            destination.rmdir()
        os.replace(unfinished, destination)
    except OSError as error:
        raise UserError(f"cannot write {destination}: {error.strerror}; make room, or give another") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def program(argv: list[str]) -> None:
    flags = parsed_flags(argv, __doc__, FLAGS)
    if bool(flags.source) == bool(flags.destination):
        raise UserError("give --source to make the workdir, or --destination to write it out: one of the two")
    if flags.destination:
        export_model(Path(flags.workdir), Path(flags.destination), dtype=flags.dtype, step=flags.step)
        return
    if flags.source in packages.KNOWN_PACKAGES:
        source = packages.fetch_package(flags.source, say)
    else:
        source = Path(flags.source).expanduser()
        if not source.exists():
            raise UserError(
                f"there is no {source}: give a folder, a .gguf file, or {', '.join(packages.KNOWN_PACKAGES)}"
            )
    import_model(source, Path(flags.workdir))


if __name__ == "__main__":
    run_program(program)
