"""The examples, as their users start them; and the line that one of them changed, changed back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.adapters import torchrun

_EXAMPLES = Path(__file__).parents[2] / "examples"
_OURS = "bnlayer.adapters.torch.convert_sync_batchnorm(model)"
_THEIRS = "torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)"


def test_a_ddp_script_changes_one_line(tmp_path: Path) -> None:
    """ResNet-18 trains on two ranks, and its checkpoint is the plain model's."""
    ended = torchrun(2, _EXAMPLES / "torch_ddp" / "train.py", "--epochs=2", f"--save={tmp_path / 'saved.pt'}")
    assert ended.code == 0, ended.out + ended.err
    accuracies = [float(accuracy) for accuracy in re.findall(r"test accuracy ([0-9.]+)", ended.out)]
    assert len(accuracies) == 2
    assert accuracies[-1] > 0.6, ended.out
    assert "the plain model gives the same answers: True" in ended.out


def test_with_torchs_own_line_the_script_fails_on_a_cpu(tmp_path: Path) -> None:
    """What the adapter is for. A later torch may do without it: then this test says so."""
    text = (_EXAMPLES / "torch_ddp" / "train.py").read_text(encoding="utf-8")
    assert text.count(f"model = {_OURS}") == 1
    (tmp_path / "train.py").write_text(text.replace(f"model = {_OURS}", f"model = {_THEIRS}"), encoding="utf-8")
    (tmp_path / "resnet.py").write_bytes((_EXAMPLES / "torch_ddp" / "resnet.py").read_bytes())
    ended = torchrun(2, tmp_path / "train.py", "--epochs=1")
    assert ended.code != 0
    assert "SyncBatchNorm layers only work with GPU modules" in ended.err


@pytest.mark.parametrize("ranks", [1, 2])
def test_observations_are_normalized_as_by_one_process(ranks: int) -> None:
    """Bit for bit, through a restart."""
    ended = torchrun(ranks, _EXAMPLES / "normalize_observations.py")
    assert ended.code == 0, ended.out + ended.err
    assert ended.out.count("the same bits as in one process: True") == ranks


def test_the_readmes_script_runs(tmp_path: Path) -> None:
    """As it stands there."""
    readme = (_EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    code = re.search(r"## In torch.*?```python\n(.*?)```", readme, re.DOTALL)
    assert code is not None
    (tmp_path / "train.py").write_text(code[1], encoding="utf-8")
    ended = torchrun(2, tmp_path / "train.py")
    assert ended.code == 0, ended.out + ended.err
