"""What a ladder says: laws and parabolas, what they foretell of a larger run, and what came of it; as numbers."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from lm.intervals import Estimate
from lm.ladder.measured import EXACT, KAPLAN, SIX, Run, counted, points
from lm.ladder.planned import Ladder, Rung
from lm.laws.isoflop import Growth, Valley, growth
from lm.laws.parametric import Fitted, fit
from lm.laws.points import checked


def fitted(found: Sequence[Run], plan: Ladder) -> tuple[Mapping[str, Growth], Mapping[str, Fitted]]:
    """Parabolas by each way of counting, and the law with N as Hoffmann et al. and as Kaplan et al. count it."""
    parabolas = {name: growth(counted(found, name), draws=plan.draws) for name in (EXACT, SIX, KAPLAN)}
    tables = {SIX: points(found), KAPLAN: points(found, embedding=False)}
    laws = {name: fit(checked(table, "the ladder"), draws=plan.draws) for name, table in tables.items()}
    return parabolas, laws


def best_size(parabolas: Mapping[str, Growth], laws: Mapping[str, Fitted], flops: float) -> float:
    """Parameters that do best with `flops`, as the parabolas' line has it; as the law has it where there is no line."""
    line = parabolas[EXACT]
    return line.optimum(flops)[0] if line.sizes else laws[SIX].law.optimum(flops)[0]


def foretold(laws: Mapping[str, Fitted], rung: Rung) -> dict[str, Any]:
    """The loss of a run that is still to be made, by each law, with the moment at which this was said."""
    sizes = {SIX: rung.parameters, KAPLAN: rung.parameters - rung.embedding}
    said = {name: law.foretold(sizes[name], rung.tokens)._asdict() for name, law in laws.items()}
    return {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "rung": rung._asdict(),
        "loss": said[SIX],
        "loss_without_embedding": said[KAPLAN],
        "law": laws[SIX].law._asdict(),
    }


def summary_of(
    found: Sequence[Run],
    parabolas: Mapping[str, Growth],
    laws: Mapping[str, Fitted],
    prediction: Mapping[str, Any],
    larger: Run,
    begun: str,
) -> dict[str, Any]:
    """Everything as JSON. begun: when the larger run was first started."""
    return {
        "stage": "scaling",
        "runs": [told(run) for run in found],
        "growth": {
            name: {
                "valleys": [of_valley(valley) for valley in one.valleys],
                "sizes": one.sizes and one.sizes._asdict(),
                "tokens": one.tokens and one.tokens._asdict(),
                "line": one.line if one.sizes else None,
                "lost": one.lost,
            }
            for name, one in parabolas.items()
        },
        "laws": {name: {key: e._asdict() for key, e in law.estimates().items()} for name, law in laws.items()},
        "prediction": dict(prediction),
        "larger": {**told(larger), "begun": begun},
    }


def of_valley(valley: Valley) -> dict[str, Any]:
    """None for what a parabola without a valley does not have: JSON knows no NaN."""
    return {key: None if value != value else value for key, value in valley._asdict().items()}


def told(run: Run) -> dict[str, Any]:
    return {**run._asdict(), "workdir": str(run.workdir)}


def sentences(summary: Mapping[str, Any]) -> list[str]:
    """What was found, with what may not be concluded."""
    said = [of_growth(name, one) for name, one in summary["growth"].items()]
    for name, law in summary["laws"].items():
        rise, floor = Estimate(**law["growth"]), Estimate(**law["E"])
        said.append(
            f"The law, {name}: loss = {floor.value:.3g} {between(floor, '.3g')} + A/N^{law['alpha']['value']:.3f} + "
            f"B/D^{law['beta']['value']:.3f}, so N_opt grows as C^{rise.value:.3f} {between(rise)}."
        )
    said.append(of_counting(summary["growth"]))
    prediction, larger = summary["prediction"], summary["larger"]
    loss, rung = Estimate(**prediction["loss"]), prediction["rung"]
    inside = loss.low <= larger["loss"] <= loss.high
    said.append(
        f"Foretold at {prediction['written']} for {rung['budget']:.3g} FLOPs, {rung['budget'] / top(summary):.3g} "
        f"times the ladder's largest budget (width {rung['width']}, {rung['tokens']:,} tokens): loss {loss.value:.4f} "
        f"{between(loss, '.4f')}. The run, begun at {larger['begun']}, came to {larger['loss']:.4f}: "
        f"{'inside' if inside else 'outside'} the interval, {100 * (larger['loss'] / loss.value - 1):+.2f} % from "
        "the prediction."
    )
    epochs = max(run["epochs"] for run in [*summary["runs"], larger])
    if epochs > 1:
        said.append(
            f"The corpus was read {epochs:.1f} times by the run that read most; up to about four times repeats are "
            "worth nearly as much as new text (Muennighoff et al. 2023, arXiv 2305.16264)."
        )
    said.append("Each run has one seed: what another would give is in the intervals only as distance from the fit.")
    return said


def of_growth(name: str, one: Mapping[str, Any]) -> str:
    """A sentence on the parabolas by one way of counting."""
    inside = sum(valley["inside"] for valley in one["valleys"])
    if one["sizes"] is None:
        return f"Parabolas, {name}: fewer than two budgets have a valley, so no growth is told."
    sizes, tokens = Estimate(**one["sizes"]), Estimate(**one["tokens"])
    lost = f"; {100 * one['lost']:.0f} % of the redrawn tables have no line" if one["lost"] else ""
    return (
        f"Parabolas, {name}: N_opt grows as C^{sizes.value:.3f} {between(sizes)}, D_opt as C^{tokens.value:.3f} "
        f"{between(tokens)}; {inside} of {len(one['valleys'])} valleys lie within the sizes that were run{lost}."
    )


def of_counting(grown: Mapping[str, Any]) -> str:
    """How much the exponent owes to what is counted."""
    if any(grown[name]["sizes"] is None for name in (EXACT, SIX, KAPLAN)):
        return "Too few valleys to say what the way of counting changes."
    exact, six, kaplan = (grown[name]["sizes"]["value"] for name in (EXACT, SIX, KAPLAN))
    return (
        f"The same runs, counted otherwise: the exponent of N_opt is {exact:.3f} with FLOPs counted one by one, "
        f"{six:.3f} with 6ND, {kaplan:.3f} with 6ND without the embedding: models as small as these are mostly "
        "embedding, and the smaller the more."
    )


def between(estimate: Estimate, form: str = ".3f") -> str:
    return f"[{estimate.low:{form}}, {estimate.high:{form}}]"


def top(summary: Mapping[str, Any]) -> float:
    return max(run["budget"] for run in summary["runs"])
