"""Simulated engines and links, by moments that are worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest

from pdjax.core.clock import VirtualClock
from pdjax.core.ids import EngineId, PoolId
from pdjax.interfaces.batches import ScoreBatch
from pdjax.interfaces.steps import DecodeStep, PrefillStep, StepKind
from pdjax.sim.costs import StepCosts
from pdjax.sim.engines import SimEngine
from pdjax.sim.links import Link, SimTransport
from pdjax.sim.meshes import MeshLost, SimMesh
from pdjax.sim.tokens import token_at
from tests.sim.batches import LAYOUT, decode_batch, job, prefill_batch

P, D, E = PoolId("hbm/prefill-0"), PoolId("hbm/decode-0"), PoolId("hbm/decode-1")
COSTS = StepCosts(prefill_step=0.5, prefill_token=0.25, tick=2.0)
GROUPS = (range(1), range(1, 4))
PAGE = LAYOUT.page_bytes


class Setup:
    """A prefill mesh and two decode meshes; a link moves a page a second and has no latency."""

    def __init__(self, costs: StepCosts = COSTS, link: Link | None = None) -> None:
        self.clock = VirtualClock()
        self.meshes = {pool: SimMesh(self.clock, pool, LAYOUT, 100) for pool in (P, D, E)}
        self.transport = SimTransport(
            self.clock,
            self.meshes.values(),
            write_seconds=0.5,
            link=link or Link(bandwidth=PAGE, latency=0.0),
        )
        self.prefill = self.engine("prefill/0", P, StepKind.PREFILL, costs=costs)
        self.decode = self.engine("decode/0", D, StepKind.DECODE, costs=costs, rows=4)

    def engine(self, name, pool, *accepts, **options):
        return SimEngine(
            EngineId(name),
            self.meshes[pool],
            self.transport,
            accepts=accepts,
            layer_groups=GROUPS,
            **options,
        )


def test_steps_run_one_after_another():
    setup = Setup()
    first = setup.prefill.submit(PrefillStep(prefill_batch([3, 5])))
    second = setup.prefill.submit(PrefillStep(prefill_batch([2])))
    assert (first.moment, second.moment) == (0.5 + 8 / 4, 2.5 + 0.5 + 2 / 4)
    setup.clock.advance_to(10.0)
    assert setup.prefill.submit(PrefillStep(prefill_batch([2]))).moment == 11.0
    assert setup.meshes[P].busy == 4.5


def test_engines_of_different_meshes_do_not_wait_for_each_other():
    setup = Setup()
    assert setup.prefill.submit(PrefillStep(prefill_batch([4]))).moment == 1.5
    ticks = [setup.decode.submit(DecodeStep(decode_batch([[0, -1, 3, 4]]))) for _ in range(2)]
    assert [tick.moment for tick in ticks] == [2.0, 4.0]


def test_engines_of_one_mesh_wait_for_each_other():
    setup = Setup()
    both = setup.engine("prefill/1", D, StepKind.PREFILL, costs=COSTS)
    assert both.pool == setup.decode.pool
    assert setup.decode.submit(DecodeStep(decode_batch([[0] * 4]))).moment == 2.0
    assert both.submit(PrefillStep(prefill_batch([2]))).moment == 3.0
    assert setup.decode.submit(DecodeStep(decode_batch([[0] * 4]))).moment == 5.0


def test_rows_and_kv_cost_what_they_are_said_to():
    costs = StepCosts(
        prefill_token=1.0, prefill_kv_token=0.5, tick=1.0, tick_row=10.0, tick_kv_token=100.0
    )
    assert costs.prefill_seconds(prefill_batch([2], before=[6])) == 2 + 8 / 2
    assert costs.tick_seconds(decode_batch([[0, -1, 3, -1]])) == 1 + 2 * 10 + 5 * 100
    assert costs.tick_seconds(decode_batch([[0, -1], [3, 4]])) == 1 + (3 * 10 + 10 * 100) / 2
    assert costs.tick_seconds(decode_batch([[-1, -1]])) == 1


def test_a_result_that_is_waited_for_moves_the_clock():
    setup = Setup()
    ticket = setup.decode.submit(DecodeStep(decode_batch([[0] * 4])))
    assert not ticket.ready()
    outcome = ticket.result()
    assert setup.clock.now() == 2.0 and ticket.ready()
    assert ticket.result() is outcome


def test_a_token_is_a_function_of_seed_and_position():
    setup = Setup()
    prefilled = setup.prefill.submit(PrefillStep(prefill_batch([3, 5], seeds=[7, 9]))).result()
    chunked = setup.prefill.submit(PrefillStep(prefill_batch([1], seeds=[9], before=[4]))).result()
    assert prefilled.tokens[1] == chunked.tokens[0]
    decoded = setup.decode.submit(
        DecodeStep(decode_batch([[5, 2, 4, -1]], seeds=[1, 2, 9, 0]))
    ).result()
    assert decoded.tokens[2] == prefilled.tokens[1], "the token at position 5 of seed 9"
    assert decoded.tokens.dtype == np.int32 and decoded.top_ids.shape == (4, 0)


def test_tokens_are_spread_over_the_vocabulary_without_the_end_token():
    seeds, positions = np.meshgrid(np.arange(50, dtype=np.uint32), np.arange(200))
    tokens = token_at(seeds.ravel(), positions.ravel(), vocab_size=11)
    counts = np.bincount(tokens, minlength=11)
    assert counts[0] == 0 and len(counts) == 11
    assert (abs(counts[1:] - 1000) < 150).all()


def test_tokens_of_a_prompt_are_as_likely_as_any_others():
    batch = replace(prefill_batch([3]), scored=ScoreBatch(np.array([0, 1]), np.array([5, 9])))
    sampled = Setup().prefill.submit(PrefillStep(batch)).result()
    assert sampled.scores is not None
    assert sampled.scores.chosen.tolist() == [sampled.chosen_logprobs[0]] * 2
    assert sampled.scores.top_ids.shape == (2, 0)


def test_what_a_layer_group_exports_leaves_when_that_group_is_computed():
    setup = Setup()
    first = (job(1, P, D, 8, range(1)),)
    second = (job(2, P, D, 8, range(1, 4)), job(3, P, E, 4, range(3, 4)))
    step = setup.prefill.submit(PrefillStep(prefill_batch([14]), (first, second)))
    # The step takes 4 s: 1 s for the layer of the first group, 3 s for those of the second. Job 1
    # has its link from 1 to 3; job 2 from 4 to 10; job 3 has a link of its own, from 4 to 5.
    assert step.moment == 4.0
    moments = {number: ticket.moment for number, ticket in step.exports.items()}
    assert moments == {1: 3.0, 2: 10.0, 3: 5.0}
    assert [step.exports[number].read.moment for number in (1, 2, 3)] == [1.0, 4.0, 4.0]
    assert step.exports[1].result().bytes == 2 * PAGE
    assert step.exports[2].result().pages == 8


def test_a_link_takes_one_transfer_at_a_time():
    setup = Setup(link=Link(bandwidth=PAGE, latency=0.25))
    first = setup.transport.send(job(1, P, D, 2))
    second = setup.transport.send(job(2, P, D, 1))
    other, back = setup.transport.send(job(3, P, E, 1)), setup.transport.send(job(4, D, P, 1))
    assert [first.moment, second.moment] == [2.25, 2.25 + 1.25]
    assert [other.moment, back.moment] == [1.25, 1.25]
    assert setup.transport.measure(P, D, 2 * PAGE).result() == 2.25
    assert setup.clock.now() == 3.5 + 2.25, "behind what had been sent"


def test_a_transfer_reads_what_was_asked_before_it_and_nothing_later():
    setup = Setup()
    setup.prefill.submit(PrefillStep(prefill_batch([2])))
    ticket = setup.transport.send(job(1, P, D, 3))
    later = setup.prefill.submit(PrefillStep(prefill_batch([2])))
    assert (ticket.read.moment, ticket.moment, later.moment) == (1.0, 4.0, 2.0)


def test_what_has_arrived_is_written_by_the_mesh_of_the_target():
    setup = Setup()
    setup.transport.send(job(1, P, D, 2))
    pages = np.array([4, 5], np.int32)
    setup.clock.advance_to(2.0)
    with pytest.raises(ValueError, match="target_pages: hold 16 tokens, but job 1 brings 32"):
        setup.transport.write(1, pages[:1])
    tick = setup.decode.submit(DecodeStep(decode_batch([[0] * 4])))
    written = setup.transport.write(1, pages)
    assert (tick.moment, written.moment, written.result()) == (4.0, 4.5, 0)
    with pytest.raises(ValueError, match="job_id=1: no transfer job"):
        setup.transport.write(1, pages)


def test_what_has_not_arrived_is_waited_for_by_the_mesh_of_the_target():
    setup = Setup()
    step = setup.prefill.submit(PrefillStep(prefill_batch([2])))
    setup.transport.send(job(1, P, D, 2))
    assert setup.transport.writes_ahead(P, D) and step.made
    written = setup.transport.write(1, np.array([4, 5], np.int32))
    assert (step.moment, written.moment) == (1.0, 3.5)
    later = setup.prefill.submit(PrefillStep(prefill_batch([6])))
    setup.decode.feed(0, later, 0)
    tick = setup.decode.submit(DecodeStep(decode_batch([[0] * 4])))
    assert tick.moment == max(written.moment, later.moment) + 2.0 and setup.clock.now() == 0.0
    with pytest.raises(ValueError, match=r"row=9: must be in \[0, "):
        setup.decode.feed(9, later, 0)


def test_a_job_that_is_cancelled_is_forgotten_and_its_link_is_not_freed():
    setup = Setup()
    setup.transport.send(job(1, P, D, 2))
    setup.transport.cancel(1)
    setup.transport.cancel(77)
    assert setup.transport.send(job(1, P, D, 1)).moment == 3.0
    with pytest.raises(ValueError, match="id=1: a transfer job of this id is on its way"):
        setup.transport.send(job(1, P, D, 1))


def test_links_may_differ_and_may_be_missing():
    clock = VirtualClock()
    meshes = [SimMesh(clock, pool, LAYOUT, 10) for pool in (P, D, E)]
    links = {(P, D): Link(bandwidth=2 * PAGE, latency=1.0)}
    transport = SimTransport(clock, meshes, link=None, links=links)
    assert transport.send(job(1, P, D, 2)).moment == 2.0
    assert transport.connects(P, D) and not transport.connects(D, P)
    with pytest.raises(ValueError, match="no link connects"):
        transport.send(job(2, D, P, 1))
    anywhere = SimTransport(clock, meshes)
    assert anywhere.connects(D, E) and not anywhere.connects(D, D)
    assert not anywhere.connects(P, PoolId("disk/0"))


def test_a_lost_mesh_fails_what_is_in_flight_and_nothing_else():
    setup = Setup()
    done = setup.prefill.submit(PrefillStep(prefill_batch([2])))
    setup.clock.advance_to(1.0)
    running = setup.prefill.submit(
        PrefillStep(prefill_batch([14]), ((job(1, P, D, 4, range(1)),), ()))
    )
    late = setup.transport.send(job(2, P, E, 2))
    setup.clock.advance_to(2.5)  # the first group was read at 2.0, the second is being computed
    assert setup.prefill.losses == 0
    setup.prefill.lose()
    assert setup.prefill.losses == 1 and setup.decode.losses == 0
    assert not running.ready() and running.moment == 5.0, "it is found out when it comes back"
    with pytest.raises(MeshLost, match=r"hbm/prefill-0: lost at 2\.5"):
        running.result()
    for part in (late.read, late):
        with pytest.raises(MeshLost):
            part.result()
    assert done.result().tokens.shape == (1,)
    assert running.exports[1].result().pages == 4, "what has been read travels on"
    setup.clock.advance_to(20.0)
    with pytest.raises(MeshLost):
        setup.transport.write(2, np.array([1, 2], np.int32))
    assert setup.prefill.submit(PrefillStep(prefill_batch([2]))).result() is not None


def test_engines_of_a_lost_mesh_are_lost_together():
    setup = Setup()
    both = setup.engine("prefill/1", D, StepKind.PREFILL, costs=COSTS)
    setup.clock.advance_to(0.5)
    setup.transport.send(job(1, P, D, 1))
    setup.clock.advance_to(1.5)
    write = setup.transport.write(1, np.array([1], np.int32))
    both.lose()
    assert (both.losses, setup.decode.losses) == (1, 1)
    with pytest.raises(MeshLost):
        write.result()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda h: h.prefill.submit(DecodeStep(decode_batch([[0]]))), "allowed are prefill"),
        (lambda h: h.decode.set_history(4, np.zeros(3, np.int32)), r"row=4: must be in \[0, 4\)"),
        (lambda h: h.prefill.submit(PrefillStep(prefill_batch([1]), ((),))), "exports: of 1"),
        (
            lambda h: h.prefill.submit(
                PrefillStep(prefill_batch([1]), ((job(1, D, P, 1, range(1)),), ()))
            ),
            "reads hbm/decode-0; must be hbm/prefill-0",
        ),
        (
            lambda h: h.prefill.submit(
                PrefillStep(prefill_batch([1]), ((job(1, P, D, 1, range(2)),), ()))
            ),
            r"reads layers range\(0, 2\)",
        ),
        (lambda h: h.engine("x", P, StepKind.DECODE), "rows=0: must be a positive multiple"),
        (lambda h: h.engine("x", P, StepKind.PREFILL, rows=4), "rows=4"),
        (lambda h: h.engine("x", P, StepKind.PREFILL, vocab_size=1), "vocab_size=1"),
        (
            lambda h: SimEngine(
                EngineId("x"),
                h.meshes[P],
                h.transport,
                accepts={StepKind.PREFILL},
                layer_groups=(range(3),),
            ),
            "layer_groups",
        ),
        (lambda h: StepCosts(tick=-1.0), "tick=-1.0: must be a number of seconds"),
        (lambda h: Link(bandwidth=0.0), "bandwidth=0.0: must be more than 0"),
        (lambda h: Link(latency=-1.0), "latency=-1.0"),
        (
            lambda h: SimTransport(h.clock, [h.meshes[P], h.meshes[P]]),
            "two of them keep the pool hbm/prefill-0",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make(Setup())
