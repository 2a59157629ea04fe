"""Measures how much fewer bits for weights and cache raise a run's held-out loss.

    python -m lm quantization --workdir=runs/quickstart/pretrain
    python -m lm quantization --workdir=runs/smollm2 --rows=8 --length=64 --corpus=stdlib --forms=float32,int8

Every held-out row is decoded through the cache as an answer is, but with its own next tokens: a prefill of its first
half, then one token after another, whose nats are counted. The loss is the mean over rows of each row's mean. There are
nine combinations: weights in float32, bfloat16 or int8 (the layers' matrices, embedding and head), and the same for the
cache. Products are always in float32, so that nothing else differs. WORKDIR/quantised.json keeps the table and each
row's nats; combinations that it already has are not measured again.
"""

import functools
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.config import parsed_flags
from lm.core.errors import UserError
from lm.core.statistics import mean_estimate, paired_difference
from lm.core.types import Array, Params, Tokens
from lm.data import batches, packing
from lm.data.sources import documents_within_bytes, load_documents, split_held_out
from lm.model import Model, make_model
from lm.model.logits import values_at_ids
from lm.model.quantization import STORAGE_DTYPES, quantized_params
from lm.runs.console import Progress, print_table, run_program, say, warn
from lm.runs.workdir import CONFIG_FILE, TrainedModel, read_json, require_decoder, write_text
from lm.train.warm_start import load_policy

RESULTS_FILE = "quantised.json"
FLAGS = {
    "workdir": dict(required=True, metavar="DIR", help="a stage's own; a converted model's will do"),
    "rows": dict(type=int, default=64, help="held-out rows; default: 64"),
    "length": dict(type=int, default=0, help="tokens a row; default: 256, or the context if that is shorter"),
    "rows_at_once": dict(type=int, default=16, help="rows decoded together; default: 16"),
    "forms": dict(
        default=",".join(STORAGE_DTYPES), help="of weights and cache, the first to compare with; default: %(default)s"
    ),
    "corpus": dict(
        default="", help="documents, as data.corpus of pretrain; default: the run's own, or stdlib,chitchat"
    ),
    "held_out": dict(type=float, default=0.0, help="the fraction held out; default: the run's own, or 0.05"),
}


def with_storage_dtypes(trained: TrainedModel, *, weights: str = "", cache: str = "") -> TrainedModel:
    """A run whose weights and cache are kept in one of STORAGE_DTYPES each; "" leaves them as they are."""
    if weights:
        trained = trained._replace(
            params={**trained.params, "lm": quantized_params(weights, trained.params["lm"], include_embeddings=True)}
        )
    return trained._replace(model=make_model(replace(trained.model.config, cache_dtype=cache))) if cache else trained


def decoded_logprobs(model: Model, lm: Params, tokens: Tokens) -> tuple[Array, Array]:
    """Log-probabilities f32[B,T-P] of the targets after the first P = T / 2 positions, and the likeliest i32[B,T-P].

    The first P positions are one prefill, each other one a step of its own.
    """
    B, T = tokens.inputs.shape
    P = T // 2
    inputs = (tokens.inputs, tokens.positions, tokens.segments)
    _, cache = model.cached_hidden_states(lm, *(a[:, :P] for a in inputs), model.empty_cache(batch=B, capacity=T))

    def step(cache, xs):
        *now, target = (a[:, None] for a in xs)
        x, cache = model.cached_hidden_states(lm, *now, cache)
        logits = model.logits(lm, x)
        logprob = values_at_ids(jax.nn.log_softmax(logits, axis=-1), target)
        return cache, (logprob[:, 0], jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32))

    _, columns = jax.lax.scan(step, cache, tuple(a[:, P:].T for a in (*inputs, tokens.targets)))
    return tuple(a.T for a in columns)


def dtype_measurement(
    trained: TrainedModel, weights: str, cache: str, rows: Tokens, rows_at_once: int
) -> dict[str, Any]:
    """The measurement of one combination of dtypes: bytes, and each row's nats per token and likeliest tokens."""
    require_decoder(trained, "lm quantization")
    config = replace(trained.model_config, dtype="float32", cache_dtype=cache, attention="auto").for_backend(
        jax.default_backend()
    )
    model, lm = make_model(config), quantized_params(weights, trained.params["lm"], include_embeddings=True)
    run, lm_there, parts = jax.jit(functools.partial(decoded_logprobs, model)), jax.device_put(lm), []
    for part in batches.sequential_batches(rows, rows_at_once):
        parts.append(jax.device_get(run(lm_there, part)))
    logprobs, likeliest = (np.concatenate(column)[: len(rows.inputs)] for column in zip(*parts))
    counted = rows.weights[:, -logprobs.shape[1] :]
    slot = jax.eval_shape(functools.partial(model.empty_cache, batch=1, capacity=1))
    return {
        "weights": weights,
        "cache": cache,
        "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(lm)),
        "bytes_per_token": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(slot) if leaf.ndim > 2),
        "nats": (-np.sum(logprobs * counted, axis=1) / np.sum(counted, axis=1)).tolist(),
        "likeliest": likeliest.tolist(),
    }


