"""The page that a person reads when a rollout engine does not serve what was published."""

from __future__ import annotations

from collections.abc import Sequence

from lorelei.publish.contract import PublishError
from lorelei.publish.verdict import Verdict
from lorelei.types import AdapterRef

ANCHOR = "docs/errors.md#the-canary"


class CanaryFailed(PublishError):
    """A rollout engine serves something else; the text is one line, `page` explains it."""

    def __init__(self, line: str, page: Sequence[str]) -> None:
        super().__init__(f"{line}; see {ANCHOR}")
        self.page = tuple(page)


def wrong_base(who: str, distance: float, tokens: int) -> CanaryFailed:
    """Without any adapter the engines disagree."""
    return CanaryFailed(
        f"canary: {who}: trainer and rollout engine do not hold the same base model",
        [
            f"The canary found two base models ({who}, before the first step).",
            f"  The log-probabilities of {tokens} fixed tokens under the base model alone differ "
            f"by {distance:.2g} nats (root mean square).",
            "  Likely: the server was started on another model or revision, on quantised weights, "
            "or scores at a temperature.",
            "  Do: give the server the run's own `model`, and the same dtype.",
        ],
    )


def wrong_proof(who: str, verdict: Verdict, share: float, signal: float) -> CanaryFailed:
    """A large random adapter of a shape does not answer as itself.

    share: how far the answer lies on the way from the base model to the adapter. signal: distance
    of these two.
    """
    return CanaryFailed(
        f"canary: {who}: a random adapter of this shape does not answer as itself",
        [
            f"The canary stopped the run before the first step ({who}).",
            "  A large random adapter of this exact rank, alpha and targets went through the "
            "publisher, and the rollout engine answers with something else.",
            *_distances("the random adapter", verdict),
            f"  It lies {share:.2f} of the way from the base model (0) to the adapter (1), which "
            f"are {signal:.2g} nats apart.",
            f"  Likely: {_likely_cause(verdict, signal)}",
            "  Do: check what the server says of the adapter when it loads it; with mixtures of "
            "experts, target the attention only where it cannot adapt experts.",
        ],
    )


def wrong_samples(who: str, verdict: Verdict, temperature: float) -> CanaryFailed:
    """Scores are right, but log-probabilities of sampled tokens are not the trainer's."""
    return CanaryFailed(
        f"canary: {who}: sampled tokens come with other log-probabilities than the trainer's",
        [
            f"The canary stopped the run before the first step ({who}).",
            f"  Tokens sampled at temperature {temperature:g} from a random adapter carry "
            "log-probabilities that are not those of the trainer.",
            *_distances("the random adapter", verdict),
            "  Likely: generation ignores the adapter though scoring does not, or reports "
            "log-probabilities before the temperature, or of a truncated distribution.",
            "  Do: look at the server's log-probability mode (vLLM: processed_logprobs).",
        ],
    )


def wrong_digest(ref: AdapterRef, installed: str) -> CanaryFailed:
    """A replica reports that it holds other tensors."""
    return CanaryFailed(
        f"canary: {ref}: the rollout engine installed {installed[:12]}, the trainer sent "
        f"{ref.digest[:12]}; do both use the same dtype?",
        [
            f"The canary stopped the run: {ref} did not arrive as it was sent.",
            f"  digest of what the trainer sent     {ref.digest}",
            f"  digest of what the engine installed {installed}",
            "  Likely: tensors were cast, cut, renamed or mixed up on their way, or a name was "
            "used twice.",
            "  Do: resume; if it happens again, use another publisher (publish.kind).",
        ],
    )


def wrong_version(ref: AdapterRef, verdict: Verdict, tokens: int) -> CanaryFailed:
    """The score after a publication is not that of the version."""
    taken_for = verdict.taken_for
    what = f"answers as {taken_for}" if taken_for else "answers as no policy that we know"
    return CanaryFailed(
        f"canary: {ref}: the rollout engine {what}",
        [
            f"The canary stopped the run: asked for {ref}, the rollout engine {what}.",
            f"  Distances of its log-probabilities of {tokens} fixed tokens from the trainer's:",
            *_distances(str(ref), verdict),
            f"  Likely: {_likely_lie(taken_for)}",
            "  Do: resume, which starts from the last committed step and publishes under a new "
            "name; if it happens again, restart the server and try another publisher.",
            f"  {ref} was not committed; no rollout was sampled from it.",
        ],
    )


def _distances(right: str, verdict: Verdict) -> list[str]:
    rows = [(right, verdict.distance, f"at most {verdict.tolerance:.1e} is allowed")]
    rows += [
        (
            name,
            value,
            "nearer"
            if name == verdict.taken_for
            else ("" if name in verdict.distinguishable else "too much like the right one to tell"),
        )
        for name, value in verdict.others.items()
    ]
    width = max(len(name) for name, _, _ in rows)
    return [f"    {name:<{width}}  {value:.1e} nats  {note}".rstrip() for name, value, note in rows]


def _likely_cause(verdict: Verdict, signal: float) -> str:
    if min(verdict.others.values(), default=signal) < 0.1 * signal:
        return "the adapter is ignored."
    return (
        "the scale differs (alpha / rank, rsLoRA), some modules or experts are ignored, tensors "
        "of modules are swapped, or another adapter is served under this name."
    )


def _likely_lie(taken_for: str | None) -> str:
    if taken_for is None:
        return (
            "another adapter is served under this name, or the server applies it with another "
            "scale or to other modules."
        )
    if taken_for == "the base model":
        return "the adapter was not loaded, or is not used, or another run's is served."
    return "the new version was not loaded, or an old one is cached under its name."
