"""The README's Python examples run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

# What the README takes for granted, and what it says comes next.
LIGHTNING = """
import lightning as L
from lightning.pytorch.demos.boring_classes import BoringModel
"""
WITHOUT = """
import sys
sys.modules["lightning"] = None  # the engine does without
"""
BATCHES = """
import torch
batches = [(torch.randn(4, 32), torch.randn(4, 2)) for _ in range(3)]
"""
BEFORE = LIGHTNING + BATCHES
FIT = """
trainer.callbacks += [Report()] if "Report" in globals() else []
trainer.fit(BoringModel())
"""
MODEL = """
model = torch.nn.Linear(32, 2)
optimizer = torch.optim.AdamW(model.parameters())
"""


def block(marker: str) -> str:
    (found,) = [text for text in BLOCKS if marker in text]
    return found


def run(tmp_path: Path, *parts: str, before: str = BEFORE, launcher: tuple[str, ...] = ()) -> str:
    script = tmp_path / "readme.py"
    body = "\n".join(parts).replace("\n", "\n    ")
    script.write_text(f"{before}\nif __name__ == '__main__':\n    {body}\n")
    done = subprocess.run(
        [sys.executable, *launcher, str(script)], capture_output=True, text=True, timeout=240, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_block_is_run_here():
    assert len(BLOCKS) == 12


def test_the_trainer(tmp_path):
    """The blocks that need a Trainer, one after another: to import Lightning takes longer than to run them."""
    printed = run(
        tmp_path,
        *(block('L.Trainer(strategy="accel_zero2"'), block("class Report"), FIT),
        *(block("EMAWeightAveraging("), FIT, "print(f'count: {average.state_dict()}\\n', end='')"),
        *(block("init_module"), "assert next(model.parameters()).is_meta\ntrainer.fit(model)"),
        "print(trainer.strategy.engine.row.name)",
        *(block("loss_weight=tokens"), FIT),
        "weighted = trainer.strategy.engine.optimizers[0].window.weighted",
        "print(f'weighted: {weighted}\\n', end='')",
        *(block("LossScaleMonitor"), FIT),
        "logged = trainer.callback_metrics['accel/skipped_steps']",
        "print(f'{trainer.precision} {logged == scaler.skipped_steps}\\n', end='')",
        *(block("AccelPrecision("), FIT),
        "print(f'policy: {trainer.precision}\\n', end='')",
        *(block("async_save=True"), FIT, "path = trainer.checkpoint_callback.best_model_path"),
        "from lightning_accel.core.checkpoint import load",
        "print(f'saved step: {load(path)[\"global_step\"]}\\n', end='')",
    )
    assert "accel_zero2, rank 0 of 2" in printed
    assert "count: {'latest_update_step': 32}" in printed
    assert "fsdp_hybrid" in printed
    assert "weighted: True" in printed
    assert "16-mixed True" in printed
    assert "policy: bf16-mixed" in printed
    assert "saved step: 32" in printed
    assert list((tmp_path / "optimizer_state").iterdir()) == []


def execute(source):
    exec(source, {"__name__": "__main__"})


def test_fabric(ranks2, capfd):
    """On ranks that are there already, as under torchrun: to start some takes far longer than the rest."""
    after = (
        "fabric.backward(model(batches[0][0]).sum())\noptimizer.step()\nprint(f'rank {fabric.global_rank}\\n', end='')"
    )
    ranks2.run(execute, "\n".join([BEFORE, MODEL, block("Fabric("), after]))
    assert sorted(capfd.readouterr().out.split("\n")) == ["", "rank 0", "rank 1"]


def test_the_engine_under_torchrun(tmp_path):
    start = "import torch.distributed as dist\ndist.init_process_group('gloo')"
    after = "print(f'steps: {engine.report().steps}\\n', end='')"  # in one piece: both ranks print
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    parts = (start, MODEL, block("Engine(model"), after)
    assert "steps: 3" in run(tmp_path, *parts, before=WITHOUT + BATCHES, launcher=torchrun)


def test_a_plan(tmp_path):
    """On what forward returns the loss of."""
    model = "class Model(torch.nn.Linear):\n    def forward(self, x):\n        return super().forward(x).mean()\n"
    found = {}
    text = block("lightning_accel.plan(").replace('"plan.png"', repr(str(tmp_path / "plan.png")))
    exec("import torch\n" + model + "model = Model(32, 2)\n" + text, found)
    assert found["plan"].ranks == 1024
    assert (tmp_path / "plan.png").exists()


def test_settings():
    found = {}
    exec(BEFORE + block("bucket_cap_mb=25"), found)
    assert found["strategy"].row.name == "zero2"


@pytest.mark.parametrize("path", re.findall(r"\]\(((?:examples|docs|tests|benchmarks)/[^)]*)\)", README))
def test_links_lead_somewhere(path):
    path, _, heading = path.partition("#")
    target = Path(__file__).parent.parent / path
    assert target.exists()
    if heading:
        headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
        assert heading in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings]
