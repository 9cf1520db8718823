"""What fakes say of the log-probabilities of a prompt, worked out by hand."""

from pdjax.host.sequences.sequence import Sequence
from tests.helpers.fakes import digest, scored


def prompt_is_scored(sequence: Sequence, layers: int) -> bool:
    """Check that they came once, whole where a token was made, and of what stands before each
    token. Returns whether they have come."""
    prompt, most = sequence.request.prompt_token_ids, sequence.request.params.prompt_logprobs
    scores = sequence.prompt_scores
    if most is None or sequence.choice > 0:
        assert scores is None
        return False
    assert scores is not None and (scores.complete or not sequence.output), sequence.id
    report = scores.report(prompt)
    if report is None:
        return False
    assert report[0] is None and len(report) == len(prompt)
    for place, entry in enumerate(report[1:], start=1):
        context, token = digest([*prompt[:place]], layers), prompt[place]
        assert entry is not None and (entry.token, entry.rank) == (token, token + 1)
        assert entry.chosen == scored(context, token), f"{sequence.id}: {place}"
        assert len(entry.top) == most
    return True
