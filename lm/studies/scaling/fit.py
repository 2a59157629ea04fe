"""The fits of a ladder as numbers: laws and parabolas, their prediction for a larger run, and its measured loss."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from lm.core.statistics import Estimate, estimate_text
from lm.studies.scaling.isoflop import IsoflopFit, IsoflopMinimum, isoflop_fit
from lm.studies.scaling.ladder import LadderPlan, PlannedRun
from lm.studies.scaling.parametric import ParametricFit, parametric_fit
from lm.studies.scaling.points import checked_points
from lm.studies.scaling.runs import (
    COUNTED_FLOPS,
    SIX_ND,
    SIX_ND_WITHOUT_EMBEDDING,
    ScalingRun,
    budgets_by_convention,
    run_points,
)

THREE_DECIMALS = "{:.3f}".format


def fitted_laws(
    runs: Sequence[ScalingRun], plan: LadderPlan
) -> tuple[Mapping[str, IsoflopFit], Mapping[str, ParametricFit]]:
    """Parabolas by each way of counting, and the law with N as Hoffmann et al. and as Kaplan et al. count it."""
    parabolas = {
        name: isoflop_fit(budgets_by_convention(runs, name), draws=plan.bootstrap_draws)
        for name in (COUNTED_FLOPS, SIX_ND, SIX_ND_WITHOUT_EMBEDDING)
    }
    tables = {SIX_ND: run_points(runs), SIX_ND_WITHOUT_EMBEDDING: run_points(runs, embedding=False)}
    laws = {
        name: parametric_fit(checked_points(table, "the ladder"), draws=plan.bootstrap_draws)
        for name, table in tables.items()
    }
    return parabolas, laws


def compute_optimal_size(parabolas: Mapping[str, IsoflopFit], laws: Mapping[str, ParametricFit], flops: float) -> float:
    """The best number of parameters for `flops`: by the parabolas' line, or by the law if there is no line."""
    line = parabolas[COUNTED_FLOPS]
    return line.optimum(flops)[0] if line.size_exponent else laws[SIX_ND].law.optimum(flops)[0]


def loss_prediction(laws: Mapping[str, ParametricFit], rung: PlannedRun) -> dict[str, Any]:
    """The predicted loss of a run that has not been made, by each law, with the time of the prediction."""
    sizes = {SIX_ND: rung.parameters, SIX_ND_WITHOUT_EMBEDDING: rung.parameters - rung.embedding}
    predictions = {name: law.predicted_loss(sizes[name], rung.tokens)._asdict() for name, law in laws.items()}
    return {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "rung": rung._asdict(),
        "loss": predictions[SIX_ND],
        "loss_without_embedding": predictions[SIX_ND_WITHOUT_EMBEDDING],
        "law": laws[SIX_ND].law._asdict(),
    }


def scaling_summary(
    runs: Sequence[ScalingRun],
    parabolas: Mapping[str, IsoflopFit],
    laws: Mapping[str, ParametricFit],
    prediction: Mapping[str, Any],
    larger: ScalingRun,
    started_at: str,
) -> dict[str, Any]:
    """Everything as JSON. begun: when the larger run was first started."""
    return {
        "stage": "scaling",
        "runs": [run_json(run) for run in runs],
        "growth": {
            name: {
                "valleys": [valley_json(valley) for valley in one.minima],
                "sizes": one.size_exponent and one.size_exponent._asdict(),
                "tokens": one.token_exponent and one.token_exponent._asdict(),
                "line": one.lines if one.size_exponent else None,
                "lost": one.failed_fraction,
            }
            for name, one in parabolas.items()
        },
        "laws": {name: {key: e._asdict() for key, e in law.estimates().items()} for name, law in laws.items()},
        "prediction": dict(prediction),
        "larger": {**run_json(larger), "begun": started_at},
    }


def valley_json(valley: IsoflopMinimum) -> dict[str, Any]:
    """None for a value that is not finite, because JSON knows no NaN."""
    return {key: None if value != value else value for key, value in valley._asdict().items()}