def dtype_comparisons(ways: Sequence[Mapping[str, Any]], counted: np.ndarray) -> list[dict[str, Any]]:
    """Each combination against the first, paired by row: its cost, and how often both have the same likeliest next
    token.

    counted f32[B,T]: the weights of all targets.
    """
    first, comparisons = ways[0], []
    for way in ways:
        same = np.array(way["likeliest"]) == np.array(first["likeliest"])
        counted_decoded = counted[:, -same.shape[1] :]
        comparisons.append(
            {
                **{name: way[name] for name in ("weights", "cache", "bytes", "bytes_per_token")},
                "nats": mean_estimate(way["nats"])._asdict(),
                "difference": paired_difference(way["nats"], first["nats"])._asdict(),
                "agreement": mean_estimate(
                    np.sum(same * counted_decoded, axis=1) / np.sum(counted_decoded, axis=1)
                )._asdict(),
            }
        )
    return comparisons


def held_out_rows(trained: TrainedModel, *, rows: int, length: int, corpus: str, held_out: float) -> Tokens:
    """Rows spread over the held-out documents. Each has targets in its second half."""
    _, unseen = split_held_out(load_documents(corpus), held_out)
    texts = [document.text for document in documents_within_bytes(unseen, 40 * rows * length)]
    all_rows = packing.document_rows(trained.tokenizer, texts, length)
    able = np.flatnonzero(all_rows.weights[:, length // 2 :].sum(axis=1) > 0)
    if len(able) < rows:
        raise UserError(
            f"{corpus} holds out {len(able)} rows of {length} tokens at {held_out:g}, not {rows}: lower --rows"
        )
    spread_rows = able[np.linspace(0, len(able) - 1, rows).astype(int)]
    return jax.tree.map(lambda leaf: leaf[spread_rows], all_rows)


def measurement_settings(trained: TrainedModel, flags) -> dict[str, Any]:
    """What is measured on: by the flags, else as the run was held out."""
    if flags.rows < 2 or flags.rows_at_once < 1:
        raise UserError(f"--rows is {flags.rows} and --rows_at_once {flags.rows_at_once}; at least 2 and 1")
    context = trained.model_config.context
    length = flags.length or min(256, context)
    if not 2 <= length <= context:
        raise UserError(f"--length is {length}; it must be at least 2, and at most the model's context of {context}")
    own = read_json(trained.path / CONFIG_FILE)
    own = own["data"] if "data" in own else {}
    named = {"corpus": "stdlib,chitchat", "held_out": 0.05} | {k: own[k] for k in ("corpus", "held_out") if k in own}
    named |= {name: getattr(flags, name) for name in named if getattr(flags, name)}
    return {"rows": flags.rows, "length": length, **named}


def parsed_dtypes(text: str) -> list[str]:
    """The forms that a flag names. UserError for an unknown one."""
    forms = [form.strip() for form in text.split(",")]
    for form in forms:
        if form not in STORAGE_DTYPES:
            raise UserError(f"--forms names {form!r}; choose among {', '.join(STORAGE_DTYPES)}")
    return forms


def print_dtypes(path: Path, ways: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """MB of weights, bytes of cache a token; nats a token, how many more than the first way's within a 95 % interval;
    and how often the likeliest next token is the first way's."""
    print_table(
        f"{path}: {about['rows']} rows held out of {about['corpus']}, decoded from the middle on",
        ["weights", "cache", "MB", "B/token", "nats", "more ± 95 %", "agree"],
        [
            [
                way["weights"],
                way["cache"],
                f"{way['bytes'] / 1e6:.1f}",
                way["bytes_per_token"],
                f"{way['nats']['value']:.4f}",
                f"{way['difference']['value']:+.5f} ± {way['difference']['high'] - way['difference']['value']:.5f}",
                f"{way['agreement']['value']:.3f}",
            ]
            for way in ways
        ],
    )


def program(argv: list[str]) -> None:
    flags = parsed_flags(argv, __doc__, FLAGS)
    trained = load_policy(flags.workdir, backend=jax.default_backend(), warn=warn)
    about, pairs = measurement_settings(trained, flags), list(itertools.product(parsed_dtypes(flags.forms), repeat=2))
    rows = held_out_rows(trained, **about)
    path = trained.path / RESULTS_FILE
    saved = read_json(path) if path.exists() else {}
    ways = saved["ways"] if saved and saved["about"] == about else []
    if [(way["weights"], way["cache"]) for way in ways] != pairs[: len(ways)]:
        ways = []
    if ways:
        say(f"{path} has {len(ways)} of {len(pairs)} ways already")
    start = time.monotonic()
    with Progress("quantised", len(pairs), "way") as progress:
        for weights, cache in pairs[len(ways) :]:
            ways.append(dtype_measurement(trained, weights, cache, rows, flags.rows_at_once))
            table = dtype_comparisons(ways, rows.weights)
            write_text(path, json.dumps({"about": about, "table": table, "ways": ways}) + "\n")
            progress.update(len(ways), {"nats": table[-1]["nats"]["value"]})
    print_dtypes(trained.path, dtype_comparisons(ways, rows.weights), about)
    say(f"{time.monotonic() - start:.0f} s; {path} has it all")


if __name__ == "__main__":
    run_program(program)
