import torch
from torch import nn

from lightning_accel.core.layout import even_layout
from lightning_accel.core.mesh import Mesh
from lightning_accel.core.parameter_memory import Gauge
from lightning_accel.core.placement import ROWS
from lightning_accel.core.pool import BufferPool
from lightning_accel.core.segment import Segment
from lightning_accel.core.unit import Unit


class Alone:
    """Collectives of a single rank: a unit sends nothing here."""

    rank, ranks = 0, 1
    device = torch.device("cpu")
    traffic = None
    phases = None


def make_unit(*shapes):
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    names = [f"p{i}" for i in range(len(shapes))]
    return Unit(
        "u", parameters, names, even_layout(shapes, 1), ROWS["ddp"], Mesh(Alone(), Alone()), BufferPool(), Gauge()
    )


def segments_of(unit, groups):
    return Segment.runs(unit, [(groups[p.slot], p) for p in unit.layout.pieces(*unit.part)])


def test_neighbours_of_one_group_are_one_segment():
    unit = make_unit((4, 4), (2, 8), (4,), (8,))
    decay, no_decay = segments_of(unit, [0, 0, 1, 1])
    assert (decay.start, decay.stop, decay.group) == (0, 32, 0)
    assert (no_decay.start, no_decay.stop, no_decay.group) == (32, 44, 1)


def test_a_segment_is_the_parameters_memory():
    unit = make_unit((4, 4), (2, 8))
    (segment,) = segments_of(unit, [0, 0])
    segment.tensor.fill_(7)
    assert all(bool((p == 7).all()) for p in unit.parameters)


def test_splitting_cuts_elementwise_state_and_copies_counts():
    unit = make_unit((4, 4), (2, 8), (16,))
    (segment,) = segments_of(unit, [0, 0, 0])
    momentum = torch.arange(48.0)
    state = {segment.tensor: {"exp_avg": momentum, "step": torch.tensor(3.0), "flag": True}}
    first, middle, last = segment.split([True, False, True], state)
    assert segment.tensor not in state
    assert torch.equal(state[middle.tensor]["exp_avg"], momentum[16:32])
    assert torch.equal(state[last.tensor]["exp_avg"], momentum[32:])
    state[first.tensor]["step"] += 1  # each part counts by itself from now on
    assert [state[s.tensor]["step"].item() for s in (first, middle, last)] == [4, 3, 3]
    assert state[last.tensor]["flag"] is True


def test_splitting_by_equal_labels_changes_nothing():
    unit = make_unit((4, 4), (2, 8))
    (segment,) = segments_of(unit, [0, 0])
    assert segment.split([True, True], {}) == [segment]


def test_a_whole_segment_has_the_parameters_shape():
    unit = make_unit((4, 4), (3,))
    piece = unit.layout.pieces(*unit.part)[0]
    assert Segment(unit, [piece], 0, whole=True).tensor.shape == (4, 4)
