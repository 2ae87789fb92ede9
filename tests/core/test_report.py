import json

from core.toys import Net, adamw, build, train
from lightning_accel.core import Engine


def reported():
    module = build(Net)
    engine = Engine(module, "zero2")
    optimizer = adamw(module.parameters())
    engine.add_optimizer(optimizer)
    engine.build()
    before = engine.report()
    train(engine, optimizer, 2)
    return before, engine.report()


def test_the_report_reads_well_and_is_plain_data(ranks2):
    before, after = ranks2.run(reported)[0]
    assert before.steps == 0
    assert before.at_rest["optimizer_state"] == 0
    assert before.bytes_sent == {}
    assert after.steps == 2
    text = str(after)
    for line in (
        "accel_zero2, rank 0 of 2, after 2 optimizer steps",
        "optimizer state",
        "reduce scatter",
        "all gather",
    ):
        assert line in text
    assert json.loads(json.dumps(after.to_dict()))["bytes_sent"] == after.bytes_sent