def run_json(run: ScalingRun) -> dict[str, Any]:
    return {**run._asdict(), "workdir": str(run.workdir)}


def conclusion_sentences(summary: Mapping[str, Any]) -> list[str]:
    """Sentences: the results, with the conclusions that they do not allow."""
    sentences = [growth_sentence(name, one) for name, one in summary["growth"].items()]
    for name, law in summary["laws"].items():
        rise, floor = Estimate(**law["growth"]), Estimate(**law["E"])
        sentences.append(
            f"The law, {name}: loss = {estimate_text(floor, '{:.3g}'.format)} + "
            f"A/N^{law['alpha']['value']:.3f} + B/D^{law['beta']['value']:.3f}, "
            f"so N_opt grows as C^{estimate_text(rise, THREE_DECIMALS)}."
        )
    sentences.append(counting_sentence(summary["growth"]))
    prediction, larger = summary["prediction"], summary["larger"]
    loss, rung = Estimate(**prediction["loss"]), prediction["rung"]
    inside = loss.low <= larger["loss"] <= loss.high
    sentences.append(
        f"Predicted at {prediction['written']} for {rung['budget']:.3g} FLOPs, "
        f"{rung['budget'] / largest_budget(summary):.3g} times the ladder's largest budget "
        f"(width {rung['width']}, {rung['tokens']:,} tokens): loss "
        f"{estimate_text(loss, '{:.4f}'.format)}. The run, started at {larger['begun']}, reached {larger['loss']:.4f}: "
        f"{'inside' if inside else 'outside'} the interval, {100 * (larger['loss'] / loss.value - 1):+.2f} % from "
        "the prediction."
    )
    epochs = max(run["epochs"] for run in [*summary["runs"], larger])
    if epochs > 1:
        sentences.append(
            f"The corpus was read {epochs:.1f} times by the run that read most; up to about four times repeats are "
            "worth nearly as much as new text (Muennighoff et al. 2023, arXiv 2305.16264)."
        )
    sentences.append(
        "Each run has one seed: what another would give is in the intervals only as distance from the fit."
    )
    return sentences


def growth_sentence(name: str, one: Mapping[str, Any]) -> str:
    """A sentence on the parabolas by one way of counting."""
    inside = sum(valley["inside"] for valley in one["valleys"])
    if one["sizes"] is None:
        return f"Parabolas, {name}: fewer than two budgets have a valley, so the growth is unknown."
    sizes, tokens = Estimate(**one["sizes"]), Estimate(**one["tokens"])
    lost = f"; {100 * one['lost']:.0f} % of the redrawn tables have no line" if one["lost"] else ""
    return (
        f"Parabolas, {name}: N_opt grows as C^{estimate_text(sizes, THREE_DECIMALS)}, D_opt as "
        f"C^{estimate_text(tokens, THREE_DECIMALS)}; {inside} of {len(one['valleys'])} valleys lie within the sizes "
        f"that were run{lost}."
    )


def counting_sentence(grown: Mapping[str, Any]) -> str:
    """A sentence: how much the exponent depends on what is counted."""
    if any(grown[name]["sizes"] is None for name in (COUNTED_FLOPS, SIX_ND, SIX_ND_WITHOUT_EMBEDDING)):
        return "Too few valleys to say what the way of counting changes."
    exact, six, kaplan = (grown[name]["sizes"]["value"] for name in (COUNTED_FLOPS, SIX_ND, SIX_ND_WITHOUT_EMBEDDING))
    return (
        f"The same runs, counted otherwise: the exponent of N_opt is {exact:.3f} with FLOPs counted one by one, "
        f"{six:.3f} with 6ND, {kaplan:.3f} with 6ND without the embedding: models as small as these are mostly "
        "embedding, and the smaller the more."
    )


def largest_budget(summary: Mapping[str, Any]) -> float:
    return max(run["budget"] for run in summary["runs"])
